"""Compiled programs, kept in a folder that the next run takes them from: JAX's persistent cache, in use for a while."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpack.errors import reason
from jaxpack.utils.console import console

_SETTINGS_LOCK = threading.RLock()  # of JAX, which has one of each for all threads
_HIT = "/jax/compilation_cache/cache_hits"


class ProgramCache:
    """Keeps what is compiled within `with cache.in_use()`, or finds it.

    Args:
      choice: a folder; "auto": the one that JAX is set to, else `default_folder()`; or "none". A folder that cannot be
        written to is "none", with a warning.

    Attributes:
      folder: None where programs are not kept.
      found: how many of the programs that `compile` was asked for were there.
    """

    def __init__(self, choice: str):
        with _SETTINGS_LOCK:  # another thread may have JAX set to a folder of its own
            self.folder = _folder(choice)
        self.found = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Points JAX to the folder, and back to what it was set to; for one thread at a time."""
        # JAX has one cache for all of the process, opened where its first program was compiled, and used from then on
        # whatever its settings say. So it is closed on both ends: what a user compiles around a run is theirs alone.
        settings: dict[str, Any] = {
            "jax_compilation_cache_dir": self.folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,  # a run's programs are few
            # XLA could keep the tilings it has tried, for programs that are new but alike: that saves 0.7 of 8 s where
            # only the batch has another size, and makes the folder's path a part of every key.
            "jax_persistent_cache_enable_xla_caches": "none",
        }
        with _SETTINGS_LOCK:
            before = {name: getattr(jax.config, name) for name in settings}
            if self.folder == before["jax_compilation_cache_dir"]:
                yield
                return
            _set(settings)
            try:
                yield
            finally:
                _set(before)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program, or finds it in the folder."""
        hits = []

        def count(event: str, **_: str | int) -> None:
            if event == _HIT:
                hits.append(event)

        jax.monitoring.register_event_listener(count)
        try:
            program = lowered.compile()
        finally:
            jax.monitoring.unregister_event_listener(count)
        self.found += bool(hits)
        return program


def default_folder() -> Path:
    """`jaxpack/programs` in the user's cache home: XDG_CACHE_HOME, where it is set to an absolute path, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "jaxpack" / "programs"


def size_of(folder: str) -> int:
    """Bytes of the files in a folder."""
    size = 0
    for file in Path(folder).rglob("*"):
        with contextlib.suppress(OSError):  # another run may be deleting it
            size += file.stat().st_size if file.is_file() else 0
    return size


def _folder(choice: str) -> str | None:
    if choice == "none" or not jax.config.jax_enable_compilation_cache:
        return None
    if choice == "auto" and jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    folder = "the cache home"
    try:
        folder = default_folder() if choice == "auto" else Path(choice).absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # JAX runs what it finds there
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        console.print(f"compiled programs cannot be kept in {folder}: {reason(error)}", style="yellow")
        return None


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
