"""Finds the device that a run is on, and measures the memory of the device."""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import backend

from jaxpack.constants import PINNED_GIB, PINNED_LIMIT

try:
    import resource
except ImportError:  # Windows has no `resource`
    resource = None


_GATHERED_BYTES = 2**30  # of an array in shards that the devices gather at a time


def current_device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the device that arrays are made on: `jax.default_device`, or the first device of this process."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.local_devices(backend=chosen)[0]


def may_lower_for_gpu() -> bool:
    """Returns whether a program that is traced now may be lowered for a GPU.

    It may if this process has a device that is not a CPU, or if the current mesh (`jax.sharding.use_abstract_mesh`)
    consists of GPUs. An abstract mesh only describes GPUs, so this process need not have them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return set(backend.backends()) != {"cpu"} or (device is not None and device.platform == "gpu")


# KiB of shared memory that a block may take, by compute capability; from NVIDIA's CUDA programming guide.
_SHARED_KIB = {"7.0": 96, "7.5": 64, "8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "9.0": 227, "10.0": 227, "10.3": 227}
_LEAST_SHARED_KIB = 99  # of cards newer than these, such as the RTX 5090


def shared_memory_bytes() -> int:
    """Returns the shared memory that a kernel's block may take on the current GPU; without a GPU, that of a Hopper.

    Kernels are built for it when they are traced, so a program must be lowered for the same kind of card.
    """
    device = current_device()
    capability = device.compute_capability if device.platform == "gpu" else "9.0"
    return 1024 * _SHARED_KIB.get(capability, _LEAST_SHARED_KIB)


def link_bytes_per_second() -> float:
    """Returns about how many bytes per second the current device copies from the host; on a CPU, as on a Hopper.

    Data-centre and consumer cards have PCIe 5 from compute capability 9.0 on, and PCIe 4 before.
    """
    device = current_device()
    is_older = device.platform == "gpu" and float(device.compute_capability) < 9
    return 25e9 if is_older else 50e9


def platform_of(array: jax.Array) -> str:
    """Returns the platform that an array lies on: "cpu" or "gpu"."""
    return next(iter(array.devices())).platform


def on_host(array: jax.Array) -> np.ndarray:
    """Returns an array's values in the host's memory, which stay when the array is donated.

    All processes must call it together for an array whose shards lie on devices of several.
    """
    if not (array.is_fully_addressable or array.is_fully_replicated):
        whole = np.empty(array.shape, array.dtype)
        # In pieces, since each of them is whole on every device for a moment.
        rows = max(1, _GATHERED_BYTES // (array.nbytes // len(array)))
        for first in range(0, len(array), rows):
            piece = array[first : first + rows]
            whole[first : first + rows] = multihost_utils.process_allgather(piece, tiled=True)
        return whole
    # Copied on a CPU: `np.asarray` would give a view of memory that is donated to the next step.
    return np.array(array) if platform_of(array) == "cpu" else np.asarray(array)


def free_device_bytes(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the bytes that the device's allocator has left, or None if the allocator does not report them."""
    statistics = device.memory_stats() or {}
    return statistics["bytes_limit"] - statistics["bytes_in_use"] if "bytes_limit" in statistics else None


def peak_memory_bytes() -> int:
    """Returns the peak memory so far, in bytes: the GPU allocator's or, on a CPU, that of the whole process.

    It is 0 on a CPU whose operating system does not report it.
    """
    statistics = current_device().memory_stats()
    if statistics is not None:
        return statistics["peak_bytes_in_use"]
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pinned_limit_bytes() -> int:
    """Returns the most host memory, in bytes, that XLA pins for a GPU."""
    setting = os.environ.get(PINNED_LIMIT, "")
    return (int(setting) if setting.isdecimal() else PINNED_GIB) * 2**30
