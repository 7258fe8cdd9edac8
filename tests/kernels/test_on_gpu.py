"""Tests what only a GPU shows of the kernels: more than 2^31 elements, equal results in each run, and no copies."""

import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.constants import Activation
from jaxpack.kernels.attention import segment_bounds
from jaxpack.kernels.gated_activation import (
    gated_activation,
    gated_activation_backward,
    gated_activation_reference,
)
from jaxpack.kernels.gated_experts import ExpertLinear, gated_experts
from jaxpack.kernels.grouped_matmul import grouped_gated, grouped_matmul
from jaxpack.kernels.rope import apply_rope, rotary_angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention
from jaxpack.kernels.routing import route
from jaxpack.kernels.weight import DenseStack

pytestmark = pytest.mark.gpu


def test_swiglu_of_more_than_2_to_the_31_elements():
    rows, features = 135_168, 8192  # gate and up: 2.2e9 elements, 4.1 GiB
    boundary = 2**31 // (2 * features)
    around = (16, boundary // 2, boundary, rows - 16)
    looked_at = jnp.concatenate([jnp.arange(row - 16, row + 16) for row in around])

    @jax.jit
    def make(key):
        bits = jax.random.bits(key, (rows, 2 * features), jnp.uint8)
        return ((bits.astype(jnp.int16) - 128) / 32).astype(jnp.bfloat16)

    gate_up = make(jax.random.key(0))
    out = gated_activation(gate_up, implementation="pallas")
    want = gated_activation_reference(gate_up[looked_at], None, "silu")
    np.testing.assert_array_less(jnp.abs(out[looked_at] - want), 2**-7 * jnp.abs(want) + 1e-6)
    d_gate_up, _, product = gated_activation_backward(gate_up, None, out, with_product=True, implementation="pallas")
    np.testing.assert_array_equal(product[looked_at], out[looked_at])
    _, pull = jax.vjp(lambda x: gated_activation_reference(x, None, "silu"), gate_up[looked_at])
    (want,) = pull(out[looked_at])
    np.testing.assert_array_less(jnp.abs(d_gate_up[looked_at] - want), 2**-7 * jnp.abs(want) + 1e-5)


def attention_inputs(dtype=jnp.bfloat16, T=4096):
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.arange(1, T), 30, replace=False))
    ids = jnp.asarray(1 + np.searchsorted(ends, np.arange(T), side="right"), jnp.int32)[None]
    qkv = jax.random.normal(jax.random.key(0), (1, T, 32 + 16, 128)).astype(dtype)
    angles = rotary_angles(jnp.arange(T)[None], 1e6 ** -(jnp.arange(64) / 64))
    return qkv, angles, segment_bounds(ids)


@pytest.mark.parametrize("normed", [False, True], ids=["rope", "norm and rope"])
def test_attention_is_the_same_in_every_run(normed):
    qkv, angles, bounds = attention_inputs()
    norms = HeadNorms(*jnp.ones((2, 128))) if normed else None

    @jax.jit
    def gradients(qkv, norms):
        def loss(qkv, norms):
            out = rotary_attention(qkv, angles, bounds, num_heads=32, norms=norms, implementation="pallas")
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)(qkv, norms)

    first = jax.tree.leaves(gradients(qkv, norms))
    for _ in range(20):
        for got, want in zip(jax.tree.leaves(gradients(qkv, norms)), first, strict=True):
            np.testing.assert_array_equal(got, want)


def copies(compiled: jax.stages.Compiled, num_elements: int) -> list[str]:
    """Returns the instructions of a compiled program that copy an array of at least `num_elements` elements."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.match(
            r"\s*(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* (copy|copy-start|concatenate|transpose|slice)\(", line
        )
        if match and np.prod([int(size) for size in match[1].split(",")]) >= num_elements:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("normed", [False, True], ids=["rope", "norm and rope"])
def test_between_projections_nothing_is_copied(normed):
    _, angles, bounds = attention_inputs()
    weight = jnp.ones((48 * 128, 256), jnp.bfloat16)
    norms = HeadNorms(*jnp.ones((2, 128))) if normed else None
    x = jnp.ones((1, 4096, 256), jnp.bfloat16)

    def loss(x, weight, norms):
        qkv = jnp.einsum("BTI,OI->BTO", x, weight).reshape(1, 4096, 48, 128)
        out = rotary_attention(qkv, angles, bounds, num_heads=32, norms=norms, implementation="pallas")
        out = jnp.einsum("BTO,OI->BTI", out.reshape(1, 4096, -1), weight[: 32 * 128])
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, weight, norms).compile()
    assert not copies(compiled, 4096 * 8 * 128)


def test_rope_is_in_place_where_q_and_k_are_given_away():
    _, angles, _ = attention_inputs()
    q, k = jnp.ones((1, 4096, 32, 128), jnp.bfloat16), jnp.ones((1, 4096, 8, 128), jnp.bfloat16)
    op = jax.jit(lambda q, k: apply_rope(q, k, angles, implementation="pallas"), donate_argnums=(0, 1))
    compiled = op.lower(q, k).compile()
    assert not copies(compiled, k.size)
    assert compiled.memory_analysis().alias_size_in_bytes == q.nbytes + k.nbytes


def choices_of(num_tokens: int, num_experts: int, C: int) -> jax.Array:
    """Draws C different experts for each token; some experts get few tokens, and the first one gets none."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((num_tokens, num_experts - 1)) * np.arange(1, num_experts), axis=1)
    return jnp.asarray(1 + order[:, :C], jnp.int32)


