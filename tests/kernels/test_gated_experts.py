"""Compares a mixture of experts and all its gradients with a loop over tokens and their experts in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly, quick_jit
from kernels.oracles import experts as oracle

from jaxpack.errors import InputError
from jaxpack.kernels.gated_experts import ExpertLinear, gated_experts
from jaxpack.kernels.routing import route
from jaxpack.kernels.weight import DenseStack, DenseWeight

N, C, E, D, F, L = 40, 2, 5, 32, 16, 3
both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])
ranks = pytest.mark.parametrize("rank", [None, 4, 24], ids=lambda rank: f"rank {rank}")
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")
BIASES = ("gate_up_bias", "down_bias")


@functools.cache
def tokens(dtype=jnp.float32) -> dict[str, jax.Array]:
    """Returns the inputs of a token each, the gradient of the result, its experts, and which tokens are no padding."""
    rng = np.random.default_rng(0)
    choices = np.argsort(rng.random((N, E)) * np.arange(1, E + 1), axis=1)[:, :C]  # the last experts get few tokens
    residual, x, d_out = (jnp.asarray(rng.standard_normal((N, D)), dtype) for _ in range(3))
    shares = jnp.asarray(rng.random((N, C)), jnp.float32)
    real = jnp.asarray(np.arange(N) % 6 != 1)
    choices = jnp.asarray(choices, jnp.int32)
    return {"residual": residual, "x": x, "shares": shares, "d_out": d_out, "choices": choices, "real": real}


@functools.cache
def matrices(rank: int | None, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Returns stacks of L layers of the experts' matrices, and one layer of factors and biases if there is a rank."""
    rng = np.random.default_rng(1)
    shapes = {"gate_up": (L, E * 2 * F, D), "down": (L, E * D, F)}
    if rank is not None:
        sides = ((E, rank, D), (E, 2 * F, rank), (E, rank, F), (E, D, rank))
        shapes |= dict(zip(FACTORS, sides, strict=True)) | dict(zip(BIASES, ((E, 2 * F), (E, D)), strict=True))
    return {name: jnp.asarray(0.3 * rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def pairs(arrays: dict[str, jax.Array]) -> tuple:
    """Returns the factors of gate and up, and of down; nothing without an adapter."""
    if "down_a" not in arrays:
        return ()
    return tuple((arrays[f"{name}_a"], arrays[f"{name}_b"]) for name in ("gate_up", "down"))


def linears(arrays: dict[str, jax.Array], gate_up, down) -> tuple[ExpertLinear, ExpertLinear]:
    """Returns both projections around these matrices, with the biases and factors among `arrays`."""
    factors = pairs(arrays) or (None, None)
    return ExpertLinear(gate_up, arrays.get(BIASES[0]), factors[0]), ExpertLinear(
        down, arrays.get(BIASES[1]), factors[1]
    )


@functools.partial(quick_jit, static_argnames=("trained", "activation", "recomputes", "implementation"))
def results(
    given, weights, layer, *, trained: bool, activation="silu", recomputes=False, implementation=None
) -> dict[str, jax.Array]:
    """Returns the result and the gradients of everything that may have one, by their names.

    Frozen matrices are read from their stacks at the number `layer`; trained ones are cut out of the stacks. With
    `recomputes`, the backward pass computes gate and up again.
    """
    routing = route(given["choices"], E, given["real"])
    added = {name: weights[name] for name in (*FACTORS, *BIASES) if name in weights}
    stacks = {name: weights[name] for name in ("gate_up", "down")}
    whole = {name: stack[layer] for name, stack in stacks.items()} if trained else {}

    def f(arrays):
        held = {name: DenseWeight(arrays[name]) if trained else DenseStack(stacks[name]).at(layer) for name in stacks}
        inputs = (*(arrays[name] for name in ("residual", "x", "shares")), routing)
        options = {"activation": activation, "implementation": implementation}
        return gated_experts(*inputs, *linears(arrays, **held), keeps_gate_up=not recomputes, **options)

    if recomputes:
        f = jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("lora"))
    out, pull = jax.vjp(f, {name: given[name] for name in ("residual", "x", "shares")} | added | whole)
    (gradients,) = pull(given["d_out"])
    return {"out": out} | {f"d_{name}": gradient for name, gradient in gradients.items()}


def expected(given, weights, layer, *, trained, activation="silu") -> dict[str, np.ndarray]:
    """Returns the same as `results`, in float64."""
    choices = np.where(np.asarray(given["real"])[:, None], given["choices"], -1)
    exact = {name: exactly(array) for name, array in weights.items()}
    inputs = (*(exactly(given[name]) for name in ("residual", "x", "shares")), choices)
    split = (exact["gate_up"][layer].reshape(E, 2 * F, D), exact["down"][layer].reshape(E, D, F))
    biases = {name: exact[name] for name in BIASES if name in exact}
    found = oracle(*inputs, *split, *pairs(exact), **biases, activation=activation, d_out=exactly(given["d_out"]))
    whole = {f"d_{name}": found.pop(f"d_{name}") for name in ("gate_up", "down")}
    return found | (
        {name: gradient.reshape(-1, gradient.shape[2]) for name, gradient in whole.items()} if trained else {}
    )


def assert_equal(got: dict[str, jax.Array], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-6 * scale, err_msg=name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@ranks
@both_implementations
def test_value_and_gradients_equal_a_loop_over_tokens_and_their_experts(implementation, rank, trained):
    given, weights = tokens(), matrices(rank)
    for layer in (0, 2):  # a traced number, so one program reads both
        got = results(given, weights, layer, trained=trained, implementation=implementation)
        assert_equal(got, expected(given, weights, layer, trained=trained))


@pytest.mark.parametrize(("dtype", "activation"), [(jnp.float32, "silu"), (jnp.bfloat16, "clamped_silu")])
@both_implementations
def test_gate_and_up_that_are_computed_again_change_no_bit(implementation, dtype, activation):
    given, weights = tokens(dtype), matrices(4, dtype)
    options = {"trained": False, "activation": activation, "implementation": implementation}
    kept, again = (results(given, weights, 1, recomputes=recomputes, **options) for recomputes in (False, True))
    assert kept.keys() == again.keys()
    for name in kept:
        np.testing.assert_array_equal(kept[name], again[name], err_msg=name)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "clamped_silu"])
