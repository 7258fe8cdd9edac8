"""Appends the LoRA adapter of the head to it, so that the losses compute with both in one matmul.

With the product of the hidden states and A appended to these as further channels, and B to the head as further columns,
the logits are `[h, h A^T] @ [W, B]^T = h W^T + (h A^T) B^T`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.kernels.weight import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedHead(Weight):
    """Represents a frozen head with the B factor of its adapter as further columns, `[V, D + R]`.

    Only B has a gradient. Each reading copies the head once.

    Attributes:
      base: the head `[V, D]`.
      lora_b: the scaled factor `[V, R]`.
    """

    base: Any
    lora_b: Any

    is_trainable: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the head with the further columns."""
        rows, columns = self.base.shape
        return rows, columns + self.lora_b.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the head."""
        return self.base.dtype

    def at(self, layer: Int[Array, ""] | int) -> Weight:
        """Raises an error, as a head has no layers."""
        raise NotImplementedError("a head has no layers")

    def dense(self, dtype: DTypeLike) -> Float[Array, "V E"]:
        """Returns `[W, B]`."""
        return self.base.append_columns(self.lora_b.astype(dtype))

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B E"]:
        """Returns rows of `[W, B]`."""
        return jnp.concatenate([self.base.take(rows, dtype), self.lora_b[rows].astype(dtype)], axis=-1)

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> Weight:
        """Raises an error, as this is a view of two arrays."""
        raise NotImplementedError("a head with its adapter is read only")

    def trained_inputs(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B R"]:
        """Returns the channels that the trained columns read: the last ones."""
        return hidden[..., self.base.shape[1] :]

    def cotangent(self, gradient: Callable[[], Float[Array, "V R"]]) -> "AdaptedHead":
        """Returns the gradient of B; the head itself has none."""
        return AdaptedHead(None, gradient().astype(self.lora_b.dtype))
