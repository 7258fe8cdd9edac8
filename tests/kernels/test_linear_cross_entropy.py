"""The chunked loss against full logits in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels import linear_cross_entropy as module
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy


def oracle(hidden, head, targets):
    """Loss and gradients in float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    flat, at = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    logits = flat @ head.T
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.flatnonzero(at != -100)
    dlogits = np.zeros_like(logits)
    dlogits[rows] = probabilities[rows]
    dlogits[rows, at[rows]] -= 1
    return -np.log(probabilities[rows, at[rows]]).sum(), (dlogits @ head).reshape(hidden.shape), dlogits.T @ flat


def some(shape: tuple[int, ...], vocab: int = 50, masked: float = 0.3):
    rng = np.random.default_rng(0)
    targets = np.where(rng.random(shape) < masked, -100, rng.integers(0, vocab, shape)).astype(np.int32)
    return (
        rng.standard_normal((*shape, 8)).astype(np.float32),
        rng.standard_normal((vocab, 8)).astype(np.float32),
        targets,
    )


@pytest.mark.parametrize("chunk", [4, 7, 2048])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 16)])
def test_loss_and_gradients(shape, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    hidden, head, targets = some(shape)
    loss, gradients = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(
        *map(jnp.asarray, (hidden, head, targets))
    )
    expected, dhidden, dhead = oracle(hidden, head, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], dhidden, atol=1e-5)
    np.testing.assert_allclose(gradients[1], dhead, atol=1e-5)


def test_without_targets_everything_is_exactly_zero():
    hidden, head, targets = map(jnp.asarray, some((2, 9), masked=1.1))
    loss, gradients = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(hidden, head, targets)
    assert loss == 0
    assert all(jnp.all(gradient == 0) for gradient in gradients)


def test_a_float32_head_collects_its_gradient_in_float32(monkeypatch):
    # 64 chunks of bfloat16 hidden states: a sum carried in bfloat16 would be off by about sqrt(64) / 2^9 = 1.6 %.
    monkeypatch.setattr(module, "_CHUNK", 16)
    hidden, head, targets = map(jnp.asarray, some((1, 1024)))
    gradient = jax.grad(linear_cross_entropy, argnums=1)(hidden.astype(jnp.bfloat16), head, targets)
    exact = jax.grad(linear_cross_entropy, argnums=1)(
        hidden.astype(jnp.bfloat16).astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), targets
    )
    assert gradient.dtype == jnp.float32
    assert jnp.linalg.norm(gradient - exact) < 4e-3 * jnp.linalg.norm(exact)
