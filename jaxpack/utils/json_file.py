"""Reads JSON that somebody else may have made: bounded in size, with every key once and only finite numbers."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jaxpack.errors import InputError, reason
from jaxpack.utils.files import is_regular_file

_MAX_BYTES = 16 << 20  # the index of 100,000 tensors; JSON may take 30 times as much memory once it is read


def read_json(path: Path, *, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `max_bytes`.

    Raises:
      InputError: the file is missing, is no regular file, is too large, or holds anything else than a JSON object whose
        keys occur once and whose numbers are finite.
    """
    try:
        content = parse_json(read_file(path, max_bytes=max_bytes))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON file, got one that cannot be read: {reason(error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {content!r:.80}.")
    return content


def read_file(path: Path, *, max_bytes: int = 1 << 30) -> bytes:
    """Returns the content of a regular file.

    Raises:
      InputError: there is something else at `path`, such as a pipe, which may never end.
      OSError: there is nothing at `path`, or it cannot be read.
      ValueError: the file has more than `max_bytes`.
    """
    is_regular_file(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        return file.read(size)


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Returns the value of a JSON text.

    Args:
      finite: False allows NaN and infinite numbers, which Python writes although they are no JSON.

    Raises:
      ValueError: the text is no JSON, is nested too deeply, has a key twice in one object (readers differ in which of
        the two values they take), or has a number that is not finite.
    """
    number = _finite if finite else float
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=number, parse_float=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))
        raise ValueError(f"the key {twice!r:.80} occurs twice in one object, so one of its two values is wrong")
    return result


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number:.20}, which is not finite")
    return value
