"""Models and documents of the right size where there are none: named shapes, random weights, drawn lengths."""

import csv
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxpack.data.documents import Documents
from jaxpack.errors import InputError, reason
from jaxpack.model.config import ModelConfig, RopeConfig
from jaxpack.model.lora import add_lora
from jaxpack.model.transformer import Transformer
from jaxpack.settings import LoraConfig

_COLUMNS = ("token_length_from", "token_length_to", "documents")
_IDS = (10, 100_000)


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


SHAPES = {
    "tiny": qwen3(64, 128, 2, 8, tied=True),  # to try things on a CPU
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
}


def abstract_model(config: ModelConfig, lora: LoraConfig | None, dtype: DTypeLike = jnp.bfloat16) -> Transformer:
    """A model of the right shapes without arrays, for predictions."""

    def make() -> Transformer:
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))
        return model if lora is None else add_lora(model, lora)

    return nnx.eval_shape(make)


def random_model(config: ModelConfig, lora: LoraConfig | None, dtype: DTypeLike = jnp.bfloat16) -> Transformer:
    """A model of the right shapes with weights of the right size, made without holding any of them twice."""
    graph, state = nnx.split(abstract_model(config, lora, dtype))

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = {getattr(key, "key", None) for key in path}
        if "scale" in names:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "lora_b" in names:
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jax.jit(_noise, static_argnums=0)(leaf)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def _noise(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Uniform, of standard deviation 0.02: a hash of each index, in one pass that needs no memory but the result's."""
    x = jax.lax.iota(jnp.uint32, math.prod(like.shape)) * jnp.uint32(2654435761)
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(73244475)
    return ((x.astype(jnp.float32) * 2.0**-32 - 0.5) * (0.02 * 12**0.5)).astype(like.dtype).reshape(like.shape)


def drawn_lengths(histogram: Path, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """Lengths of documents, int64 `[count]`, drawn from a histogram; None draws as many as were counted for it.

    The file has the columns `token_length_from`, `token_length_to` and `documents`: a bin is drawn in proportion to
    its documents, then a length uniformly within it.
    """
    try:
        with histogram.open(newline="") as file:
            bins = [[float(row[name]) for name in _COLUMNS] for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"`lengths` must be a CSV file with numbers in the columns {', '.join(_COLUMNS)}, got {str(histogram)!r}: "
            f"{type(error).__name__} {reason(error)}."
        ) from error
    low, high, weight = np.array(bins or [[0, 0, 0]]).T
    if not (weight.min() >= 0 and weight.sum() > 0 and (low <= high).all()):
        raise InputError(f"`lengths` must have bins with documents in them, got none in {str(histogram)!r}.")
    drawn = rng.choice(len(bins), round(weight.sum()) if count is None else count, p=weight / weight.sum())
    return np.maximum(2, rng.uniform(low[drawn], high[drawn]).astype(int))


def drawn_documents(histogram: Path, count: int | None, *, vocab_size: int = _IDS[1], seed: int = 0) -> Documents:
    """Documents of random ids with lengths drawn from a histogram, trained on whole."""
    rng = np.random.default_rng(seed)
    lengths = drawn_lengths(histogram, count, rng)
    high = min(_IDS[1], vocab_size)
    tokens = rng.integers(min(_IDS[0], high - 1), high, lengths.sum()).astype(np.int32)
    return Documents(tokens, tokens, np.cumsum(lengths) - lengths, lengths)


def save_documents(path: Path, documents: Documents) -> None:
    """Writes documents for other processes to read, without pickles: an `.npz` of the fields."""
    np.savez(path, **{field.name: getattr(documents, field.name) for field in dataclasses.fields(Documents)})


def read_documents(path: Path) -> Documents:
    """What `save_documents` wrote."""
    with np.load(path) as arrays:
        return Documents(**{field.name: arrays[field.name] for field in dataclasses.fields(Documents)})
