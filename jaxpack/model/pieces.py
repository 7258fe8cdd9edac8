"""Computes a part of a layer for some tokens at a time, so that its activations are never there for all of them.

The activations of a feed-forward take several times the memory of its input: 5.1 GB for the projections to gate and up
of 131,072 tokens of Qwen3-4B, and as much for their gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PIECE = 16_384  # tokens: enough for matmuls at their full rate, and so many that copies of weights cost little
_UNIT = 128  # The kernels take multiples of this.


def piece_of(num_tokens: int) -> int:
    """Returns the number of tokens in a piece; all of them if there are few."""
    count = num_pieces(num_tokens)
    return num_tokens if count == 1 else -(-num_tokens // (count * _UNIT)) * _UNIT


def num_pieces(num_tokens: int) -> int:
    """Returns the number of pieces: 1 up to two full pieces, because tokens in one piece need no second pass."""
    return 1 if num_tokens <= 2 * PIECE else -(-num_tokens // PIECE)


def in_pieces(
    part: Callable[[Float[Array, "1 P D"]], Float[Array, "1 P D"]], x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns `part(x)`, computed piece by piece, forward and backward. Each token must be computed by itself.

    The backward pass keeps `x` and computes everything else again, one piece at a time. Gradients of what `part` reads
    beside its input are added up over the pieces in the dtype that these arrays have.
    """
    B, T, D = x.shape
    size, count = piece_of(B * T), num_pieces(B * T)
    tokens = jnp.pad(x.reshape(B * T, D), ((0, count * size - B * T), (0, 0)))

    def step(_: None, piece: Float[Array, "P D"]) -> tuple[None, Float[Array, "P D"]]:
        return None, part(piece[None])[0]

    # Within a loop there is no forward pass to merge the recomputation with.
    step = jax.checkpoint(step, prevent_cse=False)
    _, out = jax.lax.scan(step, None, tokens.reshape(count, size, D))
    return out.reshape(count * size, D)[: B * T].reshape(B, T, D)
