"""Reads rows one after the other: from JSON Lines, JSON, CSV or Parquet, perhaps compressed by gzip, or from memory."""

import array
import bisect
import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxpack.data.bounded import MAX_LINE_BYTES, bounded_lines, parquet_rows, too_large
from jaxpack.data.formats import Record, Where, formats_of
from jaxpack.data.sources import KINDS, HubDataset, Source, suffix_of
from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console
from jaxpack.utils.files import kind_of, require_data_file
from jaxpack.utils.json_file import parse_json

_CHUNK_ROWS = 1024  # rows that the tokenizer gets at a time; it spreads them over the cores
_CHUNK_BYTES = 4 << 20  # of their text: the tokenizer takes some forty times as much memory, for a chunk at a time


class LineNumbers:
    """Maps rows to the numbers of the lines on which they begin; takes memory only where these do not count up by 1."""

    def __init__(self) -> None:
        # The rows that do not begin on the line after the row before, and their lines.
        self._rows, self._lines = array.array("q"), array.array("q")
        self._count, self._next = 0, 0

    def append(self, line: int) -> None:
        """Adds the line of the next row."""
        if line != self._next:
            self._rows.append(self._count)
            self._lines.append(line)
        self._count, self._next = self._count + 1, line + 1

    def __getitem__(self, row: int) -> int:
        place = bisect.bisect_right(self._rows, row) - 1
        return self._lines[place] + row - self._rows[place]


@dataclasses.dataclass
class Rows:
    """Holds the rows of a file or of a dataset in memory, which are read as they are asked for, once.

    Attributes:
      records: the rows.
      where: names rows in errors, once they are read.
      num_bytes: returns the size of the text that is read so far, or 0 if it is not known.
      share: returns which share of the rows is read so far, or None if that is not known.
    """

    records: Iterator[Record]
    where: Where
    num_bytes: Callable[[], int] = lambda: 0
    share: Callable[[], float | None] = lambda: None

    def chunks(self) -> Iterator[list[Record]]:
        """Yields the rows in lists that a tokenizer can take at a time."""
        chunk, begin = [], 0  # some rows may have been read already, to find out what the file is
        for record in self.records:
            chunk.append(record)
            if len(chunk) == _CHUNK_ROWS or self.num_bytes() - begin >= _CHUNK_BYTES:
                yield chunk
                chunk, begin = [], self.num_bytes()
        if chunk:
            yield chunk


def rows_in_memory(dataset: Any, name: str) -> Rows:
    """Returns the rows of an iterable of mappings; `name` is how errors name it.

    Raises:
      InputError: it is no iterable, or one of its rows is no mapping, which may show while the rows are read.
    """
    if isinstance(dataset, Mapping):  # a `datasets.DatasetDict`, most likely
        raise InputError(
            f"`dataset` must be an iterable of rows, such as one split, got a mapping with the keys {sorted(dataset)}."
        )
    if not isinstance(dataset, Iterable):
        raise InputError(f"`dataset` must be a file or an iterable of rows, got {dataset!r:.80}.")
    number = 0

    def records() -> Iterator[Record]:
        nonlocal number
        for record in dataset:
            if not isinstance(record, Mapping):
                raise InputError(f"Every row must be a mapping, got {record!r:.80} in row {number} of {name}.")
            number += 1
            yield record

    where = Where(name, of_arrow=hasattr(dataset, "features"))  # a `datasets.Dataset`
    total = len(dataset) if isinstance(dataset, Sized) else 0
    return Rows(records(), where, share=lambda: number / total if total else None)


