"""Checks that NaN and infinity in one document reach no other document, and that their own document keeps them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracles import quick_jit

from jaxpack.kernels.attention import attention, segment_bounds
from jaxpack.kernels.nonfinite import contain, contain_reference
from jaxpack.kernels.rope import rotary_angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention

BAD = {"nan": jnp.nan, "inf": jnp.inf, "-inf": -jnp.inf}
N, K = 4, 2


def rows(T, *lengths):
    ids = np.zeros((1, T), np.int32)
    ids[0, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return jnp.asarray(ids)


def some(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}], ids=["plain", "window", "softcap"])
@pytest.mark.one_in(6)
def test_cases_a_value_that_is_not_finite_stays_in_its_document(implementation, bad, options):
    ids = rows(150, 40, 1, 70)
    op = quick_jit(functools.partial(attention, bounds=segment_bounds(ids), implementation=implementation, **options))
    arrays = some(1, 150, N, 24), some(1, 150, K, 24), some(1, 150, K, 24)
    good = np.asarray(op(*arrays))
    for which in (0, 2, 3):
        hit = np.asarray(ids == which)
        others = ~hit & np.asarray(ids > 0)
        for index in (1, 2):
            changed = list(arrays)
            changed[index] = jnp.where(jnp.asarray(hit)[:, :, None, None], BAD[bad], arrays[index])
            got = np.asarray(op(*changed))
            np.testing.assert_array_equal(got[others], good[others])
            if which and index == 2:
                assert np.isnan(got[hit]).all()  # The document itself gets no finite number, as it would alone.


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.one_in(2)
def test_cases_a_token_that_is_not_finite_stays_in_its_document_after_rope(implementation, normed):
    ids = rows(128, 30, 50, 20)
    angles = rotary_angles(jnp.arange(128, dtype=jnp.int32)[None], jnp.asarray([1.0, 0.1]))
    norms = HeadNorms(1 + some(24), 1 + some(24)) if normed else None

    def op(qkv):
        return rotary_attention(
            qkv, angles, segment_bounds(ids), num_heads=N, norms=norms, eps=1e-6, implementation=implementation
        )

    op, qkv = quick_jit(op), some(1, 128, N + 2 * K, 24)
    good = np.asarray(op(qkv))
    hit = np.asarray(ids == 2)
    for heads in (slice(None), slice(N + K, None)):  # the whole token, or its values only
        got = np.asarray(op(qkv.at[:, 30:80, heads].set(jnp.nan)))
        np.testing.assert_array_equal(got[~hit], good[~hit])
        assert np.isnan(got[hit]).all()


@pytest.mark.parametrize("first_key", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_moves_what_the_reference_moves(first_key, dtype):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((2, 128, 3, 80)), dtype) for _ in range(2))
    for token, channel, value in ((0, 79, jnp.nan), (5, 0, jnp.inf), (127, 64, -jnp.inf)):
        v = v.at[1, token, 2, channel].set(value)
    got_k, got_v = contain(k, v, 2, first_key=first_key, first_value=1)
    keys = slice(first_key, first_key + 2)
    want_k, want_v = contain_reference(k[:, :, keys], v[:, :, 1:])
    np.testing.assert_array_equal(np.float32(got_k[:, :, keys]), np.float32(want_k))
    np.testing.assert_array_equal(np.float32(got_v[:, :, 1:]), np.float32(want_v))
    np.testing.assert_array_equal(np.float32(got_v[:, :, 0]), np.float32(v[:, :, 0]))
    assert int(jnp.isnan(got_k).sum()) == 3 * 80
    assert bool(jnp.isfinite(got_v).all())