def test_a_layer_of_experts_is_read_from_a_stack_of_more_than_2_to_the_31_elements():
    layers, E, O, I = 66, 8, 2048, 2048  # noqa: E741 # layer 64 begins at element 2^31, and layer 32 at byte 2^31

    @jax.jit
    def make(key):
        bits = jax.random.bits(key, (layers, E, O, I), jnp.uint8)
        return ((bits.astype(jnp.int16) - 128) / 128).astype(jnp.bfloat16)

    stack = make(jax.random.key(0))
    routing = route(choices_of(500, E, 2), E)
    x = jax.random.normal(jax.random.key(1), (500, I)).astype(jnp.bfloat16)
    run = jax.jit(grouped_matmul, static_argnames=("from_tokens", "transposed", "implementation"))
    for transposed in (False, True):
        options = {"from_tokens": True, "transposed": transposed}
        for layer in (0, 31, 32, 63, 64, 65):
            got = run(x, stack, routing, layer=layer, implementation="pallas", **options)
            want = run(x, stack[layer][None], routing, layer=0, implementation="xla", **options)
            error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
            np.testing.assert_array_less(error, 2**-7 * jnp.abs(want.astype(jnp.float32)) + 2**-7)


def expert_inputs(num_tokens=4096, E=32, C=4, D=512, F=256, rank=16):
    """Returns tokens, shares, factors, the experts of each token, and frozen stacks of two layers."""
    shapes = {
        "x": (num_tokens, D),
        "d_out": (num_tokens, D),
        "gate_up_factors": ((E, rank, D), (E, 2 * F, rank)),
        "down_factors": ((E, rank, F), (E, D, rank)),
        "stacks": ((2, E * 2 * F, D), (2, E * D, F)),
    }
    keys = iter(jax.random.split(jax.random.key(1), 8))
    draw = lambda shape: (0.1 * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)  # noqa: E731
    is_shape = lambda x: isinstance(x, tuple) and isinstance(x[0], int)  # noqa: E731
    arrays = jax.tree.map(draw, shapes, is_leaf=is_shape)
    shares = jax.random.uniform(jax.random.key(0), (num_tokens, C))
    return arrays | {"shares": shares, "choices": choices_of(num_tokens, E, C)}


@jax.jit
def expert_gradients(given):
    routing = route(given["choices"], given["gate_up_factors"][0].shape[0])
    gate_up, down = (DenseStack(stack).at(1) for stack in given["stacks"])

    def f(x, shares, *factors):
        linears = (ExpertLinear(weight, None, pair) for weight, pair in zip((gate_up, down), factors, strict=True))
        return gated_experts(x, x, shares, routing, *linears, implementation="pallas")

    out, pull = jax.vjp(f, given["x"], given["shares"], given["gate_up_factors"], given["down_factors"])
    return out, *pull(given["d_out"])


@pytest.mark.parametrize("activation", get_args(Activation))
def test_a_product_of_gate_and_up_has_the_bits_of_two_kernels(activation):
    """The backward pass computes the product again, in a third kernel, and must find what the forward pass used."""
    given = expert_inputs()
    (a, b), stack = given["gate_up_factors"], given["stacks"][0]
    matrices = stack.reshape(2, len(b), b.shape[1], -1)
    routing = route(given["choices"], len(b))
    bias = 0.1 * jax.random.normal(jax.random.key(2), b.shape[:2]).astype(jnp.bfloat16)
    options = {"from_tokens": True, "implementation": "pallas"}
    xa = grouped_matmul(given["x"], a[None], routing, **options)
    options |= {"layer": 1, "bias": bias, "more": (xa, b)}
    gate_up = grouped_matmul(given["x"], matrices, routing, **options)
    want = gated_activation(gate_up, activation=activation, implementation="pallas")
    *_, again = gated_activation_backward(
        gate_up, None, want, activation=activation, with_product=True, implementation="pallas"
    )
    np.testing.assert_array_equal(again, want)
    for with_gate_up in (False, True):
        product, kept = grouped_gated(
            given["x"], matrices, routing, activation=activation, with_gate_up=with_gate_up, **options
        )
        np.testing.assert_array_equal(product, want)
        if kept is not None:
            np.testing.assert_array_equal(kept, gate_up)


def test_experts_are_the_same_in_every_run():
    given = expert_inputs()
    first = jax.tree.leaves(expert_gradients(given))
    for _ in range(20):
        for got, want in zip(jax.tree.leaves(expert_gradients(given)), first, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_token_that_goes_to_other_experts_changes_no_other_token_in_the_last_bit():
    """The other tokens then lie in other rows of their blocks, and in other blocks."""
    given = expert_inputs()
    before = expert_gradients(given)
    for token in (0, 2000):
        moved = given["choices"].at[token].set((given["choices"][token] + 1) % 32)
        after = expert_gradients(given | {"choices": moved})
        others = jnp.arange(len(moved)) != token
        for got, want in zip(after[:3], before[:3], strict=True):  # the result, and the gradients of x and of shares
            np.testing.assert_array_equal(got[others], want[others])
        assert (after[0][token] != before[0][token]).any()
