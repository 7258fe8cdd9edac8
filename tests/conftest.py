"""Settings and fixtures that all tests share: strict JAX, shapes checked at every call, the two model families."""

import collections
import gc
import importlib.util
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked at every call, unless beartype is missing, as on some GPU machines. This
# must come before the package's first import.
_PARTS = ("attention", "block", "cache", "context", "feed_forward", "linear", "norm", "transformer", "weights")
_CHECKED = ("kernels", *(f"model.{part}" for part in _PARTS), "train.step", "generation.decode")
_HAS_BEARTYPE = importlib.util.find_spec("beartype") is not None
if _HAS_BEARTYPE:
    install_import_hook([f"jaxpack.{module}" for module in _CHECKED], "beartype.beartype")

# Tests of these rooms compile a program for each case. Of those with many cases, one in this many is not slow.
_COMPILING, _MANY = {"kernels": 7, "model": 7, "torch_bridge": 7, "train": 4}, 4

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # else a GPU rounds float32 references to tf32


def pytest_configure(config: pytest.Config) -> None:
    if _HAS_BEARTYPE:  # beartype warns of annotations within flax
        config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", metavar="K/N", help="run the K-th part of N of each test's cases, but at least one case"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked as slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks all but one in N cases of a `one_in(N)` test as slow, and keeps the part of the cases that `--cases` names.

    Tests of the rooms that compile a program for each case are `one_in(7)` or so without a marker, if they have many
    cases. Tests that need a GPU run all of them.

    A hash of their names orders the cases of a test. In the order of their parameters, all cases of one part could have
    the same value of one parameter.
    """
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.split("[")[0]].append(item)
    left_out = []
    for cases in tests.values():
        cases.sort(key=lambda item: zlib.crc32(item.name.encode()))
        marker = cases[0].get_closest_marker("one_in")
        of_room = _COMPILING.get(cases[0].path.parent.name, 1) if len(cases) >= _MANY else 1
        parts = marker.args[0] if marker is not None else of_room
        if parts > 1 and cases[0].get_closest_marker("gpu") is None:
            for item in _without_part([item for item in cases if not _is_slow(item)], 0, parts):
                item.add_marker(pytest.mark.slow)
        if config.getoption("--cases"):
            part, parts = map(int, config.getoption("--cases").split("/"))
            # By the names of the cases alone, so that tests with the same cases share their fixtures and programs.
            cases.sort(key=lambda item: zlib.crc32(item.name.partition("[")[2].encode()))
            left_out += _without_part([item for item in cases if _is_slow(item)], part, parts)
            left_out += _without_part([item for item in cases if not _is_slow(item)], part, parts)
    names = {item.nodeid for item in left_out}
    items[:] = [item for item in items if item.nodeid not in names]
    config.hook.pytest_deselected(items=left_out)


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _without_part(items: list[pytest.Item], part: int, parts: int) -> list[pytest.Item]:
    parts = min(parts, len(items))
    return [item for place, item in enumerate(items) if place % parts != part % parts]


@pytest.fixture(params=["qwen3", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Seeds torch, so that what torch and PEFT draw without a generator of ours is the same in every run."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Sets aside what earlier files left, mostly imported modules and compiled programs, for the garbage collector.

    It would visit these millions of objects again and again, which slows down whatever makes many objects: tracing.
    Where they have taken nearly half of the mappings of memory that Linux allows a process (65,530), they are deleted:
    XLA dies where it gets no more.
    """
    if num_mappings() > 30_000:
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def num_mappings() -> int:
    """Returns the number of mappings of this process's memory; each compiled program has several."""
    mappings = Path("/proc/self/maps")
    return mappings.read_bytes().count(b"\n") if mappings.exists() else 0


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sets a cache home for these tests alone; runs keep their compiled programs in it."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        jax.config.update("jax_compilation_cache_dir", None)
        yield home


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a separate file system of 4 MiB. Skips the test where mounting is not permitted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
