"""A projection's matrix in the form in which it is stored, and how operations and their derivatives read it.

A matmul with an adapter makes a copy of its matrix with the adapter's factor behind it. A weight that is stored in
another form (in fewer bits, say) becomes dense in that same copy, so that it costs no pass of its own. A derivative
keeps the weight, and never its dense form: at most one layer is dense at a time.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.errors import InputError


class Weight(abc.ABC):
    """A matrix `[O, I]`, or a stack of them, `[L, O, I]`. A registered pytree dataclass, whose leaves are arrays.

    A subclass says how it becomes dense. JAX builds instances anew with other leaves, so construction checks nothing.
    """

    is_trainable: ClassVar[bool] = False  # whether its leaves may be differentiated
    is_dense: ClassVar[bool] = False  # whether it is read without a copy of its own
    reads_by_number: ClassVar[bool] = False  # whether a loop over layers gives it `at(number)` in place of a slice

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense matrix, or of the stack."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of the dense matrix that is written to a checkpoint."""

    @property
    def nbytes(self) -> int:
        """The bytes of all leaves, which may be abstract."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @abc.abstractmethod
    def at(self, layer: Int[Array, ""] | int) -> "Weight":
        """Returns one layer of a stack."""

    @abc.abstractmethod
    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the matrix, or the whole stack, as an array."""

    @abc.abstractmethod
    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of a single matrix, as an embedding is read."""

    @abc.abstractmethod
    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "Weight":
        """Returns the weight with dense `rows` `[N, I]` stored in it.

        Args:
          start: the first of the rows to replace; of a stack, the layer and the row.
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

    def cast(self, dtype: DTypeLike) -> "Weight":
        """Returns what a derivative keeps that reads the weight in `dtype` twice."""
        del dtype
        return self

    def after(self, *arrays: Array) -> tuple[tuple[Array, ...], "Weight"]:
        """Returns the arrays, and the weight such that no dense copy of it is made before they are there.

        XLA would otherwise be free to make the copies of several layers at once.
        """
        return jax.lax.optimization_barrier(arrays), self

    def cotangent(self, gradient: Callable[[], Float[Array, "O I"]]) -> "Weight | None":
        """Returns what a derivative gives for the weight: None where it is frozen, and `gradient` is not called."""
        del gradient
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseWeight(Weight):
    """A matrix that is stored as one array; trained, or frozen in 16 or 32 bits."""

    value: Any  # [*L, O, I]; JAX puts other leaves in its place

    is_trainable = True
    is_dense = True

    def __getitem__(self, index: Any) -> Array:
        """Indexes the array."""
        return self.value[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which it is stored."""
        return self.value.dtype

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "DenseWeight":
        """Returns the array with `rows` in it, cast."""
        return DenseWeight(write_rows(self.value, start, rows))

    def at(self, layer: Int[Array, ""] | int) -> "DenseWeight":
        """Returns one layer of a stack."""
        return DenseWeight(jax.lax.dynamic_index_in_dim(self.value, layer, keepdims=False))

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the array, cast."""
        return self.value.astype(dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the array, cast."""
        return self.value[rows].astype(dtype)

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns `x W^T`, with JAX's own derivative."""
        return x @ self.dense(x.dtype).T

    def cast(self, dtype: DTypeLike) -> "DenseWeight":
        """Returns the weight in `dtype`: a trained matrix, in float32, is cast once for both directions."""
        return DenseWeight(self.dense(dtype))

    def cotangent(self, gradient: Callable[[], Float[Array, "O I"]]) -> "DenseWeight":
        """Returns the gradient in the weight's dtype. Where nothing asks for it, XLA computes none of it."""
        return DenseWeight(gradient().astype(self.dtype))


def write_rows(whole: Array, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> Array:
    """Returns an array with `rows`, cast, from the index `start` of its first axes on."""
    rows = rows.astype(whole.dtype).reshape((1,) * (whole.ndim - rows.ndim) + rows.shape)
    # As bits: for bfloat16 a CPU would turn all of `whole` to float32 and back.
    bits = (jax.lax.bitcast_convert_type(x, f"uint{8 * whole.dtype.itemsize}") for x in (whole, rows))
    placed = jax.lax.dynamic_update_slice(*bits, [*start, *(0,) * (whole.ndim - len(start))])
    return jax.lax.bitcast_convert_type(placed, whole.dtype)


def as_weight(value: Any) -> Weight:
    """Returns a weight as it is, and an array as a `DenseWeight`."""
    return value if isinstance(value, Weight) else DenseWeight(value)


def primal_of(weight: Weight) -> tuple[Weight, bool]:
    """Returns the weight of a forward rule with symbolic zeros, and whether it is differentiated.

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
    """Returns a cotangent of a backward rule with symbolic zeros as an array."""
    return jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d


@jax.custom_vjp
def _matmul(x, weight):
    return x @ weight.dense(x.dtype).T


def _matmul_forward(x, weight):
    weight, _ = primal_of(weight)
    (x,), weight = weight.after(x.value)
    return _matmul(x, weight), (weight, jnp.zeros((0,), x.dtype))


def _matmul_backward(kept, d):
    weight, like = kept
    (d,), weight = weight.after(instantiate(d))
    return (d @ weight.dense(d.dtype)).astype(like.dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)
