"""Compares the decoding of MXFP4 with the format's own definition, by a table in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracles import quick_jit

from jaxpack.errors import InputError
from jaxpack.kernels.mxfp4 import decoded, dequantize_mxfp4

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
    got = quick_jit(lambda codes, scales: decoded(codes, scales, dtype))(
        jnp.asarray(words(codes), jnp.uint32), jnp.asarray(scales)
    )
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), oracle(codes, scales))


def test_the_smallest_and_largest_numbers_have_the_bits_of_bfloat16():
    """Some of these are smaller than the smallest normal number, which a CPU may take for zero: bits are compared."""
    scales = np.array([0, 1, 2, 253], np.uint8)[:, None]
    codes = np.tile(np.arange(32) % 16, (len(scales), 1))
    got = decoded(jnp.asarray(words(codes), jnp.uint32), jnp.asarray(scales), jnp.bfloat16)
    with np.errstate(over="ignore"):  # 4 and 6 times the largest scale are infinity
        wanted = oracle(codes, scales).astype(np.float32).view(np.uint32)  # numbers of bfloat16, too
    assert not np.any(wanted & 0xFFFF)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), wanted >> 16)


def test_each_block_of_each_row_has_its_own_scale():
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (3, 128)), rng.integers(110, 140, (3, 4)).astype(np.uint8)
    got = decoded(jnp.asarray(words(codes), jnp.uint32), jnp.asarray(scales), jnp.float32)
    np.testing.assert_array_equal(np.asarray(got, np.float64), oracle(codes, scales))
    stacked = decoded(jnp.asarray(words(codes), jnp.uint32)[None], jnp.asarray(scales)[None], jnp.float32)
    np.testing.assert_array_equal(stacked[0], got)


def stack(kind: str, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Returns random codes and scales of a stack of matrices; the scales are ordinary, or any."""
    rng = np.random.default_rng(0)
    L, O, I = shape  # noqa: E741
    codes = rng.integers(0, 2**32, (L, O, I // 8), np.uint32)
    scales = rng.integers(*{"ordinary": (2, 253), "any": (0, 256)}[kind], (L, O, I // 32)).astype(np.uint8)
    return jnp.asarray(codes), jnp.asarray(scales)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", ["ordinary", "any"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 7, 96), (2, 40, 256), (2, 96, 2880)], ids=str)
def test_the_kernel_reads_a_layer_in_place_with_the_bits_of_the_reference(shape, kind, dtype):
    codes, scales = stack(kind, shape)
    run = jax.jit(dequantize_mxfp4, static_argnums=3, static_argnames="implementation")
    for layer in range(shape[0]):
        got = run(codes, scales, layer, dtype, implementation="pallas")
        want = decoded(codes[layer], scales[layer], dtype)
        assert (got.shape, got.dtype) == (shape[1:], dtype)
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (got, want)))
        np.testing.assert_array_equal(run(codes, scales, layer, dtype, implementation="xla"), want)


@pytest.mark.parametrize("bound", [0, 1])
def test_each_first_extraordinary_scale_is_decoded_right(bound):
    """Tests the scales next to those for which the kernel takes fewer operations, and each of those at the edge."""
    codes, _ = stack("any", (1, 16, 32))
    for scale in (1, 2, 3) if bound == 0 else (251, 252, 253, 255):
        scales = jnp.full((1, 16, 1), scale, jnp.uint8)
        got = dequantize_mxfp4(codes, scales, 0, jnp.bfloat16, implementation="pallas")
        want = decoded(codes[0], scales[0], jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(want).view(np.uint16))


def test_scales_whose_offsets_pallas_cannot_compute_are_refused_or_read_without_the_kernel():
    for layers, rows in ((32, 2**20), (1, 2**20)):  # 2^31 scales in all, and 2^31 elements in one matrix
        like = (
            jax.ShapeDtypeStruct((layers, rows, 256), jnp.uint32),
            jax.ShapeDtypeStruct((layers, rows, 64), jnp.uint8),
        )
        with pytest.raises(InputError, match=r"`implementation` must be None or 'xla' for 2\^31 scales or elements"):
            jax.eval_shape(lambda *x: dequantize_mxfp4(*x, 0, jnp.bfloat16, implementation="pallas"), *like)
        assert jax.eval_shape(lambda *x: dequantize_mxfp4(*x, 0, jnp.bfloat16), *like).shape == (rows, 2048)
