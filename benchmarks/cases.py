"""The shapes and length mixes that kernels are measured at."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxpack.data.synthetic import drawn_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What the kernels see of a model: by default Qwen3-4B."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    hidden_size: int = 2560
    rank: int = 16


KERNEL_TOKENS = (16_384, 2_048, 65_536)  # the first is what bars are set for
MIXES = ("alpaca", "long")


def document_lengths(mix: str, tokens: int, lengths_csv: Path) -> list[int]:
    """Lengths of the documents that fill one row: drawn from the histogram ("alpaca"), or four equal ones ("long")."""
    if mix == "long":
        return [tokens // 4] * 4
    drawn = drawn_lengths(lengths_csv, max(4, tokens // 16), np.random.default_rng(0))
    ends = np.cumsum(drawn)
    lengths = drawn[ends <= tokens].tolist()
    rest = tokens - sum(lengths)
    return [*lengths, rest] if rest else lengths


def causal_pairs(lengths: list[int]) -> int:
    """How many (query, key) pairs causal attention within documents has."""
    return sum(length * (length + 1) // 2 for length in lengths)
