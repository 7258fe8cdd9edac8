"""Defines how a projection's matrix is stored, and how operations and their derivatives read it.

A matmul with an adapter makes a copy of its matrix with the adapter's factor appended. A weight that is stored in
another form (for example in fewer bits) becomes dense in that same copy, so this costs no pass of its own. A derivative
keeps the weight as stored and never its dense form, so at most one layer is dense at a time.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.errors import InputError


class Weight(abc.ABC):
    """Represents a matrix `[O, I]`, or a stack of matrices, `[L, O, I]`, in the form in which it is stored.

    A subclass is a registered pytree dataclass whose leaves are arrays, and says how the weight becomes dense. JAX
    rebuilds instances with other leaves, so construction checks nothing.
    """

    is_trainable: ClassVar[bool] = False  # whether its leaves may be differentiated
    is_dense: ClassVar[bool] = False  # whether it is read as it is stored, without a dense copy
    reads_by_number: ClassVar[bool] = False  # whether a loop over layers reads it with `at(number)`, not by slicing
    shards_by_rows: ClassVar[bool] = True  # whether all arrays of a stack have the matrix' rows, in order, as axis 1

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the dense matrix, or of the dense stack."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the dense matrix that is written to a checkpoint."""

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all leaves, which may be abstract arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def is_written_whole(self) -> bool:
        """Returns whether `write` needs all rows of a projection at once."""
        return False

    @abc.abstractmethod
    def at(self, layer: Int[Array, ""] | int) -> "Weight":
        """Returns one layer of a stack, as a weight."""

    @abc.abstractmethod
    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the matrix, or the whole stack, as an array."""

    def dense_rows(self, first: int, size: int, dtype: DTypeLike) -> Float[Array, "N I"]:
        """Returns `size` rows of a single matrix, from row `first` on, as an array.

        Outside of a program, all calls with the same `size` share one compiled operation.
        """
        return jax.lax.dynamic_slice_in_dim(self.dense(dtype), first, size)

    @abc.abstractmethod
    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns the given rows of a single matrix, as an embedding lookup does."""

    @abc.abstractmethod
    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "Weight":
        """Returns the weight with dense `rows` `[N, I]` stored in it.

        Args:
          start: the first row to replace; for a stack, the layer and the row.
        """

    def append_columns(self, b: Float[Array, "O R"]) -> Float[Array, "O E"]:
        """Returns `[W, B]`, E = I + R columns, in the dtype of `b`."""
        return jnp.concatenate([self.dense(b.dtype), b], axis=1)

    def append_rows(self, a: Float[Array, "R I"]) -> Float[Array, "P I"]:
        """Returns `[W; A]`, P = O + R rows, in the dtype of `a`."""
        return jnp.concatenate([self.dense(a.dtype), a])

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns `x W^T`. Its derivative keeps the weight as it is stored."""
        return _matmul(x, self)

    def trained_inputs(self, hidden: Float[Array, "*B I"]) -> Float[Array, "*B R"]:
        """Returns the channels of a head's input that its trained columns read: by default, all of them."""
        return hidden

    def stacked(self, dtype: DTypeLike) -> tuple[Float[Array, "L O I"], Int[Array, ""] | int]:
        """Returns a dense stack and the number of the layer in it, for kernels that read a layer in place.

        By default, this is a dense copy of the one layer.
        """
        return self.dense(dtype)[None], 0

    def cast(self, dtype: DTypeLike) -> "Weight":
        """Returns what the forward pass keeps for the backward pass if both read the weight in `dtype`.

        By default, this is the weight as it is stored.
        """
        del dtype
        return self

    def after(self, *arrays: Array) -> tuple[tuple[Array, ...], "Weight"]:
        """Returns the arrays and the weight, whose dense copies are then made only after the arrays are computed.

        Without this order, XLA could make the dense copies of several layers at once. A barrier on the arrays is enough
        if the copy contains one of them, such as the adapter's factor in `append_columns`. A form whose dense copy can
        be made without the arrays must override this method.
        """
        return jax.lax.optimization_barrier(arrays), self

    def cotangent(self, gradient: Callable[[], Float[Array, "O I"]]) -> "Weight | None":
        """Returns the weight's cotangent for a backward rule: None for a frozen weight, without calling `gradient`."""
        del gradient
        return None


Tree = TypeVar("Tree")
Numbered = TypeVar("Numbered", bound="NumberedWeight")


