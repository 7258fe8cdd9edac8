"""Holds this device's rows of a matrix that several devices share, and gathers the matrix where it is read.

Only to be used within `shard_map`. A layer's matrix is gathered where the layer begins, in the forward pass and again
where the backward pass computes the layer again, so no more than a few layers are whole at a time. The gradient of a
trained matrix is added up over the devices, and each keeps its own rows of the sum (a reduce-scatter).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.kernels.weight import DenseWeight, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedStack(Weight):
    """Holds this device's share of a stack of frozen matrices, in whatever form the matrices are stored.

    Attributes:
      stack: the weight with this device's rows in place of all rows.
      is_cut: for each leaf of `stack`, whether it is cut into shards, along its second axis; the others are whole.
      whole_shape: the shape of the stack with all rows.
      axis: the mesh axis of the devices that share the matrix.
    """

    stack: Any
    is_cut: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    whole_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})

    reads_by_number: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the dense stack with all rows."""
        return self.whole_shape

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the dense stack."""
        return self.stack.dtype

    def at(self, layer: Int[Array, ""] | int) -> Weight:
        """Returns one layer with all rows, gathered."""
        leaves, tree = jax.tree.flatten(self.stack)
        whole = [self._gathered(leaf, is_cut, layer) for leaf, is_cut in zip(leaves, self.is_cut, strict=True)]
        return tree.unflatten(whole).at(0)

    def _gathered(self, leaf: Array, is_cut: bool, layer: Int[Array, ""] | int) -> Array:
        if leaf.ndim == 1:  # a table that all layers share
            return leaf
        one = jax.lax.dynamic_slice_in_dim(leaf, layer, 1)
        return jax.lax.all_gather(one, self.axis, axis=1, tiled=True) if is_cut else one

    def dense(self, dtype: DTypeLike) -> Float[Array, "L O I"]:
        """Raises an error, because all layers together may not fit on a device; see `at`."""
        raise NotImplementedError("a stack in shards is read layer by layer: take one layer with `at`")

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Raises an error, as a stack has no rows of its own; see `at`."""
        raise NotImplementedError("a stack of matrices has no rows: take one layer with `at`")

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "ShardedStack":
        """Raises an error: weights are written outside of programs."""
        raise NotImplementedError("a program does not write to a stack in shards")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedMatrix(Weight):
    """Holds this device's rows of a trained matrix; a loop over layers cuts it out of a stack.

    Attributes:
      value: the rows, `[*L, O / n, I]`.
      axis: the mesh axis of the n devices that share the matrix.
      count: n.
    """

    value: Any
    axis: str = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    is_trainable = True
    is_dense = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrix with all rows."""
        *layers, rows, columns = self.value.shape
        return (*layers, self.count * rows, columns)

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the stored rows."""
        return self.value.dtype

    def at(self, layer: Int[Array, ""] | int) -> "ShardedMatrix":
        """Returns one layer of a stack."""
        return dataclasses.replace(self, value=jax.lax.dynamic_index_in_dim(self.value, layer, keepdims=False))

    def dense(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        """Returns the matrix with all rows, gathered in `dtype`."""
        return _gather_rows(self.value, self.axis, jnp.dtype(dtype))

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the gathered matrix."""
        return self.dense(dtype)[rows]

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns `x W^T`, with JAX's own derivative."""
        return x @ self.dense(x.dtype).T

    def cast(self, dtype: DTypeLike) -> DenseWeight:
        """Returns the gathered matrix in `dtype`, for both passes."""
        return DenseWeight(self.dense(dtype))

    def cotangent(self, gradient: Callable[[], Float[Array, "O I"]]) -> "ShardedMatrix":
        """Returns this device's rows of the gradient, added up over the devices in float32."""
        return dataclasses.replace(self, value=_scatter_rows(gradient(), self.axis).astype(self.dtype))

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "ShardedMatrix":
        """Raises an error: weights are written outside of programs."""
        raise NotImplementedError("a program does not write to a matrix in shards")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_rows(value, axis, dtype):
    return jax.lax.all_gather(value.astype(dtype), axis, axis=value.ndim - 2, tiled=True)


def _gather_forward(value, axis, dtype):
    return _gather_rows(value, axis, dtype), jnp.zeros((0,), value.dtype)


def _gather_backward(axis, dtype, like, d):
    del dtype
    return (_scatter_rows(d, axis).astype(like.dtype),)


_gather_rows.defvjp(_gather_forward, _gather_backward)


def _scatter_rows(d: Array, axis: str) -> Array:
    """Returns this device's rows of the sum over the devices, float32: a sum in 16 bits would lose digits."""
    return jax.lax.psum_scatter(d.astype(jnp.float32), axis, scatter_dimension=d.ndim - 2, tiled=True)
