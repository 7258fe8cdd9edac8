"""Compares the fused path from projection to attention output with its parts, which have their own oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracles import rows_of

from jaxpack.errors import InputError
from jaxpack.kernels.attention import attention, segment_bounds
from jaxpack.kernels.rope import apply_rope, norm_rope, rotary_angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention

OPTIONS = {"plain": {}, "window": {"window": 9}, "softcap": {"softcap": 3.0}, "sinks": {"sinks": True}}


def of_parts(qkv, norms, angles, bounds, num_heads, **options):
    kv_heads = (qkv.shape[2] - num_heads) // 2
    q, k, v = jnp.split(qkv, [num_heads, num_heads + kv_heads], axis=2)
    if norms is None:
        q, k = apply_rope(q, k, angles, implementation="xla")
    else:
        q, k = norm_rope(q, k, *norms, angles, eps=1e-6, implementation="xla")
    return attention(q, k, v, bounds, implementation="xla", **options)


CASES = [
    ("xla", 128, 4, 2, "sinks", True),
    ("pallas", 128, 4, 2, "plain", True),
    pytest.param("pallas", 150, 3, 1, "plain", False, marks=pytest.mark.slow),
    pytest.param("pallas", 150, 2, 2, "window", True, marks=pytest.mark.slow),
    pytest.param("pallas", 128, 2, 1, "softcap", False, marks=pytest.mark.slow),
    ("pallas", 128, 4, 2, "sinks", False),
]


@pytest.mark.parametrize(("implementation", "T", "num_heads", "kv_heads", "option", "normed"), CASES)
def test_equals_its_parts(implementation, T, num_heads, kv_heads, option, normed):
    rng = np.random.default_rng(0)
    H = 24

    def some(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    qkv, d_out = some(2, T, num_heads + 2 * kv_heads, H), some(2, T, num_heads, H)
    norms = HeadNorms(1 + some(H), 1 + some(H)) if normed else None
    sinks = some(num_heads) if option == "sinks" else None
    options = {**OPTIONS[option], "sinks": sinks}
    ids = jnp.asarray(rows_of([40, 1, 60], [T], length=T))
    angles = rotary_angles(jnp.asarray(rng.integers(0, 50, (2, T)), jnp.int32), jnp.asarray(rng.random(8, np.float32)))
    rest = dict(angles=angles, bounds=segment_bounds(ids), num_heads=num_heads)

    def fused(qkv, norms, sinks):
        given = {**options, "sinks": sinks}
        return rotary_attention(qkv, norms=norms, eps=1e-6, implementation=implementation, **rest, **given)

    def parts(qkv, norms, sinks):
        return of_parts(qkv, norms, **rest, **{**options, "sinks": sinks})

    results = []
    for op in (fused, parts):
        out, pull = jax.vjp(op, qkv, norms, sinks)
        results.append(jax.tree.leaves((out, pull(d_out))))
    assert len(results[0]) == 2 + 2 * normed + (sinks is not None)
    for got, want in zip(*results, strict=True):
        # The gradient of a scale sums some 600 terms of order 1.
        np.testing.assert_allclose(got, want, atol=1e-5 if got.ndim == 4 else 2e-4)


@pytest.mark.parametrize("heads", [4, 5, 7])
def test_heads_that_do_not_group_are_refused(heads):
    with pytest.raises(InputError, match=rf"`qkv` must hold `num_heads` \+ 2 K heads.*got {heads} heads for 4"):
        rotary_attention(
            jnp.ones((1, 8, heads, 16)),
            rotary_angles(jnp.zeros((1, 8), jnp.int32), jnp.ones(8)),
            segment_bounds(jnp.ones((1, 8), jnp.int32)),
            num_heads=4,
        )


def test_gradients_under_jit_and_checkpoint_are_the_same():
    qkv = jax.random.normal(jax.random.key(0), (1, 128, 8, 16))
    angles = rotary_angles(jnp.arange(128)[None], jnp.ones(8))
    bounds = segment_bounds(jnp.ones((1, 128), jnp.int32))
    op = functools.partial(rotary_attention, angles=angles, bounds=bounds, num_heads=4, implementation="pallas")
    plain = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(op(x)))))(qkv)
    again = jax.jit(jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.square(op(x))))))(qkv)
    np.testing.assert_array_equal(plain, again)
