"""Defines an 8-bit weight, to test that model, training and bridge work with any kind of weight."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpack.kernels.weight import DenseWeight, Weight, write_rows
from jaxpack.model.nf4 import quantize_nf4
from jaxpack.model.weights import Frozen, MixedWeight, projection_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight(Weight):
    """Stands for `codes * scales`, with one scale for each output channel; or for one layer of a stack."""

    codes: Any  # int8 [*L, O, I]
    scales: Any  # float32 [*L, O]
    layer: Any = None

    reads_by_number: ClassVar[bool] = True

    @classmethod
    def of(cls, dense: jax.Array, module=None) -> "Int8Weight":
        scales = jnp.maximum(jnp.max(jnp.abs(dense.astype(jnp.float32)), axis=-1), 1e-12) / 127
        return cls(jnp.round(dense.astype(jnp.float32) / scales[..., None]).astype(jnp.int8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape if self.layer is None else self.codes.shape[1:]

    def at(self, layer) -> "Int8Weight":
        return dataclasses.replace(self, layer=layer)

    def dense(self, dtype) -> jax.Array:
        codes, scales = self._arrays()
        return (codes.astype(jnp.float32) * scales[..., None]).astype(dtype)

    def take(self, rows, dtype) -> jax.Array:
        codes, scales = self._arrays()
        return (codes[rows].astype(jnp.float32) * scales[rows][..., None]).astype(dtype)

    def after(self, *arrays):
        if self.layer is None:
            *arrays, scales = jax.lax.optimization_barrier((*arrays, self.scales))
            return tuple(arrays), dataclasses.replace(self, scales=scales)
        *arrays, layer = jax.lax.optimization_barrier((*arrays, jnp.asarray(self.layer)))
        return tuple(arrays), self.at(layer)

    @property
    def dtype(self):
        return jnp.dtype("float32")

    def write(self, start, rows) -> "Int8Weight":
        part = self.of(rows)
        codes, scales = write_rows(self.codes, start, part.codes), write_rows(self.scales, start, part.scales)
        return dataclasses.replace(self, codes=codes, scales=scales)

    def _arrays(self):
        if self.layer is None:
            return self.codes, self.scales
        return tuple(jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for a in (self.codes, self.scales))


def mixed(dense: jax.Array, module=None) -> Weight:
    """Turns the odd layers of a stack, or a single matrix, into 8-bit weights; even layers stay dense."""
    if dense.ndim == 2:
        return Int8Weight.of(dense)
    places = tuple((layer % 2, layer // 2) for layer in range(len(dense)))
    return MixedWeight((DenseWeight(dense[::2]), Int8Weight.of(dense[1::2])), places)


def mixed_nf4(dense: jax.Array, module=None) -> Weight:
    """Turns the odd layers of projections into 4-bit weights; all else stays dense."""
    rows = None if module is None else projection_rows(module)
    if rows is None:
        return DenseWeight(dense)
    places = tuple((layer % 2, layer // 2) for layer in range(len(dense)))
    return MixedWeight((DenseWeight(dense[::2]), quantize_nf4(dense[1::2], rows, 32)), places)


def dense_twin(model: nnx.Module) -> nnx.Module:
    """Returns a copy of the model in which each frozen weight is the dense array that it stands for."""
    graph, state = nnx.split(model)
    twin = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    for _, module in list(nnx.iter_modules(twin)):
        for name, variable in list(vars(module).items()):
            if isinstance(variable, Frozen) and isinstance(variable.get_value(), Weight):
                setattr(module, name, Frozen(DenseWeight(variable.get_value().dense(twin.dtype))))
    return twin
