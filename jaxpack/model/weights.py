"""Distinguishes trained from frozen parameters, and defines how a model holds its matrices.

A trained parameter is an `nnx.Param` that holds an array. A frozen parameter is a `Frozen` variable. It holds a matrix
as a `Weight`, in whatever form that is stored, and anything smaller as a plain array.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.kernels.host_weight import HostMatrix, HostWeight
from jaxpack.kernels.sharded_weight import ShardedMatrix, ShardedStack
from jaxpack.kernels.weight import DenseStack, DenseWeight, NumberedWeight, Weight, as_weight

TRAINED = nnx.Param  # the one filter for trained parameters; `nnx.LoRAParam` is a subclass
MATRICES = ("weight", "embedding", "lm_head")  # the attributes of modules that hold a matrix


class Frozen(nnx.Variable):
    """Holds a parameter that is not trained."""


def weight_of(variable: nnx.Variable) -> Weight:
    """Returns the matrix that a variable holds, trained or frozen."""
    return as_weight(variable.get_value())


def is_trained(variable: Any) -> bool:
    """Returns whether an attribute of a module is a parameter that training changes."""
    return isinstance(variable, TRAINED)


def split_trained(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns a model's structure, the parameters that training changes, and all others; arrays may be abstract."""
    graph, trained, others = nnx.split(model, TRAINED, ...)
    return graph, trained, others


def num_parameters(state: nnx.State) -> int:
    """Returns the number of parameters, in whatever form their matrices are stored."""
    values = jax.tree.leaves(state, is_leaf=lambda value: isinstance(value, Weight))
    return sum(math.prod(value.shape) for value in values)


def non_finite(parameters: nnx.State) -> list[str]:
    """Returns the names of the parameters that hold NaN or infinity, such as `blocks.mlp.down.lora_a`.

    The device reads them once.

    Raises:
      JaxRuntimeError: a program that was to compute them has failed.
    """
    arrays = {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(parameters)}
    finite = jax.device_get(_all_finite(list(arrays.values()))) if arrays else []
    return [name for name, good in zip(arrays, finite, strict=True) if not good]


