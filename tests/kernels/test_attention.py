"""Compares attention with a float64 softmax, one document and one head at a time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels import oracles
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly, quick_jit, rows_of

from jaxpack.errors import InputError
from jaxpack.kernels import attention as module
from jaxpack.kernels.attention import Heads, SegmentBounds, attention, segment_bounds

both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])


class Case(NamedTuple):
    segment_ids: np.ndarray
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    sinks: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None
    d_out: jax.Array


def inputs_of(case: Case, dtype) -> Inputs:
    rng = np.random.default_rng(0)
    q, d_out = rng.standard_normal((2, *case.segment_ids.shape, case.heads, case.head_dim))
    k, v = rng.standard_normal((2, *case.segment_ids.shape, case.kv_heads, case.head_dim))
    sinks = rng.uniform(-1, 3, case.heads) if case.sinks else None
    return Inputs(*(x if x is None else jnp.asarray(x, dtype) for x in (q, k, v, sinks, d_out)))


def results_of(case: Case, x: Inputs, implementation: str | None) -> dict[str, jax.Array]:
    """Returns the output and the gradients of `attention`."""
    bounds = segment_bounds(jnp.asarray(case.segment_ids))
    f = functools.partial(attention, bounds=bounds, implementation=implementation, **case.options)
    return out_and_gradients(lambda q, k, v, sinks: f(q, k, v, sinks=sinks), x)


def out_and_gradients(f: Callable, x: Inputs) -> dict[str, jax.Array]:
    @quick_jit
    def run(q, k, v, sinks, d_out):
        out, pull = jax.vjp(f, q, k, v, sinks)
        return out, *pull(d_out)

    results = dict(zip(("out", "dq", "dk", "dv", "dsinks"), run(*x), strict=True))
    return {name: result for name, result in results.items() if result is not None}


def exact_results(case: Case, x: Inputs) -> dict[str, np.ndarray]:
    q, k, v, sinks, d_out = (None if array is None else exactly(array) for array in x)
    options = {name: value for name, value in case.options.items() if name != "max_segments"}
    return oracles.attention(q, k, v, case.segment_ids, sinks=sinks, d_out=d_out, **options)


def plain(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Computes textbook attention, a mask and `jax.nn.softmax`, entirely in the dtype of `q`."""
    group = case.heads // case.kv_heads
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    ids = case.segment_ids
    distance = np.arange(ids.shape[1])[:, None] - np.arange(ids.shape[1])[None, :]
    allowed = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None] & (distance >= 0)[None]
    allowed &= (distance < case.options.get("window", len(distance)))[None]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * jnp.asarray(case.options.get("scale", case.head_dim**-0.5), q.dtype)
    if softcap := case.options.get("softcap"):
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed[:, None], scores, jnp.asarray(-1e9, q.dtype))
    if sinks is not None:
        column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(allowed[:, None], weights, 0), v)


# 24 and 211 tokens are neither a power of two nor a multiple of the kernels' blocks of 32, 64 and 128.
SHORT = rows_of([5, 1, 9], [24], length=24)
MIXED = rows_of([64, 1, 7, 100, 30], [150, 40], length=211)

