"""Compares RoPE, and RMSNorm with RoPE, with rotations of complex numbers in float64."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels import oracles
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly, quick_jit

from jaxpack.errors import InputError
from jaxpack.kernels import rope as module
from jaxpack.kernels.rope import Angles, Heads, apply_rope, norm_rope, rotary_angles

EPS = 1e-3  # large enough that a kernel without it fails

both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])


class Case(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rows: int
    length: int


CASES = {
    "one head, one token": Case(1, 1, 2, 2, rows=1, length=1),
    "head_dim 20": Case(6, 3, 20, 20, rows=2, length=24),
    "head_dim 20, partial": Case(3, 3, 20, 8, rows=2, length=7),
    "head_dim 64": Case(16, 8, 64, 64, rows=2, length=32),
    "7 query heads a key head": Case(7, 1, 64, 64, rows=1, length=211),
    "head_dim 80, partial": Case(6, 2, 80, 16, rows=2, length=22),
    "head_dim 96": Case(6, 2, 96, 96, rows=1, length=6),
    "head_dim 128": Case(4, 2, 128, 128, rows=1, length=8),
    "head_dim 256, partial": Case(2, 1, 256, 64, rows=1, length=8),
}
all_cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    q_scale: jax.Array
    k_scale: jax.Array
    angles: Angles
    dq: jax.Array
    dk: jax.Array


def inputs_of(case: Case, dtype) -> Inputs:
    rng = np.random.default_rng(0)
    B, T = case.rows, case.length
    q, dq = rng.standard_normal((2, B, T, case.heads, case.head_dim))
    k, dk = rng.standard_normal((2, B, T, case.kv_heads, case.head_dim))
    q_scale, k_scale = rng.uniform(0.5, 2, (2, case.head_dim))
    turns = rng.uniform(-4, 4, (B, T, case.rotary_dim // 2))
    angles = Angles(*(jnp.asarray(f(turns), jnp.float32) for f in (np.cos, np.sin)))
    q, k, q_scale, k_scale, dq, dk = (jnp.asarray(x, dtype) for x in (q, k, q_scale, k_scale, dq, dk))
    return Inputs(q, k, q_scale, k_scale, angles, dq, dk)


def rope_results(x: Inputs, implementation: str) -> dict[str, jax.Array]:
    return rope_and_gradients(functools.partial(apply_rope, implementation=implementation), x)


@functools.partial(quick_jit, static_argnums=0)
def rope_and_gradients(f: Callable, x: Inputs) -> dict[str, jax.Array]:
    out, pull = jax.vjp(lambda q, k: f(q, k, x.angles), x.q, x.k)
    return dict(zip(("q", "k", "dq", "dk"), (*out, *pull((x.dq, x.dk))), strict=True))


def rope_exactly(x: Inputs) -> dict[str, np.ndarray]:
    cos, sin = map(exactly, x.angles)
    return {
        "q": oracles.rope(exactly(x.q), cos, sin),
        "k": oracles.rope(exactly(x.k), cos, sin),
        "dq": oracles.rope_gradient(exactly(x.dq), cos, sin),
        "dk": oracles.rope_gradient(exactly(x.dk), cos, sin),
    }


NORM_RESULTS = ("q", "k", "dq", "dk", "dq_scale", "dk_scale")


def norm_rope_results(x: Inputs, implementation: str) -> dict[str, jax.Array]:
    return norm_rope_and_gradients(functools.partial(norm_rope, eps=EPS, implementation=implementation), x)


@functools.partial(quick_jit, static_argnums=0)
def norm_rope_and_gradients(f: Callable, x: Inputs) -> dict[str, jax.Array]:
    out, pull = jax.vjp(lambda *args: f(*args, x.angles), x.q, x.k, x.q_scale, x.k_scale)
    return dict(zip(NORM_RESULTS, (*out, *pull((x.dq, x.dk))), strict=True))


def norm_rope_exactly(x: Inputs) -> dict[str, np.ndarray]:
    cos, sin = map(exactly, x.angles)
    results = {}
    for name, heads, scale, d in (("q", x.q, x.q_scale, x.dq), ("k", x.k, x.k_scale, x.dk)):
        args = exactly(heads), exactly(scale), cos, sin, EPS
        results[name] = oracles.norm_rope(*args)
        results[f"d{name}"], results[f"d{name}_scale"] = oracles.norm_rope_gradients(*args, exactly(d))
    return results


def plain_rope(q: jax.Array, k: jax.Array, angles: Angles) -> tuple[jax.Array, jax.Array]:
    """Computes textbook RoPE, entirely in the dtype of `q` and `k`."""

    def turn(x: jax.Array) -> jax.Array:
        cos, sin = (jnp.concatenate([table, table], axis=-1)[:, :, None, :].astype(x.dtype) for table in angles)
        turning, rest = jnp.split(x, [cos.shape[-1]], axis=-1)
        first, second = jnp.split(turning, 2, axis=-1)
        return jnp.concatenate([turning * cos + jnp.concatenate([-second, first], axis=-1) * sin, rest], axis=-1)

    return turn(q), turn(k)


def plain_norm_rope(
    q: jax.Array, k: jax.Array, q_scale: jax.Array, k_scale: jax.Array, angles: Angles
) -> tuple[jax.Array, jax.Array]:
    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(EPS, x.dtype))
        return x / size * scale[None, None, None, :]

    return plain_rope(norm(q, q_scale), norm(k, k_scale), angles)


# Angles.


def test_angles_are_those_of_float32_positions_and_frequencies():
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 10_000, (2, 50)).astype(np.int32)
    frequencies = rng.random(8).astype(np.float32)
    exact = positions[..., None] * exactly(frequencies)
    angles = rotary_angles(jnp.asarray(positions), jnp.asarray(frequencies), scale=1.5)
    # An angle is rounded once, by up to 2^-24 relative; cosine, sine and scale add a few roundings of numbers near 1.
    allowed = 1.5 * (2**-24 * exact + 4 * 2**-24)
    assert angles.cos.dtype == angles.sin.dtype == jnp.float32
    assert np.all(np.abs(angles.cos - 1.5 * np.cos(exact)) <= allowed)
    assert np.all(np.abs(angles.sin - 1.5 * np.sin(exact)) <= allowed)


def test_position_257_is_not_256_in_bfloat16():
    angles = rotary_angles(jnp.array([[257]], jnp.int32), jnp.ones(1, jnp.bfloat16))
    np.testing.assert_allclose(angles.sin, np.sin(257), atol=1e-6)


# Results and gradients.


@pytest.mark.one_in(3)
@both_implementations
@all_cases
def test_rope_turns_pairs_and_its_gradient_turns_back(case, implementation):
    x = inputs_of(case, jnp.float32)
    got, want = rope_results(x, implementation), rope_exactly(x)
    for name in want:
        # Two products and a sum of numbers up to 5 have an error of up to 3 * 5 * 2^-24.
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(
            got[name][..., case.rotary_dim :], want[name][..., case.rotary_dim :], err_msg=f"{name}, not turned"
        )


@pytest.mark.one_in(3)
@both_implementations
@all_cases
def test_norm_rope_against_complex_numbers(case, implementation):
    x = inputs_of(case, jnp.float32)
    got, want = norm_rope_results(x, implementation), norm_rope_exactly(x)
    for name in want:
        # A result has about ten roundings of numbers up to 10. The gradient of a scale is a sum over all tokens and
        # heads, whose rounding errors grow like the square root of their number.
        terms = case.rows * case.length * case.heads if name.endswith("scale") else 1
        atol = 10 * 10 * 2**-24 * np.sqrt(terms)
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *(pytest.param(CASES[name], "pallas", id=name) for name in ("head_dim 20", "head_dim 80, partial")),
        *(
            pytest.param(CASES[name], "pallas", id=name, marks=pytest.mark.slow)
            for name in ("head_dim 64", "head_dim 128")
        ),
        pytest.param(CASES["head_dim 80, partial"], "xla", id="the reference"),
    ],
)
def test_bfloat16_is_rounded_once_and_as_good_as_plain_jnp(case, implementation):
    x = inputs_of(case, jnp.bfloat16)
    for got, plain, exact in (
        (rope_results(x, implementation), rope_and_gradients(plain_rope, x), rope_exactly(x)),
        (norm_rope_results(x, implementation), norm_rope_and_gradients(plain_norm_rope, x), norm_rope_exactly(x)),
    ):
        for name in exact:
            assert got[name].dtype == jnp.bfloat16
            assert_as_good_as_plain_bfloat16(got[name], plain[name], exact[name], name)
            # The result is a float32 number as above, rounded to 8 bits: half a unit in the last place.
            atol = 1e-4 if name.endswith("scale") else 1e-5
            np.testing.assert_allclose(exactly(got[name]), exact[name], rtol=2**-8, atol=atol, err_msg=name)


@both_implementations
def test_float32_scales_of_bfloat16_heads_get_float32_gradients(implementation):
    x = inputs_of(CASES["head_dim 64"], jnp.bfloat16)
    x = x._replace(q_scale=x.q_scale.astype(jnp.float32), k_scale=x.k_scale.astype(jnp.float32))
    got, want = norm_rope_results(x, implementation), norm_rope_exactly(x)
    for name in ("dq_scale", "dk_scale"):
        assert got[name].dtype == jnp.float32
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-4)


@both_implementations
def test_heads_of_zeros_stay_zeros(implementation):
    x = jax.tree.map(jnp.zeros_like, inputs_of(CASES["head_dim 20"], jnp.float32))
    for results in (rope_results(x, implementation), norm_rope_results(x, implementation)):
        for name, result in results.items():
            np.testing.assert_array_equal(result, 0, err_msg=name)


# Heads in one array, as a fused projection returns them.


@pytest.fixture
def fused() -> tuple[jax.Array, list[Heads], Inputs]:
    """Returns 4 query, 2 key and 2 value heads in one array, the heads to rotate, and the inputs they come from."""
    x = inputs_of(Case(4, 2, 16, 8, rows=2, length=6), jnp.float32)
    return jnp.concatenate([x.q, x.k, x.k + 1], axis=2), [Heads((0, 0), (0, 0), 4), Heads((0, 4), (0, 4), 2)], x


def test_rope_of_some_heads_leaves_the_others(fused):
    qkv, heads, x = fused
    q, k = (rope_results(x, "pallas")[name] for name in ("q", "k"))
    (turned,) = quick_jit(lambda qkv: module.rotate_heads([qkv], heads, x.angles))(qkv)
    np.testing.assert_allclose(turned[:, :, :6], jnp.concatenate([q, k], axis=2), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(turned[:, :, 6:], qkv[:, :, 6:])


def test_norm_rope_of_some_heads_and_its_gradient(fused):
    qkv, heads, x = fused
    apart = [Heads((0, 0), (0, 0), 4), Heads((0, 4), (1, 0), 2)]

    @quick_jit
    def run(qkv, gradient):
        scales = [x.q_scale, x.k_scale]
        out = module.norm_rotate_heads([qkv], scales, apart, [4, 2], x.angles, EPS)
        return out, module.norm_rotate_heads_backward([gradient], [qkv], scales, heads, x.angles, EPS)

    (q, k), ((d_qkv,), d_scales) = run(qkv, jnp.concatenate([x.dq, x.dk, x.dk + 1], axis=2))
    dq, dk, dv = jnp.split(d_qkv, [4, 6], axis=2)
    want = norm_rope_results(x, "pallas")
    for name, result in zip(NORM_RESULTS, (q, k, dq, dk, *d_scales), strict=True):
        # XLA adds in its own order, also in a kernel that it interprets.
        np.testing.assert_allclose(result, want[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(dv, x.dk + 1)


# Transformations and refusals.


@both_implementations
@pytest.mark.parametrize("results", [rope_results, norm_rope_results])
def test_jit_and_checkpoint_change_nothing(results, implementation):
    x = inputs_of(CASES["head_dim 80, partial"], jnp.float32)

    def loss(q, k, wrap):
        def both(q, k):
            if results is rope_results:
                return apply_rope(q, k, x.angles, implementation=implementation)
            return norm_rope(q, k, x.q_scale, x.k_scale, x.angles, eps=EPS, implementation=implementation)

        q, k = wrap(both)(q, k)
        return jnp.vdot(q, x.dq) + jnp.vdot(k, x.dk)

    want = results(x, implementation)
    got = quick_jit(jax.grad(functools.partial(loss, wrap=jax.checkpoint), argnums=(0, 1)))(x.q, x.k)
    for gradient, name in zip(got, ("dq", "dk"), strict=True):
        # Under jit, XLA may fuse a multiplication and an addition, which saves one rounding of numbers up to 10.
        np.testing.assert_allclose(gradient, want[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """Turns off the check of annotations, which only the tests have, so that errors are those a user sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def call(q=(1, 4, 2, 8), k=(1, 4, 1, 8), cos=(1, 4, 4), sin=None, scales=((8,), (8,)), dtypes=("float32", "float32")):
    q, k = jnp.ones(q, dtypes[0]), jnp.ones(k, dtypes[1])
    angles = Angles(jnp.ones(cos), jnp.ones(sin or cos))
    apply_rope(q, k, angles)
    norm_rope(q, k, *(jnp.ones(shape) for shape in scales), angles, eps=EPS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": (2, 4, 1, 8)}, r"`q` and `k` must agree .* got float32\[1, 4, 2, 8\] and float32\[2, 4, 1, 8\]"),
        ({"k": (1, 5, 1, 8)}, r"`q` and `k` must agree in rows, tokens"),
        ({"k": (1, 4, 1, 16)}, r"`q` and `k` must agree .*head_dim"),
        ({"dtypes": ("float32", "bfloat16")}, r"`q` and `k` must agree .*dtype, got float32.* and bfloat16"),
        ({"cos": (1, 5, 4)}, r"`angles` must hold two arrays of \[1, 4\] tokens, got \[1, 5, 4\] and \[1, 5, 4\]"),
        ({"sin": (1, 4, 2)}, r"`angles` must hold two arrays .* got \[1, 4, 4\] and \[1, 4, 2\]"),
        ({"cos": (1, 4, 5)}, r"`angles` must be at most head_dim / 2 = 4 wide, got 5"),
        ({"scales": ((4,), (8,))}, r"`q_scale` must have shape \(8,\), got \(4,\)"),
        ({"scales": ((8,), (1,))}, r"`k_scale` must have shape \(8,\), got \(1,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_refused(wrong, message):
    call()
    with pytest.raises(InputError, match=message):
        call(**wrong)
