"""Attention against float64 softmax, one document and one head at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels import attention as module
from jaxpack.kernels.attention import attention


def oracle(q, k, v, segment_ids, dout):
    """Output and gradients in float64, by a loop over rows, documents and query heads."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for segment in range(1, segment_ids[b].max() + 1):
            here = np.flatnonzero(segment_ids[b] == segment)
            for n in range(q.shape[2]):
                head = n // group
                scores = q[b, here, n] @ k[b, here, head].T / np.sqrt(q.shape[-1])
                scores[np.triu_indices(len(here), 1)] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[b, here, n] = weights @ v[b, here, head]
                dweights = dout[b, here, n] @ v[b, here, head].T
                dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True)) / np.sqrt(q.shape[-1])
                dq[b, here, n] = dscores @ k[b, here, head]
                dk[b, here, head] += dscores.T @ q[b, here, n]
                dv[b, here, head] += weights.T @ dout[b, here, n]
    return out, dq, dk, dv


def rows_of(*documents_per_row: list[int], length: int) -> np.ndarray:
    """Segment ids of rows with documents of the given lengths, and padding after them."""
    rows = [np.repeat(np.arange(1, len(lengths) + 1), lengths) for lengths in documents_per_row]
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)


@pytest.mark.parametrize("chunk", [8, 1024])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "segment_ids",
    [
        pytest.param(rows_of([5, 1, 9], [24], length=24), id="documents, padding, a full row"),
        pytest.param(rows_of([1] * 24, [], length=24), id="one-token documents, a row of padding"),
        pytest.param(rows_of([8, 8, 8], [7, 1, 16], length=24), id="on and beside chunk edges"),
    ],
)
def test_forward_and_backward(segment_ids, heads, kv_heads, chunk, monkeypatch):
    monkeypatch.setattr(module, "_MIN_CHUNK", chunk)
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, *segment_ids.shape, heads, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, *segment_ids.shape, kv_heads, 16)).astype(np.float32)
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, jnp.asarray(segment_ids)), *map(jnp.asarray, (q, k, v)))
    expected = oracle(q, k, v, segment_ids, dout)
    # Sums of 24 products of order 1, in float32.
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, *pull(jnp.asarray(dout))), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(np.asarray(got)[segment_ids == 0], 0, err_msg=f"padding of {name}")


def test_other_documents_do_not_reach_the_last_bit():
    segment_ids = jnp.asarray(rows_of([9, 12], length=24))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 24, 2, 16))
    here = (segment_ids == 2)[..., None, None]
    changed = [jnp.where(here, x, 100 * x + 1) for x in (q, k, v)]
    out, other = attention(q, k, v, segment_ids), attention(*changed, segment_ids)
    np.testing.assert_array_equal(jnp.where(here, out, 0), jnp.where(here, other, 0))