@contextlib.contextmanager
def open_rows(path: Path) -> Iterator[Rows]:
    """Opens a data file, or a pipe, and closes it at the end of the block.

    Raises:
      InputError: the file is missing, is of no known kind, cannot be read, or has a row that cannot be read. The last
        two may show while the rows are read.
    """
    require_data_file(path, "dataset")
    suffix = ".jsonl" if not path.suffix and kind_of(path) == "a pipe" else suffix_of(path)
    if suffix is None:
        raise InputError(f"`dataset` must end in {KINDS}, got {str(path)!r}.")
    num_items = num_bytes = 0

    def counted(sized: Iterable[tuple[Any, int]]) -> Iterator[Any]:
        nonlocal num_items, num_bytes
        for item, size in sized:
            num_items += 1
            num_bytes += size
            yield item

    with contextlib.ExitStack() as stack:
        with _as_input_errors(path):
            if suffix == ".parquet":
                total, sized = parquet_rows(path)
                where = Where(str(path), of_arrow=True)
                rows = Rows(counted(sized), where, share=lambda: num_items / max(1, total))
            else:
                file = stack.enter_context(path.open("rb"))
                size = os.fstat(file.fileno()).st_size  # 0 of a pipe
                text = file
                if path.name.lower().endswith(".gz"):
                    text = cast(BinaryIO, stack.enter_context(gzip.open(file)))
                read = _csv_rows if suffix == ".csv" else _json_rows
                lines = bounded_lines(text, path, "a row of CSV" if suffix == ".csv" else "a JSON object")
                records, where = read(counted((line, len(line)) for line in lines), path)
                rows = Rows(records, where, share=lambda: file.tell() / size if size else None)
        rows.records = _guarded(rows.records, path)
        rows.num_bytes = lambda: num_bytes
        yield rows


def _guarded(records: Iterator[Record], path: Path) -> Iterator[Record]:
    with _as_input_errors(path):
        yield from records


@contextlib.contextmanager
def _as_input_errors(path: Path) -> Iterator[None]:
    """Says in a sentence what is wrong with a file that cannot be read."""
    try:
        yield
    except MemoryError as error:
        raise too_large(path, "the memory is full") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"`dataset` must be a whole file if it is compressed by gzip, got {str(path)!r}: {reason(error)}. Download"
            " or compress it again."
        ) from error
    except OSError as error:
        raise InputError(f"`dataset` must be a file that can be read, got {str(path)!r}: {reason(error)}.") from error


def rows_of(source: Source) -> Iterator[Rows]:
    """Yields the rows of each file of a source, or those that are in memory."""
    if not source.files:
        rows = source.rows.load() if isinstance(source.rows, HubDataset) else source.rows
        yield rows_in_memory(rows, source.name)
    for path in source.files:
        with open_rows(path) as rows:
            yield rows


# CSV.


def _csv_rows(lines: Iterable[bytes], path: Path) -> tuple[Iterator[Record], Where]:
    """Reads a table of texts, whose first row names the fields."""
    csv.field_size_limit(MAX_LINE_BYTES)
    numbers = LineNumbers()
    rows = _csv_lists(lines, path)
    _, header = next(rows, (1, []))
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None or "" in header:
        got = "an empty name" if twice is None or twice == "" else f"{twice!r:.80} twice"
        raise InputError(
            f"The first row of {path} must name each field of the rows once, got {got} in {header!r:.200}."
        )

    def records() -> Iterator[Record]:
        for number, row in rows:
            if len(row) != len(header):
                raise InputError(
                    f"The row on line {number} of {path} must have {len(header)} fields, as the first row has, got"
                    f" {len(row)}: {row!r:.80}. Put quotes around a text that has a comma, a quote or a line break."
                )
            numbers.append(number)
            yield dict(zip(header, row, strict=True))

    return records(), Where(str(path), numbers)


