"""Finds out what a dataset is that a user names: files, a folder, a pattern, a dataset of the hub, rows, or several."""

import glob
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpack.data.documents import Documents
from jaxpack.errors import InputError, not_installed, reason
from jaxpack.utils.files import kind_of, require_data_file

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KINDS = ".jsonl, .json, .csv or .parquet (all but .parquet also with .gz after it)"
NAME = re.compile("[A-Za-z0-9_-]+")  # of an evaluation set
# An id of the hub, perhaps a configuration, and a split, which may be sliced: org/name:main:train[:1000].
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:\[\]/]+))?:([^:\[\]/]+(?:\[[^\[\]]*\])?)")


class Source(NamedTuple):
    """Names rows that count as one in a mix.

    Attributes:
      name: what the user calls it, without its weight.
      files: its files, in the order in which they are read; empty if `rows` has the rows.
      rows: a dataset in memory, or a function that loads it from the hub; None if there are `files`.
      weight: its share of the rows, as a part of the sum of all weights; None takes all rows.
    """

    name: str
    files: tuple[Path, ...] = ()
    rows: Any = None
    weight: float | None = None


class HubDataset(NamedTuple):
    """Names a split of a dataset on the hub, whose rows are all loaded at once, or one by one as a stream."""

    given: str
    path: str
    configuration: str | None
    split: str
    is_streamed: bool = False

    def load(self) -> Any:
        """Returns the rows, which the `datasets` library downloads or finds in its cache.

        Raises:
          InputError: the library is not installed, or cannot load the dataset.
        """
        try:
            import datasets
        except ImportError as error:
            raise not_installed(f"`dataset` {self.given!r}", "datasets", "datasets") from error
        try:
            return datasets.load_dataset(self.path, self.configuration, split=self.split, streaming=self.is_streamed)
        except Exception as error:  # the library raises errors of many kinds
            raise InputError(
                f"`dataset` must be a dataset of the hub and its split, as 'org/name:train' or, if the dataset has"
                f" several configurations, 'org/name:configuration:train', got {self.given!r}: {reason(error):.300}."
            ) from error


def sources_of(dataset: Any) -> list[Source]:
    """Returns the sources of a dataset in the order in which the user gave them. Reads no rows.

    A dataset is a path, rows, or `Documents`, or a list of those; see `load_documents`.

    Raises:
      InputError: there is nothing at a path, no data file in a folder, nothing that a pattern matches; or a weight is
        no number, or is missing beside others, or all are 0.
    """
    if not _is_several(dataset):
        sources = [_source(dataset, "the dataset")]
    else:
        sources = [_source(item, f"dataset {number} of {len(dataset)}") for number, item in enumerate(dataset, 1)]
    _check_weights(sources)
    return sources


def _is_several(dataset: Any) -> bool:
    """Returns whether a dataset is a list of datasets, and not a list of rows."""
    if not isinstance(dataset, list | tuple) or not len(dataset):
        return False
    first = dataset[0]
    return isinstance(first, Iterable | Documents | os.PathLike) and not isinstance(first, Mapping)


def _source(given: Any, name: str) -> Source:
    if isinstance(given, tuple) and len(given) == 2 and _is_number(given[1]):
        dataset, weight = given
        return _source(dataset, name)._replace(weight=_checked_weight(weight, repr(given)))
    if isinstance(given, str):
        return _of_text(given)
    if isinstance(given, os.PathLike):
        return _of_path(os.fspath(given))
    return Source(name, rows=given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_text(given: str) -> Source:
    """Reads a path, perhaps with a weight behind it, as in "rows.jsonl=0.7"."""
    path, equals, weight = given.rpartition("=")
    if not equals or "/" in weight or kind_of(Path(given)) is not None:  # the name of a file may have the sign, too
        return _of_path(given)
    number = _checked_weight(_number(weight), repr(given))
    return _of_path(path)._replace(weight=number)


def split_name(given: str) -> tuple[str, str]:
    """Splits the name of an evaluation set from its path: "math=rows.jsonl=0.7" is "math" and "rows.jsonl=0.7".

    The name is "" if there is none: if no word of letters, digits, `_` and `-` stands before the first "=", if all that
    stands behind it is a weight, as in "rows=0.7", or if there is a file of that name.
    """
    name, _, rest = given.partition("=")
    is_named = NAME.fullmatch(name) is not None and rest != "" and math.isnan(_number(rest))
    if not is_named or any(_is_there(path) for path in (given, _without_weight(given))):
        return "", given
    return name, rest


def _without_weight(given: str) -> str:
    path, _, weight = given.rpartition("=")
    return given if math.isnan(_number(weight)) else path


def _is_there(given: str) -> bool:
    """Returns whether there is a file or a folder, or one that a pattern matches."""
    return kind_of(Path(given)) is not None or (glob.has_magic(given) and bool(glob.glob(given, recursive=True)))


def _number(text: str) -> float:
    """Returns the number in a text, or NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _checked_weight(weight: float, given: str) -> float:
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(
            f"`dataset` must have a positive number as its weight, or 0 to leave it out, got {given:.200}. Write for"
            " example 'rows.jsonl=0.7'."
        )
    return float(weight)


def _of_path(given: str) -> Source:
    path = Path(given)
    kind = kind_of(path)
    if kind == "a folder":
        files = [file for file in sorted(path.iterdir()) if is_data_file(file) and not file.name.startswith(".")]
        if not files:
            raise InputError(
                f"`dataset` must be a file, or a folder with data files, got {given!r:.200}, which is a folder without"
                f" one: their names end in {KINDS}. Files in its folders are read by a pattern, '{given:.100}/**/*'."
            )
    elif kind is None and (hub := _HUB.fullmatch(given)) is not None:
        return Source(given, rows=HubDataset(given, hub[1], hub[2], hub[3]))
    elif kind is None and glob.has_magic(given):
        files = [file for file in map(Path, sorted(glob.glob(given, recursive=True))) if kind_of(file) != "a folder"]
        if not files:
            raise InputError(
                f"`dataset` must match at least one file, got the pattern {given!r:.200}, which matches none. Check"
                f" the path from the working folder, {str(Path.cwd())!r}."
            )
    else:
        if kind is None and _may_be_of_hub(given):
            raise InputError(
                f"`dataset` must be an existing file, folder or pattern, or a dataset of the hub and its split, got"
                f" {given!r:.200}. If it is on the hub, write '{given}:train'."
            )
        require_data_file(path, "dataset")
        files = [path]
    return Source(given, tuple(files))


def is_data_file(path: Path) -> bool:
    """Returns whether the name of a file says that it has rows, and there is no folder of that name."""
    return suffix_of(path) is not None and kind_of(path) != "a folder"


def suffix_of(path: Path) -> str | None:
    """Returns which of `SUFFIXES` a path has, perhaps with ".gz" behind it; None if it has another."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES and not name.endswith(".parquet.gz") else None


def _may_be_of_hub(given: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) is not None and suffix_of(Path(given)) is None


def _check_weights(sources: list[Source]) -> None:
    weighted = [source.weight for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source.name for source in sources if source.weight is None)
        raise InputError(
            f"`dataset` must have a weight for each of its {len(sources)} sources, or for none, got {without!r:.200}"
            " without one. Write for example 'rows.jsonl=0.7'."
        )
    if weighted and not sum(weighted) > 0:
        raise InputError(
            f"`dataset` must have weights with a sum above 0, got {', '.join(f'{weight:g}' for weight in weighted)}."
            " Give at least one source a positive weight."
        )
