"""Places arrays on a mesh."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpack.parallel.device import current_device
from jaxpack.parallel.mesh import DeviceMesh, batch_axes

Tree = TypeVar("Tree")

WHOLE = PartitionSpec()  # the partition of an array that is whole on every device


def batch_spec(mesh: DeviceMesh) -> PartitionSpec:
    """Returns the partition of a batch's arrays `[A, B, T]`, which gives each device a share of the B rows."""
    return PartitionSpec(None, batch_axes(mesh))


def batch_sharding(mesh: DeviceMesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays `[A, B, T]`."""
    return NamedSharding(mesh, batch_spec(mesh))


def is_partition(value: Any) -> bool:
    """Returns whether a value is a `PartitionSpec`, which pytrees of partitions have as leaves."""
    return isinstance(value, PartitionSpec)


def place(tree: Tree, partition: Any, mesh: DeviceMesh) -> Tree:
    """Returns a pytree with its arrays, which may be abstract, on the mesh.

    For a mesh of one device it is unchanged, but for arrays that lie on several devices.

    Args:
      partition: the partition of each array, see `specs`.
    """
    if mesh.size == 1:
        return jax.tree.map(_on_current_device, tree)

    def placed(spec: PartitionSpec, leaf: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return put(leaf, sharding)

    return jax.tree.map(placed, partition, tree, is_leaf=is_partition)


def _on_current_device(leaf: Any) -> Any:
    """Returns an array as it is, unless an earlier run left it on several devices."""
    is_spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    return jax.device_put(leaf, current_device()) if is_spread else leaf


def keep_placed(tree: Tree, partition: Any, mesh: DeviceMesh) -> Tree:
    """Returns a pytree whose arrays lie by their partition, in a program; unchanged for a mesh of one device.

    XLA may choose another place for an array whose place nothing says, and the next call of the program refuses it.
    """
    if mesh.size == 1:
        return tree

    def placed(spec: PartitionSpec, leaf: Any) -> Any:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(placed, partition, tree, is_leaf=is_partition)


def put(tree: Tree, sharding: Any) -> Tree:
    """Returns a pytree with its arrays, which may be NumPy's, on devices; as `jax.device_put`, also for several hosts.

    If some of the devices belong to other processes, each process has all of the arrays, and puts its own shards on its
    own devices. `jax.device_put` would compare the arrays of all processes, which none may do by itself in a thread.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def from_own(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)  # it lies on all devices already
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(from_own, tree)


def zeros_at(tree: Tree) -> Tree:
    """Makes arrays of zeros in one program, each where its abstract array lies: on one device, or in shards."""
    leaves, structure = jax.tree.flatten(tree)
    shardings = [leaf.sharding for leaf in leaves]
    make = jax.jit(lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves], out_shardings=shardings)
    return structure.unflatten(make())


def on_one_device(tree: Tree) -> Tree:
    """Returns a pytree whose arrays that are whole on every device lie on one device alone, without a copy."""

    def taken(leaf: Any) -> Any:
        is_copied = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 and leaf.is_fully_replicated
        return leaf.addressable_data(0) if is_copied else leaf

    return jax.tree.map(taken, tree)


def bytes_on_device(leaf: Any) -> int:
    """Returns the bytes that an array, which may be abstract, takes on each of its devices."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def replicate(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Returns a pytree with its arrays whole on every device of the mesh; unchanged for a mesh of one device."""
    return tree if mesh.size == 1 else put(tree, NamedSharding(mesh, WHOLE))
