"""Tests DoRA's norms against sums in float64, and the derivative of scaled channels against that of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels.magnitude import row_norms, scale_channels
from jaxpack.model.nf4 import quantize_nf4

O, I, R = 24, 64, 5  # noqa: E741


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((O, I), (R, I), (O, R), (2, I))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize("four_bits", [False, True])
def test_norms_are_those_of_the_rows_of_the_adapted_weight(arrays, dtype, tolerance, four_bits):
    # bfloat16 rounds the factors by 2^-9 of each element; the norms are sums of squares, in which this averages out.
    matrix, a, b, x = map(jnp.asarray, arrays)
    weight = quantize_nf4(matrix, (O,)) if four_bits else matrix.astype(dtype)
    dense = np.asarray(weight.dense(dtype) if four_bits else weight, np.float64)
    whole = dense + np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    found = jax.jit(row_norms)(weight, a, b, x.astype(dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.linalg.norm(whole, axis=1), rtol=tolerance)


def test_norms_have_no_gradient_and_a_row_of_zeros_has_one(arrays):
    matrix, a, b, x = map(jnp.asarray, arrays)
    gradients = jax.grad(lambda *given: row_norms(*given, x).sum(), argnums=(0, 1, 2))(matrix, a, b)
    assert not any(np.any(gradient) for gradient in gradients)
    nothing = row_norms(jnp.zeros((O, I)), a, jnp.zeros((O, R)), x)
    assert np.all(np.isfinite(0 / nothing))


@pytest.mark.parametrize("name", [None, "heads"])
def test_the_derivative_of_scaled_channels_is_that_of_the_product(arrays, name):
    y, d = jnp.asarray(arrays[0].reshape(2, 3, -1)), jnp.asarray(arrays[0][::-1].reshape(2, 3, -1))
    scale = jnp.linspace(0.5, -1.5, y.shape[-1])
    plain, pull_plain = jax.vjp(lambda y, scale: y * scale[None, None], y, scale)
    found, pull = jax.vjp(lambda y, scale: scale_channels(y, scale, name), y, scale)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    for got, want in zip(pull(d), pull_plain(d), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    zero = scale.at[3].set(0)
    d_y, d_scale = jax.vjp(lambda y, scale: scale_channels(y, scale, name), y, zero)[1](d)
    assert np.all(np.isfinite(d_scale))
    assert not d_y[..., 3].any()
