"""Tests that tokens find their experts' rows, and their way back, for every distribution over the experts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import equations

from jaxpack.errors import InputError
from jaxpack.kernels.gated_experts import ExpertLinear, gated_experts
from jaxpack.kernels.routing import Routing, block_rows, combine, gather_copies, num_blocks, route, spread
from jaxpack.kernels.weight import DenseStack


class Case(NamedTuple):
    """Holds the choices of N tokens among E experts, and which tokens are no padding."""

    choices: np.ndarray
    num_experts: int
    real: np.ndarray | None = None


def drawn(N: int, C: int, E: int, seed: int = 0) -> np.ndarray:
    """Draws C different experts for each token."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((N, E)), axis=1)[:, :C]


def one_copy_too_many(E: int) -> np.ndarray:
    """Gives each expert one copy more than fills a block, so that almost half of the rows stay empty."""
    return np.repeat(np.arange(E), 17)[:, None]


CASES = {
    "random": Case(drawn(50, 2, 6), 6),
    "random, with padding": Case(drawn(50, 2, 6), 6, np.random.default_rng(1).random(50) < 0.6),
    "large blocks": Case(drawn(700, 2, 3), 3, np.arange(700) % 7 != 0),
    "all to one expert": Case(np.full((70, 1), 2), 4),
    "all to the same two experts, in both orders": Case(np.where(np.arange(40)[:, None] % 2, [3, 0], [0, 3]), 5),
    "an expert without tokens": Case(drawn(33, 2, 4) + (drawn(33, 2, 4) >= 2), 5),
    "as many choices as experts": Case(drawn(20, 4, 4), 4),
    "one expert": Case(np.zeros((5, 1), int), 1),
    "one token": Case(np.array([[6, 1]]), 8),
    "one token after padding": Case(drawn(9, 2, 3), 3, np.arange(9) == 8),
    "all padding": Case(drawn(12, 2, 3), 3, np.zeros(12, bool)),
    "one copy too many for a block": Case(one_copy_too_many(5), 5),
    "one copy each, and all others to one": Case(np.r_[np.arange(7), np.full(105, 3)][:, None], 7),
}
all_cases = pytest.mark.parametrize("case", CASES)
_route = jax.jit(route, static_argnums=1)


@functools.cache
def routed(name: str) -> tuple[np.ndarray, Routing]:
    """Returns the expert of each copy, -1 for padding, and the routing, both as numpy arrays."""
    choices, E, real = CASES[name]
    routing = _route(jnp.asarray(choices, jnp.int32), E, None if real is None else jnp.asarray(real))
    chosen = choices if real is None else np.where(real[:, None], choices, -1)
    return chosen, Routing(*map(np.asarray, routing))