def _csv_lists(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV file as lists, but empty lines, each with the number of the line on which it begins."""
    number = 1

    def texts() -> Iterator[str]:
        for at, line in enumerate(lines, 1):
            try:
                text = line.removeprefix(b"\xef\xbb\xbf").decode() if at == 1 else line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"Line {at} of {path} must be UTF-8: {reason(error)}. Save the file as UTF-8."
                ) from error
            yield text

    reader = csv.reader(texts(), strict=True)
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"The row that begins on line {number} of {path} must be CSV, with quotes around a text that has a comma, a"
            f" quote or a line break, and each quote within it twice, but line {reader.line_num} has a fault:"
            f" {reason(error)}."
        ) from error


# JSON.


def _json_rows(read: Iterator[bytes], path: Path) -> tuple[Iterator[Record], Where]:
    """Reads JSON Lines, or a file that is one JSON value: an array of rows, or an object that is a row or has the rows.

    The file is read once, because it may be a pipe.
    """
    number, first = next((line for line in enumerate(map(_stripped, read), 1) if line[1]), (1, b""))
    lines = itertools.chain([first], read)
    if not first.startswith((b"[", b"{")) or (first.startswith(b"{") and _is_json(first)):
        records, where = _read_lines(lines, number, path)
        head = list(itertools.islice(records, 2))
        return (itertools.chain(head, records), where) if len(head) > 1 else _rows_within(head, where, path)
    whole = b"\n".join(lines)
    try:
        value = parse_json(whole.decode(), finite=False)
    except ValueError as error:
        if first.startswith(b"{") and isinstance(error, json.JSONDecodeError):
            records, where = _read_lines([first], number, path)
            return iter(list(records)), where  # and says what is wrong with the first line
        raise InputError(
            f"{path} must be JSON Lines, or one JSON array of objects, got one value that cannot be read:"
            f" {reason(error)}."
        ) from error
    if isinstance(value, dict):
        return _rows_within([value], Where(str(path)), path)
    return _read_array(value, str(path))


def _rows_within(records: Sequence[Record], where: Where, path: Path) -> tuple[Iterator[Record], Where]:
    """Returns the rows in a list that a file's only object holds; the object itself if it is a row, or holds none."""
    if not records or formats_of(records[0]):
        return iter(records), where
    lists = {
        key: value
        for key, value in records[0].items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and formats_of(value[0])
    }
    if len(lists) > 1:
        raise InputError(f"{path} must have the rows of one dataset, got lists of rows in the fields {sorted(lists)}.")
    if not lists:
        return iter(records), where
    ((key, rows),) = lists.items()
    others = [f"`{other}`" for other in records[0] if other != key]
    rest = f"; not used: {', '.join(others)}" if others else ""
    console.print(f"the rows of {path} are those of its field `{key}`{rest}")
    return _read_array(rows, f"`{key}` of {path}")


def _read_array(records: list, source: str) -> tuple[Iterator[Record], Where]:
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"Each item of the array in {source} must be an object, got {record!r:.80} as item {row}.")

    def consume() -> Iterator[Record]:
        records.reverse()
        while records:
            yield records.pop()  # and so the rows that were read take no memory

    return consume(), Where(source)


def _read_lines(lines: Iterable[bytes], first: int, path: Path) -> tuple[Iterator[Record], Where]:
    """Reads JSON Lines; `first` is the number of the first of the lines in the file."""
    numbers = LineNumbers()

    def records() -> Iterator[Record]:
        for number, line in enumerate(map(_stripped, lines), first):
            if not line:
                continue
            try:
                record = parse_json(line.decode(), finite=False)
            except ValueError as error:
                why = reason(error)
                if isinstance(error, json.JSONDecodeError):
                    why = f"{error.msg} at column {error.colno}"
                raise InputError(
                    f"Line {number} of {path} must be a JSON object, one row on each line: {why}."
                ) from error
            if not isinstance(record, dict):
                text = line[:320].decode(errors="replace")[:80]
                raise InputError(f"Line {number} of {path} must be a JSON object, one row on each line, got {text!r}.")
            numbers.append(number)
            yield record

    return records(), Where(str(path), numbers)


def _stripped(line: bytes) -> bytes:
    """Removes white space around a line, and a byte order mark before it: joined files have marks within."""
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _is_json(line: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(line)
        return True
    return False
