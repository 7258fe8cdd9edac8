"""Writes folders and files so that they appear whole or not at all, and checks paths before a run writes to them."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxpack.errors import InputError, reason

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None


def require_free_folder(path: Path, name: str) -> None:
    """Refuses a path that already holds files, because no file of a user is ever overwritten."""
    require_folder(path, name)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"`{name}` must be empty or not exist yet, got {str(path)!r}, which holds files.")


def require_folder(path: Path, name: str) -> None:
    """Refuses a path that is not a writable folder and cannot become one."""
    try:
        existing = _existing(path)
    except (OSError, ValueError) as error:  # the path is too long, not permitted, or a loop of links
        raise InputError(f"`{name}` must be a folder, got {str(path)!r:.200}: {reason(error)}.") from error
    if not existing.is_dir():
        raise InputError(f"`{name}` must be a folder, got {str(path)!r}, but {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise InputError(f"`{name}` must be writable, got {str(path)!r}, but {existing} is not writable.")


def require_new_folder(path: Path, name: str) -> None:
    """Refuses a path as `require_free_folder` does, and also a mount point or the working folder.

    Neither of these can be replaced by the finished folder, even if it is empty.
    """
    require_free_folder(path, name)
    place = path.resolve()
    if place.is_mount() or place == Path.cwd():
        which = "a mount point" if place.is_mount() else "the working folder"
        raise InputError(f"`{name}` must be a folder that can be replaced, got {str(path)!r}, which is {which}.")


def require_room(path: Path, name: str, needed: int) -> None:
    """Refuses a path on a disk with fewer than `needed` bytes free: a run should fail before training, not after it."""
    existing = _existing(path)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"`{name}` must have {needed:,} bytes free for what the run saves, got {free:,} bytes free on {existing}."
        )


@contextlib.contextmanager
def held_folder(path: Path, name: str) -> Iterator[None]:
    """Locks a folder, created if missing, for one process, until the block ends or the process is killed.

    Raises:
      InputError: another process holds the folder, or the folder cannot be created.
    """
    there = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        place = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"`{name}` must be writable, got {str(path)!r}: {reason(error)}.") from error
    try:
        if fcntl is not None:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"`{name}` must not be in use, got {str(path)!r}, which another run uses.") from None
            except OSError:  # the file system has no locks
                pass
        yield
    finally:
        os.close(place)
        if not there:
            with contextlib.suppress(OSError):  # it holds something now
                path.rmdir()


@contextlib.contextmanager
def whole_folder(path: Path, name: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; renames it to `path` at the end, or removes it on an error.

    If `path` is a link, the folder that it points to is written.

    Raises:
      InputError: `path` holds something, or the disk refused a write (full, read-only, not permitted).
    """
    require_new_folder(path, name)
    given, path, temporary = path, path.resolve(), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name:.50}-", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        temporary.rename(path)  # atomic, and allowed over an empty folder
    except OSError as error:
        raise InputError(
            f"`{name}` must be writable, got {str(given)!r}: {reason(error)} (nothing was left there)."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def from_home(path: Path) -> str:
    """Returns `path` as a shell accepts it, `~/...` within the user's home, so that notebooks show no user name."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def replace_folder(write: Callable[[Path], None], path: Path) -> None:
    """Lets `write` create a folder, and puts the folder in the place of an existing one at `path`."""
    if not path.exists():
        write(path)
        return
    new, old = _beside(path)
    write(new)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def replace_file(path: Path, content: bytes, name: str) -> None:
    """Replaces or creates a file atomically: a reader finds the old or the new content, never a part of it.

    Raises:
      InputError: the disk refused a write. The file that was there is unchanged.
    """
    partial = path.with_name(f".{path.name}")  # a fixed name: the next write overwrites what a killed process left
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"`{name}` must be writable, got {str(path)!r}: {reason(error)}.") from error


def remove_leftovers(path: Path) -> None:
    """Deletes the files that are left beside `path` if a process is killed in `whole_folder` or `replace_folder`.

    If it was killed between the two renames of `replace_folder`, the old folder gets its place back.
    """
    new, old = _beside(path)
    if old.exists() and not path.exists():
        old.rename(path)  # the process was killed between the two renames
    for name in (path.name, new.name):
        for leftover in path.parent.glob(f".{name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Returns the paths at which `replace_folder` keeps the new and the old folder while it replaces `path`."""
    return path.with_name(f".{path.name}-new"), path.with_name(f".{path.name}-old")


def _existing(path: Path) -> Path:
    """Returns the path itself if it exists, else the nearest folder above it that does."""
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.stat()
            return place
    raise AssertionError("there is always a root")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
