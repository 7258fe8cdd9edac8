"""Rotary embedding against float64 complex rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels.rope import apply_rope, rotary_angles


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Channel pairs (i, i + H/2) as complex numbers, times e^(i position frequency), in float64."""
    half = x.shape[-1] // 2
    pairs = x[..., :half].astype(np.complex128) + 1j * x[..., half:]
    turned = pairs * np.exp(1j * positions[..., None, None] * frequencies.astype(np.float64))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [2, 20, 64])
def test_pairs_turn_by_position_times_frequency(heads, head_dim):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, heads, head_dim)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 7)).astype(np.int32)
    frequencies = rng.random(head_dim // 2).astype(np.float32)
    out = apply_rope(jnp.asarray(x), *rotary_angles(jnp.asarray(positions), jnp.asarray(frequencies)))
    # float32 angles up to 1,000 are rounded by up to 3e-5.
    np.testing.assert_allclose(out, rotate(x, positions, frequencies), atol=2e-4)


def test_the_gradient_turns_back():
    rng = np.random.default_rng(0)
    x, dout = rng.standard_normal((2, 2, 7, 3, 16)).astype(np.float32)
    positions = rng.integers(0, 100, (2, 7)).astype(np.int32)
    frequencies = rng.random(8).astype(np.float32)
    angles = rotary_angles(jnp.asarray(positions), jnp.asarray(frequencies))
    _, pull = jax.vjp(lambda x: apply_rope(x, *angles), jnp.asarray(x))
    np.testing.assert_allclose(pull(jnp.asarray(dout))[0], rotate(dout, -positions, frequencies), atol=2e-5)


def test_bfloat16_heads_are_turned_in_float32():
    # In bfloat16 arithmetic positions past 256 are rounded, and the error would be of the order of x itself.
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 64), jnp.float32).astype(jnp.bfloat16)
    angles = rotary_angles(jnp.array([[257]]), jnp.ones(32))
    out = apply_rope(x, *angles)
    assert out.dtype == jnp.bfloat16
    expected = rotate(np.asarray(x, np.float64), np.array([[257]]), np.ones(32))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-6)  # one rounding
