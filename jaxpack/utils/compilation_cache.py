"""Keeps compiled programs in a folder for the next run: JAX's persistent cache, switched on for part of a process."""

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

_SETTINGS_LOCK = threading.RLock()  # JAX has one copy of its settings for all threads
_HIT = "/jax/compilation_cache/cache_hits"


class ProgramCache:
    """Stores programs that are compiled within `with cache.in_use()`, and finds those that were stored before.

    Args:
      choice: a folder, "auto" or "none". "auto" takes the folder that JAX is set to, else `default_folder()`. A folder
        that cannot be written to counts as "none", with a warning.

    Attributes:
      folder: the folder in use, or None if programs are not kept.
      found: the number of programs that `compile` found in the folder.
    """

    def __init__(self, choice: str):
        with _SETTINGS_LOCK:  # another thread may have pointed JAX to its own folder
            self.folder = _folder(choice)
        self.found = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Points JAX to the folder, and restores its settings at the end. Only one thread at a time can be inside."""
        # JAX has one cache for the whole process. It opens with the first compilation and ignores later changes of the
        # settings. So the cache is reset on entry and on exit: a user's own programs stay out of our folder.
        settings: dict[str, Any] = {
            "jax_compilation_cache_dir": self.folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,  # a run has few programs: keep them all
            # XLA could also keep its autotuned tilings, for new but similar programs. This saves 0.7 of 8 s if only the
            # batch size changes, but makes the folder's path a part of every cache key.
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
        """Compiles a program, or loads it from the folder."""
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
    """Returns `jaxpack/programs` in the user's cache home: XDG_CACHE_HOME if it is an absolute path, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "jaxpack" / "programs"


def size_of(folder: str) -> int:
    """Returns the total size of the files in a folder, in bytes."""
    size = 0
    for file in Path(folder).rglob("*"):
        with contextlib.suppress(OSError):  # another run may be deleting the file
            size += file.stat().st_size if file.is_file() else 0
    return size


def _folder(choice: str) -> str | None:
    settings: Any = jax.config  # which declares no types of its settings
    if choice == "none" or not settings.jax_enable_compilation_cache:
        return None
    if choice == "auto" and settings.jax_compilation_cache_dir:
        return settings.jax_compilation_cache_dir
    folder = "the user's cache folder"
    try:
        folder = default_folder() if choice == "auto" else Path(choice).absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private: JAX runs the programs that it finds there
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        console.print(
            f"compiled programs cannot be kept in {folder}: {reason(error)}; each run compiles them again",
            style="yellow",
        )
        return None


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
