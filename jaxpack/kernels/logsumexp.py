"""The logarithm of a sum of exponentials over a long last axis, reading it once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.constants import Implementation
from jaxpack.kernels._launch import dispatch, launch, pl, powers_of_two

_PIECE = 2048  # logits of a row in one piece
_PIECES = 4  # pieces at a time: sums are corrected for a higher maximum once for all of them
_NUM_WARPS = 8


def logsumexp(logits: Float[Array, "C V"], *, implementation: Implementation | None = None) -> Float[Array, " C"]:
    """Computes `jax.nn.logsumexp` over the last axis of float32 logits. The Pallas kernel has no derivative.

    XLA reads the logits twice, once for their maximum and once for the sum; the kernel reads them once.
    """
    return dispatch(implementation, xla=_reference, pallas=_kernel)(logits)


def _reference(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def _kernel(logits: jax.Array) -> jax.Array:
    C, V = logits.shape
    block = _PIECES * _PIECE
    whole = V // block * block
    lowest = jnp.finfo(jnp.float32).min  # maximum of an empty sum; not -inf, as -inf - -inf is NaN

    def kernel(logits_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0)
        top, total = jnp.float32(lowest), jnp.float32(0)
        if whole:
            # Every lane has a maximum and a sum of its own. They are combined once, at the end.
            def step(i: Any, lanes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                pieces = [logits_ref[row, pl.ds(i * block + j * _PIECE, _PIECE)] for j in range(_PIECES)]
                highest = functools.reduce(jnp.maximum, pieces, lanes[0])
                return highest, lanes[1] * jnp.exp(lanes[0] - highest) + sum(jnp.exp(x - highest) for x in pieces)

            empty = jnp.full(_PIECE, lowest, jnp.float32), jnp.zeros(_PIECE, jnp.float32)
            tops, totals = jax.lax.fori_loop(0, whole // block, step, empty)
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
