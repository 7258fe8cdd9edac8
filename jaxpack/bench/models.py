"""Makes models of the right shapes where there is no checkpoint, with random weights or without any."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxpack.model.config import ModelConfig
from jaxpack.model.lora import add_lora
from jaxpack.model.transformer import Transformer
from jaxpack.settings import LoraConfig


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
