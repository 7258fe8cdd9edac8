"""Tests that matrices are quantised as bitsandbytes does, one projection at a time, and read as they were stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpack.errors import InputError
from jaxpack.kernels.dequantize import GROUP
from jaxpack.kernels.dynamic_map import dynamic_map
from jaxpack.kernels.weight import DenseWeight
from jaxpack.model.linear import Linear
from jaxpack.model.nf4 import NF4Weight, nf4_store, quantize_nf4

ROWS, COLUMNS = (48, 16, 24), 192


def draw(*shape: int, dtype: str = "bfloat16") -> jax.Array:
    return (0.05 * jax.random.normal(jax.random.key(sum(shape)), shape)).astype(dtype)


def leaves(weight: NF4Weight) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in weight.arrays._asdict().items() if array is not None}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("block_size", [32, 64, 512, 4096])
def test_the_codes_are_those_of_bitsandbytes(block_size, dtype, nested):
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    matrix = draw(sum(ROWS), COLUMNS, dtype=dtype)
    got = leaves(quantize_nf4(matrix, ROWS, block_size, nested))
    places = quantize_nf4(matrix, ROWS, block_size, nested).places
    for i, (row, block, group) in enumerate(places.starts):
        part = torch.from_numpy(np.array(matrix[row : row + ROWS[i]], np.float32)).to(getattr(torch, dtype))
        codes, state = functional.quantize_4bit(
            part, blocksize=block_size, quant_type="nf4", compress_statistics=nested
        )
        mine = got["codes"][0, row : row + ROWS[i]].view(np.uint8)
        np.testing.assert_array_equal(mine.reshape(-1), codes.numpy().reshape(-1))
        absmax = got["absmax"][0, block : block + places.blocks[i]]
        if not nested:
            np.testing.assert_array_equal(absmax, state.absmax.numpy())
            continue
        np.testing.assert_allclose(got["means"][0, i], float(state.offset), rtol=1e-6)
        # The CPU build of bitsandbytes looks codes up approximately: where two values are nearly as far, it may take
        # the other one. Neither is farther from the true magnitude than the other by more than 1 part in 10,000.
        scales = np.repeat(got["scales"][0, group : group + places.groups[i]], GROUP)[: len(absmax)]
        mine = dynamic_map()[absmax] * scales + got["means"][0, i]
        theirs = functional.dequantize_blockwise(state.absmax, state.state2).numpy() + float(state.offset)
        true = np.abs(np.asarray(part.float())).reshape(-1)
        true = np.pad(true, (0, -len(true) % block_size)).reshape(-1, block_size).max(axis=1)
        assert np.abs(np.abs(mine - true) - np.abs(theirs - true)).max() < 1e-4 * true.mean()
        assert np.mean(absmax != state.absmax.numpy()) < 0.1 or len(absmax) == 1


@pytest.mark.parametrize("nested", [True, False])
def test_a_stack_written_a_projection_at_a_time_is_the_stack_quantised_at_once(nested):
    stack = draw(3, sum(ROWS), COLUMNS)
    want = quantize_nf4(stack, ROWS, 64, nested)
    weight = jax.tree.map(jnp.zeros_like, want)
    write = jax.jit(lambda weight, start, rows: weight.write(start, rows))
    for layer in (2, 0, 1):
        for (row, *_), size in zip(want.places.starts, ROWS, strict=True):
            start = jnp.int32(layer), jnp.int32(row)
            weight = write(weight, start, stack[layer, row : row + size].astype(jnp.float32))
    for name, array in leaves(want).items():
        np.testing.assert_array_equal(leaves(weight)[name], array, err_msg=name)
    whole = jax.tree.map(jnp.zeros_like, want)
    for layer in range(3):
        whole = write(whole, (jnp.int32(layer), jnp.int32(0)), stack[layer])
    for name, array in leaves(want).items():
        np.testing.assert_array_equal(leaves(whole)[name], array, err_msg=name)


def test_a_stack_reads_as_its_layers_and_keeps_its_dtype():
    stack = draw(2, sum(ROWS), COLUMNS)
    weight = quantize_nf4(stack, ROWS)
    assert (weight.shape, weight.at(1).shape, weight.dtype) == (stack.shape, stack.shape[1:], stack.dtype)
    dense = weight.dense(jnp.float32)
    np.testing.assert_array_equal(dense[1], weight.at(1).dense(jnp.float32))
    single = quantize_nf4(stack[1], ROWS)
    assert single.shape == stack.shape[1:]
    np.testing.assert_array_equal(single.dense(jnp.float32), dense[1])
    # NF4 is off by 9.2 % on normal weights, as published.
    error = jnp.linalg.norm(dense - stack.astype(jnp.float32)) / jnp.linalg.norm(stack.astype(jnp.float32))
    assert 0.085 < float(error) < 0.1


def test_a_weight_takes_little_more_than_half_a_byte_for_each_element():
    stack = jax.eval_shape(lambda: quantize_nf4(jnp.zeros((2, 1024, 4096), jnp.bfloat16), (1024,)))
    assert stack.nbytes / (2 * 1024 * 4096) == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)
    flat = jax.eval_shape(lambda: quantize_nf4(jnp.zeros((2, 1024, 4096), jnp.bfloat16), (1024,), 64, False))
    assert flat.nbytes / (2 * 1024 * 4096) == pytest.approx(0.5 + 4 / 64, rel=1e-3)


def test_a_matrix_of_zeros_stays_zero():
    weight = quantize_nf4(jnp.zeros((16, 64), jnp.bfloat16), (16,))
    np.testing.assert_array_equal(weight.dense(jnp.float32), 0)


def test_rows_are_those_of_the_dense_matrix():
    """Whole projections are decoded alone, any other rows with the matrix."""
    weight = quantize_nf4(draw(3, sum(ROWS), COLUMNS), ROWS).at(2)
    dense = weight.dense(jnp.float32)
    starts = np.cumsum([0, *ROWS])
    for first, size in [*zip(starts.tolist(), ROWS, strict=False), (3, 9), (0, sum(ROWS)), (ROWS[0], 5)]:
        np.testing.assert_array_equal(weight.dense_rows(first, size, jnp.float32), dense[first : first + size])


def test_only_whole_projections_are_written():
    weight = quantize_nf4(draw(2, sum(ROWS), COLUMNS), ROWS)
    with pytest.raises(
        InputError, match=r"`part` must have the rows of a projection, one of \[16, 24, 48\], got \[8\]"
    ):
        weight.write((0, 0), draw(8, COLUMNS))


def test_the_store_keeps_embeddings_and_odd_matrices_dense():
    store = nf4_store()
    linear = Linear(64, {"one": 32}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert isinstance(store(draw(32, 64), nnx.Module()), DenseWeight)
    assert isinstance(store(draw(2, 32, 20), linear), DenseWeight)
    assert isinstance(store(draw(2, 32, 64), linear), NF4Weight)