@dataclasses.dataclass(frozen=True)
class NumberedWeight(Weight):
    """Represents a stack whose layers are read by their numbers, without a slice of the stack.

    Attributes:
      layer: the layer that is read; None for the whole stack.
    """

    layer: Any = dataclasses.field(default=None, kw_only=True)

    reads_by_number: ClassVar[bool] = True

    def at(self: Numbered, layer: Int[Array, ""] | int) -> Numbered:
        """Returns one layer of the stack."""
        return dataclasses.replace(self, layer=layer)

    def after(self, *arrays: Array) -> tuple[tuple[Array, ...], Weight]:
        """Returns the arrays, and this weight read only after they are computed.

        A barrier orders the layer number after the arrays, and every read of the weight depends on that number.
        """
        if self.layer is None:
            return super().after(*arrays)
        *computed, layer = jax.lax.optimization_barrier((*arrays, jnp.asarray(self.layer, jnp.int32)))
        return tuple(computed), self.at(layer)

    def dense_stack(self, dtype: DTypeLike) -> Float[Array, "L O I"]:
        """Returns all layers of the stack as one array."""
        return jnp.stack([self.at(layer).dense(dtype) for layer in range(self.shape[0])])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseWeight(Weight):
    """Stores a matrix as one array, which is trained, or frozen in 16 or 32 bits."""

    value: Any  # an array [*L, O, I]; `Any`, because JAX also puts other leaves in its place

    is_trainable = True
    is_dense = True

    def __getitem__(self, index: Any) -> Array:
        """Returns `value[index]`."""
        return self.value[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the stored array."""
        return self.value.dtype

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "DenseWeight":
        """Returns the weight with its rows from `start` on replaced by `rows`, which are cast to the weight's dtype."""
        return DenseWeight(write_rows(self.value, start, rows))

    def at(self, layer: Int[Array, ""] | int) -> "DenseWeight":
        """Returns one layer of a stack."""
        return DenseWeight(jax.lax.dynamic_index_in_dim(self.value, layer, keepdims=False))

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the array, cast to `dtype`."""
        return self.value.astype(dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the array, cast to `dtype`."""
        return self.value[rows].astype(dtype)

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns `x W^T`, with JAX's own derivative."""
        return x @ self.dense(x.dtype).T

    def cast(self, dtype: DTypeLike) -> "DenseWeight":
        """Returns the weight in `dtype`, so that a trained float32 matrix is cast once for both passes."""
        return DenseWeight(self.dense(dtype))

    def cotangent(self, gradient: Callable[[], Float[Array, "O I"]]) -> "DenseWeight":
        """Returns the gradient in the weight's dtype. If nothing uses the gradient, XLA does not compute it."""
        return DenseWeight(gradient().astype(self.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseStack(NumberedWeight):
    """Stores frozen matrices of all layers in one array, in which kernels read a layer in place.

    A loop over layers would copy each layer of a `DenseWeight` out of its stack before a kernel reads it.
    """

    value: Any  # an array [L, O, I]

    is_dense = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one matrix, or of the stack."""
        return self.value.shape if self.layer is None else self.value.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the stored array."""
        return self.value.dtype

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the layer that is read, or the whole stack, cast to `dtype`."""
        return self._one.astype(dtype)

    def dense_rows(self, first: int, size: int, dtype: DTypeLike) -> Float[Array, "N I"]:
        """Returns rows of the layer that is read, of which no other row is copied."""
        if self.layer is None:
            return super().dense_rows(first, size, dtype)
        return jax.lax.dynamic_slice(self.value, (self.layer, first, 0), (1, size, self.value.shape[2]))[0].astype(
            dtype
        )

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the layer that is read, cast to `dtype`."""
        return self._one[rows].astype(dtype)

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "DenseStack":
        """Returns the stack with `rows` of one layer replaced."""
        return dataclasses.replace(self, value=write_rows(self.value, start, rows))

    def stacked(self, dtype: DTypeLike) -> tuple[Float[Array, "L O I"], Int[Array, ""] | int]:
        """Returns the stack itself, unless it must be cast."""
        return (self.value, self.layer) if self.dtype == dtype else super().stacked(dtype)

    @property
    def _one(self) -> Array:
        if self.layer is None:
            return self.value
        return jax.lax.dynamic_index_in_dim(self.value, self.layer, keepdims=False)


def one_layer(stack: Tree) -> Tree:
    """Returns abstract arrays, on one device, for one layer of a stack, with the axis of the layers.

    An array with one axis, such as a table that all layers share, is whole.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]) if leaf.ndim > 1 else leaf.shape, leaf.dtype), stack
    )


def write_rows(whole: Array, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> Array:
    """Returns `whole` with `rows` written into it; `rows` are cast to the dtype of `whole`.

    `start` is the place of the first row: its index in each of the first axes of `whole`.
    """
    rows = rows.astype(whole.dtype).reshape((1,) * (whole.ndim - rows.ndim) + rows.shape)
    # The rows are written as bits: for bfloat16, a CPU would convert all of `whole` to float32 and back.
    bits, new = (jax.lax.bitcast_convert_type(x, f"uint{8 * whole.dtype.itemsize}") for x in (whole, rows))
    placed = jax.lax.dynamic_update_slice(bits, new, [*start, *(0,) * (whole.ndim - len(start))])
    return jax.lax.bitcast_convert_type(placed, whole.dtype)


def as_weight(value: Any) -> Weight:
    """Returns a `Weight` unchanged, and wraps an array in a `DenseWeight`."""
    return value if isinstance(value, Weight) else DenseWeight(value)


def primal_of(weight: Weight) -> tuple[Weight, bool]:
    """Unwraps the weight that a forward rule gets under `symbolic_zeros=True`.

    Returns:
      The weight with plain arrays, and whether the weight is differentiated.

    Raises:
      InputError: a frozen weight is differentiated.
    """
    leaves: list[CustomVJPPrimal] = jax.tree.leaves(weight)
    is_perturbed = any(leaf.perturbed for leaf in leaves)
    if is_perturbed and not weight.is_trainable:
        raise InputError(
            f"A {type(weight).__name__} is frozen and has no gradient, but it was differentiated. Differentiate with"
            " respect to the trainable parameters alone (`split_trainable`)."
        )
    return jax.tree.map(lambda leaf: leaf.value, weight), is_perturbed


def instantiate(d: Array | SymbolicZero) -> Array:
    """Returns a cotangent as an array, with zeros for a symbolic zero."""
    return jnp.zeros(d.shape, jnp.dtype(str(d.dtype))) if isinstance(d, SymbolicZero) else d


@jax.custom_vjp
def _matmul(x, weight):
    return x @ weight.dense(x.dtype).T


def _matmul_forward(x, weight):
    weight, _ = primal_of(weight)
    (x,), weight = weight.after(x.value)
    return _matmul(x, weight), (weight, jnp.zeros((0,), x.dtype))


def _matmul_backward(residuals, d):
    weight, like = residuals
    (d,), weight = weight.after(instantiate(d))
    return (d @ weight.dense(d.dtype)).astype(like.dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)
