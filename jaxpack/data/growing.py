"""Holds numbers that are appended part by part: in memory, and beyond a size in a file that has no name."""

import tempfile
import weakref
from typing import BinaryIO

import numpy as np

from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console
from jaxpack.utils.files import cache_home, from_home

_IN_MEMORY = 2**30  # bytes; of a file, the system keeps as much in memory as there is room for


class GrowingArray:
    """Holds an array of one axis that grows at its end.

    Args:
      dtype: the dtype of the array.
      what: what the array holds, in the plural, for messages.
    """

    def __init__(self, dtype: type[np.generic], what: str):
        self._dtype, self._what = np.dtype(dtype), what
        self._memory = bytearray()
        self._file: BinaryIO | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, values: np.ndarray) -> None:
        """Appends an array of one axis.

        Raises:
          InputError: there is no room for the file, or no permission.
        """
        added = np.ascontiguousarray(values, self._dtype)
        self._length += len(added)
        if self._file is None and len(self._memory) + added.nbytes > _IN_MEMORY:
            self._move_to_file()
        if self._file is None:
            self._memory += added.data
        else:
            self._write(self._file, added.data)

    def in_numpy(self) -> np.ndarray:
        """Returns the array, which must not grow any more; it is not copied, and cannot be written to."""
        if self._file is not None:
            self._file.flush()
            return np.memmap(self._file, self._dtype, mode="r")
        array = np.frombuffer(self._memory, self._dtype)
        array.flags.writeable = False
        return array

    def copy(self) -> "GrowingArray":
        """Returns a copy that grows by itself."""
        other = GrowingArray(self._dtype.type, self._what)
        if len(self):
            other.extend(self.in_numpy())
        return other

    def _move_to_file(self) -> None:
        try:
            folder = cache_home()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            weakref.finalize(self, file.close)
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
            raise self._no_room(error) from error
        self._write(file, self._memory)
        self._memory, self._file = bytearray(), file
        console.print(
            f"the {self._what} take more than {_IN_MEMORY / 2**30:.2g} GiB: they are kept in a file in"
            f" {from_home(folder)} while the run goes on"
        )

    def _write(self, file: BinaryIO, values: bytearray | memoryview) -> None:
        try:
            file.write(values)
            file.flush()
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: Exception) -> InputError:
        size = self._length * self._dtype.itemsize / 2**30
        return InputError(
            f"`dataset` must have a disk to lie on beyond {_IN_MEMORY / 2**30:.2g} GiB, got {size:.2g} GiB of"
            f" {self._what} so far, which cannot be written: {reason(error)}. Set the environment variable"
            " XDG_CACHE_HOME to a folder on a larger disk, or read the data as a stream, with `streaming`."
        )