@jax.jit
def _all_finite(arrays: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


# Makes the weight that a module holds from a matrix, or from a stack of matrices.
Store = Callable[[Array, nnx.Module], Weight]


def store_dense(matrix: Array | jax.ShapeDtypeStruct, module: nnx.Module) -> Weight:
    """Returns the matrix, which may be abstract, as a weight that is stored as it is."""
    return DenseStack(matrix) if getattr(module, "reads_in_place", False) else DenseWeight(matrix)


def projection_rows(module: nnx.Module) -> tuple[int, ...] | None:
    """Returns the rows of each projection in a module's matrix; None for an embedding, a head and a router."""
    projections = getattr(module, "projections", None)
    return None if projections is None else tuple(size for _, size in projections)


def freeze(model: nnx.Module, store: Store = store_dense, *, leave_out: Collection[str] = ()) -> None:
    """Turns all parameters of a model into frozen ones, in place.

    Args:
      store: makes the weights of the matrices.
      leave_out: names of attributes of the model itself that stay trained.
    """
    for path, module in list(nnx.iter_modules(model)):
        for name, variable in list(vars(module).items()):
            if is_trained(variable) and not (path == () and name in leave_out):
                value = variable.get_value()
                setattr(module, name, Frozen(store(value, module) if name in MATRICES else value))


def move_to_host(model: Any, *, layers: bool = False, embedding: bool = False) -> None:
    """Moves frozen matrices of a model to the host's memory, in place, one after another. Arrays may be abstract.

    A stack whose layers are stored in several forms stays on the device. So does an embedding or a head that is trained
    or not stored as one dense array.

    Args:
      layers: whether to move the matrices of all layers.
      embedding: whether to move the embedding and the head.
    """
    in_layers, outside = movable(model)
    for module, name, value in in_layers if layers else ():
        if not isinstance(value, HostWeight):
            setattr(module, name, Frozen(HostWeight.of(value)))
    for module, name, value in outside if embedding else ():
        if not isinstance(value, HostMatrix):
            setattr(module, name, Frozen(HostMatrix.of(value)))


class Place(NamedTuple):
    """Says where a model holds a frozen matrix, or a stack of them: the module, the attribute's name, and its value."""

    module: Any
    name: str
    value: Weight


def movable(model: Any) -> tuple[list[Place], list[Place]]:
    """Returns the frozen matrices that `move_to_host` moves, moved or not: those of the layers, and those outside."""

    def found(module: Any, name: str, kinds: Any) -> list[Place]:
        variable = vars(module).get(name)
        value = variable.get_value() if isinstance(variable, Frozen) else None
        if not isinstance(value, kinds) or isinstance(value, MixedWeight):
            return []
        return [Place(module, name, as_weight(value))]

    modules = [module for _, module in nnx.iter_modules(model.blocks)]
    in_layers = [place for module in modules for place in found(module, "weight", Weight)]
    # A head with an adapter is read whole, beside the adapter's factor.
    names = [name for name in ("embedding", "lm_head") if name != model.head_name or "lm_head" not in model.lora]
    outside = [place for name in names for place in found(model, name, DenseWeight | HostMatrix)]
    return in_layers, outside


def reads_by_number(_: Any, variable: Any) -> bool:
    """Selects, as an nnx filter, the weights that a loop over layers reads by layer number (`Weight.at`)."""
    value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
    return isinstance(value, Weight) and value.reads_by_number


def is_hosted(_: Any, variable: Any) -> bool:
    """Selects, as an nnx filter, the stacks whose arrays lie in the host's memory."""
    return isinstance(variable.get_value() if isinstance(variable, nnx.Variable) else variable, HostWeight)


def gathers(module: nnx.Module) -> bool:
    """Returns whether matrices of a module are in shards, so that reading them gathers them from several devices."""
    values = jax.tree.leaves(nnx.state(module), is_leaf=lambda value: isinstance(value, Weight))
    return any(isinstance(value, ShardedStack | ShardedMatrix) for value in values)


def weights_at(stacks: nnx.State, layer: Int[Array, ""] | None) -> nnx.State:
    """Returns one layer's view of weights that are read by layer number."""
    return jax.tree.map(lambda weight: weight.at(layer), stacks, is_leaf=lambda leaf: isinstance(leaf, Weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedWeight(NumberedWeight):
    """Holds a stack whose layers are stored in several forms, for example most in 4 bits and a few in 16.

    Attributes:
      parts: one stack for each form.
      places: for each layer, the index of its part and its index within that part.
    """

    parts: tuple[Any, ...]
    places: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    shards_by_rows: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one matrix, or of the stack of all layers."""
        matrix = self.parts[0].shape[-2:]
        return (len(self.places), *matrix) if self.layer is None else matrix

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype that the parts' dtypes promote to."""
        return jnp.result_type(*(part.dtype for part in self.parts))

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> "MixedWeight":
        """Returns the stack with `rows` of one layer replaced, stored in the form of that layer."""
        layer, row = start
        parts = list(self.parts)
        for kind, part in enumerate(parts):
            numbers = jnp.array([number if place == kind else -1 for place, number in self.places], jnp.int32)
            number = numbers[layer]
            keep = lambda part, number: part  # noqa: E731
            put = lambda part, number: part.write((number, row), rows)  # noqa: E731
            parts[kind] = jax.lax.cond(number < 0, keep, put, part, number)
        return dataclasses.replace(self, parts=tuple(parts))

    def with_part(self, kind: int, part: Weight) -> "MixedWeight":
        """Returns the stack with one of its parts replaced."""
        return dataclasses.replace(self, parts=(*self.parts[:kind], part, *self.parts[kind + 1 :]))

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the layer that is read, or all layers, as a dense array."""
        if self.layer is None:
            return self.dense_stack(dtype)
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

    def _choose(self, read: Callable[[Weight], Array]) -> Array:
        kinds, numbers = (jnp.asarray(column, jnp.int32) for column in zip(*self.places, strict=True))
        number = numbers[self.layer]
        branches = [lambda number, part=part: read(part.at(number)) for part in self.parts]
        return jax.lax.switch(kinds[self.layer], branches, number)
