"""Holds frozen matrices in 4 bits (NF4), and quantises dense ones as bitsandbytes does."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.errors import InputError
from jaxpack.kernels.dequantize import (
    CODE_SHIFTS,
    CODES_PER_WORD,
    GROUP,
    NF4_VALUES,
    NF4Arrays,
    NF4Places,
    dequantize_nf4,
)
from jaxpack.kernels.dynamic_map import dynamic_map, nearest_codes
from jaxpack.kernels.weight import NumberedWeight, Weight
from jaxpack.model.weights import Store, projection_rows, store_dense

BLOCK_SIZE = 64  # bitsandbytes' default


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Weight(NumberedWeight):
    """Stores a stack of matrices, or one of them, as bitsandbytes' 4-bit codes; see `kernels.dequantize`.

    Attributes:
      arrays: the codes and magnitudes, with an axis for the layers also where there is only one matrix.
      places: the sizes of a matrix and of its projections.
      stored: the name of the dtype that the matrices had before they were quantised.
      is_stack: whether there are several layers, so that `shape` begins with their number.
    """

    arrays: Any
    places: NF4Places = dataclasses.field(metadata={"static": True})
    stored: str = dataclasses.field(metadata={"static": True})
    is_stack: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one dense matrix, or of the dense stack."""
        matrix = sum(self.places.rows), self.places.columns
        return (self.arrays.codes.shape[0], *matrix) if self.is_stack and self.layer is None else matrix

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype that the matrices had before they were quantised."""
        return jnp.dtype(self.stored)

    @property
    def is_written_whole(self) -> bool:
        """Returns True: a block may cross the end of a row, and a mean is that of a whole projection."""
        return True

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the layer that is read, or the whole stack, as a dense array."""
        if self.is_stack and self.layer is None:
            return self.dense_stack(dtype)
        return self._dense(dtype)

    def dense_rows(self, first: int, size: int, dtype: DTypeLike) -> Float[Array, "N I"]:
        """Returns rows of the layer that is read; of a whole projection, only its own codes are decoded."""
        starts = [row for row, *_ in self.places.starts]
        if (self.is_stack and self.layer is None) or first not in starts:
            return super().dense_rows(first, size, dtype)
        number = starts.index(first)
        if self.places.rows[number] != size:
            return super().dense_rows(first, size, dtype)
        start = jnp.array([int(self._layer), *self.places.starts[number], number], jnp.int32)
        places = NF4Places((size,), self.places.columns, self.places.block_size)
        return _dense_projection(self.arrays, start, places=places, stored=self.stored, dtype=jnp.dtype(dtype).name)

    def append_columns(self, b: Float[Array, "O R"]) -> Float[Array, "O E"]:
        """Returns `[W, B]`, written in one pass."""
        return self._dense(b.dtype, columns_behind=b)

    def append_rows(self, a: Float[Array, "R I"]) -> Float[Array, "P I"]:
        """Returns `[W; A]`, written in one pass."""
        return self._dense(a.dtype, rows_behind=a)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the matrix, from a dense copy of it: 4-bit embeddings are not worth code of their own."""
        return self.dense(dtype)[rows]

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "NF4Weight":
        """Returns the weight with a dense matrix quantised into the place of one projection, or of all of them.

        Raises:
          InputError: `rows` are not all rows of a projection.
        """
        sizes = self.places.rows if rows.shape[0] == sum(self.places.rows) else (rows.shape[0],)
        return self.put(start, quantize_nf4(rows.astype(self.dtype), sizes, self.places.block_size, self.is_nested))

    def put(self, start: tuple[Int[Array, ""] | int, ...], part: "NF4Weight") -> "NF4Weight":
        """Returns the weight with one quantised projection, or one whole matrix, in its place.

        Args:
          start: the first row to replace; for a stack, the layer and the row.
          part: one matrix of the same block size, nested as this one is.

        Raises:
          InputError: the part is no projection of this matrix.
        """
        *layer, row = start
        if part.places.rows != self.places.rows and part.places.rows[0] not in self.places.rows:
            raise InputError(
                f"`part` must have the rows of a projection, one of {sorted(set(self.places.rows))}, got"
                f" {list(part.places.rows)}."
            )
        rows, blocks, groups = (jnp.array(column, jnp.int32) for column in zip(*self.places.starts, strict=True))
        index = jnp.searchsorted(rows, jnp.asarray(row))
        first = {"codes": (row, 0), "absmax": (blocks[index],), "scales": (groups[index],), "means": (index,)}
        arrays = self.arrays._asdict()
        for name, place in first.items():
            if arrays[name] is not None:
                new = getattr(part.arrays, name)
                arrays[name] = jax.lax.dynamic_update_slice(arrays[name], new, [layer[0] if layer else 0, *place])
        if self.is_nested:
            arrays["table"] = part.arrays.table
        return dataclasses.replace(self, arrays=NF4Arrays(**arrays))

    def after(self, *arrays: Array) -> tuple[tuple[Array, ...], "NF4Weight"]:
        """Returns the arrays, and this weight read only after they are computed.

        A barrier orders the layer number after the arrays, and every read of the weight depends on that number.
        """
        *computed, layer = jax.lax.optimization_barrier((*arrays, self._layer))
        return tuple(computed), self.at(layer)

    @property
    def is_nested(self) -> bool:
        """Returns whether the magnitudes of the blocks are codes of 8 bits."""
        return self.arrays.table is not None

    @property
    def _layer(self) -> Int[Array, ""]:
        return jnp.asarray(0 if self.layer is None else self.layer, jnp.int32)

    def _dense(self, dtype: DTypeLike, **behind: Any) -> Float[Array, "P E"]:
        return dequantize_nf4(self.arrays, self._layer, self.places, stored=self.stored, dtype=dtype, **behind)


@functools.partial(jax.jit, static_argnames=("places", "stored", "dtype"))
def _dense_projection(
    arrays: NF4Arrays, start: Int[Array, "5"], *, places: NF4Places, stored: str, dtype: str
) -> Float[Array, "N I"]:
    """Returns one projection; `start` is its layer, first row, first block and first group, and its number."""
    layer, row, block, group, number = start

    def cut(array: Array | None, first: Array, size: int) -> Any:
        if array is None:
            return None
        others = array.shape[2:]
        return jax.lax.dynamic_slice(array, (layer, first, *(0,) * len(others)), (1, size, *others))

    one = NF4Arrays(
        cut(arrays.codes, row, places.rows[0]),
        cut(arrays.absmax, block, places.blocks[0]),
        cut(arrays.scales, group, places.groups[0]),
        cut(arrays.means, number, 1),
        arrays.table,
    )
    return dequantize_nf4(one, 0, places, stored=stored, dtype=dtype)


def holds_4bit(state: nnx.State) -> bool:
    """Returns whether any parameter is held in 4 bits (NF4), perhaps in only some of its layers."""
    is_nf4 = lambda value: isinstance(value, NF4Weight)  # noqa: E731
    return any(map(is_nf4, jax.tree.leaves(state, is_leaf=is_nf4)))


def nf4_store(block_size: int = BLOCK_SIZE, *, nested: bool = True) -> Store:
    """Returns a function for `freeze` that stores projections in 4 bits, and embedding and head as they are.

    A matrix whose rows are no multiple of 8 elements stays dense, too.
    """

    def store(matrix: Float[Array, "*L O I"], module: nnx.Module) -> Weight:
        rows = projection_rows(module)
        if rows is None or matrix.shape[-1] % CODES_PER_WORD:
            return store_dense(matrix, module)
        return quantize_nf4(matrix, rows, block_size, nested)

    return store


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantize_nf4(
    matrix: Float[Array, "*L O I"], rows: tuple[int, ...], block_size: int = BLOCK_SIZE, nested: bool = True
) -> NF4Weight:
    """Quantises a matrix, or a stack of matrices, to the codes that bitsandbytes' `quantize_4bit` gives.

    Args:
      matrix: float32, bfloat16 or float16.
      rows: the rows of each projection in the matrix; each is quantised on its own.
      block_size: elements that share a magnitude.
      nested: whether the magnitudes are quantised, too (bitsandbytes' `compress_statistics`).
    """
    places = NF4Places(rows, matrix.shape[-1], block_size)
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    quantise = jax.vmap(functools.partial(_quantized, places=places, nested=nested))
    if len(set(rows)) == 1:  # such as those of experts
        projections = quantise(stack.reshape(-1, rows[0], stack.shape[2]))
        arrays = jax.tree.map(lambda each: each.reshape(len(stack), -1, *each.shape[2:]), projections)
    else:
        starts = [first for first, *_ in places.starts]
        parts = [quantise(stack[:, first : first + size]) for first, size in zip(starts, rows, strict=True)]
        arrays = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *parts)
    if nested:
        arrays = arrays._replace(table=jnp.asarray(dynamic_map()))
    return NF4Weight(arrays, places, jnp.dtype(matrix.dtype).name, is_stack=matrix.ndim == 3)


def _quantized(matrix: Float[Array, "O I"], places: NF4Places, nested: bool) -> NF4Arrays:
    """Returns the arrays of one projection of one layer, without an axis for layers and without the table."""
    blocks = _blocks(matrix.astype(jnp.float32).reshape(-1), places.block_size)
    absmax, scaled = _scaled(blocks)
    bounds = jnp.asarray((NF4_VALUES[:-1] + NF4_VALUES[1:]) / 2)
    codes = jnp.searchsorted(bounds, scaled.reshape(-1)[: matrix.size], method="compare_all").astype(jnp.uint32)
    codes = codes.reshape(len(matrix), -1, CODES_PER_WORD) << CODE_SHIFTS[None, None, :]
    words = jnp.sum(codes, axis=-1, dtype=jnp.uint32)
    if not nested:
        return NF4Arrays(words, absmax)
    mean = jnp.mean(absmax)
    scales, scaled = _scaled(_blocks(absmax - mean, GROUP))
    return NF4Arrays(words, nearest_codes(scaled.reshape(-1)[: len(absmax)]), scales, mean[None])


def _blocks(x: Float[Array, " N"], size: int) -> Float[Array, "B S"]:
    return jnp.pad(x, (0, -len(x) % size)).reshape(-1, size)


def _scaled(blocks: Float[Array, "B S"]) -> tuple[Float[Array, " B"], Float[Array, "B S"]]:
    """Returns the largest magnitude of each block, and the blocks multiplied by its reciprocal."""
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    return absmax, jnp.clip(blocks * (1 / jnp.maximum(absmax, 1e-38))[:, None], -1, 1)
