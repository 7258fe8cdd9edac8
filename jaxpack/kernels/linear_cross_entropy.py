"""Cross entropy from hidden states, without ever holding the logits of the whole batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpack.packing import IGNORE

_CHUNK = 2048  # tokens whose logits exist at a time: 1.2 GB in float32 for a vocabulary of 152k


def linear_cross_entropy(
    hidden: Float[Array, "*B T D"], head: Float[Array, "V D"], targets: Int[Array, "*B T"]
) -> Float[Array, ""]:
    """Sum over all targets of `logsumexp(head @ hidden) - (head @ hidden)[target]`, in float32.

    The head is used in the dtype of `hidden`; logits and sums are float32. A target of -100 contributes nothing, so a
    batch without targets has loss and gradients of exactly 0. The backward pass recomputes logits, chunk by chunk.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    # Chunks of equal size: the last may reach past the end, where there are no targets.
    num_chunks = -(-len(targets) // _CHUNK)
    size = -(-len(targets) // num_chunks)
    missing = num_chunks * size - len(targets)
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(num_chunks, size, -1)
    targets = jnp.pad(targets, (0, missing), constant_values=IGNORE).reshape(num_chunks, size)

    @jax.checkpoint
    def chunk_loss(total, chunk):
        hidden, targets = chunk
        # Cast inside the chunk: the gradient of a trainable float32 head then adds up in float32 over the chunks.
        logits = jnp.einsum("TD,VD->TV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(jnp.where(targets == IGNORE, 0.0, losses)), None

    total, _ = jax.lax.scan(chunk_loss, jnp.float32(0), (hidden, targets))
    return total