CASES = {
    "documents, padding, a full row": Case(SHORT),
    "one-token documents, a row of padding": Case(rows_of([1] * 24, [], length=24)),
    "ends on block edges, a full row": Case(rows_of([64, 32, 32], [128], length=128)),
    "one beside block edges": Case(rows_of([63, 1, 65, 127], [129, 1, 126], length=256)),
    "padding before, between and after": Case(rows_of([-3, 30, -70, 70, -5, 13], [-140, 50], length=211)),
    "one head": Case(MIXED, heads=1),
    "2 key heads of 2 query heads": Case(MIXED, heads=4, kv_heads=2),
    "2 key heads of 3 query heads": Case(MIXED, heads=6, kv_heads=2),
    "2 key heads of 7 query heads": Case(MIXED, heads=14, kv_heads=2),
    "head_dim 64": Case(SHORT, head_dim=64),
    "head_dim 80": Case(SHORT, head_dim=80),
    "head_dim 96": Case(SHORT, head_dim=96),
    "head_dim 128": Case(SHORT, head_dim=128),
    "head_dim 256": Case(SHORT, head_dim=256),
    "scale": Case(SHORT, options={"scale": 0.7}),
    "window of 1": Case(SHORT, options={"window": 1}),
    "window within documents": Case(MIXED, heads=3, options={"window": 37}),
    "window beyond documents": Case(MIXED, options={"window": 1000}),
    "softcap": Case(SHORT, options={"softcap": 1.5}),
    "sinks": Case(MIXED, heads=6, kv_heads=2, sinks=True),
    "sinks, a row of padding": Case(rows_of([20], [], length=24), sinks=True),
    "everything": Case(
        MIXED, 6, 2, 80, sinks=True, options={"scale": 0.3, "window": 50, "softcap": 2.0, "max_segments": 5}
    ),
}
all_cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def assert_exact(case: Case, got: dict[str, jax.Array], want: dict[str, np.ndarray]) -> None:
    """Asserts that results are as close as float32 allows, and exactly zero at padding."""
    assert got.keys() == want.keys()
    for name in want:
        # Up to 211 * 7 products of order 1 are added. Partial sums of up to 10 have rounding errors of 2^-24 each,
        # relative to the sum, which grow like the square root of their number, to 2e-5 at most.
        atol = 10 * 2**-24 * np.sqrt(case.segment_ids.size * case.heads // case.kv_heads)
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)
        if name != "dsinks":
            padding = np.asarray(got[name])[case.segment_ids == 0]
            np.testing.assert_array_equal(padding, 0, err_msg=f"{name} at padding")


@pytest.mark.one_in(4)
@both_implementations
@all_cases
def test_forward_and_backward(case, implementation):
    x = inputs_of(case, jnp.float32)
    assert_exact(case, results_of(case, x, implementation), exact_results(case, x))


def test_reference_in_chunks_of_queries(monkeypatch):
    monkeypatch.setattr(module, "_MIN_CHUNK", 64)
    case = CASES["everything"]
    x = inputs_of(case, jnp.float32)
    assert_exact(case, results_of(case, x, "xla"), exact_results(case, x))


