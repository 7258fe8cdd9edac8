"""Tests that the loss with a head in host memory is the loss, whatever the pieces, the chunks and the targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels import host_weight
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.kernels.token_log_probs import token_log_probs, token_scores
from jaxpack.kernels.weight import DenseWeight

V, D, T = 300, 16, 50


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_weight, "_PIECE_BYTES", 128 * D * 2)


def some(seed: int = 0, scale: float = 1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    head, hidden = jax.random.normal(keys[0], (V, D)), scale * jax.random.normal(keys[1], (T, D))
    targets = jax.random.randint(keys[2], (T,), 0, V).at[::5].set(-100).at[1:3].set(jnp.array([0, V - 1]))
    return hidden, head, targets


def hosted(head: jax.Array) -> HostMatrix:
    made = HostMatrix.of(DenseWeight(head))
    assert len(made.pieces) > 1
    return made


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("chunk", "max_targets"), [(16, None), (1024, 45), (7, 45)])
def test_losses_and_gradients_are_those_of_a_head_on_the_device(softcap, chunk, max_targets):
    hidden, head, targets = some()
    options = {"softcap": softcap, "chunk": chunk, "max_targets": max_targets}

    def summed(hidden, head):
        return linear_cross_entropy(hidden, head, targets, **options)

    def weighed(hidden, head):  # each token with a factor of its own
        return jnp.sum(jnp.sin(jnp.arange(T)) * token_log_probs(hidden, head, targets, **options))

    for loss in (summed, weighed):
        value, gradient = jax.jit(jax.value_and_grad(loss))(hidden, hosted(head))
        want, want_gradient = jax.jit(jax.value_and_grad(loss))(hidden, head)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-5)


def test_scores_and_log_probs_without_a_gradient():
    hidden, head, targets = some()
    got, want = (token_scores(hidden, weight, targets) for weight in (hosted(head), head))
    np.testing.assert_array_equal(got.predictions, want.predictions)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    got, want = (token_log_probs(hidden, weight, targets) for weight in (hosted(head), head))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert not np.signbit(np.asarray(got[::5])).any()  # 0, and not -0, without a target


def test_a_token_that_is_nearly_certain_has_an_exact_gradient():
    """Tests in bfloat16, with a cap, where `p W[target] - W[target]` would lose most digits."""
    _, head, _ = some()
    head, targets, softcap = head.astype(jnp.bfloat16), np.arange(T), 30.0
    hidden = (1.2 * head[targets].astype(jnp.float32)).astype(jnp.bfloat16)

    def loss(hidden):
        return linear_cross_entropy(hidden, hosted(head), jnp.asarray(targets), softcap=softcap)

    gradient = np.asarray(jax.grad(loss)(hidden).astype(jnp.float32))
    exact_hidden, exact_head = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, head))
    tanh = np.tanh(exact_hidden @ exact_head.T / softcap)
    exponents = np.exp(softcap * (tanh - tanh.max(axis=1, keepdims=True)))
    probabilities, is_target = exponents / exponents.sum(axis=1, keepdims=True), np.arange(V) == targets[:, None]
    remainder = np.where(is_target, 0, probabilities).sum(axis=1, keepdims=True)  # 1 - p, with all of its digits
    want = (np.where(is_target, -remainder, probabilities) * (1 - tanh**2)) @ exact_head
    certain = (remainder[:, 0] < 1e-2) & (remainder[:, 0] > 1e-4)  # float32 has three digits of such a remainder
    assert certain.sum() > 5
    error = np.linalg.norm(gradient - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error[certain].max() < 0.03


@pytest.mark.parametrize("target", [V, V + 90, -1])
def test_a_target_out_of_range_makes_its_loss_nan_alone(target):
    hidden, head, targets = some()
    targets = targets.at[1].set(target)
    got = token_log_probs(hidden, hosted(head), targets)
    assert np.isnan(got[1])
    assert not np.isnan(np.delete(got, 1)).any()
    gradient = jax.grad(lambda hidden: linear_cross_entropy(hidden, hosted(head), targets))(hidden)
    assert np.isnan(gradient[1]).all()
    assert not np.isnan(np.delete(gradient, 1, axis=0)).any()


def test_more_targets_than_allowed_make_the_loss_nan():
    hidden, head, targets = some()
    assert np.isnan(linear_cross_entropy(hidden, hosted(head), targets, max_targets=3))
    assert np.isnan(token_log_probs(hidden, hosted(head), targets, max_targets=3)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_spoils_no_other(value):
    hidden, head, targets = some()
    spoiled = hidden.at[7].set(value)
    loss = lambda hidden: jnp.nansum(token_log_probs(hidden, hosted(head), targets))  # noqa: E731
    got, want = token_log_probs(spoiled, hosted(head), targets), token_log_probs(hidden, hosted(head), targets)
    assert np.isnan(got[7])
    np.testing.assert_array_equal(np.delete(got, 7), np.delete(want, 7))
    np.testing.assert_array_equal(
        np.delete(jax.grad(loss)(spoiled), 7, axis=0), np.delete(jax.grad(loss)(hidden), 7, axis=0)
    )
