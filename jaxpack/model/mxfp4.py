"""Holds frozen matrices in MXFP4, the format of GPT-OSS' experts; see `kernels.mxfp4`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.errors import InputError
from jaxpack.kernels.mxfp4 import BLOCK, CODES_PER_WORD, decoded, dequantize_mxfp4
from jaxpack.kernels.weight import NumberedWeight, Weight, write_rows
from jaxpack.model.moe import Experts
from jaxpack.model.weights import store_dense

_decoded = jax.jit(decoded, static_argnums=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Weight(NumberedWeight):
    """Stores a stack of matrices, `[L, O, I]`, as codes of 4 bits and scales of 8 bits.

    Attributes:
      codes: eight codes in each word, uint32 `[L, O, I / 8]`.
      scales: one for each block of 32 elements, uint8 `[L, O, I / 32]`.
    """

    codes: Any
    scales: Any

    @classmethod
    def abstract(cls, shape: tuple[int, ...]) -> "MXFP4Weight":
        """Returns a stack of this shape without arrays."""
        *rows, columns = shape
        codes = jax.ShapeDtypeStruct((*rows, columns // CODES_PER_WORD), jnp.uint32)
        return cls(codes, jax.ShapeDtypeStruct((*rows, columns // BLOCK), jnp.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one dense matrix, or of the dense stack."""
        *rows, words = self.codes.shape
        shape = (*rows, words * CODES_PER_WORD)
        return shape if self.layer is None else shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        """Returns bfloat16, which holds every value exactly."""
        return jnp.dtype(jnp.bfloat16)

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the layer that is read, or the whole stack, as a dense array."""
        if self.layer is None:
            return decoded(self.codes, self.scales, dtype)
        return dequantize_mxfp4(self.codes, self.scales, self.layer, dtype)

    def dense_rows(self, first: int, size: int, dtype: DTypeLike) -> Float[Array, "N I"]:
        """Returns rows of the layer that is read, of which only these are decoded."""
        codes, scales = (
            jax.lax.dynamic_slice(x, (self.layer, first, 0), (1, size, x.shape[2]))[0]
            for x in (self.codes, self.scales)
        )
        return _decoded(codes, scales, dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the layer that is read."""
        codes, scales = self._arrays
        return decoded(codes[rows], scales[rows], dtype)

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "MXFP4Weight":
        """Raises InputError: dense rows are not quantised to MXFP4."""
        raise InputError("Rows of a matrix in MXFP4 must be in MXFP4, too, got dense ones. Read the original files.")

    def put(self, start: tuple[Int[Array, ""] | int, ...], part: "MXFP4Weight") -> "MXFP4Weight":
        """Returns the weight with rows of one layer replaced by those of `part`, a stack of one matrix.

        Args:
          start: the layer and the first row.
        """
        codes, scales = (
            write_rows(whole, start, new[0]) for whole, new in ((self.codes, part.codes), (self.scales, part.scales))
        )
        return dataclasses.replace(self, codes=codes, scales=scales)

    @property
    def _arrays(self) -> tuple[Array, Array]:
        if self.layer is None:
            return self.codes, self.scales
        codes, scales = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (self.codes, self.scales))
        return codes, scales


def mxfp4_store(matrix: Float[Array, "L O I"], module: nnx.Module) -> Weight:
    """Returns experts' matrices as zeros in MXFP4, for predictions of memory, and all others as they are."""
    if not isinstance(module, Experts):
        return store_dense(matrix, module)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), MXFP4Weight.abstract(matrix.shape))
