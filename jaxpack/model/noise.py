"""Adds noise to embeddings in training (NEFTune, https://arxiv.org/abs/2310.05914)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

# Dropout splits a step's key into one for each layer, and key i of a split is also what folding i in gives. No model
# has this many layers.
_STREAM = 2**32 - 1


def add_noise(
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B T"],
    rows: UInt32[Array, " B"],
    key: Key[Array, ""],
    *,
    alpha: float,
) -> Float[Array, "B T D"]:
    """Returns `x` plus uniform noise of at most `alpha / sqrt(length * D)`; drawn and added in float32, rounded once.

    The length is that of a token's own document, so that a document in a packed row gets noise of the same size as
    alone. Padding gets none.

    Args:
      lengths: the number of tokens of each token's document; 0 or less for padding.
      rows: a number for each row, from which its draws follow, and from the key.
      key: the key of the optimizer step.
    """
    key = jax.random.fold_in(key, _STREAM)
    draw = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), x.shape[1:], minval=-1.0))
    size = jnp.where(lengths > 0, alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1) * jnp.float32(x.shape[2])), 0.0)
    return (x.astype(jnp.float32) + size[:, :, None] * draw(rows)).astype(x.dtype)
