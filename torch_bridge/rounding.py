"""Rounds weights as a file holds them: to a dtype, or to the 8-bit blocks of GGUF."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Q8_0 = "q8_0"
Q8_0_BLOCK = 32  # neighbours in a row that share one scale


def dtype_of(written: str) -> str:
    """Returns the dtype that holds the values of a written form exactly before they are packed."""
    return "float32" if written == Q8_0 else written


def rounded(weight: Float[Array, "*O I"], written: str) -> Float[Array, "*O I"]:
    """Returns a weight with the values that a file gives back.

    In Q8_0, each block of 32 neighbours in a row is whole numbers from -127 to 127 times a scale in float16. Rows that
    are no multiple of 32 are float32 there.

    Args:
      written: a dtype, or "q8_0".
    """
    if written != Q8_0:
        return weight.astype(written)
    weight = weight.astype(jnp.float32)
    if weight.shape[-1] % Q8_0_BLOCK:
        return weight
    blocks = weight.reshape(*weight.shape[:-1], -1, Q8_0_BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    scaled = blocks * inverse
    codes = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5)  # half away from zero, as in llama.cpp
    return (codes * scale.astype(jnp.float16).astype(jnp.float32)).reshape(weight.shape)
