"""Compares the chunked loss with full logits in float64."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels.cuda_lowering import lower_for_cuda
from kernels.oracles import quick_jit
from programs import equations

from jaxpack.errors import InputError
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy, token_losses


def oracle(hidden, head, targets, softcap=None):
    """Returns the losses of the tokens and the gradients of their sum, in float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    flat, at = hidden.reshape(-1, hidden.shape[-1]), np.asarray(targets).reshape(-1)
    logits = flat @ head.T
    slope = np.ones_like(logits)
    if softcap is not None:
        slope = 1 / np.cosh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.flatnonzero(at != -100)
    losses = np.zeros(len(flat))
    losses[rows] = -np.log(probabilities[rows, at[rows]])
    dlogits = np.zeros_like(logits)
    dlogits[rows] = probabilities[rows]
    dlogits[rows, at[rows]] -= 1
    dlogits *= slope
    return losses.reshape(targets.shape), (dlogits @ head).reshape(hidden.shape), dlogits.T @ flat


def some(shape: tuple[int, ...], vocab: int = 50, masked: float = 0.3):
    rng = np.random.default_rng(0)
    targets = np.where(rng.random(shape) < masked, -100, rng.integers(0, vocab, shape)).astype(np.int32)
    return (
        jnp.asarray(rng.standard_normal((*shape, 8)), jnp.float32),
        jnp.asarray(rng.standard_normal((vocab, 8)), jnp.float32),
        jnp.asarray(targets),
    )


SHAPES = [(1, 1), (2, 9), (3, 16), (130,)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [4, 7, 2048])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(shape, chunk, softcap):
    hidden, head, targets = some(shape)
    losses, dhidden, dhead = oracle(hidden, head, targets, softcap)
    for max_targets in (None, max(1, int((targets != -100).sum())), targets.size):

        def loss(hidden, head, max_targets=max_targets):
            options = {"softcap": softcap, "max_targets": max_targets, "chunk": chunk}
            return 3 * linear_cross_entropy(hidden, head, targets, **options)

        got, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
        np.testing.assert_allclose(got, 3 * losses.sum(), rtol=1e-5)
        np.testing.assert_allclose(gradients[0], 3 * dhidden, atol=2e-5)
        np.testing.assert_allclose(gradients[1], 3 * dhead, atol=5e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_of_tokens(shape, softcap):
    hidden, head, targets = some(shape)
    losses, dhidden, dhead = oracle(hidden, head, targets, softcap)
    got, pull = jax.vjp(lambda *args: token_losses(*args, targets, softcap=softcap, chunk=7), hidden, head)
    np.testing.assert_allclose(got, losses, rtol=1e-5, atol=1e-6)
    gradients = pull(jnp.ones_like(got))
    np.testing.assert_allclose(gradients[0], dhidden, atol=2e-5)
    np.testing.assert_allclose(gradients[1], dhead, atol=5e-5)


@pytest.mark.parametrize("max_targets", [None, 5])
def test_without_targets_everything_is_exactly_zero(max_targets):
    hidden, head, targets = some((2, 9), masked=1.1)
    loss, gradients = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(
        hidden, head, targets, max_targets=max_targets
    )
    assert loss == 0
    assert all(jnp.all(gradient == 0) for gradient in gradients)
    assert not np.any(token_losses(hidden, head, targets))


def test_more_targets_than_promised_make_the_loss_nan():
    hidden, head, targets = some((2, 9))
    count = int((targets != -100).sum())
    assert np.isfinite(linear_cross_entropy(hidden, head, targets, max_targets=count))
    assert np.isnan(linear_cross_entropy(hidden, head, targets, max_targets=count - 1))


@pytest.mark.parametrize("implementation", ["xla", "pallas", "tokens"])
def test_a_target_out_of_range_makes_the_loss_and_its_gradients_nan(implementation):
    hidden, head, targets = some((2, 9))

    def loss(hidden, head, targets):
        if implementation == "tokens":
            return jnp.sum(token_losses(hidden, head, targets))
        return linear_cross_entropy(hidden, head, targets, implementation=implementation)

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run(hidden, head, targets)))
    for wrong in (-1, -101, 50, 1000):
        total, (d_hidden, d_head) = run(hidden, head, targets.at[1, 4].set(wrong))
        assert np.isnan(total)
        assert np.all(np.isnan(d_hidden[1, 4]))
        assert np.all(np.isnan(d_head))
        assert np.all(np.isfinite(d_hidden.at[1, 4].set(0)))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_have_no_loss(shape):
    hidden, head, targets = some(shape)
    loss, gradients = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(hidden, head, targets, max_targets=4)
    assert loss == 0
    assert gradients[0].shape == hidden.shape
    assert np.all(gradients[1] == 0)
    assert token_losses(hidden, head, targets).shape == shape


