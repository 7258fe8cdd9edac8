"""Keeps compiled programs in a folder for the next run: JAX's persistent cache, switched on for part of a process.

JAX runs the programs that it finds. So they count only if nobody but the user can have written them, and if they are as
they were when they were written: a checksum stands beside each, because JAX's own format may have none.
"""

import contextlib
import os
import re
import stat
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console
from jaxpack.utils.files import cache_home, replace_file

try:
    import grp
    import pwd
except ImportError:  # Windows has no groups of this kind
    grp = pwd = None

_SETTINGS_LOCK = threading.RLock()  # JAX has one copy of its settings for all threads
_HIT = "/jax/compilation_cache/cache_hits"
_ENTRY, _CHECKSUM = "-cache", ".crc32"  # the ends of the names of JAX's entries, and of their checksums
_ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of a Zstandard archive
_READ_ERROR = re.compile(r"Error reading persistent compilation cache entry for '(.*?)'")


class ProgramCache:
    """Stores programs that are compiled within `with cache.in_use()`, and finds those that were stored before.

    Args:
      choice: a folder, "auto" or "none". "auto" takes the folder that JAX is set to, else `default_folder()`. A folder
        that cannot be written to, or that somebody else can write to, counts as "none", with a warning.

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
        """Points JAX to the folder, and restores its settings at the end. Only one thread at a time can be inside.

        JAX has one cache for all threads. So what other threads compile meanwhile is kept in the folder, too.
        """
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
            if self.folder is not None:
                _remove_unsafe(Path(self.folder))
            if self.folder == before["jax_compilation_cache_dir"]:
                yield
                return
            _set(settings)
            try:
                yield
            finally:
                _set(before)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program, or loads it from the folder, from which a program that cannot be loaded is deleted."""
        there = self._entries()
        program, damaged = self._compile(lowered)
        if damaged:
            of_name = [entry for entry in there if any(entry.name.startswith(f"{name}-") for name in damaged)]
            for entry in [entry for entry in of_name if not _checksum_of(entry).exists()] or of_name:
                _remove(entry)
            console.print(
                f"a compiled program in {self.folder} was damaged and is deleted; it is compiled again", style="yellow"
            )
        for entry in self._entries() - there:
            with contextlib.suppress(OSError, InputError):  # a program counts without a checksum, too
                replace_file(_checksum_of(entry), _checksum(entry), "compilation_cache_dir")
        return program

    def _compile(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, set[str]]:
        """Returns the program, and the names of programs in the folder that JAX could not load and compiled anew."""
        hits, thread = [], threading.get_ident()

        def count(event: str, **_: str | int) -> None:
            if event == _HIT and threading.get_ident() == thread:
                hits.append(event)

        jax.monitoring.register_event_listener(count)
        try:
            with _read_errors.noted() as damaged:
                program = lowered.compile()
        finally:
            jax.monitoring.unregister_event_listener(count)
        self.found += bool(hits)
        return program, damaged

    def _entries(self) -> set[Path]:
        return set() if self.folder is None else set(Path(self.folder).glob(f"*{_ENTRY}"))


class _ReadErrors(threading.local):
    """Keeps JAX's warnings of damaged programs from the user, and notes the names of these programs instead.

    All threads share the filters of warnings, so `warnings.catch_warnings` would change what other threads show for as
    long as a compilation takes. This object stands in a filter as the pattern that Python matches with each warning. It
    matches only in a thread that is within `noted`.
    """

    names: set[str] | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[set[str]]:
        """Yields a set that receives the names of the programs that JAX could not load."""
        filters: Any = warnings.filters
        if not filters or filters[0] is not _READ_ERRORS_FILTER:  # the first one that matches counts
            filters[:] = [_READ_ERRORS_FILTER, *(one for one in filters if one is not _READ_ERRORS_FILTER)]
        self.names = names = set()
        try:
            yield names
        finally:
            self.names = None

    def match(self, text: str) -> bool:
        """Returns whether a warning is one of a damaged program that this thread has found, and notes its name."""
        if self.names is None or (found := _READ_ERROR.match(text)) is None:
            return False
        self.names.add(found[1])
        return True


