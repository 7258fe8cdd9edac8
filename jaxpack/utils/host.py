"""Measures the memory of this machine that is free, within the limits of a container."""

from collections.abc import Iterator
from pathlib import Path


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes that can be allocated without swapping, within a container's limit; None outside Linux."""
    try:
        available = _counters(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return None
    return min([available, *_left_in_containers(root)])


# For versions 2 and 1 of control groups: the folder, and the names of three numbers. These are the limit, the memory in
# use, and the part of the memory in use that caches files, which Linux frees when memory is needed.
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
        except (OSError, ValueError, KeyError):  # there is no container, or no limit ("max")
            continue


def _counters(path: Path) -> dict[str, int]:
    """Returns the number after the first word of each line, by that word."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
