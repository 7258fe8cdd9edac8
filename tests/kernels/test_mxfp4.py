"""Compares the decoding of MXFP4 with the format's own definition, by a table in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracles import quick_jit

from jaxpack.kernels.mxfp4 import dequantize_mxfp4

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def oracle(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the elements of `[rows, 32 G]` in float64, from codes one by one and the scale of each block."""
    signed = np.concatenate([VALUES, -VALUES])[codes]
    return signed * np.repeat(2.0 ** (scales.astype(int) - 127), 32, axis=1)


def words(codes: np.ndarray) -> np.ndarray:
    return (codes.reshape(len(codes), -1, 8).astype(np.uint64) << (4 * np.arange(8, dtype=np.uint64))).sum(
        axis=2, dtype=np.uint64
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_code_with_every_ordinary_scale_is_exact(dtype):
    scales = np.arange(3, 253, dtype=np.uint8)[:, None]
    codes = np.tile(np.arange(32) % 16, (len(scales), 1))
    got = quick_jit(lambda codes, scales: dequantize_mxfp4(codes, scales, dtype))(
        jnp.asarray(words(codes), jnp.uint32), jnp.asarray(scales)
    )
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), oracle(codes, scales))


def test_the_smallest_and_largest_numbers_have_the_bits_of_bfloat16():
    """Some of these are smaller than the smallest normal number, which a CPU may take for zero: bits are compared."""
    scales = np.array([0, 1, 2, 253], np.uint8)[:, None]
    codes = np.tile(np.arange(32) % 16, (len(scales), 1))
    got = dequantize_mxfp4(jnp.asarray(words(codes), jnp.uint32), jnp.asarray(scales), jnp.bfloat16)
    with np.errstate(over="ignore"):  # 4 and 6 times the largest scale are infinity
        wanted = oracle(codes, scales).astype(np.float32).view(np.uint32)  # numbers of bfloat16, too
    assert not np.any(wanted & 0xFFFF)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), wanted >> 16)


def test_each_block_of_each_row_has_its_own_scale():
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (3, 128)), rng.integers(110, 140, (3, 4)).astype(np.uint8)
    got = dequantize_mxfp4(jnp.asarray(words(codes), jnp.uint32), jnp.asarray(scales), jnp.float32)
    np.testing.assert_array_equal(np.asarray(got, np.float64), oracle(codes, scales))
    stacked = dequantize_mxfp4(jnp.asarray(words(codes), jnp.uint32)[None], jnp.asarray(scales)[None], jnp.float32)
    np.testing.assert_array_equal(stacked[0], got)
