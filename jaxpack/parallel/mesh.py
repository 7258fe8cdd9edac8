"""Makes the mesh of devices that a run is on; one device is a mesh of one."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxpack.errors import InputError
from jaxpack.parallel.device import current_device

DeviceMesh = Mesh | AbstractMesh
DATA = "data"  # the mesh axis over which the rows of a batch are dealt


def make_mesh(devices: Sequence[jax.Device] | None = None) -> DeviceMesh:  # pyright: ignore[reportInvalidTypeForm]
    """Returns a mesh with one axis, "data", over `devices`.

    With None, it is the mesh that is set in JAX (`jax.set_mesh`), if that mesh has such an axis, and otherwise a mesh
    of the one device that arrays are made on.

    Raises:
      InputError: `devices` is empty or names a device twice.

    Example:
      >>> make_mesh().shape["data"]
      1
    """
    if devices is None and DATA in (already := jax.sharding.get_abstract_mesh()).axis_names:
        return already
    devices = [current_device()] if devices is None else list(devices)
    if not devices or len(set(devices)) != len(devices):
        raise InputError(f"`devices` must be at least one device, each once, got {devices}.")
    return Mesh(np.array(devices), (DATA,))
