"""Compares products with experts' matrices, and sums of outer products by expert, with loops in float64.

The product of gate and up is compared with the two kernels that it joins, to the last bit.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels.oracles import assert_as_good_as_plain_bfloat16, copies_of, exactly, quick_jit

from jaxpack.errors import InputError
from jaxpack.kernels import _launch
from jaxpack.kernels import grouped_matmul as grouped
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.grouped_matmul import grouped_gated, grouped_matmul, grouped_outer
from jaxpack.kernels.routing import Routing, route

both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])
from_tokens_or_rows = pytest.mark.parametrize("from_tokens", [True, False], ids=["from tokens", "from rows"])
L = 3

# Tokens, choices, experts, the rows of a block that follow from them, and input and output channels.
SHAPES = {
    "small blocks": (40, 2, 5, 16, 32, 48),
    "large blocks": (75, 2, 2, 128, 16, 64),
    "most experts without tokens": (3, 2, 12, 16, 80, 16),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES)


@functools.cache
def routed(shape: str) -> tuple[np.ndarray, Routing]:
    """Returns the experts of each token, -1 for padding, and their routing; nearly a fifth of the tokens is padding."""
    N, C, E, size, _, _ = SHAPES[shape]
    rng = np.random.default_rng(0)
    choices = np.argsort(rng.random((N, E)) ** 2 * np.arange(1, E + 1), axis=1)[:, :C]
    real = np.arange(N) % 6 != 1
    routing = jax.jit(route, static_argnums=1)(jnp.asarray(choices, jnp.int32), E, jnp.asarray(real))
    assert len(routing.copies) == size * len(routing.experts)
    return np.where(real[:, None], choices, -1), routing


def drawn(*shape: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def operand(routing: Routing, channels: int, from_tokens: bool, **options) -> jax.Array:
    """Draws tokens, or rows with zeros in the empty rows of experts' blocks and noise in the blocks of no expert."""
    if from_tokens:
        return drawn(len(routing.rows), channels, **options)
    rows = drawn(len(routing.copies), channels, **options)
    experts = jnp.repeat(routing.experts, len(routing.copies) // len(routing.experts))
    return jnp.where(((routing.copies < 0) & (experts < routing.num_experts))[:, None], 0, rows)


def row_of(x: np.ndarray, routing: Routing, from_tokens: bool, n: int, c: int) -> np.ndarray:
    """Returns what a product reads for a token's choice."""
    return x[n] if from_tokens else x[routing.rows[n, c]]


def products(x, matrices, shape: str, *, layer=0, from_tokens=False, transposed=False, more=None) -> np.ndarray:
    """Returns what `grouped_matmul` computes, in float64, with a loop over the copies of all tokens."""
    choices, routing = routed(shape)
    turn = (lambda matrix: matrix.T) if transposed else (lambda matrix: matrix)
    matrices = exactly(matrices)[layer]
    out = np.zeros((len(routing.copies), turn(matrices[0]).shape[0]))
    for n, c, e in copies_of(choices):
        row = routing.rows[n, c]
        out[row] = turn(matrices[e]) @ row_of(exactly(x), routing, from_tokens, n, c)
        if more is not None:
            out[row] += turn(exactly(more[1])[e]) @ exactly(more[0])[row]
    return out


def outers(d, x, shape: str, *, d_from_tokens=False, x_from_tokens=False) -> np.ndarray:
    """Returns what `grouped_outer` computes, in float64, with a loop over the copies of all tokens."""
    choices, routing = routed(shape)
    out = np.zeros((routing.num_experts, d.shape[1], x.shape[1]))
    for n, c, e in copies_of(choices):
        left = row_of(exactly(d), routing, d_from_tokens, n, c)
        out[e] += np.outer(left, row_of(exactly(x), routing, x_from_tokens, n, c))
    return out


def matmul_inputs(shape: str, from_tokens: bool, transposed: bool, rank: int | None, dtype=jnp.float32):
    """Returns the input, the matrices of all layers, and the rows and matrices of `more`."""
    _, routing = routed(shape)
    *_, E, _, I, O = SHAPES[shape]  # noqa: E741
    sides = lambda O, I: (I, O) if transposed else (O, I)  # noqa: E731, E741
    x, matrices = operand(routing, I, from_tokens, dtype=dtype), drawn(L, E, *sides(O, I), dtype=dtype)
    if rank is None:
        return x, matrices, None
    return x, matrices, (operand(routing, rank, False, dtype=dtype), drawn(E, *sides(O, rank), dtype=dtype, seed=1))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rank", [None, 16], ids=["alone", "more"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@from_tokens_or_rows
@all_shapes
@both_implementations
def test_each_row_is_multiplied_with_the_matrix_of_its_expert(implementation, shape, from_tokens, transposed, rank):
    _, routing = routed(shape)
    x, matrices, more = matmul_inputs(shape, from_tokens, transposed, rank)
    options = {"from_tokens": from_tokens, "transposed": transposed}
    run = quick_jit(functools.partial(grouped_matmul, implementation=implementation, **options))
    for layer in (0, 2):  # a traced number, so one program reads both
        got = run(x, matrices, routing, layer=jnp.int32(layer), more=more)
        want = products(x, matrices, shape, layer=layer, more=more, **options)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        # Neither empty rows of an expert nor the blocks of no expert, whatever they hold, give anything but zeros.
        assert not np.any(np.asarray(got)[np.asarray(routing.copies) < 0])


def gated_inputs(shape: str, dtype, *, rank: int | None = 16, has_bias: bool = True) -> tuple[tuple, dict]:
    """Returns tokens, the matrices of gate and up, and their routing; and layer, biases and factors by their names."""
    _, routing = routed(shape)
    *_, E, _, I, F = SHAPES[shape]  # noqa: E741
    x, matrices = operand(routing, I, True, dtype=dtype), drawn(L, E, 2 * F, I, dtype=dtype)
    more = rank and (operand(routing, rank, False, dtype=dtype), drawn(E, 2 * F, rank, dtype=dtype, seed=1))
    bias = drawn(E, 2 * F, dtype=dtype, seed=2) if has_bias else None
    return (x, matrices, routing), {"layer": jnp.int32(1), "bias": bias, "more": more}


def both_kernels(arguments: tuple, added: dict, activation: str, implementation: str) -> tuple[jax.Array, jax.Array]:
    """Returns the product of gate and up, and gate and up, from two kernels that run one after the other."""
    options = {"from_tokens": True, "implementation": implementation}
    gate_up = quick_jit(functools.partial(grouped_matmul, **options))(*arguments, **added)
    activate = functools.partial(gated_activation, activation=activation, implementation=implementation)
    return quick_jit(activate)(gate_up), gate_up


GATED_CASES = [(activation, {}) for activation in ("silu", "clamped_silu", "gelu_tanh", "gelu")]
GATED_CASES += [("silu", {"rank": None}), ("silu", {"has_bias": False})]


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    ("activation", "added"), GATED_CASES, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@all_shapes
@both_implementations
def test_the_product_of_gate_and_up_has_the_bits_of_two_kernels(implementation, shape, dtype, activation, added):
    arguments, named = gated_inputs(shape, dtype, **added)
    want, want_gate_up = both_kernels(arguments, named, activation, implementation)
    options = {"activation": activation, "from_tokens": True, "implementation": implementation}
    run = quick_jit(functools.partial(grouped_gated, **options), static_argnames="with_gate_up")
    alone, nothing = run(*arguments, **named)
    product, gate_up = run(*arguments, **named, with_gate_up=True)
    assert nothing is None
    for got, expected in ((alone, want), (product, want), (gate_up, want_gate_up)):
        assert got.dtype == dtype
        if implementation == "pallas":
            np.testing.assert_array_equal(got, expected)
        else:  # XLA computes them in one program or in two, and need not round alike
            limit = 4 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(exactly(got), exactly(expected), rtol=limit, atol=limit)
    routing = arguments[2]
    of_no_expert = np.repeat(routing.experts, len(routing.copies) // len(routing.experts)) == routing.num_experts
    assert of_no_expert.any()
    assert not np.asarray(alone)[of_no_expert].any()
    assert not np.asarray(gate_up)[of_no_expert].any()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("x_from_tokens", [True, False], ids=["x from tokens", "x from rows"])
@pytest.mark.parametrize("d_from_tokens", [True, False], ids=["d from tokens", "d from rows"])
@all_shapes
@both_implementations
def test_outer_products_are_summed_by_expert(implementation, shape, d_from_tokens, x_from_tokens):
    _, routing = routed(shape)
    *_, I, O = SHAPES[shape]  # noqa: E741
    d, x = operand(routing, O, d_from_tokens, seed=1), operand(routing, I, x_from_tokens)
    options = {"d_from_tokens": d_from_tokens, "x_from_tokens": x_from_tokens}
    got = quick_jit(functools.partial(grouped_outer, implementation=implementation, **options))(d, x, routing)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, outers(d, x, shape, **options), rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(got)[np.asarray(routing.counts) == 0])


@pytest.mark.parametrize("shared", [227, 99, 64], ids="{} KiB".format)
@pytest.mark.parametrize("sides", [(320, 48), (2880, 32), (48, 320)], ids=str)
def test_a_card_with_little_shared_memory_gets_smaller_tiles_and_the_same_products(sides, shared, monkeypatch):
    """Tests sides that no wide tile divides, too: the last tile overlaps the one before."""
    monkeypatch.setattr(_launch, "shared_memory_bytes", lambda: 1024 * shared)
    _, routing = routed("small blocks" if shared == 227 else "large blocks")
    O, I = sides  # noqa: E741
    x, d, matrices = operand(routing, I, True), operand(routing, O, False), drawn(1, routing.num_experts, O, I)
    for function, arguments, options in (
        (grouped_matmul, (x, matrices), {"from_tokens": True}),
        (grouped_matmul, (d, matrices), {"transposed": True}),
        (grouped_outer, (d, x), {"x_from_tokens": True}),
    ):
        got, want = (
            quick_jit(functools.partial(function, implementation=form, **options))(*arguments, routing)
            for form in ("pallas", "xla")
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shared", [227, 163, 99, 64], ids="{} KiB".format)
@pytest.mark.parametrize("features", [160, 2880, 16], ids="F {}".format)
def test_a_card_with_little_shared_memory_gets_the_same_product_of_gate_and_up(features, shared, monkeypatch):
    """Tests halves that no wide tile divides, too: the last tile of each overlaps the one before it."""
    monkeypatch.setattr(_launch, "shared_memory_bytes", lambda: 1024 * shared)
    _, routing = routed("large blocks")
    arguments = operand(routing, 48, True), drawn(1, routing.num_experts, 2 * features, 48), routing
    want, want_gate_up = both_kernels(arguments, {}, "silu", "xla")
    run = functools.partial(grouped_gated, from_tokens=True, with_gate_up=True, implementation="pallas")
    product, gate_up = quick_jit(run)(*arguments)
    np.testing.assert_allclose(product, want, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(gate_up, want_gate_up, rtol=1e-5, atol=1e-3)


def test_halves_that_no_tile_divides_are_computed_without_the_kernel():
    """The halves have 24 channels, which are no multiple of 16; both together, 48, are one."""
    _, routing = routed("small blocks")
    arguments = operand(routing, 32, True), drawn(1, routing.num_experts, 48, 32), routing
    run = functools.partial(grouped_gated, *arguments, from_tokens=True)
    np.testing.assert_array_equal(run()[0], run(implementation="xla")[0])
    with pytest.raises(InputError, match=r"must be None or 'xla' here, got 'pallas': .* multiples of 16, got 24"):
        run(implementation="pallas")


def test_a_rank_that_no_tile_of_the_card_holds_is_multiplied_without_the_kernel(monkeypatch):
    for module in (_launch, grouped):
        monkeypatch.setattr(module, "shared_memory_bytes", lambda: 1024 * 99)
    x, matrices, more = matmul_inputs("small blocks", True, False, 1024)
    _, routing = routed("small blocks")
    run = functools.partial(grouped_matmul, x, matrices, routing, from_tokens=True, more=more)
    np.testing.assert_array_equal(run(), run(implementation="xla"))
    with pytest.raises(InputError, match=r"must be None or 'xla' here, got 'pallas': a rank of 1024 needs 195 KiB"):
        run(implementation="pallas")
    arguments, named = gated_inputs("small blocks", jnp.float32, rank=1024)
    run = functools.partial(grouped_gated, *arguments, from_tokens=True, **named)
    np.testing.assert_array_equal(run()[0], run(implementation="xla")[0])
    with pytest.raises(InputError, match=r"must be None or 'xla' here, got 'pallas': a rank of 1024 needs 195 KiB"):
        run(implementation="pallas")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("shared", [227, 163, 99, 64], ids="{} KiB".format)
@pytest.mark.parametrize("tiles", ["_TILES", "_GATED_TILES"])
def test_a_tile_fits_the_shared_memory(tiles, shared, rank, itemsize, monkeypatch):
    monkeypatch.setattr(_launch, "shared_memory_bytes", lambda: 1024 * shared)
    dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
    sizes = [grouped._shared_bytes(128, tile, rank, dtype) for tile in getattr(grouped, tiles)]
    chosen = _launch.fitting(sizes, int)
    assert chosen <= 1024 * shared
    assert all(size > 1024 * shared for size in sizes[: sizes.index(chosen)])


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@both_implementations
def test_bfloat16_is_as_good_as_plain_bfloat16(implementation, transposed):
    _, routing = routed("small blocks")
    x, matrices, more = matmul_inputs("small blocks", True, transposed, 16, jnp.bfloat16)
    options = {"from_tokens": True, "transposed": transposed}
    run = quick_jit(functools.partial(grouped_matmul, implementation=implementation, **options))
    got = run(x, matrices, routing, layer=1, more=more)
    assert got.dtype == jnp.bfloat16

    experts = jnp.repeat(routing.experts, 16)
    equation = "MI,MIO->MO" if transposed else "MI,MOI->MO"
    pick = lambda matrices: jnp.take(matrices, experts, axis=0, mode="fill", fill_value=0)  # noqa: E731
    rows = jnp.where(routing.tokens[:, None] < 0, 0, x[routing.tokens])
    plain = jnp.einsum(equation, rows, pick(matrices[1])) + jnp.einsum(equation, more[0], pick(more[1]))
    exact = products(x, matrices, "small blocks", layer=1, more=more, **options)
    assert_as_good_as_plain_bfloat16(got, plain, exact)


@both_implementations
def test_outer_products_of_bfloat16_are_summed_in_float32(implementation):
    _, routing = routed("large blocks")
    d, x = operand(routing, 32, True, dtype=jnp.bfloat16), operand(routing, 16, False, dtype=jnp.bfloat16)
    run = quick_jit(functools.partial(grouped_outer, d_from_tokens=True, implementation=implementation))
    np.testing.assert_allclose(
        run(d, x, routing), outers(d, x, "large blocks", d_from_tokens=True), rtol=1e-5, atol=1e-5
    )


def with_nan_in_token_0(shape: str, channels: int) -> tuple[jax.Array, np.ndarray]:
    """Returns tokens of which the first is NaN, and the experts that it goes to."""
    choices, _ = routed(shape)
    return drawn(len(choices), channels).at[0].set(jnp.nan), choices[0]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@all_shapes
@both_implementations
def test_what_is_not_finite_stays_in_the_rows_of_its_token(implementation, shape, transposed):
    """An empty row has the token -1, and a kernel must not read a real token in its place."""
    _, routing = routed(shape)
    _, matrices, _ = matmul_inputs(shape, True, transposed, None)
    x, _ = with_nan_in_token_0(shape, SHAPES[shape][-2])
    options = {"from_tokens": True, "transposed": transposed, "implementation": implementation}
    got = np.asarray(quick_jit(functools.partial(grouped_matmul, **options))(x, matrices, routing))
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), np.asarray(routing.tokens) == 0)
    assert np.isfinite(got[np.asarray(routing.tokens) != 0]).all()


@all_shapes
@both_implementations
def test_a_product_of_gate_and_up_that_is_not_finite_stays_in_the_rows_of_its_token(implementation, shape):
    (x, matrices, routing), named = gated_inputs(shape, jnp.float32)
    run = quick_jit(functools.partial(grouped_gated, from_tokens=True, implementation=implementation))
    got = np.asarray(run(x.at[0].set(jnp.nan), matrices, routing, **named)[0])
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), np.asarray(routing.tokens) == 0)
    assert np.isfinite(got[np.asarray(routing.tokens) != 0]).all()


