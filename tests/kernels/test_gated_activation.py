"""Compares gated activations with float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracles import activate

from jaxpack.errors import InputError
from jaxpack.kernels.gated_activation import gated_activation, gated_activation_backward

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "clamped_silu")
IMPLEMENTATIONS = ("xla", "pallas")
SHAPES = [(1, 1), (2, 5, 12), (3, 7, 1), (4, 128), (1, 3, 640), (300, 19)]


def oracle(gate, up, d_out, activation):
    gate, up, d_out = (np.asarray(x, np.float64) for x in (gate, up, d_out))
    act, slope = activate(gate, activation)
    if activation == "clamped_silu":
        return act * (np.clip(up, -7, 7) + 1), d_out * (np.clip(up, -7, 7) + 1) * slope, d_out * act * (np.abs(up) < 7)
    return act * up, d_out * up * slope, d_out * act


def some(shape: tuple[int, ...], dtype=jnp.float32, spread: float = 3.0):
    return tuple((spread * jax.random.normal(jax.random.key(0), (3, *shape))).astype(dtype))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("together", [True, False], ids=["one array", "two arrays"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_and_backward(implementation, activation, shape, together):
    gate, up, d_out = some(shape)
    op = functools.partial(gated_activation, activation=activation, implementation=implementation)
    if together:
        out, pull = jax.vjp(op, jnp.concatenate([gate, up], axis=-1))
        d_gate, d_up = jnp.split(pull(d_out)[0], 2, axis=-1)
    else:
        out, pull = jax.vjp(op, gate, up)
        d_gate, d_up = pull(d_out)
    # XLA's derivative of the tanh form computes 1 - tanh^2, which cancels where it is under 1e-7; the error is relative
    # to the largest factor.
    atol = 1e-3 if (implementation, activation) == ("xla", "gelu_tanh") else 1e-5
    for name, got, want in zip(
        ("out", "d_gate", "d_up"), (out, d_gate, d_up), oracle(gate, up, d_out, activation), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize("together", [True, False], ids=["one array", "two arrays"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_backward_pass_writes_the_product_on_request(implementation, activation, together):
    gate, up, d_out = some((6, 40))
    inputs = (jnp.concatenate([gate, up], axis=-1), None) if together else (gate, up)
    op = functools.partial(
        gated_activation_backward, *inputs, d_out, activation=activation, implementation=implementation
    )
    *gradients, product = op(with_product=True)
    np.testing.assert_allclose(product, oracle(gate, up, d_out, activation)[0], rtol=1e-5, atol=1e-5)
    *without, nothing = op(with_product=False)
    assert nothing is None
    for got, want in zip(gradients, without, strict=True):
        assert (got is None) == (want is None) == (together and got is None)
        if got is not None:  # the same arithmetic, which a compiler may fuse in another way
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_tails_are_those_of_float64(activation):
    gate = jnp.concatenate([jnp.linspace(-30, 30, 4096), jnp.array([0.0, -0.0, 1e-20, -1e-20, 3e4, -3e4])])[None]
    ones = jnp.ones_like(gate)
    up = jnp.zeros_like(gate) if activation == "clamped_silu" else ones  # of which the factor is 1
    out = gated_activation(gate, up, activation=activation, implementation="pallas")
    want = activate(np.asarray(gate, np.float64), activation)[0]
    # The error function is exact to 1e-7 of 1 and, down to 1e-8, to 1e-7 of its own value.
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=2e-8)
    d_gate, _, _ = gated_activation_backward(gate, up, ones, activation=activation, implementation="pallas")
    assert jnp.all(jnp.isfinite(d_gate))
    np.testing.assert_allclose(d_gate, activate(np.asarray(gate, np.float64), activation)[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_as_good_as_plain_bfloat16(implementation, activation):
    gate, up, d_out = some((32, 64), jnp.bfloat16)
    in_plain_jnp = {
        "silu": lambda gate, up: gate * jax.nn.sigmoid(gate) * up,
        "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
        "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
        "clamped_silu": lambda gate, up: (
            jnp.minimum(gate, 7) * jax.nn.sigmoid(1.702 * jnp.minimum(gate, 7)) * (jnp.clip(up, -7, 7) + 1)
        ),
    }[activation]
    plain, pull = jax.vjp(in_plain_jnp, gate, up)
    plain = (plain, *pull(d_out))
    op = functools.partial(gated_activation, activation=activation, implementation=implementation)
    out, pull = jax.vjp(op, gate, up)
    for got, other, exact in zip((out, *pull(d_out)), plain, oracle(gate, up, d_out, activation), strict=True):
        assert got.dtype == jnp.bfloat16
        distance = [np.abs(np.asarray(x, np.float64) - exact).max() for x in (got, other)]
        assert distance[0] <= 2 * distance[1] + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gate=jnp.ones((2, 3))), "even number of channels.*got 3"),
        (dict(gate=jnp.ones((2, 4)), up=jnp.ones((2, 3))), r"same shape and dtype.*\[2, 4\].*\[2, 3\]"),
        (dict(gate=jnp.ones((2, 4)), up=jnp.ones((2, 4), jnp.bfloat16)), "same shape and dtype.*float32.*bfloat16"),
        (dict(gate=jnp.ones((2, 4)), activation="relu"), "`activation` must be one of silu.*got 'relu'"),
        (dict(gate=jnp.ones((2, 4)), implementation="triton"), "`implementation`.*got 'triton'"),
        (dict(gate=jnp.ones((2, 4), jnp.float8_e4m3fn)), "`gate`.*two bytes.*float8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(gated_activation)(**arguments)  # without the check of annotations


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"`d_out` must have shape \[2, 2\], got \[2, 4\]"):
        gated_activation_backward(jnp.ones((2, 4)), None, jnp.ones((2, 4)))
