"""Compares log-probabilities of targets, and their derivative, with full logits in float64."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from int8_weight import Int8Weight
from programs import equations

from jaxpack.errors import InputError
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.kernels.token_log_probs import token_log_probs, token_log_probs_reference, token_scores

V, D = 29, 12
SHAPES = [(1, 1), (2, 9), (3, 16), (130,)]


def draw(shape, seed=0):
    """Draws hidden states, a head, targets (about 30 % are -100) and a cotangent for each token."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(*shape, D)), rng.normal(size=(V, D))
    targets = np.where(rng.random(shape) < 0.3, -100, rng.integers(0, V, shape))
    arrays = (x.astype(np.float32) for x in (hidden, head, rng.normal(size=shape)))
    hidden, head, d = map(jnp.asarray, arrays)
    return hidden, head, jnp.asarray(targets, jnp.int32), d


def oracle(hidden, head, targets, d, softcap):
    """Returns the log-probabilities and the gradients of hidden states and head, in float64."""
    hidden, head, d = (np.asarray(x, np.float64) for x in (hidden, head, d))
    h, y, d = hidden.reshape(-1, D), np.asarray(targets).reshape(-1), d.reshape(-1)
    logits = h @ head.T
    slope = np.ones_like(logits)
    if softcap is not None:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    logits -= logits.max(axis=-1, keepdims=True)
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    there = y >= 0
    rows = np.arange(len(y))
    out = np.where(there, np.log(probs[rows, np.maximum(y, 0)]), 0)
    onehot = np.zeros_like(probs)
    onehot[rows[there], y[there]] = 1
    d_logits = d[:, None] * (onehot - probs) * slope * there[:, None]
    return out.reshape(targets.shape), (d_logits @ head).reshape(hidden.shape), d_logits.T @ h


@pytest.mark.one_in(4)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [7, 2048])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_gradients(shape, chunk, softcap):
    hidden, head, targets, d = draw(shape)
    want, d_hidden, d_head = oracle(hidden, head, targets, d, softcap)
    np.testing.assert_allclose(
        token_log_probs_reference(hidden, head, targets, softcap=softcap), want, rtol=1e-5, atol=1e-6
    )
    for max_targets in (None, max(1, int((targets != -100).sum())), targets.size):

        @jax.jit
        def run(hidden, head, max_targets=max_targets):
            f = functools.partial(token_log_probs, softcap=softcap, max_targets=max_targets, chunk=chunk)
            out, pull = jax.vjp(lambda *arrays: f(*arrays, targets), hidden, head)
            return out, pull(d)

        out, gradients = run(hidden, head)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradients[0], d_hidden, atol=2e-5)
        np.testing.assert_allclose(gradients[1], d_head, atol=5e-5)


def test_its_sum_is_the_loss_in_bfloat16_too():
    hidden, head, targets, _ = draw((64,))
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    summed = jax.value_and_grad(lambda h: -jnp.sum(token_log_probs(h, head, targets)))
    loss, gradient = jax.jit(summed)(hidden)
    want, want_gradient = jax.jit(jax.value_and_grad(lambda h: linear_cross_entropy(h, head, targets)))(hidden)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), want_gradient.astype(jnp.float32))


def matmuls(f, *arguments):
    found = equations(jax.make_jaxpr(f)(*arguments).jaxpr)
    return [e for e in found if e.primitive.name == "dot_general"]


def test_a_frozen_head_costs_as_many_matmuls_as_the_loss_and_logits_are_not_made_again():
    hidden, head, targets, _ = draw((64,))
    both = [
        matmuls(jax.value_and_grad(lambda h: jnp.sum(jnp.sin(token_log_probs(h, head, targets)))), hidden),
        matmuls(jax.value_and_grad(lambda h: linear_cross_entropy(h, head, targets)), hidden),
    ]
    assert len(both[0]) == len(both[1]) == 2
    assert len(matmuls(lambda h: token_log_probs(h, head, targets), hidden)) == 1


def test_logit_gradients_are_multiplied_in_the_dtype_of_the_hidden_states():
    hidden, head, targets, _ = draw((64,))
    f = jax.grad(lambda h, w: jnp.sum(jnp.sin(token_log_probs(h, w, targets))), argnums=(0, 1))
    found = matmuls(f, hidden.astype(jnp.bfloat16), head)
    assert len(found) == 4
    assert {variable.aval.dtype for e in found for variable in e.invars} == {jnp.dtype("bfloat16")}


def test_a_head_of_another_form_is_read_and_not_differentiated():
    hidden, head, targets, d = draw((40,))
    weight = Int8Weight.of(head)
    out, pull = jax.vjp(lambda h: token_log_probs(h, weight, targets), hidden)
    want, want_pull = jax.vjp(lambda h: token_log_probs(h, weight.dense(jnp.float32), targets), hidden)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(pull(d)[0], want_pull(d)[0])


def test_too_many_targets_and_targets_out_of_range_are_nan():
    hidden, head, targets, _ = draw((40,))
    assert jnp.isnan(token_log_probs(hidden, head, targets, max_targets=4)).all()
    wrong = targets.at[3].set(V)
    out = token_log_probs(hidden, head, wrong)
    assert jnp.isnan(out[3])
    assert jnp.isfinite(jnp.delete(out, 3)).all()
    assert jnp.isnan(jax.grad(lambda h: jnp.sum(token_log_probs(h, head, wrong)))(hidden)[3]).all()


def test_without_targets_all_is_zero():
    hidden, head, _, d = draw((40,))
    out, pull = jax.vjp(lambda *a: token_log_probs(*a, jnp.full(40, -100)), hidden, head)
    assert not out.any()
    assert not any(gradient.any() for gradient in pull(d))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores_are_losses_and_the_likeliest_tokens(softcap):
    hidden, head, targets, d = draw((3, 16))
    scores = jax.jit(functools.partial(token_scores, softcap=softcap, chunk=7))(hidden, head, targets)
    np.testing.assert_allclose(scores.losses, -oracle(hidden, head, targets, d, softcap)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores.predictions, jnp.argmax(hidden @ head.T, axis=-1))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"targets": jnp.zeros(3, jnp.int32)}, "`targets` must have shape"),
        ({"head": jnp.zeros((V, D + 1))}, "`head` must have 12 columns"),
        ({"softcap": -1.0}, "`softcap` must be positive"),
        ({"max_targets": 0}, "`max_targets` must be positive"),
    ],
)
def test_bad_arguments(changes, rule, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    hidden, head, targets, _ = draw((4,))
    with pytest.raises(InputError, match=rule):
        token_log_probs(**{"hidden": hidden, "head": head, "targets": targets} | changes)
