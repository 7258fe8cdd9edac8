"""Gated activations (https://arxiv.org/abs/2002.05202)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu(gate_up: Float[Array, "*B F2"]) -> Float[Array, "*B F"]:
    """`silu(gate) * up`, for `gate` and `up` side by side on the last axis: F2 = 2 F.

    Computed in float32, returned in the dtype of `gate_up`.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
