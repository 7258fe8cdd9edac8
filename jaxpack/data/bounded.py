"""Reads the lines or rows of a data file, and ends with a sentence before they fill the memory of the machine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxpack.errors import InputError, reason
from jaxpack.utils.files import require_regular_file
from jaxpack.utils.host import available_host_bytes

_CHUNK_BYTES = 32 << 20  # read between two looks at the memory that is left
MAX_LINE_BYTES = 64 << 20  # of a row: the longest documents have a few MiB
_PARSED = 4  # times as much memory as the text of a row takes, or more, once the row is read
_SPARE_BYTES = 128 << 20  # of memory, for everything else
_LINES_BETWEEN_LOOKS = 1024
_PARQUET_ROWS = 64  # rows that are decoded at a time
_MIN_ROW_BYTES = 16  # of an empty row: where it begins, and its length


def bounded_lines(file: BinaryIO, path: Path, row: str = "a JSON object") -> Iterator[bytes]:
    """Yields the lines of a file, which may be a pipe.

    A line may have 64 MiB. The first line that is not empty may have more if it begins as an array or an object does,
    because it may be the whole of the data.

    Args:
      file: the file that is open for reading.
      path: the name of the file for errors.
      row: what a line must be, for errors.

    Raises:
      InputError: a line is longer than that, or the lines do not fit into the memory.
    """
    number, since, bytes_since, may_be_whole = 0, 0, 0, True
    while line := file.readline(_CHUNK_BYTES):
        number += 1
        if len(line) == _CHUNK_BYTES and not line.endswith(b"\n"):
            begins = line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            line = _long_line(line, file, path, number, row, may_be_whole and begins in (b"[", b"{"))
        may_be_whole = may_be_whole and not line.strip()
        yield line
        since, bytes_since = since + 1, bytes_since + len(line)
        if since >= _LINES_BETWEEN_LOOKS or bytes_since >= _CHUNK_BYTES:
            _require_room(path, f"after {number:,} lines", _SPARE_BYTES)
            since = bytes_since = 0


def _long_line(line: bytes, file: BinaryIO, path: Path, number: int, row: str, may_be_whole: bool) -> bytes:
    parts, size = [line], len(line)
    while not parts[-1].endswith(b"\n") and (part := file.readline(_CHUNK_BYTES)):
        parts.append(part)
        size += len(part)
        if size > MAX_LINE_BYTES and not may_be_whole:
            raise InputError(
                f"Line {number} of {path} must be {row} of at most {MAX_LINE_BYTES >> 20} MiB, one row on each line,"
                " got a longer line."
            )
        _require_room(path, f"in line {number:,}, which has more than {size >> 20:,} MiB", _PARSED * size)
    return b"".join(parts)


def parquet_rows(path: Path) -> tuple[int, Iterator[tuple[dict[str, Any], int]]]:
    """Returns the number of rows in a Parquet file, and an iterator over them, each with the bytes that it may take.

    Raises:
      InputError: the file is no regular file, whose end can be read first; is damaged; or has rows that do not fit into
        the memory. The last two may show while the rows are read.
    """
    import pyarrow
    import pyarrow.parquet

    require_regular_file(path, "dataset")

    @contextlib.contextmanager
    def readable() -> Iterator[None]:
        try:
            yield
        except MemoryError:  # of pyarrow, too
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} must be a readable Parquet file: {reason(error)}.") from error

    def rows() -> Iterator[tuple[dict[str, Any], int]]:
        read = 0
        with readable(), file:
            # A few rows at a time: a file of some bytes can say that a long text is repeated in a billion rows. In a
            # column with a dictionary, each row can be as long as the whole dictionary.
            longer = _PARQUET_ROWS if "dictionary<" in str(file.schema_arrow) else 1
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                size = longer * batch.nbytes
                step = _PARQUET_ROWS if size < _CHUNK_BYTES else 1
                for begin in range(0, len(batch), step):
                    _require_room(path, f"after {read:,} rows", _SPARE_BYTES + _PARSED * size)
                    decoded = batch.slice(begin, step).to_pylist()
                    for row in decoded:
                        yield row, size // len(batch)
                    read += len(decoded)

    with readable():
        file = pyarrow.parquet.ParquetFile(path)
        promised = file.metadata.num_rows
        _require_room(path, f"for the {promised:,} rows that the file promises", promised * _MIN_ROW_BYTES)
    return promised, rows()


def too_large(path: Path, why: str) -> InputError:
    """Returns the error of a dataset that does not fit into the memory."""
    return InputError(
        f"`dataset` must fit into the memory of this machine, got {str(path)!r}: {why}. Use fewer rows, or a machine"
        " with more memory."
    )


def _require_room(path: Path, when: str, needed: int) -> None:
    free = available_host_bytes()
    if free is not None and free < needed:
        raise too_large(path, f"{when}, {free >> 20:,} MiB of memory are left")
