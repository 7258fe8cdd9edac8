"""Checks files that `torch.save` wrote before torch reads them through a memory map. Needs no torch.

Such a file is a zip archive: a pickle that describes tensors, and a record of bytes for each storage of theirs. torch
takes the bytes from the place of a record as they are. So a compressed record is read as noise, and a storage that is
described as longer than its record takes in the bytes of its neighbours, both without an error.
"""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, cast

from jaxpack.errors import InputError, reason

_MAX_PICKLE_BYTES = 4 << 20  # the description of 30,000 tensors
_MAX_DIRECTORY_BYTES = 16 << 20  # the list of 100,000 records
_LOCAL = struct.Struct("<26xHH")  # the lengths of the name and of the extra field, at the end of a record's own header
_ITEM_BYTES = {"Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4, "Half": 2}
_ITEM_BYTES |= {"BFloat16": 2, "Short": 2}  # any other storage has at least one byte for each item


def require_plain_records(path: Path) -> None:
    """Refuses a file of tensors that torch would read wrongly, or not in bounded time and memory.

    Raises:
      InputError: the file is no zip archive; a record is compressed, encrypted, there twice, or overlaps another; the
        pickle is too large or broken; or a storage is longer than its record.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(cast(Any, _Bounded(file))) as archive:
            sizes = _sizes(archive, file)
            (described,) = [name for name in sizes if name.endswith("/data.pkl")] or [""]
            if not described:
                raise ValueError("it has no data.pkl")
            if sizes[described] > _MAX_PICKLE_BYTES:
                raise ValueError(f"its description of the tensors has more than {_MAX_PICKLE_BYTES:,} bytes")
            unpickler = _Storages(archive.read(described))
            unpickler.load()
        for key, needed in unpickler.found:
            name = f"{described.removesuffix('data.pkl')}data/{key}"
            if needed > sizes.get(name, -1):
                raise ValueError(f"a tensor needs {needed:,} bytes of the record {name!r:.80}, which has fewer")
    except zipfile.BadZipFile as error:
        raise _refused(path, f"it is no complete zip archive ({reason(error):.100})") from error
    except InputError:
        raise
    except Exception as error:  # a broken pickle may raise any class
        raise _refused(path, f"{reason(error):.200}") from error


def _sizes(archive: zipfile.ZipFile, file: io.BufferedReader) -> dict[str, int]:
    """Returns the bytes of each record by name, after a check that each is stored plainly, at a place of its own."""
    sizes: dict[str, int] = {}
    end = 0
    for record in sorted(archive.infolist(), key=lambda record: record.header_offset):
        name = record.filename
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ValueError(f"its record {name!r:.80} is compressed, which torch reads as noise")
        if record.flag_bits & 1:
            raise ValueError(f"its record {name!r:.80} is encrypted")
        if name in sizes:
            raise ValueError(f"its record {name!r:.80} is there twice")
        if record.header_offset < end:
            raise ValueError(f"its record {name!r:.80} overlaps the one before")
        file.seek(record.header_offset)
        end = record.header_offset + _LOCAL.size + sum(_LOCAL.unpack(file.read(_LOCAL.size))) + record.file_size
        sizes[name] = record.file_size
    if end > archive.start_dir:
        raise ValueError("its last record overlaps the list of records")
    return sizes


class _Bounded:
    """Reads a file, but never more at once than the largest list of records."""

    def __init__(self, file: io.BufferedReader):
        self._file = file

    def read(self, count: int = -1) -> bytes:
        """Reads up to `count` bytes, or the rest of the file."""
        content = self._file.read(min(count, _MAX_DIRECTORY_BYTES + 1) if count >= 0 else _MAX_DIRECTORY_BYTES + 1)
        if len(content) > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"its list of records has more than {_MAX_DIRECTORY_BYTES:,} bytes")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Inert:
    """Stands for whatever a pickle names: takes everything, and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return self

    __setstate__ = __setitem__ = append = extend = add = __init__


class _Storages(pickle._Unpickler):  # in Python: that in C makes a table as long as the pickle says
    """Finds the storages that a pickle describes, as pairs of a key and a number of bytes, and runs no code of it."""

    # A pickle may ask for an array of bytes of any length. Those of tensors never do.
    dispatch: ClassVar[dict] = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, description: bytes):
        super().__init__(io.BytesIO(description))
        self.found: list[tuple[str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        kind = name.removesuffix("Storage")
        return type(name, (_Inert,), {"item_bytes": _ITEM_BYTES.get(kind, 1)})

    def persistent_load(self, pid: Any) -> _Inert:
        _, kind, key, _, count = pid
        if type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError(f"it describes a storage by {pid!r:.80}")
        self.found.append((key, count * getattr(kind, "item_bytes", 1)))
        return _Inert()


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} must be a file that `torch.save` wrote, with plain records, got one that cannot be read: {why}."
        " Download it again, or read it with torch and write it with `safetensors.torch.save_file`."
    )
