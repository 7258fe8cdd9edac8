"""Makes 16-bit matrices from 4-bit codes, with an adapter's factor appended in the same pass.

The format is bitsandbytes' NF4 (https://arxiv.org/abs/2305.14314). The elements of a matrix `[O, I]`, row by row, are
cut into blocks. Each element is a code of 4 bits, the place of a value in `NF4_VALUES`, times the largest magnitude of
its block. Nested, these magnitudes are codes of 8 bits themselves: of 256 blocks in a row, each magnitude is a value of
a second table times a scale, plus the matrix' mean magnitude.

A matrix here may consist of several projections, one below the other, each quantised on its own. Blocks may cross the
end of a row, but not the end of a projection.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8, UInt32

from jaxpack.constants import Implementation
from jaxpack.errors import InputError
from jaxpack.kernels._launch import dispatch, launch, pl, power_of_two_divisor

CODES_PER_WORD = 8
GROUP = 256  # magnitudes that share a scale

# The quantiles of a normal distribution that bitsandbytes publishes as NF4, in float32.
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
# The place of each code in a word of four bytes, of which the lowest comes first. A byte's first code is its high half.
CODE_SHIFTS = np.array([4 * (i ^ 1) for i in range(CODES_PER_WORD)], np.uint32)


class NF4Arrays(NamedTuple):
    """Holds a stack of L quantised matrices `[O, I]` of P projections each; I is a multiple of 8.

    Attributes:
      codes: eight codes in each word. One-byte arrays of more than 2^31 elements would be too long for Pallas.
      absmax: the magnitude of each block, float32; or its code, if magnitudes are nested.
      scales: the scale of each group of 256 magnitudes; None if magnitudes are not nested, and so are the next two.
      means: the mean magnitude of each projection.
      table: the values of the magnitudes' codes.
    """

    codes: UInt32[Array, "L O W"]
    absmax: UInt8[Array, "L N"] | Float[Array, "L N"]
    scales: Float[Array, "L G"] | None = None
    means: Float[Array, "L P"] | None = None
    table: Float[Array, "256"] | None = None


class NF4Places(NamedTuple):
    """Says where the blocks and groups of each projection begin in the arrays of one matrix.

    Attributes:
      rows: the rows of each projection.
      columns: the columns of the matrix.
      block_size: the elements of a block; a projection's last block may have fewer.
    """

    rows: tuple[int, ...]
    columns: int
    block_size: int

    @property
    def blocks(self) -> list[int]:
        """Returns the number of blocks of each projection."""
        return [-(-rows * self.columns // self.block_size) for rows in self.rows]

    @property
    def groups(self) -> list[int]:
        """Returns the number of groups of magnitudes of each projection."""
        return [-(-blocks // GROUP) for blocks in self.blocks]

    @property
    def starts(self) -> list[tuple[int, int, int]]:
        """Returns the first row, the first block and the first group of each projection."""
        return list(zip(*map(_starts, (self.rows, self.blocks, self.groups)), strict=True))


def _starts(sizes: Sequence[int]) -> list[int]:
    """Returns where each of several pieces begins, if they lie one after another."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def dequantize_nf4(
    arrays: NF4Arrays,
    layer: Int[Array, ""] | int,
    places: NF4Places,
    *,
    stored: DTypeLike,
    dtype: DTypeLike,
    rows_behind: Float[Array, "R I"] | None = None,
    columns_behind: Float[Array, "O R"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "P E"]:
    """Returns one dense matrix of a stack, with rows below it or columns beside it: `[P, E]`.

    An element is the product of its value and its magnitude in float32, rounded to `stored` and then cast to `dtype`:
    the same bits as bitsandbytes' own `dequantize_4bit`, cast.

    Args:
      layer: the number of the matrix in the stack.
      places: the sizes of the matrix and of its projections.
      stored: the dtype that the matrix had before it was quantised.
      rows_behind, columns_behind: an array in `dtype` to append to the matrix; at most one of the two.
      implementation: see `jaxpack.kernels`.

    Raises:
      InputError: the arrays do not fit the sizes, or both rows and columns are to be appended.
    """
    _check(arrays, places, rows_behind, columns_behind)
    settings = {"places": places, "stored": jnp.dtype(stored), "dtype": jnp.dtype(dtype)}
    behind = rows_behind if columns_behind is None else columns_behind
    axis = 0 if columns_behind is None else 1
    if behind is None or behind.size == 0:
        behind, axis = jnp.zeros((0, places.columns), dtype), 0
    xla, pallas = (functools.partial(f, axis=axis, **settings) for f in (_reference, _kernel))
    return dispatch(implementation, xla=xla, pallas=pallas)(arrays, jnp.asarray(layer, jnp.int32), behind)


