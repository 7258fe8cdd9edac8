"""The logarithm of a sum of exponentials over a long last axis, reading it once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.kernels._launch import Implementation, dispatch, launch, pl, powers_of_two

_PIECE = 4096  # of a row at a time
_NUM_WARPS = 8


def logsumexp(logits: Float[Array, "C V"], *, implementation: Implementation | None = None) -> Float[Array, " C"]:
    """`jax.nn.logsumexp` over the last axis, of float32. It has no derivative where Pallas computes it.

    XLA reads the logits for their maximum, and again for the sum.
    """
    return dispatch(implementation, xla=_reference, pallas=_kernel)(logits)


def _reference(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def _kernel(logits: jax.Array) -> jax.Array:
    C, V = logits.shape
    whole = V // _PIECE * _PIECE
    lowest = jnp.finfo(jnp.float32).min  # of an empty sum: -inf - -inf would be NaN

    def kernel(logits_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0)
        top, total = jnp.float32(lowest), jnp.float32(0)
        if whole:
            # Every lane has a maximum and a sum of its own: what they share is found once, at the end.
            def step(i: Any, lanes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                x = logits_ref[row, pl.ds(i * _PIECE, _PIECE)]
                highest = jnp.maximum(lanes[0], x)
                return highest, lanes[1] * jnp.exp(lanes[0] - highest) + jnp.exp(x - highest)

            empty = jnp.full(_PIECE, lowest, jnp.float32), jnp.zeros(_PIECE, jnp.float32)
            tops, totals = jax.lax.fori_loop(0, whole // _PIECE, step, empty)
            top = jnp.max(tops)
            total = jnp.sum(totals * jnp.exp(tops - top))
        for start, size in powers_of_two(V - whole, limit=_PIECE):
            x = logits_ref[row, pl.ds(whole + start, size)]
            highest = jnp.maximum(top, jnp.max(x))
            total = total * jnp.exp(top - highest) + jnp.sum(jnp.exp(x - highest))
            top = highest
        out_ref[row] = top + jnp.log(total)

    return launch(
        kernel,
        logits,
        name="logsumexp",
        grid=(C,),
        out_shape=jax.ShapeDtypeStruct((C,), jnp.float32),
        num_warps=_NUM_WARPS,
    )
