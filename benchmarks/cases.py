"""Defines the shapes and length mixes at which kernels are measured."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxpack.data.synthetic import drawn_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """Holds the sizes of a model that kernels depend on; the default is Qwen3-4B."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    hidden_size: int = 2560
    rank: int = 16


KERNEL_TOKENS = (16_384, 2_048, 65_536)  # the bars are set for the first
MIXES = ("alpaca", "long")


def document_lengths(mix: str, tokens: int, lengths_csv: Path) -> list[int]:
    """Returns document lengths that fill one row: drawn from the histogram ("alpaca"), or four equal ones ("long")."""
    if mix == "long":
        return [tokens // 4] * 4
    drawn = drawn_lengths(lengths_csv, max(4, tokens // 16), np.random.default_rng(0))
    ends = np.cumsum(drawn)
    lengths = drawn[ends <= tokens].tolist()
    rest = tokens - sum(lengths)
    return [*lengths, rest] if rest else lengths


def causal_pairs(lengths: list[int]) -> int:
    """Counts the (query, key) pairs of causal attention within documents."""
    return sum(length * (length + 1) // 2 for length in lengths)