BFLOAT16_CASES = {
    "2 key heads of 3 query heads": Case(MIXED, 6, 2, 64),
    # The kernel cuts 22 into 16, 4 and 2; the last two are narrower than a tensor core takes.
    "head_dim 22": Case(MIXED, 4, 2, 22),
    "head_dim 22, one long document": Case(rows_of([1024], length=1024), head_dim=22, options={"max_segments": 1}),
    "head_dim 72": Case(SHORT, head_dim=72),
    "head_dim 80": Case(SHORT, head_dim=80),
    "head_dim 128": Case(MIXED, head_dim=128),
    "head_dim 256": Case(SHORT, head_dim=256),
    "window, softcap, sinks": Case(MIXED, 2, 1, 96, sinks=True, options={"window": 50, "softcap": 2.0, "scale": 0.3}),
    "one long document": Case(rows_of([1000], [1024], length=1024), options={"max_segments": 1}),
}
_SOONER = {"head_dim 128", "window, softcap, sinks", "one long document"}  # the others run in `make test-slow`


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *(
            pytest.param(case, "pallas", id=name, marks=() if name in _SOONER else pytest.mark.slow)
            for name, case in BFLOAT16_CASES.items()
        ),
        pytest.param(BFLOAT16_CASES["window, softcap, sinks"], "xla", id="the reference, with options"),
        pytest.param(BFLOAT16_CASES["one long document"], "xla", id="the reference, long", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_as_good_as_plain_jnp(case, implementation):
    x = inputs_of(case, jnp.bfloat16)
    got, exact = results_of(case, x, implementation), exact_results(case, x)
    textbook = out_and_gradients(functools.partial(plain, case), x)
    for name in exact:
        assert got[name].dtype == jnp.bfloat16
        assert_as_good_as_plain_bfloat16(got[name], textbook[name], exact[name], name)


@both_implementations
def test_scores_of_bfloat16_are_float32(implementation):
    case = Case(MIXED, head_dim=64, options={"scale": 2.0})
    x = inputs_of(case, jnp.bfloat16)
    out, exact = results_of(case, x, implementation)["out"], exact_results(case, x)["out"]
    # Weights and output are rounded to 8 bits. In bfloat16, scores of 50 would be off by 0.1, and weights by a tenth.
    np.testing.assert_allclose(exactly(out), exact, rtol=0, atol=2 * 2**-8 * np.max(np.abs(exactly(x.v))))


def test_sums_of_bfloat16_are_float32():
    case = Case(rows_of([300, 84], length=384))
    x = inputs_of(case, jnp.bfloat16)
    x = x._replace(q=jnp.zeros_like(x.q))  # all weights are equal: the output is a mean, rounded once
    got, exact = results_of(case, x, "pallas"), exact_results(case, x)
    np.testing.assert_allclose(exactly(got["out"]), exact["out"], rtol=2**-8, atol=1e-6)


# Tiles.


def test_max_segments_selects_larger_tiles_for_long_documents():
    long, short = (module.plan(128, 2, 8192, max_segments) for max_segments in (8, 9))
    assert long.forward.split
    assert not short.forward.split
    assert module.plan(128, 2, 8192, None) == short


@pytest.mark.parametrize("max_segments", [None, 1], ids=["short documents", "long documents"])
@pytest.mark.parametrize(("heads", "window"), [pytest.param(1, None, marks=pytest.mark.slow), (3, 70)])
def test_tiles_of_bfloat16_in_float32(heads, window, max_segments, monkeypatch):
    # Some blocks of keys have no mask, and the last block is moved back; float32 shows one key too many or too few.
    plan = module.plan(16, 2, 1024, max_segments)
    assert plan.forward.split == (max_segments == 1)
    monkeypatch.setattr(module, "plan", lambda *_: plan)
    ids = rows_of([384], [300, 2, 82], [-20, 100, -30, 200], length=384)
    case = Case(ids, heads=heads, sinks=window == 70, options={"window": window})
    x = inputs_of(case, jnp.float32)
    assert_exact(case, results_of(case, x, "pallas"), exact_results(case, x))


@pytest.mark.parametrize(
    ("implementation", "length", "dtype"),
    [("pallas", 10_000, jnp.float32), ("pallas", 1_000, jnp.bfloat16), ("xla", 1_000, jnp.float32)],
)
def test_many_one_token_documents(implementation, length, dtype):
    case = Case(np.arange(1, length + 1, dtype=np.int32)[None], heads=1)
    x = inputs_of(case, dtype)
    got = results_of(case, x, implementation)
    np.testing.assert_array_equal(got["out"], x.v)
    # The backward pass recomputes scores of up to 20 in another order, so weights are 1 up to about 20 * 2^-24.
    for name, want in (("dv", exactly(x.d_out)), ("dq", 0), ("dk", 0)):
        np.testing.assert_allclose(exactly(got[name]), np.broadcast_to(want, x.v.shape), rtol=0, atol=1e-5)


# Separation of documents.


@both_implementations
@pytest.mark.parametrize("options", [{}, {"window": 7, "softcap": 2.0}], ids=["plain", "options"])
def test_other_documents_do_not_reach_the_last_bit(implementation, options):
    case = Case(rows_of([9, 12, 20, -1, 3], length=46), options=options)
    x = inputs_of(case, jnp.float32)
    here = jnp.asarray(case.segment_ids == 2)[..., None, None]
    changed = Inputs(*(None if a is None else jnp.where(here, a, 100 * a + 1) for a in x))
    got, other = (results_of(case, inputs, implementation) for inputs in (x, changed))
    for name in got:
        np.testing.assert_array_equal(jnp.where(here, got[name], 0), jnp.where(here, other[name], 0), err_msg=name)
        assert not np.array_equal(got[name], other[name])


@both_implementations
def test_a_document_has_in_a_row_what_it_has_alone(implementation):
    case = Case(rows_of([40, -3, 30], length=90), heads=3, options={"window": 25})
    x = inputs_of(case, jnp.float32)
    packed = results_of(case, x, implementation)
    for _, here in oracles.documents(case.segment_ids):
        alone = case._replace(segment_ids=np.ones((1, len(here)), np.int32))
        got = results_of(alone, Inputs(*(None if a is None else a[:, here] for a in x)), implementation)
        for name in got:
            # Blocks begin at other tokens, so sums have another order; few terms near 1 differ by some 2^-24.
            np.testing.assert_allclose(got[name], packed[name][:, here], rtol=1e-6, atol=1e-6, err_msg=name)


@both_implementations
def test_no_gradient_comes_from_the_future_or_from_beyond_the_window(implementation):
    case = Case(np.ones((1, 100), np.int32), options={"window": 10})
    x = inputs_of(case, jnp.float32)
    only_one = jnp.zeros_like(x.d_out).at[:, 60].set(1)
    got = results_of(case, x._replace(d_out=only_one), implementation)
    for name in ("dk", "dv"):
        reached = np.flatnonzero(np.any(np.asarray(got[name]) != 0, axis=(0, 2, 3)))
        assert reached.tolist() == list(range(51, 61))


@both_implementations
def test_large_scores_do_not_overflow(implementation):
    case = Case(SHORT, options={"scale": 100.0})
    x = inputs_of(case, jnp.float32)
    got, want = results_of(case, x, implementation), exact_results(case, x)
    # Scores of up to 1e3 are off by 1e3 * 2^-24, which is the relative error of weights; gradients have it times the
    # scale.
    np.testing.assert_allclose(got["out"], want["out"], rtol=0, atol=5e-3)
    assert all(np.all(np.isfinite(result)) for result in got.values())


# Bounds.


@pytest.mark.parametrize("seed", range(5))
def test_segment_bounds_by_a_loop(seed):
    rng = np.random.default_rng(seed)
    lengths = [[int(n) * (1 if rng.random() < 0.7 else -1) for n in rng.integers(1, 9, 6)] for _ in range(4)]
    ids = rows_of(*lengths, [], length=50)
    bounds = segment_bounds(jnp.asarray(ids))
    for b, row in enumerate(ids):
        for t, segment in enumerate(row):
            tokens = np.flatnonzero(row == segment)
            if segment:
                first, last = tokens[0], tokens[-1] + 1
            else:
                first = next((s for s in range(t, len(row)) if row[s]), len(row))
                last = next((s + 1 for s in range(t, -1, -1) if row[s]), 0)
            assert (bounds.first[b, t], bounds.last[b, t]) == (first, last)
    assert bounds.first.dtype == bounds.last.dtype == jnp.int32
    assert np.all(np.diff(bounds.first, axis=1) >= 0)
    assert np.all(np.diff(bounds.last, axis=1) >= 0)


# Heads in one array, as a fused projection returns them.


def test_heads_of_one_array():
    first = 2  # heads of NaN before the heads of q, and before the heads of k
    case = Case(rows_of([50, 60], [-8, 120], length=128), heads=6, kv_heads=2, sinks=True)
    x = inputs_of(case, jnp.float32)
    want = results_of(case, x, "pallas")
    other = jnp.full((*case.segment_ids.shape, first, case.head_dim), jnp.nan)
    array = jnp.concatenate([other, x.q, other, x.k, x.v], axis=2)
    bounds = segment_bounds(jnp.asarray(case.segment_ids))
    options = module.make_options(case.head_dim, None, None, None, None, "pallas")

    @quick_jit
    def run(array):
        q, k, v = (Heads(array, heads) for heads in (first, 2 * first + 6, 2 * first + 8))
        out, lse = module.attention_forward(q, k, v, 6, 2, bounds, x.sinks, options)
        return out, *module.attention_backward(q, k, v, bounds, x.sinks, out, lse, x.d_out, options)

    out, d_qkv, dsinks = run(array)
    for name, got in zip(want, (out, *jnp.split(d_qkv, [6, 8], axis=2), dsinks), strict=True):
        rtol = 1e-6 if name == "dsinks" else 0  # XLA adds `dsinks` up, in its own order
        np.testing.assert_allclose(got, want[name], rtol=rtol, atol=0, err_msg=name)


# Transformations and refusals.


@both_implementations
def test_jit_and_checkpoint_change_nothing(implementation):
    case = CASES["everything"]._replace(head_dim=16)
    x = inputs_of(case, jnp.float32)
    bounds = segment_bounds(jnp.asarray(case.segment_ids))

    @jax.checkpoint
    def attend(q, k, v, sinks):
        return attention(q, k, v, bounds, sinks=sinks, implementation=implementation, **case.options)

    loss = lambda *args: jnp.vdot(attend(*args), x.d_out)  # noqa: E731
    got = quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*x[:4])
    want = results_of(case, x, implementation)
    for name, gradient in zip(("dq", "dk", "dv", "dsinks"), got, strict=True):
        np.testing.assert_allclose(gradient, want[name], rtol=0, atol=3e-6, err_msg=name)  # equal up to fusions


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """Turns off the check of annotations, which only the tests have, so that errors are those a user sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def call(q=(1, 4, 2, 8), k=(1, 4, 1, 8), v=None, tokens=(1, 4), sinks=(2,), **options):
    q, k, v = jnp.ones(q), jnp.ones(k), jnp.ones(v or k)
    bounds = SegmentBounds(*jnp.zeros((2, *tokens), jnp.int32))
    return attention(q, k, v, bounds, sinks=jnp.ones(sinks), **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": (2, 4, 1, 8)}, r"`q`, `k` and `v` must agree .* got \[1, 4, 2, 8\], \[2, 4, 1, 8\] and \[2, 4, 1, 8\]"),
        ({"k": (1, 5, 1, 8)}, r"`q`, `k` and `v` must agree in rows, tokens"),
        ({"k": (1, 4, 1, 16)}, r"`q`, `k` and `v` must agree .*head_dim"),
        ({"v": (1, 4, 2, 8)}, r"`q`, `k` and `v` must agree .* \[1, 4, 1, 8\] and \[1, 4, 2, 8\]"),
        ({"q": (1, 4, 3, 8), "k": (1, 4, 2, 8)}, r"the number of heads of `k` and `v` must divide that of `q`, got"),
        ({"tokens": (1, 5)}, r"`bounds` must have shape \[1, 4\], as `q` has, got \[1, 5\]"),
        ({"sinks": (1,)}, r"`sinks` must have shape \(2,\), one per query head, got \(1,\)"),
        ({"window": 0}, r"`window` must be positive, got 0"),
        ({"window": -3}, r"`window` must be positive, got -3"),
        ({"softcap": 0.0}, r"`softcap` must be positive, got 0.0"),
        ({"softcap": float("nan")}, r"`softcap` must be positive, got nan"),
        ({"max_segments": 0}, r"`max_segments` must be positive, got 0"),
        ({"implementation": "flash"}, r"`implementation` must be None or one of xla, pallas, cudnn, got 'flash'"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_refused(wrong, message):
    assert np.all(call() >= 0)
    with pytest.raises(InputError, match=message):
        call(**wrong)