def test_the_activation_is_the_one_that_is_named(activation):
    got = results(tokens(), matrices(4), 1, trained=True, activation=activation)
    assert_equal(got, expected(tokens(), matrices(4), 1, trained=True, activation=activation))


@both_implementations
def test_an_adapter_changes_the_result_as_its_product_added_to_the_matrix_does(implementation):
    given, weights = tokens(), matrices(4)
    merged = {name: weights[name] for name in ("gate_up", "down", *BIASES)}
    for name in ("gate_up", "down"):
        product = weights[f"{name}_b"] @ weights[f"{name}_a"]
        merged[name] = merged[name] + product.reshape(1, -1, product.shape[2])
    options = {"trained": False, "implementation": implementation}
    got, want = results(given, weights, 1, **options), results(given, merged, 1, **options)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-6 * np.abs(want[name]).max())


def plain(given, weights, layer) -> dict[str, jax.Array]:
    """Returns the result and the gradients of plain jnp in bfloat16, which computes every expert for every token."""
    chosen = given["choices"][:, :, None] == jnp.arange(E)[None, None, :]
    chosen &= given["real"][:, None, None]

    def f(arrays):
        x, split = arrays["x"], {"gate_up": (E, 2 * F, D), "down": (E, D, F)}
        whole = {name: arrays[name].reshape(shape) for name, shape in split.items()}
        whole = {name: matrix + arrays[f"{name}_b"] @ arrays[f"{name}_a"] for name, matrix in whole.items()}
        hidden = jnp.einsum("ND,EFD->NEF", x, whole["gate_up"]) + arrays["gate_up_bias"][None]
        gate, up = jnp.split(hidden, 2, axis=-1)
        out = jnp.einsum("NEF,EDF->NED", jax.nn.silu(gate) * up, whole["down"]) + arrays["down_bias"][None]
        shares = jnp.sum(jnp.where(chosen, arrays["shares"][:, :, None], 0), axis=1).astype(x.dtype)
        return arrays["residual"] + jnp.einsum("NE,NED->ND", shares, out)

    arrays = {name: given[name] for name in ("residual", "x", "shares")} | weights
    arrays |= {name: weights[name][layer] for name in ("gate_up", "down")}
    out, pull = jax.vjp(f, arrays)
    (gradients,) = pull(given["d_out"])
    return {"out": out} | {f"d_{name}": gradient for name, gradient in gradients.items()}


@both_implementations
def test_bfloat16_is_as_good_as_plain_bfloat16(implementation):
    given, weights = tokens(jnp.bfloat16), matrices(4, jnp.bfloat16)
    got = results(given, weights, 1, trained=True, implementation=implementation)
    other, exact = quick_jit(plain)(given, weights, 1), expected(given, weights, 1, trained=True)
    assert got.keys() == exact.keys()
    for name in exact:
        assert got[name].dtype == (jnp.float32 if name == "d_shares" else jnp.bfloat16)
        assert_as_good_as_plain_bfloat16(got[name], other[name], exact[name], name)


