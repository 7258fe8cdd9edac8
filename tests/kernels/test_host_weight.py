"""Tests that matrices in the host's memory read and write as those on the device, and are fetched piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels import host_weight
from jaxpack.kernels.host_weight import HostMatrix, HostWeight, loop_with, piece_rows
from jaxpack.kernels.weight import DenseWeight
from jaxpack.model.nf4 import quantize_nf4
from jaxpack.parallel.host_memory import abstract_pinned, host_buffer, is_pinned, numpy_view, pinned_zeros

L, O, I = 4, 40, 24  # noqa: E741
STACK = 0.3 * jax.random.normal(jax.random.key(0), (L, O, I))
FORMS = {
    "dense": DenseWeight(STACK),
    "bfloat16": DenseWeight(STACK.astype(jnp.bfloat16)),
    "nf4": quantize_nf4(STACK, (16, 24)),
    "nf4, not nested": quantize_nf4(STACK, (16, 24), 32, False),
}
all_forms = pytest.mark.parametrize("form", FORMS)


@all_forms
def test_a_layer_reads_as_on_the_device(form):
    stack = FORMS[form]
    hosted = HostWeight.of(stack)
    assert (hosted.shape, hosted.dtype, hosted.nbytes) == (stack.shape, stack.dtype, stack.nbytes)
    large = [leaf for leaf in jax.tree.leaves(hosted) if leaf.ndim > 1]
    assert large
    assert all(map(is_pinned, large))
    for layer in (0, L - 1):
        want = stack.at(layer).dense(jnp.float32)
        np.testing.assert_array_equal(hosted.at(layer).dense(jnp.float32), want)
        traced = jax.jit(lambda hosted, layer: hosted.at(layer).dense(jnp.float32))(hosted, layer)
        np.testing.assert_array_equal(traced, want)
        assert not any(map(is_pinned, jax.tree.leaves(hosted.fetch(layer))))
    past_the_end = jax.jit(lambda hosted: hosted.fetch(L + 1).at(0).dense(jnp.float32))(hosted)
    np.testing.assert_array_equal(past_the_end, stack.at(L - 1).dense(jnp.float32))
    np.testing.assert_array_equal(hosted.dense(jnp.float32), stack.dense(jnp.float32))


@all_forms
def test_a_written_layer_is_that_of_a_weight_on_the_device(form):
    stack = FORMS[form]
    hosted = HostWeight.of(jax.tree.map(lambda leaf: jnp.zeros_like(leaf), stack))
    for layer in range(L):
        hosted = hosted.write((layer, 0), STACK[layer, :16]).write((layer, 16), STACK[layer, 16:])
    for got, want in zip(jax.tree.leaves(hosted), jax.tree.leaves(stack), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@all_forms
def test_an_abstract_stack_has_a_place_in_host_memory(form):
    abstract = jax.eval_shape(lambda: FORMS[form])
    hosted = HostWeight.of(abstract)
    assert [is_pinned(leaf) for leaf in jax.tree.leaves(hosted)] == [leaf.ndim > 1 for leaf in jax.tree.leaves(hosted)]
    one = jax.eval_shape(lambda: HostWeight.of(FORMS[form]).fetch(0))
    assert jax.tree.leaves(hosted.one) == jax.tree.leaves(one)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_weight, "_PIECE_BYTES", 128 * I * 4)


@pytest.mark.parametrize("rows", [100, 128, 300, 640])
def test_a_matrix_in_pieces_reads_as_the_matrix(rows, small_pieces):
    matrix = jax.random.normal(jax.random.key(1), (rows, I))
    hosted = HostMatrix.of(DenseWeight(matrix))
    assert hosted.shape == (rows, I)
    assert is_pinned(hosted.pieces)
    assert hosted.pieces.shape[1] % 128 == 0
    np.testing.assert_array_equal(hosted.table, matrix)
    np.testing.assert_array_equal(hosted.dense(jnp.float32), matrix)
    chosen = jnp.array([[0, rows - 1]])
    np.testing.assert_array_equal(jax.jit(lambda w: w.take(chosen, jnp.float32))(hosted), matrix[chosen])
    pieces = [hosted.fetch(number) for number in range(len(hosted.pieces))]
    np.testing.assert_array_equal(jnp.concatenate(pieces)[:rows], matrix)
    np.testing.assert_array_equal(jnp.concatenate(pieces)[rows:], 0)
    hosted = hosted.write((3,), np.ones((2, I), np.float32))
    np.testing.assert_array_equal(hosted.table[3:5], 1)
    np.testing.assert_array_equal(hosted.table[5:], matrix[5:])


def test_pieces_have_about_one_size():
    for rows, columns in ((151936, 2560), (151936, 5120), (262144, 3840), (32000, 4096), (97, 48)):
        size = piece_rows(rows, columns, 2)
        assert size % 128 == 0
        count = -(-rows // size)
        assert count * size - rows <= 128 * count  # the padding
        assert count == 1 or 40e6 < size * columns * 2 < 90e6


def test_a_loop_fetches_every_slice_once_and_in_order():
    hosted = HostWeight.of(DenseWeight(STACK))

    def turn(i, fetched, seen):
        return jax.lax.dynamic_update_index_in_dim(seen, (i + 1) * fetched.at(0).dense(jnp.float32), i, 0)

    got = jax.jit(lambda hosted: loop_with(HostWeight.fetch, hosted, L, turn, jnp.zeros_like(STACK)))(hosted)
    np.testing.assert_allclose(got, STACK * jnp.arange(1, L + 1)[:, None, None])


def test_numpy_writes_to_what_a_program_reads():
    array = pinned_zeros(abstract_pinned((3, 5), jnp.float32))
    numpy_view(array)[1] = 7
    np.testing.assert_array_equal(jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device))(array)[1], 7)
    np.testing.assert_array_equal(array[1], 7)


def test_a_buffer_in_host_memory_is_filled_in_slices():
    def fill(x):
        def turn(state):
            i, buffer = state
            sent = jax.device_put(i * x, jax.memory.Space.Host)
            return i + 1, jax.lax.dynamic_update_index_in_dim(buffer, sent, i, 0, allow_negative_indices=False)

        return jax.lax.while_loop(lambda state: state[0] < 3, turn, (0, host_buffer((3, *x.shape), x.dtype)))[1]

    x = jnp.arange(4.0)
    program = jax.make_jaxpr(fill)(x)
    assert program.out_avals[0].memory_space == jax.memory.Space.Host
    np.testing.assert_array_equal(jax.jit(fill)(x), jnp.outer(jnp.arange(3.0), x))
