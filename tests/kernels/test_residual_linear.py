"""Compares the projection that adds to the residual stream, gated or not, with the parts that it fuses."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly, quick_jit
from programs import equations

from jaxpack.errors import InputError
from jaxpack.kernels.gated_activation import gated_activation_reference
from jaxpack.kernels.residual_linear import gated_residual_linear, residual_linear

NAMES = ("out", "d_residual", "d_x", "d_weight", "d_a", "d_b")
both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])
ranks = pytest.mark.parametrize("rank", [None, 3, 16, 64], ids=lambda rank: f"rank {rank}")
activations = pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh", "gelu"], ids=str)


def inputs(activation, rank, dtype=jnp.float32, tokens=(2, 24), features=24, out=48):
    """Returns the arguments, and the gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = [
        (*tokens, out),
        (*tokens, features * (2 if activation else 1)),
        (out, features),
        *([(rank, features), (out, rank)] if rank else []),
        (*tokens, out),
    ]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def fused(activation, implementation):
    if activation is None:
        return functools.partial(residual_linear, implementation=implementation)
    return functools.partial(gated_residual_linear, activation=activation, implementation=implementation)


def parts(activation):
    def f(residual, x, weight, lora_a=None, lora_b=None):
        x = x if activation is None else gated_activation_reference(x, None, activation)
        return residual + x @ weight.T + (0 if lora_a is None else (x @ lora_a.T) @ lora_b.T)

    return f


def results(f, *inputs, d_out):
    @quick_jit
    def run(d_out, *inputs):
        out, pull = jax.vjp(f, *inputs)
        return out, *pull(d_out)

    return dict(zip(NAMES, run(d_out, *inputs), strict=False))


@pytest.mark.one_in(3)
@activations
@ranks
@both_implementations
def test_equals_its_parts(activation, rank, implementation):
    *given, d_out = inputs(activation, rank)
    got = results(fused(activation, implementation), *given, d_out=d_out)
    want = results(parts(activation), *given, d_out=d_out)
    assert got.keys() == want.keys()
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"], ids=str)
@pytest.mark.parametrize("rank", [None, 16], ids=lambda rank: f"rank {rank}")
@both_implementations
def test_without_a_residual_it_is_the_projection(activation, rank, implementation):
    (zero, *given), d_out = inputs(activation, rank)[:-1], inputs(activation, rank)[-1]
    got = results(functools.partial(fused(activation, implementation), None), *given, d_out=d_out)
    want = results(functools.partial(parts(activation), jnp.zeros_like(zero)), *given, d_out=d_out)
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-6 * scale, err_msg=name)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
@ranks
@both_implementations
def test_bfloat16_is_as_good_as_its_parts(activation, rank, implementation):
    *given, d_out = inputs(activation, rank, jnp.bfloat16, tokens=(4, 32))
    got = results(fused(activation, implementation), *given, d_out=d_out)
    plain = results(parts(activation), *given, d_out=d_out)
    exact = results(parts(activation), *(x.astype(jnp.float32) for x in given), d_out=d_out.astype(jnp.float32))
    for name in exact:
        assert_as_good_as_plain_bfloat16(got[name], plain[name], exactly(exact[name]), name)


@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
def test_tokens_and_channels_that_no_kernel_can_cut(activation):
    *given, d_out = inputs(activation, 5, tokens=(1, 7), features=10, out=6)
    got = results(fused(activation, None), *given, d_out=d_out)
    for name, want in results(parts(activation), *given, d_out=d_out).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@ranks
def test_the_product_is_not_kept_and_the_activation_runs_twice(rank):
    *given, d_out = inputs("silu", rank, tokens=(32,))
    _, pull = jax.vjp(fused("silu", "pallas"), *given)
    kept = {x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape") and x.ndim == 2 and len(x) == 32}
    between = {None: set(), 3: {(32, 16)}, 16: {(32, 16)}, 64: {(32, 64)}}[rank]  # the factors
    assert {shape for shape in kept if 0 not in shape} == {(32, 48)} | between  # gate and up

    def step(d_out, *given):
        out, pull = jax.vjp(fused("silu", "pallas"), *given)
        return out, pull(d_out)

    program = equations(jax.make_jaxpr(step)(d_out, *given).jaxpr)
    launches = {
        e.params["name"]: e.params["input_output_aliases"] for e in program if e.primitive.name == "pallas_call"
    }
    gated = {name: aliases for name, aliases in launches.items() if "gated" in name}
    assert gated == {"jaxpack_gated_silu": (), "jaxpack_gated_silu_backward": ((0, 0), (1, 1))}
    assert launches.keys() - gated.keys() == ({"jaxpack_add_extended", "jaxpack_append_lora_input"} if rank else set())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate_up": (3, 14)}, r"`gate_up` must have twice as many channels as `weight` has columns, 16, got 14"),
        ({"residual": (4, 5)}, r"`residual` must have shape \[3, 5\], got \[4, 5\]"),
        ({"lora_b": None}, r"`lora_a` and `lora_b` must be given both or neither, got one"),
        ({"lora_a": (2, 9)}, r"`lora_a` must have 8 columns, as `weight` has, got 9"),
        ({"lora_b": (5, 3)}, r"`lora_b` must have shape \(5, 2\)"),
        ({"gate_up": None, "x": (3, 9)}, r"`weight` must have 9 columns, as `x` has channels, got 8"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    shapes = {"residual": (3, 5), "gate_up": (3, 16), "weight": (5, 8), "lora_a": (2, 8), "lora_b": (5, 2)} | wrong
    f = residual_linear if "x" in wrong else gated_residual_linear
    if "x" in wrong:
        del shapes["gate_up"]
    with pytest.raises(InputError, match=message):
        f(**{name: None if shape is None else jnp.ones(shape) for name, shape in shapes.items()})
