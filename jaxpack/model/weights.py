"""What is trained and what is frozen, and how a model holds its matrices.

A parameter that is trained is an `nnx.Param` of an array. What is frozen is a `Frozen` variable: of a `Weight` for a
matrix, in whatever form it is stored, and of a plain array for anything smaller.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.kernels.weight import DenseWeight, Weight, as_weight

TRAINED = nnx.Param  # the one filter that says what is trained: adapters' factors are kinds of it
MATRICES = ("weight", "embedding", "lm_head")  # the attributes of modules that hold a matrix


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


def weight_of(variable: nnx.Variable) -> Weight:
    """Returns the matrix that a variable holds, trained or frozen."""
    return as_weight(variable.get_value())


def is_trained(variable: Any) -> bool:
    """Whether an attribute of a module is a parameter that training changes."""
    return isinstance(variable, TRAINED)


def split_trained(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns a model's structure, the parameters that training changes, and all others; arrays may be abstract."""
    return nnx.split(model, TRAINED, ...)


def freeze(
    model: nnx.Module, store: Callable[[Array], Weight] = DenseWeight, *, leave_out: Collection[str] = ()
) -> None:
    """Turns all parameters of a model into frozen ones, in place.

    Args:
      store: makes the weight of a matrix, or of a stack of them.
      leave_out: the attributes of the model itself that stay trained.
    """
    for path, module in list(nnx.iter_modules(model)):
        for name, variable in list(vars(module).items()):
            if is_trained(variable) and not (path == () and name in leave_out):
                value = variable.get_value()
                setattr(module, name, Frozen(store(value) if name in MATRICES else value))


def reads_by_number(_: Any, variable: Any) -> bool:
    """A filter for variables whose weight a loop over layers reads by the number of the layer (`Weight.at`)."""
    value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
    return isinstance(value, Weight) and value.reads_by_number


def weights_at(stacks: nnx.State, layer: Int[Array, ""] | None) -> nnx.State:
    """Returns one layer's view of weights that are read by number."""
    return jax.tree.map(lambda weight: weight.at(layer), stacks, is_leaf=lambda leaf: isinstance(leaf, Weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedWeight(Weight):
    """A stack whose layers are stored in several forms: 4-bit with single layers left in 16 bits, say.

    Attributes:
      parts: a stack for each form.
      places: for each layer, its part and its number there.
      layer: the layer that is read; None for the whole stack.
    """

    parts: tuple[Any, ...]
    places: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    layer: Any = None

    reads_by_number: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one matrix, or of the stack of all layers."""
        matrix = self.parts[0].shape[-2:]
        return (len(self.places), *matrix) if self.layer is None else matrix

    @property
    def dtype(self) -> jnp.dtype:
        """The widest dtype of the parts."""
        return jnp.result_type(*(part.dtype for part in self.parts))

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "MixedWeight":
        """Returns the stack with rows of one layer stored in the form that this layer has."""
        layer, row = start
        parts = list(self.parts)
        for kind, part in enumerate(parts):
            numbers = jnp.array([number if place == kind else -1 for place, number in self.places], jnp.int32)
            number = numbers[layer]
            keep = lambda part, number: part  # noqa: E731
            put = lambda part, number: part.write((number, row), rows)  # noqa: E731
            parts[kind] = jax.lax.cond(number < 0, keep, put, part, number)
        return dataclasses.replace(self, parts=tuple(parts))

    def at(self, layer: Int[Array, ""] | int) -> "MixedWeight":
        """Returns one layer of the stack."""
        return dataclasses.replace(self, layer=layer)

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the layer that is read, or all layers."""
        if self.layer is None:
            return jnp.stack([self.at(layer).dense(dtype) for layer in range(len(self.places))])
        return self._choose(lambda weight: weight.dense(dtype))

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of the layer that is read."""
        return self._choose(lambda weight: weight.take(rows, dtype))

    def append_columns(self, b: Float[Array, "O R"]) -> Float[Array, "O E"]:
        """Returns `[W, B]`, made in one pass from whichever form the layer has."""
        return self._choose(lambda weight: weight.append_columns(b))

    def append_rows(self, a: Float[Array, "R I"]) -> Float[Array, "P I"]:
        """Returns `[W; A]`, made in one pass from whichever form the layer has."""
        return self._choose(lambda weight: weight.append_rows(a))

    def after(self, *arrays: Array) -> tuple[tuple[Array, ...], "MixedWeight"]:
        """Orders the number of the layer, from which all else is read, behind the arrays."""
        *arrays, layer = jax.lax.optimization_barrier((*arrays, jnp.asarray(self.layer)))
        return tuple(arrays), self.at(layer)

    def _choose(self, read: Callable[[Weight], Array]) -> Array:
        kinds, numbers = (jnp.asarray(column, jnp.int32) for column in zip(*self.places, strict=True))
        number = numbers[self.layer]
        branches = [lambda number, part=part: read(part.at(number)) for part in self.parts]
        return jax.lax.switch(kinds[self.layer], branches, number)
