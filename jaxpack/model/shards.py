"""Deals a model's matrices over the devices of a mesh: which array is cut into shards, and along which axis.

Along the mesh axis "fsdp" the matrices of the layers are cut by rows, whole or quantised, trained or frozen, and with
them their gradients and the optimizer's state (`optimizers/placement.py`). So are a trained embedding and head.
Everything else is whole on every device: norms, biases, adapters, and a frozen embedding or head, which every device
needs whole at once.
"""

import functools
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import DictKey, tree_map_with_path

from jaxpack.kernels.sharded_weight import ShardedMatrix, ShardedStack
from jaxpack.kernels.weight import Weight, one_layer
from jaxpack.parallel.mesh import FSDP, DeviceMesh, num_shards
from jaxpack.parallel.placement import WHOLE, is_partition, place, put

Tree = TypeVar("Tree")
Path = tuple[Any, ...]

_BLOCKS, _MATRIX, _OUTSIDE, _ADAPTERS = "blocks", "weight", ("embedding", "lm_head"), "lora"


def specs(parameters: Tree, mesh: DeviceMesh) -> Tree:
    """Returns the partition of each array of a model's trained or frozen parameters, which may be abstract.

    An array whose rows cannot be dealt evenly is whole on every device.
    """
    shards = num_shards(mesh)

    def of_value(path: Path, value: Any) -> Any:
        axis = _row_axis(path, is_frozen=isinstance(value, Weight))
        if isinstance(value, Weight) and not value.shards_by_rows:
            axis = None

        def of_array(array: Any) -> PartitionSpec:
            if shards == 1 or axis is None or array.ndim <= axis or array.shape[axis] % shards:
                return WHOLE
            return PartitionSpec(*axis * (None,), FSDP)

        return jax.tree.map(of_array, value)

    return tree_map_with_path(of_value, parameters, is_leaf=lambda value: isinstance(value, Weight))


def deal(parameters: Tree, mesh: DeviceMesh) -> Tree:
    """Returns a model's trained or frozen parameters on a mesh; of abstract ones, where they will lie."""
    return place(parameters, specs(parameters, mesh), mesh)


def _row_axis(path: Path, *, is_frozen: bool) -> int | None:
    """Returns the axis of a matrix' rows if they are dealt over the devices, by the matrix' path in a model."""
    names = [key.key for key in path if isinstance(key, DictKey)]
    if _ADAPTERS in names:
        return None
    if names[:1] == [_BLOCKS] and names[-1] == _MATRIX:
        return 1  # behind the axis of the layers
    return 0 if names and names[0] in _OUTSIDE and not is_frozen else None


def gathering(parameters: Tree, whole: Tree, mesh: DeviceMesh) -> Tree:
    """Returns parameters, of which this device holds its shards, with weights that gather them where they are read.

    Only within `sum_over_shards`.

    Args:
      whole: the same parameters outside of it, as `specs` takes them.
    """
    count = num_shards(mesh)
    if count == 1:
        return parameters

    def held(partition: Any, local: Any, value: Any) -> Any:
        is_cut = tuple(FSDP in spec for spec in jax.tree.leaves(partition, is_leaf=is_partition))
        if not any(is_cut):
            return local
        if isinstance(local, Weight):
            return ShardedStack(local, is_cut, value.shape, FSDP)
        return ShardedMatrix(local, FSDP, count)

    def is_value(value: Any) -> bool:
        return isinstance(value, Weight) or is_partition(value)

    return jax.tree.map(held, specs(whole, mesh), parameters, whole, is_leaf=is_value)


def in_shards(value: Any) -> bool:
    """Returns whether arrays of a weight, or an array, are cut into shards on several devices."""
    return any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(value))


def one_of(value: Tree, layer: int | None) -> Tree:
    """Returns abstract arrays on one device for one layer of a stack, with its axis; for all if `layer` is None."""
    if layer is not None:
        return one_layer(value)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), value)


def put_in_shards(value: Tree, layer: int | None, one: Tree) -> Tree:
    """Returns a stack in shards with one layer replaced by `one`, whose arrays are whole on one device.

    The stack's arrays are donated. If `layer` is None, `one` replaces all of it. Not to be used in a program.
    """

    def written(whole: jax.Array, new: jax.Array) -> jax.Array:
        new = put(new, whole.sharding)  # each device gets its rows
        return new if layer is None or whole.ndim == 1 else _write_layer(whole, new, layer)

    return jax.tree.map(written, value, one)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(whole: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, one, layer, axis=0)
