"""Writes folders and files so that they appear whole or not at all, and checks paths before they are read or written.

Whatever is created here is created exclusively, under a name that nobody can predict, and then renamed: so a link that
somebody left in a folder is replaced, and never followed to a file elsewhere.
"""

import contextlib
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxpack.errors import InputError, reason

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None


_KINDS = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda _: True, "a device"),
)
_PARTIAL = ".partial"  # the end of the name of a file that is not whole yet
_LEFT_BEHIND = 60  # seconds after which nobody writes to a partial file any more
_HELD = ".replaced"  # the end of the name of a folder that holds a new and an old folder during a replacement


def kind_of(path: Path) -> str | None:
    """Returns in words what lies at a path, such as "a regular file", "a folder" or "a pipe"; None if nothing does.

    A link counts as what it points to, and a link to nothing is "a link to nothing". Nothing is opened: that would wait
    forever at a pipe.

    Raises:
      InputError: the path is not valid, or may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if path.is_symlink() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path!s:.200} must be a path that can be read: {reason(error)}.") from error
    return next(name for is_kind, name in _KINDS if is_kind(mode))


def is_regular_file(path: Path) -> bool:
    """Returns whether there is a regular file, or a link to one, at a path; False if there is nothing.

    Raises:
      InputError: there is something else, such as a pipe or a link to nothing, which must not pass for a missing file.
    """
    kind = kind_of(path)
    if kind not in (None, "a regular file"):
        raise InputError(f"{path!s:.200} must be a regular file, got {kind}. Copy or download the file again.")
    return kind is not None


def require_regular_file(path: Path, name: str) -> None:
    """Refuses a path that is no regular file and no link to one: a pipe may never end, and a device never does.

    `name` is the argument that errors name.
    """
    if (kind := kind_of(path)) != "a regular file":
        got = "" if kind is None else f", which is {kind}"
        raise InputError(f"`{name}` must be an existing file, got {str(path)!r:.200}{got}.")


def require_data_file(path: Path, name: str) -> None:
    """Refuses a path as `require_regular_file` does, but for a pipe, through which another program may send data."""
    if kind_of(path) != "a pipe":
        require_regular_file(path, name)


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
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        temporary.chmod(0o777 & ~_umask())  # at the end: until then, nobody else can leave a link in it
        temporary.rename(path)  # atomic, and allowed over an empty folder
    except OSError as error:
        raise InputError(
            f"`{name}` must be writable, got {str(given)!r}: {reason(error)} (nothing was left there)."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def require_new_file(path: Path, name: str) -> None:
    """Refuses a path where something lies already, even a link to nothing, and one whose folder is not there."""
    try:
        path.lstat()
        is_new = False
    except FileNotFoundError:
        is_new = path.absolute().parent.is_dir()
    except (OSError, ValueError) as error:  # the path is too long, or not permitted
        raise InputError(f"`{name}` must be a new file, got {str(path)!r:.200}: {reason(error)}.") from error
    if not is_new:
        raise InputError(f"`{name}` must be a new file in an existing folder, got {str(path)!r:.200}.")
    require_folder(path.absolute().parent, name)


@contextlib.contextmanager
def whole_file(path: Path, name: str) -> Iterator[Path]:
    """Yields the path of a temporary file near `path`; the file becomes `path` at the end, or is removed on an error.

    Unlike `write_new_file`, it is for files that are larger than the memory.

    Raises:
      InputError: there is something at `path`, or the disk refused a write (full, read-only, not permitted).
    """
    require_new_file(path, name)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name:.50}-", dir=path.absolute().parent))
        partial = temporary / f"new{_PARTIAL}"
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.chmod(0o666 & ~_umask())
        _put_new(partial, path, name)
    except OSError as error:
        raise InputError(
            f"`{name}` must be writable, got {str(path)!r}: {reason(error)} (nothing was left there)."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def from_home(path: Path) -> str:
    """Returns `path` as a shell accepts it, `~/...` within the user's home, so that notebooks show no user name."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def cache_home() -> Path:
    """Returns `jaxpack` in the user's cache home: XDG_CACHE_HOME if it is an absolute path, else ~/.cache.

    Raises:
      RuntimeError: the user has no home folder.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "jaxpack"


def replace_folder(write: Callable[[Path], None], path: Path) -> None:
    """Lets `write` create a folder, and puts the folder in the place of an existing folder or link at `path`."""
    if not os.path.lexists(path):
        write(path)
        return
    held = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=_HELD, dir=path.parent))
    try:
        write(held / "new")
    except BaseException:
        shutil.rmtree(held, ignore_errors=True)
        raise
    path.rename(held / "old")
    (held / "new").rename(path)
    shutil.rmtree(held, ignore_errors=True)


def replace_file(path: Path, content: bytes, name: str) -> None:
    """Replaces or creates a file atomically: a reader finds the old or the new content, never a part of it.

    A link at `path` is replaced; the file that it points to stays as it is.

    Raises:
      InputError: the disk refused a write. The file that was there is unchanged.
    """

    def put(partial: Path) -> None:
        partial.replace(path)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`{name}` must be writable, got {str(path)!r}: {reason(error)}.") from error
    _write_file(path, content, name, put)


def write_new_file(path: Path, content: bytes, name: str) -> None:
    """Creates a file in an existing folder; the file appears whole or not at all.

    Raises:
      InputError: there is something at `path`, even if it is only a link to nothing; or the disk refused a write.
    """

    _write_file(path, content, name, lambda partial: _put_new(partial, path, name))


def _put_new(partial: Path, path: Path, name: str) -> None:
    """Gives a finished file its name, and never replaces another file.

    Raises:
      InputError: there is something at `path`.
      OSError: the disk refused.
    """
    try:
        try:
            path.hardlink_to(partial)
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links
            path.open("xb").close()
            try:
                partial.replace(path)  # the empty file that was just made
            except OSError:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise InputError(f"`{name}` must be a new file, got {str(path)!r}, which exists.") from None


def open_own_file(path: Path, *, is_new: bool) -> BinaryIO:
    """Opens a file without a buffer to write at its end: a new file, or an existing regular file that is no link.

    Raises:
      OSError: there is a file where a new one is to be, or there is something else than a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_EXCL if is_new else 0)
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # not every system has all of them
        flags |= getattr(os, flag, 0)
    opened = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError("it is no regular file")
    return open(opened, "a+b", buffering=0)


def _write_file(path: Path, content: bytes, name: str, put: Callable[[Path], None]) -> None:
    """Writes a file of an unpredictable name beside `path`, and lets `put` give it its name."""
    partial = None
    try:
        prefix = f".{path.name:.50}-"
        for leftover in path.parent.glob(f"{glob.escape(prefix)}*{_PARTIAL}"):  # of a process that was killed
            with contextlib.suppress(OSError):
                if leftover.lstat().st_mtime < time.time() - _LEFT_BEHIND:
                    leftover.unlink()
        opened, written = tempfile.mkstemp(prefix=prefix, suffix=_PARTIAL, dir=path.parent)
        partial = Path(written)
        with open(opened, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        put(partial)
    except OSError as error:
        raise InputError(f"`{name}` must be writable, got {str(path)!r}: {reason(error)}.") from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Deletes the files that are left beside `path` if a process is killed in `whole_folder` or `replace_folder`.

    If it was killed between the two renames of `replace_folder`, the old folder gets its place back.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*"):
        if leftover.is_symlink() or not leftover.is_dir():
            continue
        old = leftover / "old"
        if leftover.name.endswith(_HELD) and os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)  # the process was killed between the two renames
        shutil.rmtree(leftover, ignore_errors=True)


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
