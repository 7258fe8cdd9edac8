"""The device that a run is on, and the memory of it and of its host."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.extend import backend

try:
    import resource
except ImportError:  # Windows has none
    resource = None

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PINNED_LIMIT_GIB = 64  # of a process, where that is not set


def current_device() -> jax.Device:
    """Where arrays are made: by `jax.default_device`, or the first of this process."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.local_devices(backend=chosen)[0]


def may_lower_for_gpu() -> bool:
    """Returns whether a program that is traced now may be lowered for a GPU.

    It may where this process has any device but a CPU, or where the mesh in context (`jax.sharding.use_abstract_mesh`)
    is one of GPUs that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return set(backend.backends()) != {"cpu"} or (device is not None and device.platform == "gpu")


def platform_of(array: jax.Array) -> str:
    """Returns the platform that an array lies on: "cpu" or "gpu"."""
    return next(iter(array.devices())).platform


def free_device_bytes(device: jax.Device) -> int | None:
    """What its allocator has left; None where it does not say."""
    statistics = device.memory_stats() or {}
    return statistics["bytes_limit"] - statistics["bytes_in_use"] if "bytes_limit" in statistics else None


def peak_memory_bytes() -> int:
    """Returns the most memory held so far: the GPU allocator's own peak, or, on a CPU, that of the whole process.

    It is 0 on a CPU whose operating system does not say.
    """
    statistics = current_device().memory_stats()
    if statistics is not None:
        return statistics["peak_bytes_in_use"]
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """What Linux says can be allocated without swapping, within the limit of a container; None elsewhere."""
    try:
        available = _counters(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return None
    return min([available, *_left_in_containers(root)])


def pinned_limit_bytes() -> int:
    """The most of the host's memory that XLA pins for a GPU."""
    setting = os.environ.get(PINNED_LIMIT, "")
    return (int(setting) if setting.isdecimal() else _PINNED_LIMIT_GIB) * 2**30


# In versions 2 and 1 of control groups: the folder; its limit, what is used, and what of that is files read before,
# which make way.
_GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _left_in_containers(root: Path) -> Iterator[int]:
    for folder, *names, cached in _GROUPS:
        group = root / folder
        try:
            limit, used = (int((group / name).read_text()) for name in names)
            yield max(0, limit - used + _counters(group / "memory.stat")[cached])
        except (OSError, ValueError, KeyError):  # no container, or no limit: "max"
            continue


def _counters(path: Path) -> dict[str, int]:
    """The numbers behind the first word of each line."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