@all_cases
def test_every_copy_of_a_real_token_has_one_row_and_padding_has_none(case):
    chosen, routing = routed(case)
    C = chosen.shape[1]
    copies = np.flatnonzero(chosen.reshape(-1) >= 0)
    assert sorted(routing.copies[routing.copies >= 0]) == copies.tolist()
    assert (routing.copies[routing.copies < 0] == -1).all()
    np.testing.assert_array_equal(routing.copies[routing.rows.reshape(-1)[copies]], copies)
    assert (routing.rows[chosen < 0] == -1).all()
    tokens = Routing(*map(jnp.asarray, routing)).tokens
    assert tokens.tolist() == [-1 if copy < 0 else copy // C for copy in routing.copies]


@all_cases
def test_the_rows_of_an_expert_are_its_tokens_in_order_and_the_empty_rows_follow(case):
    chosen, routing = routed(case)
    size = len(routing.copies) // len(routing.experts)
    for expert in range(routing.num_experts):
        here = slice(routing.starts[expert] * size, routing.starts[expert + 1] * size)
        copies = np.flatnonzero(chosen.reshape(-1) == expert)
        rows = routing.copies[here]
        assert rows.tolist() == [*copies, *[-1] * (len(rows) - len(copies))]
        assert len(rows) == size * -(-len(copies) // size)  # no block more than its copies need


@all_cases
def test_blocks_counts_and_starts_agree_and_the_blocks_without_tokens_come_last(case):
    chosen, routing = routed(case)
    E = routing.num_experts
    np.testing.assert_array_equal(routing.counts, np.bincount(chosen[chosen >= 0], minlength=E))
    assert routing.starts[0] == 0
    blocks = [expert for expert in range(E) for _ in range(routing.starts[expert], routing.starts[expert + 1])]
    assert len(blocks) <= len(routing.experts)
    assert routing.experts.tolist() == [*blocks, *[E] * (len(routing.experts) - len(blocks))]
    assert (routing.copies.reshape(len(routing.experts), -1)[len(blocks) :] == -1).all()


def most_blocks(copies: int, num_experts: int, size: int) -> int:
    """Returns the most blocks that any distribution of `copies` over the experts takes, by trying all of them."""
    most = [0] + copies * [-1]  # for the experts so far; -1 where they cannot hold so many
    for _ in range(num_experts):
        most = [max(most[n - c] - (-c // size) for c in range(n + 1) if most[n - c] >= 0) for n in range(copies + 1)]
    return most[copies]


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_there_are_enough_blocks_for_the_worst_distribution_but_not_many_more(num_experts):
    for copies in [*range(1, 20), 31, 32, 33, 80, 81, 96]:
        size = block_rows(copies, num_experts)
        worst = most_blocks(copies, num_experts, size)
        assert worst <= num_blocks(copies, num_experts) <= worst + 1


@pytest.mark.parametrize("num_experts", [1, 3, 8, 128])
def test_blocks_are_as_large_as_the_experts_have_copies_within_what_a_kernel_takes(num_experts):
    for copies in (1, 8, 100, 1000, 16_384, 131_072, 2**24):
        size = block_rows(copies, num_experts)
        assert size in (16, 32, 64, 128)
        assert size == 128 or size * num_experts >= copies  # full blocks would not be better
        assert size == 16 or size * num_experts < 2 * copies  # equal experts fill half of their rows or more


@all_cases
def test_gathering_copies_is_the_inverse_of_spreading_them(case):
    chosen, routing = routed(case)
    shares = 1 + np.random.default_rng(0).random(chosen.shape, np.float32)
    rows = spread(jnp.asarray(shares), routing)
    np.testing.assert_array_equal(np.asarray(rows) > 0, routing.copies >= 0)
    np.testing.assert_array_equal(gather_copies(rows, routing), np.where(chosen >= 0, shares, 0))
    junk = jnp.where(jnp.asarray(routing.copies) < 0, jnp.nan, rows)  # nobody reads an empty row
    np.testing.assert_array_equal(gather_copies(junk, routing), np.where(chosen >= 0, shares, 0))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("with_shares", [True, False], ids=["shares", "no shares"])
@all_cases
def test_combine_adds_up_the_copies_of_each_token_and_reads_no_empty_row(case, with_shares, dtype):
    chosen, routing = routed(case)
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal((len(routing.copies), 3)), dtype)
    values = jnp.where(jnp.asarray(routing.copies)[:, None] < 0, jnp.nan, values)
    shares = rng.random(chosen.shape, np.float32) if with_shares else None
    want = np.zeros((len(chosen), 3))
    for row, copy in enumerate(routing.copies):
        if copy >= 0:
            share = shares.reshape(-1)[copy] if with_shares else 1
            want[copy // chosen.shape[1]] += np.float64(share) * np.asarray(values[row], np.float64)
    got = combine(values, routing, None if shares is None else jnp.asarray(shares))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def scatters(function, *arguments) -> list[str]:
    program = jax.make_jaxpr(function)(*arguments)
    return [e.primitive.name for e in equations(program.jaxpr) if e.primitive.name.startswith("scatter")]


def test_routing_and_combining_scatter_nothing():
    choices, real, shares = jnp.zeros((40, 2), jnp.int32), jnp.ones(40, bool), jnp.ones((40, 2))

    def there_and_back(choices, real, shares):
        routing = route(choices, 4, real)
        rows = spread(shares, routing)
        return combine(rows[:, None], routing, shares), gather_copies(rows, routing)

    assert scatters(there_and_back, choices, real, shares) == []


@pytest.mark.parametrize(("implementation", "rank"), [("xla", None), ("pallas", None), ("pallas", 4)])
def test_a_step_with_frozen_experts_scatters_nothing(implementation, rank):
    N, C, E, D, F = 40, 2, 4, 32, 16
    factors = []
    if rank is not None:
        factors = [
            (jnp.ones((E, rank, D)), jnp.ones((E, 2 * F, rank))),
            (jnp.ones((E, rank, F)), jnp.ones((E, D, rank))),
        ]
    gate_up, down = (DenseStack(jnp.ones((2, *shape))).at(1) for shape in ((E * 2 * F, D), (E * D, F)))

    def step(choices, x, shares, *factors):
        def f(x, shares, *factors):
            routing = route(choices, E)
            linears = (
                ExpertLinear(weight, None, pair)
                for weight, pair in zip((gate_up, down), factors or (None, None), strict=True)
            )
            return gated_experts(x, x, shares, routing, *linears, implementation=implementation)

        out, pull = jax.vjp(f, x, shares, *factors)
        return pull(out)

    assert scatters(step, jnp.zeros((N, C), jnp.int32), jnp.ones((N, D)), jnp.ones((N, C)), *factors) == []


def test_more_choices_than_experts_are_refused():
    with pytest.raises(InputError, match=r"`num_experts` must be at least the number of choices of a token, 3, got 2"):
        route(jnp.zeros((4, 3), jnp.int32), 2)