def _check(arrays: NF4Arrays, places: NF4Places, below: Array | None, beside: Array | None) -> None:
    if below is not None and beside is not None:
        raise InputError("`rows_behind` and `columns_behind` must not both be given, got both.")
    expected = {
        "codes": (sum(places.rows), places.columns // CODES_PER_WORD),
        "absmax": (sum(places.blocks),),
        "scales": (sum(places.groups),),
        "means": (len(places.rows),),
    }
    for name, shape in expected.items():
        array = getattr(arrays, name)
        if array is not None and array.shape[1:] != shape:
            raise InputError(f"`arrays.{name}` must have shape (layers, {str(shape)[1:]}, got {array.shape}.")
    if arrays.absmax.dtype.itemsize == 1 and arrays.absmax.size >= 2**31:  # Pallas would compute offsets in 32 bits
        raise InputError(f"`arrays.absmax` must have fewer than 2^31 codes, got {arrays.absmax.size}: use more stacks.")
    if places.columns % CODES_PER_WORD:
        raise InputError(f"`places.columns` must be a multiple of {CODES_PER_WORD}, got {places.columns}.")


def magnitudes(values: Float[Array, "*N"], scales: Float[Array, "*N"], means: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Returns `values * scales + means` in float32: magnitudes from the values of their codes.

    The product is rounded before the mean is added, as bitsandbytes does. Compilers would fuse both into one operation
    that rounds once, so the product's bits pass through an operation that changes nothing, which no compiler can know.
    """
    products = jax.lax.bitcast_convert_type(values * scales, jnp.int32)
    products = jax.lax.bitcast_convert_type(products ^ (means != means).astype(jnp.int32), jnp.float32)
    return products + means


# The reference.


def _reference(arrays, layer, behind, *, places, stored, dtype, axis):
    at_layer: Any = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), arrays._replace(table=None)
    )
    codes, absmax, scales, means, _ = at_layer
    nibbles = (codes[..., None] >> CODE_SHIFTS[None, None, :]) & 15
    values = jnp.asarray(NF4_VALUES)[nibbles.astype(jnp.int32)].reshape(-1, places.columns)
    dense = []
    for i, (row, block, group) in enumerate(places.starts):
        factors = absmax[block : block + places.blocks[i]]
        if arrays.table is not None:
            own = jnp.repeat(scales[group : group + places.groups[i]], GROUP)[: len(factors)]
            factors = magnitudes(arrays.table[factors.astype(jnp.int32)], own, jnp.broadcast_to(means[i], own.shape))
        part = values[row : row + places.rows[i]].reshape(-1)
        blocks = jnp.pad(part, (0, len(factors) * places.block_size - len(part))).reshape(-1, places.block_size)
        dense.append((blocks * factors[:, None]).reshape(-1)[: len(part)].reshape(-1, places.columns))
    return jnp.concatenate([jnp.concatenate(dense).astype(stored).astype(dtype), behind], axis=axis)


# The kernel. A program makes a block of the matrix, or copies a block of the array that is appended to it.

_ROWS, _COLUMNS, _NUM_WARPS = 16, 512, 4  # the most that one program makes, and its warps
_MOST_COMPARED = 8  # projections


class _Blocks:
    """Cuts the matrix, and the array behind it, into blocks without a remainder."""

    def __init__(self, places: NF4Places, behind: jax.Array, axis: int):
        O, I = sum(places.rows), places.columns  # noqa: E741
        self.rows = power_of_two_divisor(*places.rows, limit=_ROWS)  # so that a block lies in one projection
        self.columns = power_of_two_divisor(I, limit=_COLUMNS)
        self.count = O // self.rows, I // self.columns
        self.axis, self.matrix, self.has_more = axis, (O, I), bool(behind.size)
        self.shape = (O + len(behind), I) if axis == 0 else (O, I + behind.shape[1])
        # The blocks of the array behind the matrix.
        more = behind.shape[axis] if self.has_more else 1
        self.more = power_of_two_divisor(more, limit=_ROWS if axis == 0 else _COLUMNS)
        self.more_count = more // self.more if self.has_more else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Returns the number of blocks along the columns, and along the rows."""
        rows, columns = self.count
        return (columns, rows + self.more_count) if self.axis == 0 else (columns + self.more_count, rows)

    def copy(self, behind_ref: Any, out_ref: Any, row_block: Any, column_block: Any) -> None:
        """Copies one block of the array behind the matrix. To be called in a kernel."""
        if self.axis == 0:
            row, here = (row_block - self.count[0]) * self.more, pl.ds(column_block * self.columns, self.columns)
            out_ref[pl.ds(self.matrix[0] + row, self.more), here] = behind_ref[pl.ds(row, self.more), here]
        else:
            column, here = (column_block - self.count[1]) * self.more, pl.ds(row_block * self.rows, self.rows)
            out_ref[here, pl.ds(self.matrix[1] + column, self.more)] = behind_ref[here, pl.ds(column, self.more)]


def _kernel(arrays, layer, behind, *, places, stored, dtype, axis):
    blocks = _Blocks(places, behind, axis)
    inputs = [array for array in arrays if array is not None]
    inputs += [jnp.asarray(NF4_VALUES), jnp.asarray(CODE_SHIFTS), layer.reshape(1)]

    def kernel(*refs: Any) -> None:
        inputs, (*behind_ref, out_ref) = (
            refs[: len(refs) - 1 - blocks.has_more],
            refs[len(refs) - 1 - blocks.has_more :],
        )
        column_block, row_block = pl.program_id(0), pl.program_id(1)
        is_behind = row_block >= blocks.count[0] if axis == 0 else column_block >= blocks.count[1]

        def make() -> None:
            row, column = row_block * blocks.rows, column_block * blocks.columns
            dense = _dense_block(inputs, places, row, column, (blocks.rows, blocks.columns))
            out_ref[pl.ds(row, blocks.rows), pl.ds(column, blocks.columns)] = dense.astype(stored).astype(dtype)

        if not blocks.has_more:
            make()
            return
        pl.when(jnp.logical_not(is_behind))(make)
        pl.when(is_behind)(lambda: blocks.copy(behind_ref[0], out_ref, row_block, column_block))

    return launch(
        kernel,
        *inputs,
        *([behind] if blocks.has_more else []),
        name="dequantize_nf4",
        grid=blocks.grid,
        out_shape=jax.ShapeDtypeStruct(blocks.shape, dtype),
        num_warps=_NUM_WARPS,
    )


def _dense_block(refs: Sequence[Any], places: NF4Places, row: Any, column: Any, shape: tuple[int, int]) -> jax.Array:
    """Returns a block of the matrix in float32, from its first row and column. To be called in a kernel."""
    codes_ref, absmax_ref, *nested_refs, values_ref, shifts_ref, layer_ref = refs
    layer, (rows, columns) = layer_ref[0], shape
    # The projection that the rows belong to, as scalars: a few are compared one by one, and many of equal size, such as
    # those of experts, found by division.
    first_row = first_block = first_group = projection = jnp.int32(0)
    if len(places.rows) > _MOST_COMPARED and len(set(places.rows)) == 1:
        projection = row // places.rows[0]
        first_row = projection * places.rows[0]
        first_block, first_group = projection * places.blocks[0], projection * places.groups[0]
    else:
        for i, (start, block, group) in enumerate(places.starts):
            is_after = row >= start
            first_row, projection = jnp.where(is_after, start, first_row), jnp.where(is_after, i, projection)
            first_block, first_group = jnp.where(is_after, block, first_block), jnp.where(is_after, group, first_group)

    by_word = rows, columns // CODES_PER_WORD, CODES_PER_WORD
    words = codes_ref[layer, pl.ds(row, rows), pl.ds(column // CODES_PER_WORD, by_word[1])]
    shifts = jnp.broadcast_to(shifts_ref[pl.ds(0, CODES_PER_WORD)][None, None, :], by_word)
    nibbles = (jnp.broadcast_to(words[:, :, None], by_word) >> shifts) & jnp.uint32(15)
    values = values_ref[nibbles.astype(jnp.int32)]

    run = math.gcd(columns, places.block_size)  # neighbours in a row that are sure to share a magnitude
    row_starts = (row - first_row + jnp.arange(rows, dtype=jnp.int32)) * places.columns + column
    runs = run * jnp.arange(columns // run, dtype=jnp.int32)
    block = (row_starts[:, None] + runs[None, :]) // places.block_size
    layers = jnp.broadcast_to(layer, block.shape)
    absmax = absmax_ref[layers, first_block + block]
    if nested_refs:
        scales_ref, means_ref, table_ref = nested_refs
        scales = scales_ref[layers, first_group + block // GROUP]
        means = jnp.broadcast_to(means_ref[layer, projection], block.shape)
        absmax = magnitudes(table_ref[absmax.astype(jnp.int32)], scales, means)
    by_run = jnp.broadcast_to(absmax[:, :, None], (*absmax.shape, run // CODES_PER_WORD))
    return (values * jnp.broadcast_to(by_run.reshape(by_word[:2])[:, :, None], by_word)).reshape(shape)
