"""Compares the projection after a norm, with and without an adapter, with float64."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels import oracles
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly, quick_jit
from programs import equations

from jaxpack.errors import InputError
from jaxpack.kernels.normed_linear import normed_linear
from jaxpack.kernels.rms_norm import rms_norm_reference

EPS = 1e-3
ARGUMENTS = ("x", "scale", "weight", "lora_a", "lora_b")
# Tokens, input, output and rank. The first shape has no block of 16 by 16, so no kernel; ranks are padded to 2^n.
SHAPES = {
    "small": ((5,), 12, 40, 3),
    "rank 16": ((2, 24), 48, 20, 16),
    "rank 33": ((64,), 272, 24, 33),
    "rank 64": ((16,), 16, 16, 64),
    "no adapter": ((2, 32), 80, 96, None),
}
all_shapes = pytest.mark.parametrize(
    ("shape", "implementation"),
    [
        pytest.param(shape, implementation, id=f"{name}-{implementation}")
        for name, shape in SHAPES.items()
        for implementation in ("xla", None if name == "small" else "pallas")
    ],
)


def inputs(shape, dtype=jnp.float32):
    """Returns the arguments, and the gradients of both results."""
    tokens, I, O, R = shape  # noqa: E741
    rng = np.random.default_rng(0)
    factors = [] if R is None else [(R, I), (O, R)]
    shapes = [(*tokens, I), (I,), (O, I), *factors, (*tokens, I), (*tokens, O)]
    *arguments, d_x, d_out = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return arguments, (d_x, d_out)


def results(f, arguments, d):
    @quick_jit
    def run(arguments, d):
        out, pull = jax.vjp(f, *arguments)
        return out, pull(d)

    (x, out), gradients = run(arguments, d)
    return {"x": x, "out": out} | {f"d_{name}": y for name, y in zip(ARGUMENTS, gradients, strict=False)}


def exact_results(arguments, d):
    x, scale, weight, *factors = map(exactly, arguments)
    d_x, d_out = map(exactly, d)
    n = oracles.rms_norm(x, scale, EPS)
    flat_n, flat_d = n.reshape(-1, n.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    whole = weight + (factors[1] @ factors[0] if factors else 0)
    through, d_scale = oracles.rms_norm_gradients(x, scale, EPS, d_out @ whole)
    exact = {"x": x, "out": n @ whole.T, "d_x": d_x + through, "d_scale": d_scale, "d_weight": flat_d.T @ flat_n}
    if factors:
        a, b = factors
        exact |= {"d_lora_a": (flat_d @ b).T @ flat_n, "d_lora_b": flat_d.T @ (flat_n @ a.T)}
    return exact


def plain(x, scale, weight, lora_a=None, lora_b=None):
    """Computes the formula as written, in the dtype of `x`."""
    n = rms_norm_reference(x, scale, eps=EPS)
    return x, n @ weight.T + (0 if lora_a is None else (n @ lora_a.T) @ lora_b.T)


@all_shapes
def test_output_and_gradients(shape, implementation):
    arguments, d = inputs(shape)
    got = results(functools.partial(normed_linear, eps=EPS, implementation=implementation), arguments, d)
    want = exact_results(arguments, d)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=2e-6 * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.one_in(2)
@all_shapes
def test_bfloat16_is_as_good_as_plain_bfloat16(shape, implementation):
    arguments, d = inputs(shape, jnp.bfloat16)
    got = results(functools.partial(normed_linear, eps=EPS, implementation=implementation), arguments, d)
    other, want = results(plain, arguments, d), exact_results(arguments, d)
    for name in want:
        assert_as_good_as_plain_bfloat16(got[name], other[name], want[name], name)


def test_float32_factors_have_float32_gradients():
    (x, scale, weight, *factors), d = inputs(SHAPES["rank 16"], jnp.bfloat16)
    arguments = x, scale, weight, *(factor.astype(jnp.float32) for factor in factors)
    got = results(functools.partial(normed_linear, eps=EPS), arguments, d)
    assert got["d_lora_a"].dtype == got["d_lora_b"].dtype == jnp.float32
    assert got["out"].dtype == got["d_x"].dtype == got["d_scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize("trained", [False, True], ids=["frozen norm", "trained norm"])
def test_a_frozen_norm_has_no_gradient_computed(trained):
    (x, scale, weight, *factors), d = inputs(SHAPES["rank 16"])

    def run(x, scale, factors):
        def f(x, factors, trained_scale=scale):
            return normed_linear(x, trained_scale, weight, *factors, eps=EPS, implementation="pallas")

        out, pull = jax.vjp(f, x, factors, *([scale] if trained else []))
        return out, pull(d)

    program = equations(jax.make_jaxpr(run)(x, scale, factors).jaxpr)
    launches = {e.params["name"]: e for e in program if e.primitive.name == "pallas_call"}
    assert launches.keys() == {"jaxpack_norm_append_lora_input", "jaxpack_norm_append_lora_input_backward"}
    assert len(launches["jaxpack_norm_append_lora_input_backward"].outvars) == (2 if trained else 1)


def test_nothing_of_the_input_s_size_is_written_but_by_the_kernels():
    """The kernels do the norm, the narrow products and the residual's gradient, so XLA adds and joins nothing."""
    (x, scale, weight, *factors), d = inputs(SHAPES["rank 16"], jnp.bfloat16)

    def run(x, factors):
        out, pull = jax.vjp(
            lambda x, *factors: normed_linear(x, scale, weight, *factors, eps=EPS, implementation="pallas"), x, *factors
        )
        return out, pull(d)

    made = [
        equation.primitive.name
        for equation in jax.make_jaxpr(run)(x, factors).jaxpr.eqns
        for out in equation.outvars
        if out.aval.shape in {(2, 24, 48), (48, 48)}
    ]
    assert not {"add", "add_any", "mul", "concatenate", "convert_element_type"} & set(made)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (7,)}, r"`scale` must have shape \(8,\), got \(7,\)"),
        ({"weight": (5, 7)}, r"`weight` must have 8 columns, as `x` has channels, got 7"),
        ({"lora_b": None}, r"`lora_a` and `lora_b` must be given both or neither, got one"),
        ({"lora_a": (2, 9)}, r"`lora_a` must have 8 columns, as `weight` has, got 9"),
        ({"lora_b": (5, 3)}, r"`lora_b` must have shape \(5, 2\): rows of `weight`, rows of `lora_a`, got \(5, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    shapes = {"x": (3, 8), "scale": (8,), "weight": (5, 8), "lora_a": (2, 8), "lora_b": (5, 2)} | wrong
    arrays = {name: None if shape is None else jnp.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(InputError, match=message):
        normed_linear(**arrays, eps=EPS)
