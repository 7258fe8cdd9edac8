"""Places arrays on a mesh by one table from logical axes to mesh axes."""

from typing import TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpack.parallel.mesh import DATA, DeviceMesh

Tree = TypeVar("Tree")

# A logical axis that is not named here is whole on every device.
MESH_AXES: dict[str, str] = {"batch": DATA}

BATCH = ("micro", "batch", "token")  # the logical axes of a `PackedBatch`


def spec(*axes: str) -> PartitionSpec:
    """Returns the partition of an array with these logical axes."""
    return PartitionSpec(*(MESH_AXES.get(axis) for axis in axes))


def batch_sharding(mesh: DeviceMesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays `[A, B, T]`, which gives each device a share of the B rows."""
    return NamedSharding(mesh, spec(*BATCH))


def replicate(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Returns a pytree with its arrays whole on every device of the mesh; unchanged for a mesh of one device."""
    return tree if mesh.size == 1 else jax.device_put(tree, NamedSharding(mesh, spec()))
