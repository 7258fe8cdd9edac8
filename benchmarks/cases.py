"""The shapes and length mixes that are measured."""

import csv
import dataclasses
from pathlib import Path

import numpy as np

from jaxpack.config import ModelConfig, RopeConfig


def qwen3(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, *, tied: bool) -> ModelConfig:
    """Qwen3 of a given size; the sizes share vocabulary, head_dim, key/value heads and rope."""
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151_936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        qk_norm=True,
        tie_word_embeddings=tied,
    )


MODELS = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
}


def documents(lengths_csv: Path, count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of random ids in [10, 100000) with lengths drawn from a histogram.

    The file has the columns `token_length_from`, `token_length_to` and `documents`: a bin is drawn in proportion to
    its documents, then a length uniformly within it.
    """
    with lengths_csv.open() as file:
        bins = [tuple(map(float, row.values())) for row in csv.DictReader(file)]
    low, high, weight = np.array(bins).T
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(bins), count, p=weight / weight.sum())
    lengths = np.maximum(2, rng.uniform(low[drawn], high[drawn]).astype(int))
    return [{"input_ids": rng.integers(10, 100_000, length).tolist()} for length in lengths]


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
    drawn = np.array([len(row["input_ids"]) for row in documents(lengths_csv, max(4, tokens // 16))])
    ends = np.cumsum(drawn)
    lengths = drawn[ends <= tokens].tolist()
    rest = tokens - sum(lengths)
    return [*lengths, rest] if rest else lengths


def causal_pairs(lengths: list[int]) -> int:
    """How many (query, key) pairs causal attention within documents has."""
    return sum(length * (length + 1) // 2 for length in lengths)
