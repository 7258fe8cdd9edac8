"""What all tests share: strict jax, shapes checked at every call, and small models of both families."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked at every call (not on a GPU machine that has no beartype). This must come
# before the package's first import.
_PARTS = ("attention", "block", "cache", "context", "feed_forward", "linear", "norm", "transformer", "weights")
_CHECKED = ("kernels", *(f"model.{part}" for part in _PARTS), "train.step", "generation.decode")
_HAS_BEARTYPE = importlib.util.find_spec("beartype") is not None
if _HAS_BEARTYPE:
    install_import_hook([f"jaxpack.{module}" for module in _CHECKED], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU, float32 references would be rounded to tf32


def pytest_configure(config: pytest.Config) -> None:
    if _HAS_BEARTYPE:  # which warns of annotations within flax
        config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


@pytest.fixture(params=["qwen3", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What torch and PEFT draw without a generator of ours, which would be something else in every run."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's cache home for these tests alone: runs keep their programs there."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        jax.config.update("jax_compilation_cache_dir", None)
        yield home


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