@both_implementations
def test_two_runs_have_the_same_bits(implementation):
    run = functools.partial(results, tokens(), matrices(4), 1, trained=True, implementation=implementation)
    for got, want in zip(jax.tree.leaves(run()), jax.tree.leaves(run()), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("change", ["x", "choices", "real"])
@both_implementations
def test_changing_a_token_changes_no_other_in_the_last_bit(implementation, change):
    """A token that goes to other experts, or becomes padding, moves the rows of other tokens to other places."""
    given, weights = tokens(), matrices(4)
    run = functools.partial(results, weights=weights, layer=1, trained=False, implementation=implementation)
    before = run(given)
    for token in (0, 17, N - 1):
        new = {
            "x": given["x"].at[token].add(1),
            "choices": given["choices"].at[token].set((given["choices"][token] + 1) % E),
            "real": given["real"].at[token].set(False),
        }[change]
        after, others = run(given | {change: new}), np.arange(N) != token
        assert given["real"][token]
        assert (after["out"][token] != before["out"][token]).any()
        for name in ("out", "d_x", "d_shares"):
            np.testing.assert_array_equal(after[name][others], before[name][others], err_msg=name)


@both_implementations
def test_padding_keeps_its_residual_and_has_no_gradient_and_reaches_no_one(implementation):
    given, weights = tokens(), matrices(4)
    padding = ~np.asarray(given["real"])
    run = functools.partial(results, weights=weights, layer=1, trained=True, implementation=implementation)
    want = run(given)
    got = run(given | {"x": jnp.where(given["real"][:, None], given["x"], jnp.nan)})
    np.testing.assert_array_equal(got["out"][padding], given["residual"][padding])
    for name in ("d_x", "d_shares"):
        assert not np.any(np.asarray(got[name])[padding])
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_the_gradient_of_a_frozen_weight_is_refused(which):
    given, weights = tokens(), matrices(None)
    routing = route(given["choices"], E, given["real"])

    def loss(stack):
        held = {name: weights[name] for name in ("gate_up", "down")} | {which: stack}
        held = {name: DenseStack(value).at(0) for name, value in held.items()}
        inputs = (*(given[name] for name in ("residual", "x", "shares")), routing)
        return jnp.sum(gated_experts(*inputs, *linears({}, **held)))

    with pytest.raises(InputError, match="A DenseStack is frozen and has no gradient, but it was differentiated"):
        jax.grad(loss)(weights[which])


def test_a_trained_and_a_frozen_matrix_go_together():
    given, weights = tokens(), matrices(None)
    routing = route(given["choices"], E, given["real"])
    inputs = (*(given[name] for name in ("residual", "x", "shares")), routing)
    frozen = DenseStack(weights["gate_up"]).at(1)
    _, pull = jax.vjp(lambda down: gated_experts(*inputs, *linears({}, frozen, down)), weights["down"][1])
    want = expected(given, weights, 1, trained=True)["d_down"]
    np.testing.assert_allclose(pull(given["d_out"])[0], want, rtol=1e-5, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate_up": (12, 8)}, r"`gate_up` must have a matrix of shape \(8, 8\) for 4 experts, got \(12, 8\)"),
        ({"gate_up": (32, 6)}, r"`gate_up` must have a matrix of shape \(32, 8\) for 4 experts, got \(32, 6\)"),
        ({"down": (32, 8)}, r"`down` must have a matrix of shape \(32, 4\) for 4 experts, got \(32, 8\)"),
        ({"down_bias": (4, 4)}, r"`down` must have biases of shape \(4, 8\), got \(4, 4\)"),
        (
            {"gate_up_a": (4, 2, 8), "gate_up_b": (4, 4, 2)},
            r"`gate_up` must have factors of .*\(4, 8, 2\), got .*\(4, 4, 2\)",
        ),
        ({"down_a": (3, 2, 4), "down_b": (3, 8, 2)}, r"`down` must have factors of .*\(4, 8, 2\), got \(3, 2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    arrays = {name: jnp.ones(shape) for name, shape in ({"gate_up": (32, 8), "down": (32, 4)} | wrong).items()}
    factors = (
        (arrays[f"{name}_a"], arrays[f"{name}_b"]) if f"{name}_a" in arrays else None for name in ("gate_up", "down")
    )
    gate_up, down = (
        ExpertLinear(arrays[name], arrays.get(f"{name}_bias"), pair)
        for name, pair in zip(("gate_up", "down"), factors, strict=True)
    )
    x, routing = jnp.ones((3, 8)), route(jnp.zeros((3, 1), jnp.int32), 4)
    with pytest.raises(InputError, match=message):
        inspect.unwrap(gated_experts)(x, x, jnp.ones((3, 1)), routing, gate_up, down)  # annotations unchecked