def test_a_float32_head_collects_its_gradient_in_float32():
    # There are 64 chunks of bfloat16 hidden states; a bfloat16 sum would be off by about sqrt(64) / 2^9 = 1.6 %.
    in_chunks = functools.partial(linear_cross_entropy, chunk=16)
    hidden, head, targets = some((1, 1024))
    gradient = jax.grad(in_chunks, argnums=1)(hidden.astype(jnp.bfloat16), head, targets)
    exact = jax.grad(linear_cross_entropy, argnums=1)(
        hidden.astype(jnp.bfloat16).astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), targets
    )
    assert gradient.dtype == jnp.float32
    assert jnp.linalg.norm(gradient - exact) < 4e-3 * jnp.linalg.norm(exact)


# Matmuls and arrays, counted in the traced program.


@pytest.mark.parametrize(("argnums", "matmuls"), [((), 1), ((0,), 2), ((0, 1), 3)])
def test_no_matmul_more_than_is_needed(argnums, matmuls):
    hidden, head, targets = some((4, 2048))
    f = jax.value_and_grad(linear_cross_entropy, argnums=argnums) if argnums else linear_cross_entropy
    program = equations(jax.make_jaxpr(f)(hidden.astype(jnp.bfloat16), head, targets).jaxpr)
    dots = [equation for equation in program if equation.primitive.name == "dot_general"]
    assert len(dots) == matmuls
    for dot in dots:
        assert {x.aval.dtype for x in dot.invars} == {jnp.dtype(jnp.bfloat16)}
        assert dot.params["preferred_element_type"] == jnp.float32


def test_logits_exist_for_one_chunk_of_the_targets_only():
    hidden, head, targets = some((8, 2048), vocab=1000)
    program = jax.make_jaxpr(
        lambda hidden, head: jax.grad(linear_cross_entropy)(hidden, head, targets, max_targets=4096)
    )(hidden, head)
    made = [x.aval for equation in equations(program.jaxpr) for x in equation.outvars]
    with_vocab = {x.shape for x in made if 1000 in x.shape and x.ndim > 1 and x.shape != head.shape}
    assert with_vocab == {(1024, 1000), (1, 1000)}
    (length,) = {e.params["length"] for e in equations(program.jaxpr) if e.primitive.name == "scan"}
    assert length == 4


# Refusals.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": (2, 8)}, r"`targets` must have shape \[2, 9\], got \[2, 8\]"),
        ({"head": (50, 7)}, r"`head` must have 8 columns, as `hidden` has channels, got 7"),
        ({"softcap": 0.0}, r"`softcap` must be positive, got 0.0"),
        ({"softcap": float("nan")}, r"`softcap` must be positive, got nan"),
        ({"max_targets": 0}, r"`max_targets` must be positive, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user, without the tests' own check
    shapes = {"targets": (2, 9), "head": (50, 8)} | {name: x for name, x in wrong.items() if isinstance(x, tuple)}
    options = {name: x for name, x in wrong.items() if not isinstance(x, tuple)}
    head, targets = jnp.ones(shapes["head"]), jnp.zeros(shapes["targets"], jnp.int32)
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(jnp.ones((2, 9, 8)), head, targets, **options)


@pytest.mark.parametrize("f", [linear_cross_entropy, lambda *args: jnp.sum(token_losses(*args))], ids=["sum", "tokens"])
def test_a_gpu_gets_a_derivative(f):
    """The loss lowers with its gradients for a GPU, where the log-sum-exp differs from the one on a CPU."""
    hidden, head, targets = some((2, 64), vocab=50)
    lower_for_cuda(jax.value_and_grad(f, argnums=(0, 1)), hidden, head, targets)
