"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), with a position for every token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(
    positions: Int[Array, "B T"], inverse_frequencies: Float[Array, " half"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of each token's angles, in float32: once per batch, for every layer.

    float32, because bfloat16 rounds position 257 to 256, and sin(257) is far from sin(256).
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies[None, None, :].astype(jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotates queries or keys by their positions: channel `i` is paired with `i + H/2`, the Hugging Face layout.

    `out[i] = x[i] cos - x[i + H/2] sin`, `out[i + H/2] = x[i + H/2] cos + x[i] sin`, computed in float32 and returned
    in the dtype of `x`. `half` is H / 2; `cos` and `sin` are those of `rotary_angles`.
    """
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
