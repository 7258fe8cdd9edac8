"""Tests what only a GPU shows of the kernels: more than 2^31 elements, equal results in each run, and no copies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels.attention import segment_bounds
from jaxpack.kernels.gated_activation import (
    gated_activation,
    gated_activation_backward,
    gated_activation_reference,
)
from jaxpack.kernels.rope import apply_rope, rotary_angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention

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
