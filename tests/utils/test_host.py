"""Tests how much memory a machine has free."""

import pytest

from jaxpack.utils.host import available_host_bytes

# For each cgroup version: the folder, the names of the limit and the usage, and the name of the page cache entry.
GROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def host(root, available: int, version: int = 2, limit: str | None = None, used: int = 0, cached: int = 0):
    """Writes a file system that says how much memory there is, in GiB."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available * 2**20} kB\n")
    if limit is not None:
        folder, of_limit, of_use, of_files = GROUPS[version]
        group = root / folder
        group.mkdir(parents=True)
        (group / of_limit).write_text(limit + "\n")
        (group / of_use).write_text(f"{used * 2**30}\n")
        (group / "memory.stat").write_text(f"anon 7\n{of_files} {cached * 2**30}\nactive_file 9\n")
    return root


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize(
    ("limit", "used", "cached", "expected"),
    [
        (None, 0, 0, 8),
        ("max", 1, 0, 8),
        (str(2**63 - 4096), 1, 0, 8),
        (str(5 * 2**30), 2, 0, 3),
        (str(5 * 2**30), 5, 4, 4),  # a checkpoint was read, and is still in the cache
        (str(50 * 2**30), 2, 1, 8),
        (str(2**30), 2, 0, 0),
    ],
)
def test_available_memory_is_that_of_the_container(version, limit, used, cached, expected, tmp_path):
    assert available_host_bytes(tmp_path) is None  # not Linux
    assert available_host_bytes(host(tmp_path, 8, version, limit, used, cached)) == expected * 2**30
