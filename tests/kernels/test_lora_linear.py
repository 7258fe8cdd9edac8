"""The projection with its adapter, against the two summands in float64."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly

from jaxpack.errors import InputError
from jaxpack.kernels.lora_linear import lora_linear, lora_linear_reference

NAMES = ("out", "dx", "dweight", "da", "db", "dadapted")
SHAPES = {"wide": (12, 40, 3), "narrow": (40, 12, 3), "square": (16, 16, 8), "rank 1": (12, 40, 1)}
all_shapes = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
both_inputs = pytest.mark.parametrize("dropped", [False, True], ids=["one input", "dropped input"])


def inputs(shape, dropped, dtype=jnp.float32, tokens=(2, 7)):
    I, O, R = shape  # noqa: E741
    rng = np.random.default_rng(0)
    shapes = [(*tokens, I), (O, I), (R, I), (O, R), (*tokens, I) if dropped else None, (*tokens, O)]
    return [None if shape is None else jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def results(f, x, weight, a, b, adapted, d_out):
    out, pull = jax.vjp(f, x, weight, a, b, adapted)
    return {name: y for name, y in zip(NAMES, (out, *pull(d_out)), strict=True) if y is not None}


def exact_results(x, weight, a, b, adapted, d_out):
    x, weight, a, b, d_out = (exactly(y) for y in (x, weight, a, b, d_out))
    read = x if adapted is None else exactly(adapted)
    through = d_out @ b @ a
    flat = [y.reshape(-1, y.shape[-1]) for y in (d_out, x, read)]
    exact = {
        "out": x @ weight.T + read @ a.T @ b.T,
        "dx": d_out @ weight + (through if adapted is None else 0),
        "dweight": flat[0].T @ flat[1],
        "da": (flat[0] @ b).T @ flat[2],
        "db": flat[0].T @ (flat[2] @ a.T),
    }
    return exact if adapted is None else {**exact, "dadapted": through}


@all_shapes
@both_inputs
@pytest.mark.parametrize("f", [lora_linear, lora_linear_reference])
def test_output_and_gradients(shape, dropped, f):
    given = inputs(shape, dropped)
    got, want = results(f, *given), exact_results(*given)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-4, err_msg=name)


@all_shapes
@both_inputs
def test_bfloat16_is_as_good_as_the_two_summands(shape, dropped):
    given = inputs(shape, dropped, jnp.bfloat16, tokens=(4, 64))
    got, plain, want = results(lora_linear, *given), results(lora_linear_reference, *given), exact_results(*given)
    for name in want:
        assert_as_good_as_plain_bfloat16(got[name], plain[name], want[name], name)


def test_float32_factors_have_float32_gradients():
    x, weight, a, b, _, d_out = inputs(SHAPES["wide"], False, jnp.bfloat16, tokens=(64, 64))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    got, want = results(lora_linear, x, weight, a, b, None, d_out), exact_results(x, weight, a, b, None, d_out)
    assert got["da"].dtype == got["db"].dtype == jnp.float32
    assert got["out"].dtype == got["dx"].dtype == jnp.bfloat16
    # What is rounded is the narrow product, not the sum over 4,096 tokens.
    np.testing.assert_allclose(got["db"], want["db"], atol=2**-8 * np.abs(want["db"]).max())


@all_shapes
def test_no_sum_on_the_wide_side(shape):
    """Each array of the wide side's size is the result of a matmul or an argument: none is written to be added."""
    *given, _, d_out = inputs(shape, False)
    I, O, _ = shape  # noqa: E741

    def run(x, weight, a, b, d_out):  # the weight is frozen
        out, pull = jax.vjp(lambda x, a, b: lora_linear(x, weight, a, b), x, a, b)
        return out, pull(d_out)

    text = jax.jit(run).lower(*given, d_out).as_text()
    wide = f"tensor<2x7x{max(I, O)}xf32>"
    adds = [line for line in text.splitlines() if "stablehlo.add" in line and wide in line]
    assert len(adds) == (1 if I == O else 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": (5, 7)}, r"`weight` must have 8 columns, as `x` has channels, got 7"),
        ({"lora_a": (2, 9)}, r"`lora_a` must have 8 columns, as `weight` has, got 9"),
        ({"lora_b": (5, 3)}, r"`lora_b` must have shape \(5, 2\): rows of `weight`, rows of `lora_a`, got \(5, 3\)"),
        ({"adapted": (4, 8)}, r"`adapted` must have the shape of `x`, \[3, 8\], got \[4, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    shapes = {"x": (3, 8), "weight": (5, 8), "lora_a": (2, 8), "lora_b": (5, 2), "adapted": (3, 8)} | wrong
    with pytest.raises(InputError, match=message):
        lora_linear(**{name: jnp.ones(shape) for name, shape in shapes.items()})