_read_errors = _ReadErrors()
_READ_ERRORS_FILTER = ("ignore", _read_errors, UserWarning, None, 0)


def default_folder() -> Path:
    """Returns the folder `programs` in the cache home."""
    return cache_home() / "programs"


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
    folder = "the user's cache folder"
    try:
        chosen = settings.jax_compilation_cache_dir or default_folder() if choice == "auto" else choice
        folder = Path(chosen).absolute()
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir(mode=0o700, exist_ok=True)  # private: JAX runs the programs that it finds there
        with tempfile.TemporaryFile(dir=folder):
            pass
        why = _unsafe_folder(folder.resolve())
        if why is None:
            return str(folder.resolve())  # no link, which somebody could change later
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        why = reason(error)
    console.print(f"compiled programs cannot be kept in {folder}: {why}; each run compiles them again", style="yellow")
    return None


# Whom programs may come from.


def _unsafe_folder(folder: Path) -> str | None:
    """Returns why somebody else could put a program into a folder, or None if nobody can."""
    if not hasattr(os, "geteuid"):
        return None
    user = os.geteuid()
    status = folder.stat()
    if status.st_uid != user:
        return "the folder belongs to another user, who could change the programs in it"
    if _others_can_write(status):
        return f"others can write to it, and could change the programs in it (`chmod go-w {folder}` forbids that)"
    for parent in folder.parents:
        status = parent.stat()
        # In a folder with the sticky bit, such as /tmp, others cannot rename what is not theirs.
        if status.st_uid not in (0, user) or (_others_can_write(status) and not status.st_mode & stat.S_ISVTX):
            return f"others can write to {parent}, and could put a folder of theirs in its place"
    return None


def _others_can_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid, os.geteuid())


def _is_own_group(group: int, user: int) -> bool:
    """Returns whether a group has the user's name and no other member, as on systems where each user has a group."""
    if grp is None or pwd is None:
        return False
    try:
        account, found = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    return (
        found.gr_gid == account.pw_gid and found.gr_name == account.pw_name and set(found.gr_mem) <= {account.pw_name}
    )


def _remove_unsafe(folder: Path) -> None:
    """Deletes the programs that somebody else can have written, and those that have changed since they were written."""
    others, changed = 0, 0
    for entry in folder.glob(f"*{_ENTRY}"):
        try:
            status = entry.lstat()
            is_own = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not _others_can_write(status))
            if not stat.S_ISREG(status.st_mode) or not is_own:
                others += 1
                _remove(entry)
            elif not _is_whole(entry):
                changed += 1
                _remove(entry)
        except OSError:  # another run has just deleted it
            continue
    for count, which in ((others, "others could have written"), (changed, "were damaged")):
        if count:
            console.print(
                f"compiled programs that {which} are deleted from {folder}, and compiled again: {count:,}",
                style="yellow",
            )


def _is_whole(entry: Path) -> bool:
    """Returns whether a program is as it was written, or, without a checksum, an archive that can be read to its end.

    A program has no checksum if JAX wrote it for other runs, or if the run that wrote it was killed.
    """
    if _checksum_of(entry).is_file():
        return _checksum_of(entry).read_bytes() == _checksum(entry)
    content = entry.read_bytes()
    if content.startswith(_ZSTD):  # which JAX chooses if Python has it
        return True
    try:
        return len(zlib.decompress(content)) > 0
    except zlib.error:
        return False


def _checksum_of(entry: Path) -> Path:
    return entry.with_name(entry.name + _CHECKSUM)


def _checksum(entry: Path) -> bytes:
    content = entry.read_bytes()
    return f"{zlib.crc32(content):08x} {len(content)}\n".encode()


def _remove(entry: Path) -> None:
    with contextlib.suppress(OSError):
        entry.unlink()
    with contextlib.suppress(OSError):
        _checksum_of(entry).unlink()


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
