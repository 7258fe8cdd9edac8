"""Makes the mesh of devices that a run is on; one device is a mesh of one."""

import contextlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxpack.errors import InputError
from jaxpack.parallel.device import current_device

DeviceMesh = Mesh | AbstractMesh
DATA = "data"  # the axis along which all weights are whole on every device
FSDP = "fsdp"  # the axis along which the matrices of the layers are in shards
AXES = (DATA, FSDP)  # the rows of a batch are dealt over both


def make_mesh(
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    *,
    fsdp: int = 1,
) -> DeviceMesh:
    """Returns a mesh with the axes "data" and "fsdp" over `devices`.

    With None, it is the mesh that is set in JAX (`jax.set_mesh`), if that mesh has the axis "data", and otherwise a
    mesh of the one device that arrays are made on.

    Args:
      fsdp: the number of devices along the axis "fsdp"; the rest lies along "data".

    Raises:
      InputError: `devices` is empty or names a device twice, their number is no multiple of `fsdp`, or the mesh that is
        set has an axis of another name.

    Example:
      >>> make_mesh().shape["data"]
      1
    """
    if devices is None and (already := _already_set()) is not None:
        return already
    devices = [current_device()] if devices is None else list(devices)
    if not devices or len(set(devices)) != len(devices):
        raise InputError(f"`devices` must be at least one device, each once, got {devices}.")
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"`fsdp` must be a divisor of the number of devices, {len(devices)}, got {fsdp}.")
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES)


def _already_set() -> DeviceMesh | None:
    """Returns the mesh that is set in JAX, if it has the axis "data"."""
    mesh: DeviceMesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.axis_names:
        return None
    with contextlib.suppress(ValueError):  # Within a program, which knows no devices, JAX gives only the abstract mesh.
        mesh = jax.sharding.get_mesh()
    if others := [axis for axis in mesh.axis_names if axis not in AXES and mesh.shape[axis] > 1]:
        raise InputError(
            f"the mesh of `jax.set_mesh` must have no axes but {' and '.join(AXES)}, got {others}. Set another mesh, or"
            " none and `mesh` in `TrainConfig`."
        )
    return mesh


def batch_axes(mesh: DeviceMesh) -> tuple[str, ...]:
    """Returns the axes of the mesh over which rows are dealt and sums are added up."""
    return tuple(axis for axis in AXES if axis in mesh.axis_names)


def num_shards(mesh: DeviceMesh) -> int:
    """Returns the number of devices that share one copy of the weights."""
    return mesh.shape.get(FSDP, 1)


def parse_mesh(text: str, num_devices: int | None) -> dict[str, int]:
    """Returns the size of each axis in a text such as "data=4,fsdp=2"; an axis that is not named has size 1.

    Args:
      num_devices: the number of devices that there are; None if any number will do.

    Raises:
      InputError: the text names another axis, or an axis twice, or sizes whose product is not `num_devices`.

    Example:
      >>> parse_mesh("fsdp=2", 2)
      {'data': 1, 'fsdp': 2}
    """
    sizes = dict.fromkeys(AXES, 1)
    named = [part.partition("=") for part in text.replace(" ", "").split(",")]
    names = [name for name, _, _ in named]
    is_whole = all(size.isdecimal() and int(size) >= 1 for _, _, size in named)
    if not is_whole or not set(names) <= set(AXES) or len(set(names)) != len(names):
        raise InputError(
            f"`mesh` must be 'auto', or sizes of the axes {' and '.join(AXES)} such as 'data=4,fsdp=2', got {text!r}."
        )
    sizes |= {name: int(size) for name, _, size in named}
    if num_devices is not None and math.prod(sizes.values()) != num_devices:
        raise InputError(
            f"`mesh` must have sizes whose product is the number of devices, {num_devices}, got {text!r}. Change the"
            " sizes, or choose devices with the environment variable CUDA_VISIBLE_DEVICES."
        )
    return sizes


def describe_mesh(mesh: DeviceMesh) -> str:
    """Returns the number and kind of the devices, and the mesh, such as "8 x NVIDIA H200 (data=2, fsdp=4)".

    Axes of size 1 are left out.
    """
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {jax.devices()[0].device_kind} ({sizes})"
