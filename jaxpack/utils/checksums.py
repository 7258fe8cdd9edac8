"""Keeps a checksum of every file of a folder in that folder, so that damage is found before anything in it is used.

The list is `SHA256SUMS`, as `sha256sum -c SHA256SUMS` reads it; its last line is a checksum of the lines above it.
Processors of servers have instructions for SHA-256, so it is the fastest of hashlib's secure hashes there.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from jaxpack.errors import reason

CHECKSUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_LAST = "# sha256 of the lines above: "  # `sha256sum` takes a line that begins with "#" as a comment
_MAX_BYTES = 2**24  # the size of a file that is read as a whole
_THREADS = 8
# Errors that are no sign of damage: something is not permitted, or there are no more open files or memory.
_NOT_DAMAGE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class DamagedError(Exception):
    """Says what is wrong with a folder that is not as it was written. The message is a clause for a longer sentence."""


def write_checksums(folder: Path) -> None:
    """Writes the list of checksums of all files in a folder. The disk has these files and the list at the end.

    Raises:
      OSError: the disk refused a write.
    """
    names = _files_in(folder)
    assert all(_LINE.fullmatch(f"{64 * '0'}  {name}") for name in names), "a name has a space"
    content = _as_list(_checksums(folder, names, synced=True))
    with (folder / CHECKSUMS).open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(place)


def check_folder(folder: Path) -> bool:
    """Requires that a folder holds exactly the files that were written, and returns whether it has a list of checksums.

    Without a list, only entries that are neither folders nor regular files are found.

    Raises:
      DamagedError: a file is missing, added, changed, cut off, or not a regular file.
      OSError: a file must not be read by this user.
    """
    with _reading(folder):
        found = _files_in(folder)
        expected = _read_list(folder)
        if expected is None:
            return False
        for name in sorted(found - expected.keys() - {CHECKSUMS}):
            raise DamagedError(f"{name!r:.100} was not written with the other files")
        for name, checksum in _checksums(folder, expected).items():
            if checksum != expected[name]:
                raise _changed(name, (folder / name).stat().st_size)
    return True


def read_checked(folder: Path, name: str) -> bytes:
    """Returns the content of a file of at most 16 MiB, which is checked if the folder has a list of checksums.

    Raises:
      DamagedError: the file or the list is missing, changed, too large, or not a regular file.
      OSError: a file must not be read by this user.
    """
    with _reading(folder):
        content, expected = _read(folder, name), _read_list(folder)
    if expected is not None and expected.get(name) != hashlib.sha256(content).hexdigest():
        raise _changed(name, len(content))
    return content


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names of a folder's entries. Does nothing on systems that cannot open a folder."""
    if hasattr(os, "O_DIRECTORY"):
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _changed(name: str, size: int) -> DamagedError:
    return DamagedError(f"{name} ({size:,} bytes) is not as it was written")


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raises DamagedError in place of the system's errors that damage can cause, such as a missing file."""
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise
        name = os.path.relpath(error.filename, folder) if error.filename else "a file"
        raise DamagedError(f"{name!r:.100} cannot be read: {reason(error)}") from error


def _files_in(folder: Path) -> set[str]:
    """Returns the names of all files below a folder, relative to it."""
    found, folders = set(), [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    found.add(name)
                else:
                    raise _irregular(name)
    return found


def _irregular(name: str) -> DamagedError:
    return DamagedError(f"{name!r:.100} is a link, a pipe or a device, not a regular file")


def _checksums(folder: Path, names: Iterable[str], *, synced: bool = False) -> dict[str, str]:
    def checksum(name: str) -> str:
        with _opened(folder, name) as file:
            if synced:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = sorted(names)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:  # Hashing releases the GIL.
        return dict(zip(names, threads.map(checksum, names), strict=True))


def _as_list(checksums: dict[str, str]) -> bytes:
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in checksums.items()).encode()
    return lines + f"{_LAST}{hashlib.sha256(lines).hexdigest()}\n".encode()


def _read_list(folder: Path) -> dict[str, str] | None:
    """Returns the checksums by name, or None if the folder has no list."""
    if not os.path.lexists(folder / CHECKSUMS):
        return None
    content = _read(folder, CHECKSUMS)
    matches = [_LINE.fullmatch(line) for line in content.decode("ascii", "replace").split("\n")]
    checksums = {match[2]: match[1] for match in matches if match is not None}
    if content != _as_list(checksums):  # Compared as a whole, so that no byte can differ from what was written.
        raise _changed(CHECKSUMS, len(content))
    return checksums


def _read(folder: Path, name: str) -> bytes:
    with _opened(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise DamagedError(f"{name} has {size:,} bytes, more than {_MAX_BYTES:,}")
        return file.readall()


def _opened(folder: Path, name: str) -> FileIO:
    # Neither follows a link nor waits for the other end of a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        place = os.open(folder / name, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise _irregular(name) from error
        raise
    if not stat.S_ISREG(os.fstat(place).st_mode):
        os.close(place)
        raise _irregular(name)
    return FileIO(place)
