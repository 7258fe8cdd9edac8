"""Keeps frozen matrices in the host's memory, from where programs copy one layer, or one piece, at a time.

A program must copy from an array in host memory before it computes with it, and can slice it along its first axis only.
So a stack of layers is fetched layer by layer, and a large matrix is cut into pieces beforehand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.kernels.weight import DenseWeight, Weight, one_layer
from jaxpack.parallel.host_memory import abstract_pinned, is_pinned, numpy_view, pinned_zeros, to_device, to_pinned

_PIECE_BYTES = 64 * 2**20  # large enough for the full speed of the link, and small beside the logits
_UNIT = 128  # rows: matmuls are fast with multiples of this

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostWeight(Weight):
    """Holds a stack of matrices whose arrays lie in the host's memory.

    Attributes:
      stack: the weight that holds the arrays. Arrays with two or more axes lie in the host's memory. Those with one
        axis, such as a table that all layers share, lie on the device.
    """

    stack: Any

    reads_by_number: ClassVar[bool] = True

    @classmethod
    def of(cls, stack: Weight) -> "HostWeight":
        """Moves a stack's arrays to the host. They may be abstract."""
        return cls(jax.tree.map(lambda leaf: _moved(leaf) if leaf.ndim > 1 else leaf, stack))

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the dense stack."""
        return self.stack.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the dense stack."""
        return self.stack.dtype

    @property
    def is_written_whole(self) -> bool:
        """Returns whether `write` needs all rows of a projection at once."""
        return self.stack.is_written_whole

    def fetch(self, layer: Int[Array, ""] | int) -> Weight:
        """Returns a copy of one layer on the device, as a stack of one matrix; -1 gives the first layer."""
        return jax.tree.map(lambda leaf: _slice(leaf, layer) if leaf.ndim > 1 else leaf, self.stack)

    def at(self, layer: Int[Array, ""] | int) -> Weight:
        """Returns a copy of one layer on the device."""
        return self.fetch(layer).at(0)

    def dense(self, dtype: DTypeLike) -> Float[Array, "L O I"]:
        """Returns a copy of the whole stack on the device, as a dense array."""
        return jax.tree.map(to_device, self.stack).dense(dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Raises an error, as a stack has no rows of its own; see `at`."""
        raise NotImplementedError("a stack of matrices has no rows: take one layer with `at`")

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array | np.ndarray) -> "HostWeight":
        """Writes `rows` into the host's memory, in place. Not to be used in a program; see `put`."""
        layer, row = (int(place) for place in start)
        return self.put(layer, self.fetch(layer).write((0, row), jnp.asarray(rows)))

    def put(self, layer: int, one: Weight) -> "HostWeight":
        """Overwrites a layer in the host's memory with a stack of one matrix. Not to be used in a program.

        Returns a weight with the same memory; the arrays that all layers share are taken from `one`.
        """

        def written(whole: Array, new: Array) -> Array:
            if not is_pinned(whole):
                return new
            numpy_view(whole)[layer] = np.asarray(new)[0]
            return whole

        return HostWeight(jax.tree.map(written, self.stack, one))

    @property
    def in_numpy(self) -> Weight:
        """Returns the stack with NumPy arrays, which share their memory, in place of those in the host's memory."""
        return jax.tree.map(lambda leaf: numpy_view(leaf) if is_pinned(leaf) else leaf, self.stack)

    @property
    def one(self) -> Weight:
        """Returns an abstract stack of one matrix, as `fetch` returns it."""
        return one_layer(self.stack)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostMatrix(Weight):
    """Holds one large matrix, an embedding or a head, in the host's memory.

    Attributes:
      pieces: the matrix `[V, D]`, cut into pieces of S rows each; the last one is filled up with zeros.
      rows: V.
    """

    pieces: Any  # an array [P, S, D]
    rows: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, matrix: Weight) -> "HostMatrix":
        """Moves a dense matrix to the host. It may be abstract."""
        rows, columns = matrix.shape
        size = piece_rows(rows, columns, matrix.dtype.itemsize)
        like = abstract_pinned((-(-rows // size), size, columns), matrix.dtype)
        leaf = jax.tree.leaves(matrix)[0]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return cls(like, rows)
        made = cls(pinned_zeros(like), rows)
        made.table[:] = np.asarray(matrix.dense(matrix.dtype))
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the shape of the matrix."""
        return self.rows, self.pieces.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the matrix."""
        return self.pieces.dtype

    @property
    def table(self) -> np.ndarray:
        """Returns the matrix as a NumPy array `[V, D]` that shares its memory."""
        return numpy_view(self.pieces).reshape(-1, self.pieces.shape[-1])[: self.rows]

    @property
    def in_numpy(self) -> Weight:
        """Returns the matrix as a weight that holds a NumPy array, which shares its memory."""
        return DenseWeight(self.table)

    def fetch(self, number: Int[Array, ""] | int) -> Float[Array, "S D"]:
        """Returns a copy of one piece on the device."""
        return _slice(self.pieces, number)[0]

    def at(self, layer: Int[Array, ""] | int) -> Weight:
        """Raises an error, as one matrix has no layers."""
        raise NotImplementedError("one matrix has no layers")

    def dense(self, dtype: DTypeLike) -> Float[Array, "V D"]:
        """Returns a copy of the matrix on the device."""
        return to_device(self.pieces).reshape(-1, self.pieces.shape[-1])[: self.rows].astype(dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B D"]:
        """Returns rows, from a copy of the whole matrix on the device. A run takes them with NumPy from `table`."""
        return self.dense(dtype)[rows]

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array | np.ndarray) -> "HostMatrix":
        """Writes `rows` into the host's memory, in place, and returns this weight. Not to be used in a program."""
        (row,) = (int(place) for place in start)
        self.table[row : row + len(rows)] = np.asarray(rows).astype(self.dtype)
        return self


def piece_rows(rows: int, columns: int, itemsize: int) -> int:
    """Returns the number of rows in each piece of a `HostMatrix` whose elements take `itemsize` bytes."""
    count = max(1, round(rows * columns * itemsize / _PIECE_BYTES))
    return -(-rows // (count * _UNIT)) * _UNIT


def loop_with(
    fetch: Callable[[Any, Any], Tree], source: Any, count: int, turn: Callable[[Any, Tree, Any], Any], state: Any
) -> Any:
    """Returns the state after `state = turn(i, fetch(source, i), state)` for i in 0, ..., count - 1.

    `fetch` copies from host memory; each copy is made while the iteration before computes. XLA makes such copies with
    the GPU's copy engines only if it can compute their source from the number of the iteration by additions alone, and
    not if it has to read the source from an array, as in a scan over numbers. It copies with kernels otherwise. The
    loop counts what is fetched, one more than i, because XLA starts a copy only when its number is computed. The last
    iteration copies the last slice once more, which nothing reads.

    The barrier behind the computation keeps the wait for the copy there. Without it, XLA may wait anywhere before the
    end of the iteration, in which nothing reads the copy.
    """

    def body(carry: Any) -> Any:
        following, state, fetched = carry
        number, state, fetched = copies_first((following, state, fetched), source)
        both = turn(number - 1, fetched, state), fetch(source, following)
        return following + 1, *jax.lax.optimization_barrier(both)

    return jax.lax.while_loop(lambda carry: carry[0] <= count, body, (1, state, fetch(source, 0)))[1]


def copies_first(state: Tree, source: Any) -> Tree:
    """Returns `state`, with which the program computes only after it has named the arrays of `source`.

    XLA schedules a copy as soon as all of its operands are scheduled. Nothing but the copy reads an array in host
    memory, so without this barrier XLA schedules the array, and the copy, behind the iteration's computation. A number
    that a copy reads belongs into `state`, and the computation must use what comes back: XLA drops it otherwise.
    """
    zero = jnp.int32(0)  # the start of a copy along the other axes, which is an operand, too
    return jax.lax.optimization_barrier((state, source, zero))[0]


def _moved(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract_pinned(leaf.shape, leaf.dtype)
    return to_pinned(leaf)


def _slice(array: Array, number: Int[Array, ""] | int) -> Array:
    """Copies a slice along the first axis to the device, with this axis. Numbers outside give the slice at that end."""
    return to_device(jax.lax.dynamic_slice_in_dim(array, number, 1, allow_negative_indices=False))
