"""Causal attention confined to segments: a token attends to the tokens of its own document at or before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MIN_CHUNK = 256  # float32 scores exist for this many queries of a row at a time,
_MAX_CHUNKS = 16  # or for a sixteenth of it: each chunk is a part of the program


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Softmax attention with scores `q k^T / sqrt(H)`, within segments and causal.

    Grouped queries: query head `n` reads key and value head `n // (N / K)`. Segment 0 is padding: it yields zeros.
    Scores and softmax are float32; the result has the dtype of `q`. What lies in another segment has weight exactly 0,
    so it cannot change a result in its last bit. The backward pass recomputes scores, a chunk of queries at a time.
    """
    T = q.shape[1]
    chunk = max(_MIN_CHUNK, -(-T // _MAX_CHUNKS))
    # Keys after a chunk are never attended to, so they are not read.
    outputs = [
        _attend(q[:, begin:end], k[:, :end], v[:, :end], segment_ids[:, begin:end], segment_ids[:, :end])
        for begin, end in ((begin, min(begin + chunk, T)) for begin in range(0, T, chunk))
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@jax.checkpoint
def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    allowed = (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments[:, :, None] > 0)
    causal = jnp.arange(S)[None, :] <= jnp.arange(S - T, S)[:, None]  # the queries are the last T of the S tokens
    allowed = (allowed & causal[None])[:, None, None, :, :]
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed, scores * H**-0.5, jnp.finfo(jnp.float32).min)
    weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0.0)  # a row of padding allows nothing
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)
