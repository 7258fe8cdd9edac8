"""Where arrays lie on a mesh: one table from logical axes to mesh axes."""

from typing import TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpack.parallel.mesh import DATA, DeviceMesh

Tree = TypeVar("Tree")

# A logical axis that is not named here lies whole on every device.
MESH_AXES: dict[str, str] = {"batch": DATA}

BATCH = ("micro", "batch", "token")  # the logical axes of a `PackedBatch`


def spec(*axes: str) -> PartitionSpec:
    """Returns where an array with these logical axes lies."""
    return PartitionSpec(*(MESH_AXES.get(axis) for axis in axes))


def batch_sharding(mesh: DeviceMesh) -> NamedSharding:
    """Returns where the arrays `[A, B, T]` of a batch lie: each device has some of the B rows."""
    return NamedSharding(mesh, spec(*BATCH))


def replicate(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Returns the arrays of a pytree, whole, on every device of the mesh. On a mesh of one they are not touched."""
    return tree if mesh.size == 1 else jax.device_put(tree, NamedSharding(mesh, spec()))
