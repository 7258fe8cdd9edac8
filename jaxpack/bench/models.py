"""Makes models without a checkpoint: with random weights, or with shapes only."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxpack.kernels.host_weight import HostMatrix, HostWeight
from jaxpack.kernels.weight import DenseWeight, Weight
from jaxpack.model.config import ModelConfig
from jaxpack.model.lora import add_lora
from jaxpack.model.shards import in_shards, one_of, put_in_shards
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import TRAINED, Store, freeze, store_dense
from jaxpack.parallel.host_memory import is_pinned, pinned_zeros
from jaxpack.parallel.placement import zeros_at
from jaxpack.settings import LoraConfig


def abstract_model(
    config: ModelConfig,
    lora: LoraConfig | None,
    dtype: DTypeLike = jnp.bfloat16,
    store: Store = store_dense,
) -> Transformer:
    """Makes a model with shapes but no arrays, for predictions. See `random_model` for the arguments."""

    def make() -> Transformer:
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))
        if lora is None:
            return model
        freeze(model, store)
        return add_lora(model, lora)

    return nnx.eval_shape(make)


def random_model(
    config: ModelConfig,
    lora: LoraConfig | None,
    dtype: DTypeLike = jnp.bfloat16,
    store: Store = store_dense,
    *,
    lazy: bool = False,
) -> Transformer:
    """Makes a model with random weights of a realistic size, and never holds a weight twice.

    Args:
      lora: the adapters; None for full fine-tuning.
      store: makes the frozen weights of a model with adapters from dense matrices.
      lazy: whether frozen weights are made only when they are needed, as `from_pretrained` reads them.
    """

    def fill(path: tuple, value: Any) -> Any:
        if isinstance(value, HostWeight | HostMatrix):
            return _filled_on_host(value)
        names = {getattr(key, "key", None) for key in path}
        if isinstance(value, Weight) and not isinstance(value, DenseWeight):
            return _filled(value)
        if "scale" in names:
            return jnp.ones(value.shape, value.dtype)
        if "lora_b" in names:
            return jnp.zeros(value.shape, value.dtype)
        return jax.tree.map(_noise_at, value)

    def fill_all(model: Transformer, kind: Any) -> None:
        state = nnx.state(model, kind)
        is_weight = lambda value: isinstance(value, Weight)  # noqa: E731
        nnx.update(model, jax.tree_util.tree_map_with_path(fill, state, is_leaf=is_weight))

    model = abstract_model(config, lora, dtype, store)
    fill_all(model, TRAINED)
    if lora is not None:
        model.pending = lambda model: fill_all(model, nnx.Not(TRAINED))
    if not lazy:
        model.read_weights()
    return model


def _filled(abstract: Weight) -> Weight:
    """Returns a weight that holds the same random matrix in each layer, written one layer at a time."""
    weight = zeros_at(abstract)
    if in_shards(weight):
        one = _filled(one_of(weight, 0))
        for layer in range(weight.shape[0]):
            weight = put_in_shards(weight, layer, one)
        return weight
    *layers, rows, columns = weight.shape
    matrix = _noise_at(jax.ShapeDtypeStruct((rows, columns), weight.dtype))
    write = jax.jit(lambda weight, start: weight.write(start, matrix), donate_argnums=0)
    for layer in range(math.prod(layers)):
        weight = write(weight, (layer, 0) if layers else (0,))
    return weight


def _filled_on_host(abstract: HostWeight | HostMatrix) -> Weight:
    """Returns a weight in the host's memory that holds the same random matrix in each layer, or in each piece."""

    def zero(leaf: Any) -> jax.Array:
        return pinned_zeros(leaf) if is_pinned(leaf) else jnp.zeros(leaf.shape, leaf.dtype)

    zeros = jax.tree.map(zero, abstract)
    if isinstance(zeros, HostMatrix):
        piece = np.asarray(_noise_at(jax.ShapeDtypeStruct(zeros.pieces.shape[1:], zeros.dtype)))
        for first in range(0, zeros.rows, len(piece)):
            zeros = zeros.write((first,), piece[: zeros.rows - first])
        return zeros
    one = jax.tree.map(_noise_at, zeros.one) if isinstance(zeros.one, DenseWeight) else _filled(zeros.one)
    one = jax.tree.map(np.asarray, one)
    for layer in range(zeros.shape[0]):
        zeros = zeros.put(layer, one)
    return jax.tree.map(jnp.asarray, zeros)


def _noise_at(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns noise that lies where an abstract array does."""
    return jax.jit(_noise, static_argnums=0, out_shardings=like.sharding)(like)


def _noise(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns normal noise of standard deviation 0.02: a hash of each index, in one pass without extra memory."""
    x = jax.lax.iota(jnp.uint32, math.prod(like.shape)) * jnp.uint32(2654435761)
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(73244475)
    return (0.02 * _normal(x)).astype(like.dtype).reshape(like.shape)


def _normal(bits: jax.Array) -> jax.Array:
    """Returns numbers of the normal distribution, float32 and finite, from uint32 numbers."""
    # float32 holds 23 bits and a half exactly. So neither end of the range, -1 or 1, is ever drawn.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1
    return jax.lax.erf_inv(uniform) * 2**0.5