@pytest.mark.parametrize("wrong", ["d", "x"])
@all_shapes
@both_implementations
def test_what_is_not_finite_reaches_the_outer_products_of_its_experts_alone(implementation, shape, wrong):
    _, routing = routed(shape)
    bad, reached = with_nan_in_token_0(shape, 16)
    d, x = (bad, drawn(len(bad), 32)) if wrong == "d" else (drawn(len(bad), 32), bad)
    options = {"d_from_tokens": True, "x_from_tokens": True, "implementation": implementation}
    got = np.asarray(quick_jit(functools.partial(grouped_outer, **options))(d, x, routing))
    is_nan = np.isnan(got)
    assert np.flatnonzero(is_nan.any(axis=(1, 2))).tolist() == sorted(reached)
    assert is_nan[reached].all()


def test_channels_that_no_kernel_can_cut_are_computed_without_it():
    shape = "small blocks"
    _, routing = routed(shape)
    x, matrices, more = operand(routing, 10, True), drawn(1, 5, 6, 10), (operand(routing, 3, False), drawn(5, 6, 3))
    got = grouped_matmul(x, matrices, routing, from_tokens=True, more=more)
    np.testing.assert_allclose(got, products(x, matrices, shape, from_tokens=True, more=more), rtol=1e-5, atol=1e-5)
    got = grouped_outer(operand(routing, 6, False), x, routing, x_from_tokens=True)
    want = outers(operand(routing, 6, False), x, shape, x_from_tokens=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": (16, 48)}, r"`matrices` must sum over 48 channels, as many as `x` has, got 32"),
        ({"transposed": True}, r"`matrices` must sum over 32 channels, as many as `x` has, got 64"),
        ({"more": ((16, 16), (2, 64, 32))}, r"`more` must have matrices of shape \(2, 64, 16\), got \(2, 64, 32\)"),
        ({"more": ((16, 16), (3, 64, 16))}, r"`more` must have matrices of shape \(2, 64, 16\), got \(3, 64, 16\)"),
        (
            {"x": (16, 64), "more": ((16, 16), (2, 32, 16)), "transposed": True},
            r"`more` must have matrices of shape \(2, 16, 32\), got \(2, 32, 16\)",
        ),
        ({"matrices": (1, 2, 24, 32)}, r"`implementation` must be None or 'xla' here, got 'pallas'.* 16, got 24"),
        ({"x": (16, 40), "matrices": (1, 2, 64, 40)}, r"got 'pallas'.*channels in multiples of 16, got 40"),
        ({"more": ((16, 8), (2, 64, 8))}, r"got 'pallas'.*channels in multiples of 16, got 8"),
        ({"implementation": "triton"}, r"`implementation`.*got 'triton'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_products_that_cannot_be_are_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    routing = route(jnp.zeros((3, 1), jnp.int32), 2)
    given = {"x": (16, 32), "matrices": (1, 2, 64, 32), "implementation": "pallas"} | wrong
    if "more" in given:
        given["more"] = tuple(map(jnp.ones, given["more"]))
    given |= {name: jnp.ones(given[name]) for name in ("x", "matrices")}
    with pytest.raises(InputError, match=message):
        grouped_matmul(**given, routing=routing)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"matrices": (1, 2, 33, 32)}, r"`matrices` must have gate above up, so an even number .*, got 33"),
        ({"matrices": (1, 2, 32, 48)}, r"`matrices` must sum over 32 channels, as many as `x` has, got 48"),
        ({"bias": (2, 16)}, r"`bias` must have shape \(2, 32\), got \(2, 16\)"),
        ({"activation": "relu"}, r"`activation` must be one of .*, got 'relu'"),
        ({"implementation": "triton"}, r"`implementation`.*got 'triton'"),
    ],
)
def test_products_of_gate_and_up_that_cannot_be_are_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    routing = route(jnp.zeros((3, 1), jnp.int32), 2)
    given = {"x": (16, 32), "matrices": (1, 2, 32, 32)} | wrong
    given |= {name: jnp.ones(shape) for name, shape in given.items() if isinstance(shape, tuple)}
    with pytest.raises(InputError, match=message):
        grouped_gated(**given, routing=routing)


@pytest.mark.parametrize(("O", "I", "odd"), [(24, 32, 24), (16, 1, 1)])
def test_the_kernel_refuses_outer_products_with_sides_that_it_cannot_cut(O, I, odd):  # noqa: E741
    routing = route(jnp.zeros((3, 1), jnp.int32), 2)
    M = len(routing.copies)
    with pytest.raises(InputError, match=f"got 'pallas'.*channels in multiples of 16, got {odd}"):
        grouped_outer(jnp.ones((M, O)), jnp.ones((M, I)), routing, implementation="pallas")
