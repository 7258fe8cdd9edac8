"""The projection behind a gated activation, against its parts: activation, and projection with its adapter."""

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
from jaxpack.kernels.gated_linear import gated_linear
from jaxpack.kernels.lora_linear import lora_linear_reference

NAMES = ("out", "d_gate_up", "d_weight", "d_a", "d_b")
both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])
with_and_without = pytest.mark.parametrize("rank", [None, 3], ids=["no adapter", "adapter"])


def inputs(rank, dtype=jnp.float32, tokens=(2, 6), features=24, out=10):
    rng = np.random.default_rng(0)
    shapes = [
        (*tokens, 2 * features),
        (out, features),
        *([(rank, features), (out, rank)] if rank else []),
        (*tokens, out),
    ]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def parts(gate_up, weight, *factors, activation):
    product = gated_activation_reference(gate_up, None, activation)
    return lora_linear_reference(product, weight, *factors) if factors else product @ weight.astype(product.dtype).T


def results(f, *inputs, d_out):
    @quick_jit
    def run(d_out, *inputs):
        out, pull = jax.vjp(f, *inputs)
        return out, *pull(d_out)

    return dict(zip(NAMES, run(d_out, *inputs), strict=False))


@both_implementations
@with_and_without
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_equals_its_parts(implementation, rank, activation):
    *given, d_out = inputs(rank)
    fused = functools.partial(gated_linear, activation=activation, implementation=implementation)
    got = results(fused, *given, d_out=d_out)
    want = results(functools.partial(parts, activation=activation), *given, d_out=d_out)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-4, err_msg=name)


@both_implementations
@with_and_without
def test_bfloat16_is_as_good_as_its_parts(implementation, rank):
    *given, d_out = inputs(rank, jnp.bfloat16, tokens=(4, 32))
    got = results(functools.partial(gated_linear, implementation=implementation), *given, d_out=d_out)
    f = functools.partial(parts, activation="silu")
    plain = results(f, *given, d_out=d_out)
    wide = [x.astype(jnp.float32) for x in given]
    exact = results(f, *wide, d_out=d_out.astype(jnp.float32))
    for name in exact:
        assert_as_good_as_plain_bfloat16(got[name], plain[name], exactly(exact[name]), name)


@with_and_without
def test_the_product_is_not_kept_and_the_activation_runs_twice(rank):
    *given, d_out = inputs(rank, tokens=(5, 7))
    _, pull = jax.vjp(functools.partial(gated_linear, implementation="pallas"), *given)
    kept = {x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape") and x.ndim == 3}
    assert kept == {(5, 7, 48)} | ({(5, 7, rank)} if rank else set())  # gate and up, and what is between the factors

    def step(d_out, *given):
        out, pull = jax.vjp(functools.partial(gated_linear, implementation="pallas"), *given)
        return out, pull(d_out)

    program = equations(jax.make_jaxpr(step)(d_out, *given).jaxpr)
    launches = {e.params["name"] for e in program if e.primitive.name == "pallas_call"}
    assert launches == {"jaxpack_gated_silu", "jaxpack_gated_silu_backward"}
    in_place = {e.params["input_output_aliases"] for e in program if e.primitive.name == "pallas_call"}
    assert in_place == {(), ((0, 0),)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate_up": (3, 14)}, r"`gate_up` must have twice as many channels as `weight` has columns, 16, got 14"),
        ({"lora_b": None}, r"`lora_a` and `lora_b` must be given both or neither, got one"),
        ({"lora_a": (2, 9)}, r"`lora_a` must have 8 columns, as `weight` has, got 9"),
        ({"lora_b": (5, 3)}, r"`lora_b` must have shape \(5, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    shapes = {"gate_up": (3, 16), "weight": (5, 8), "lora_a": (2, 8), "lora_b": (5, 2)} | wrong
    with pytest.raises(InputError, match=message):
        gated_linear(**{name: None if shape is None else jnp.ones(shape) for name, shape in shapes.items()})
