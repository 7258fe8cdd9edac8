"""Compares the norm and its derivative with float64."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from kernels import oracles
from kernels.oracles import assert_as_good_as_plain_bfloat16, exactly

from jaxpack.errors import InputError
from jaxpack.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-3
NAMES = ("out", "dx", "dscale")


def inputs(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, shape[-1:], shape)]


def results(f, x, scale, d_out):
    out, pull = jax.vjp(lambda x, scale: f(x, scale, eps=EPS), x, scale)
    return dict(zip(NAMES, (out, *pull(d_out)), strict=True))


def exact_results(x, scale, d_out):
    x, scale, d_out = map(exactly, (x, scale, d_out))
    dx, dscale = oracles.rms_norm_gradients(x, scale, EPS, d_out)
    return {"out": oracles.rms_norm(x, scale, EPS), "dx": dx, "dscale": dscale}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("f", [rms_norm, rms_norm_reference])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 8), (2, 7, 48)])
def test_output_and_gradients(shape, f):
    given = inputs(shape)
    got, want = results(f, *given), exact_results(*given)
    for name in NAMES:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)


def test_bfloat16_is_as_good_as_plain_bfloat16():
    def plain(x, scale, eps):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(eps, x.dtype)) * scale[None]

    given = inputs((256, 64), jnp.bfloat16)
    got, other, want = results(rms_norm, *given), results(plain, *given), exact_results(*given)
    for name in NAMES:
        assert_as_good_as_plain_bfloat16(got[name], other[name], want[name], name)


def test_a_row_of_zeros_and_a_large_row():
    x = jnp.stack([jnp.zeros(8), jnp.full(8, 3e18)])
    got = results(rms_norm, x, jnp.ones(8), jnp.ones((2, 8)))
    assert all(np.all(np.isfinite(y)) for y in got.values())
    np.testing.assert_allclose(got["out"][1], 1, rtol=1e-6)


def test_only_the_input_is_kept():
    x, scale, _ = inputs((4, 256), jnp.bfloat16)
    _, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=EPS), x, scale)
    kept = [y for y in jax.tree.leaves(pull) if y.size == x.size]
    assert [y.dtype for y in kept] == [jnp.bfloat16]


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own check
    with pytest.raises(InputError, match=r"`scale` must have shape \(8,\), got \(4,\)"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(4), eps=EPS)
