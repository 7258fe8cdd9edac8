"""No kernel reads or writes outside of its arrays, which nothing else would show on a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from kernels.guards import guard_launches
from kernels.oracles import rows_of

from jaxpack.kernels import attention as attention_module
from jaxpack.kernels import extended as extended_module
from jaxpack.kernels import gated_activation as gated_module
from jaxpack.kernels import grouped_matmul as grouped_module
from jaxpack.kernels import rope as rope_module
from jaxpack.kernels.attention import attention, segment_bounds
from jaxpack.kernels.gated_activation import gated_activation_backward
from jaxpack.kernels.rope import apply_rope, norm_rope, rotary_angles
from jaxpack.kernels.routing import route

# Only on a GPU can a kernel reach memory beyond an array: an interpreted kernel knows where arrays end.
pytestmark = pytest.mark.slow

DTYPES = [jnp.float32, jnp.bfloat16]


def normal(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(dtype, monkeypatch):
    T = 24
    names = guard_launches(monkeypatch, rope_module)
    q, k, scale = normal((2, T, 6, 80), dtype), normal((2, T, 2, 80), dtype), normal((80,), dtype)
    angles = rotary_angles(jnp.broadcast_to(jnp.arange(T), (2, T)), jnp.ones(24))
    _, pull = jax.vjp(functools.partial(apply_rope, angles=angles, implementation="pallas"), q, k)
    pull((q, k))
    op = functools.partial(norm_rope, angles=angles, eps=1e-6, implementation="pallas")
    _, pull = jax.vjp(op, q, k, scale, scale)
    pull((q, k))
    assert names == ["rope", "rope_backward", "norm_rope", "norm_rope_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 640)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated_activation(activation, shape, dtype, monkeypatch):
    names = guard_launches(monkeypatch, gated_module)
    gate, up, d_out = (normal(shape, dtype, seed) for seed in range(3))
    for inputs in ((gate, up), (jnp.concatenate([gate, up], axis=-1), None)):
        gated_module.gated_activation(*inputs, activation=activation, implementation="pallas")
        op = functools.partial(gated_activation_backward, *inputs, d_out, activation=activation, with_product=True)
        op(implementation="pallas")
    assert names == 2 * [f"gated_{activation}", f"gated_{activation}_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels", "rank"), [(16, 16, 16), (48, 400, 64), (64, 256, 0)])
def test_extended(tokens, channels, rank, dtype, monkeypatch):
    names = guard_launches(monkeypatch, extended_module)
    x, scale, a = (normal(shape, dtype) for shape in ((tokens, channels), (channels,), (rank, channels)))
    a *= 0.01  # so that no sum equals the guard value by chance
    options = {"implementation": "pallas"}
    extended = extended_module.norm_append_lora_input(x, scale, a, eps=1e-6, **options)
    for with_scale in (False, True):
        inputs = extended, extended, x, scale, a, x
        extended_module.norm_append_lora_input_backward(*inputs, eps=1e-6, with_scale=with_scale, **options)
    extended_module.append_lora_input(x, a, **options)
    extended_module.add_extended(extended, a.T, 0.1 * x, **options)
    backward = 2 * ["norm_append_lora_input_backward"]
    assert names == ["norm_append_lora_input", *backward, "append_lora_input", *["add_extended"] * (rank > 0)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "options"),
    [
        (4, 2, 16, {}),
        (3, 1, 80, {"window": 40}),
        (2, 1, 16, {"max_segments": 1}),
        (4, 1, 16, {"sinks": True, "softcap": 5.0}),
        (1, 1, 256, {}),
    ],
    ids=str,
)
def test_attention(heads, kv_heads, head_dim, options, monkeypatch):
    dtype = jnp.bfloat16
    names = guard_launches(monkeypatch, attention_module)
    T = 1024 if "max_segments" in options else 128
    ids = jnp.asarray(rows_of([T], [T // 2 + 3, T // 2 - 20], length=T))
    q, k = normal((2, T, heads, head_dim), dtype), normal((2, T, kv_heads, head_dim), dtype)
    sinks = normal((heads,)) if "sinks" in options else None
    op = functools.partial(
        attention, bounds=segment_bounds(ids), implementation="pallas", **{**options, "sinks": sinks}
    )
    out, pull = jax.vjp(op, q, k, k)
    pull(out)
    assert names == ["attention", "attention_backward_q", "attention_backward_kv"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "experts", "I", "O"), [(33, 5, 32, 48), (150, 2, 80, 16), (2, 7, 16, 16)])
def test_grouped_matmul(tokens, experts, I, O, dtype, monkeypatch):  # noqa: E741
    names = guard_launches(monkeypatch, grouped_module)
    # The last expert, whose matrix lies beside the guards, has tokens, and so have the first and the last token.
    choices = jnp.stack([jnp.arange(tokens) % experts, (jnp.arange(tokens) + 1) % experts], axis=1)
    routing = route(choices, experts, jnp.arange(tokens) % 7 != 1)
    rows = routing.copies.shape[0]
    small = lambda *shape: 0.01 * normal(shape, dtype)  # noqa: E731 # so that no sum equals the guard value by chance
    factors = normal((experts, O, 16), dtype), normal((experts, 16, O), dtype)
    more = small(rows, 16)
    for layer in (0, 2):
        for from_tokens, length in ((True, tokens), (False, rows)):
            x, options = small(length, I), {"layer": layer, "from_tokens": from_tokens}
            options |= {"implementation": "pallas"}
            grouped_module.grouped_matmul(
                x, normal((3, experts, O, I), dtype), routing, more=(more, factors[0]), **options
            )
            grouped_module.grouped_matmul(
                x, normal((3, experts, I, O), dtype), routing, more=(more, factors[1]), transposed=True, **options
            )
    for d_from_tokens, x_from_tokens in ((False, False), (True, False), (False, True), (True, True)):
        d, x = (small(tokens if given else rows, C) for given, C in ((d_from_tokens, O), (x_from_tokens, I)))
        grouped_module.grouped_outer(
            *(d, x, routing), d_from_tokens=d_from_tokens, x_from_tokens=x_from_tokens, implementation="pallas"
        )
    assert names == 4 * ["grouped_matmul", "grouped_matmul_transposed"] + 4 * ["grouped_outer"]
