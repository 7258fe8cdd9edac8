"""Tests that label smoothing and z-loss are those of torch, with a head on the device and in the host's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.errors import InputError
from jaxpack.kernels import host_weight
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from jaxpack.kernels.weight import DenseWeight

torch = pytest.importorskip("torch")

V, D, T = 300, 16, 50


def losses_of_torch(hidden, head, targets, smoothing, z_loss, softcap):
    """Returns the sum of the losses, and its gradients by hidden states and head, in float64."""
    hidden, head = (torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in (hidden, head))
    logits, targets = hidden @ head.T, torch.tensor(np.asarray(targets), dtype=torch.int64)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    options = {"ignore_index": -100, "reduction": "sum", "label_smoothing": smoothing}
    loss = torch.nn.functional.cross_entropy(logits, targets, **options)
    loss = loss + z_loss * (torch.logsumexp(logits, -1)[targets != -100] ** 2).sum()
    loss.backward()
    return loss.item(), hidden.grad.numpy(), head.grad.numpy()


@pytest.mark.parametrize(("smoothing", "z_loss", "softcap"), [(0.1, 0.0, None), (0.0, 0.01, 3.0), (0.3, 0.01, 3.0)])
def test_losses_and_gradients_are_those_of_torch(smoothing, z_loss, softcap, monkeypatch):
    monkeypatch.setattr(host_weight, "_PIECE_BYTES", 128 * D * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    head, hidden = jax.random.normal(keys[0], (V, D)), jax.random.normal(keys[1], (T, D))
    targets = jax.random.randint(keys[2], (T,), 0, V).at[::5].set(-100)
    expected = losses_of_torch(hidden, head, targets, smoothing, z_loss, softcap)
    options = {"softcap": softcap, "chunk": 16, "label_smoothing": smoothing, "z_loss": z_loss}

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, targets, max_targets=45, **options)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    # Sums over 300 logits in float32, as in the tests of the plain loss.
    for got, want in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)
    hosted = HostMatrix.of(DenseWeight(head))
    assert len(hosted.pieces) > 1
    value, gradient = jax.jit(jax.value_and_grad(lambda hidden: loss(hidden, hosted)))(hidden)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(token_losses(hidden, head, targets, **options).sum(), expected[0], rtol=1e-5)


def test_wrong_coefficients_are_refused():
    arguments = jnp.ones((2, D)), jnp.ones((V, D)), jnp.zeros(2, jnp.int32)
    with pytest.raises(InputError, match=r"`label_smoothing` must be in \[0, 1\), got 1\.0"):
        linear_cross_entropy(*arguments, label_smoothing=1.0)
    with pytest.raises(InputError, match="`z_loss` must be 0 or a positive number, got nan"):
        linear_cross_entropy(*arguments, z_loss=float("nan"))
