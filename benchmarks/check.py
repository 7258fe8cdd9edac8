"""Compares two results files of the same benchmark, and fails where jaxpack became slower or needs more memory.

    PYTHONPATH=. python benchmarks/check.py OLD.json NEW.json    # or: make bench-check OLD=OLD.json NEW=NEW.json

Reads the files that the training, kernel, loss and loading benchmarks write. Only jaxpack's own rows are compared, and
only with the row of the same case, documents and device. Exits with status 1 if a rate fell by 3 % or more, if peak
memory grew by 2 % or more, or if a case failed that ran before; with status 2 if the files cannot be compared.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxpack.bench.cases import Planned, case_of
from jaxpack.bench.report import GIB
from jaxpack.errors import InputError, reason

RATE_LOSS = 0.03  # relative: runs of one program on one machine differ by up to 2 %
MEMORY_GROWTH = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds one row of a results file.

    Attributes:
      key: identifies the case, the documents and the device; rows of two files with the same key are compared.
      name: the key in words.
      unit: the unit of the rate.
      rate: work a second, or None if the case failed.
      memory: peak memory in bytes, or None if it was not measured.
    """

    key: Hashable
    name: str
    unit: str
    rate: float | None
    memory: float | None = None


@dataclasses.dataclass(frozen=True)
class Change:
    """Holds the rows of one case in both files."""

    old: Row
    new: Row

    @property
    def rate(self) -> float | None:
        """Returns the relative change of the rate, or None if a run failed."""
        return _relative(self.old.rate, self.new.rate)

    @property
    def memory(self) -> float | None:
        """Returns the relative change of the peak memory, or None if one file has no figure."""
        return _relative(self.old.memory, self.new.memory)

    @property
    def faults(self) -> list[str]:
        """Returns what became worse, or an empty list."""
        if self.new.rate is None:
            return [] if self.old.rate is None else ["failed"]
        faults = ["slower"] if self.rate is not None and self.rate <= -RATE_LOSS else []
        return faults + (["more memory"] if self.memory is not None and self.memory >= MEMORY_GROWTH else [])


def read_rows(path: Path) -> dict[Hashable, Row]:
    """Reads jaxpack's rows of a results file, by their keys; the last of several rows with one key counts.

    Raises:
      InputError: the file cannot be read, or is no results file of a known benchmark.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} must be a JSON file of results: {reason(error)}.") from error
    benchmark = content.get("benchmark") if isinstance(content, dict) else None
    if benchmark not in _READERS:
        found = f"it holds the benchmark {benchmark!r}" if benchmark else "it names no benchmark"
        raise InputError(f"{str(path)!r} must hold results of one of {', '.join(_READERS)}, but {found}.")
    try:
        return {row.key: row for row in _READERS[benchmark](content)}
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{str(path)!r} holds a row of {benchmark!r} that cannot be read: {what}.") from error


def compare(old: dict[Hashable, Row], new: dict[Hashable, Row]) -> list[Change]:
    """Pairs the rows that both files have, in the order of the new file.

    Raises:
      InputError: the files have no row in common.
    """
    changes = [Change(old[key], row) for key, row in new.items() if key in old]
    if not changes:
        examples = [f"for example {next(iter(rows.values())).name!r}" if rows else "none at all" for rows in (old, new)]
        raise InputError(
            "The files have no row of jaxpack in common, so there is nothing to compare. A row is known by its case,"
            f" its documents and its device. The old file has {examples[0]}; the new file has {examples[1]}."
        )
    return changes


def changes_table(changes: list[Change]) -> Table:
    """Returns a table with a line for each row that both files have."""
    table = Table(title="jaxpack's rows in both files")
    for heading in ("row", "unit"):
        table.add_column(heading)
    for heading in ("old rate", "new rate", "change", "old peak, GiB", "new peak, GiB", "change", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        rates = [_shown(row.rate, missing="failed") for row in (change.old, change.new)]
        peaks = [_shown(None if row.memory is None else row.memory / GIB) for row in (change.old, change.new)]
        table.add_row(
            change.new.name,
            change.new.unit,
            *rates,
            _percent(change.rate),
            *peaks,
            _percent(change.memory),
            ", ".join(change.faults) or "ok",
            style="red" if change.faults else None,
        )
    return table


def main() -> None:
    """Prints the table and the rows that are only in one file, and exits with the status that the module names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the results to compare with")
    parser.add_argument("new", type=Path, help="the results to judge")
    options = parser.parse_args()
    try:
        old, new = read_rows(options.old), read_rows(options.new)
        changes = compare(old, new)
    except InputError as error:
        parser.error(str(error))

    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    console.print(changes_table(changes))
    for which, rows, others in (("old", old, new), ("new", new, old)):
        for row in (row for key, row in rows.items() if key not in others):
            console.print(f"only in the {which} file: {row.name}")
    worse = [change for change in changes if change.faults]
    for change in worse:
        console.print(f"{', '.join(change.faults)}: {change.new.name}", style="red")
    console.print(
        f"{len(worse)} of {len(changes)} rows became worse (a rate lower by {RATE_LOSS:.0%} or more, a peak higher by"
        f" {MEMORY_GROWTH:.0%} or more, or a failure)"
    )
    sys.exit(1 if worse else 0)


# The forms of results files.


def _training_rows(content: dict[str, Any]) -> Iterator[Row]:
    for record in content["results"]:
        if record["system"] != "jaxpack":
            continue
        planned = Planned(record["plan"], record["label"], case_of(record))
        failed = "failed" in record
        # A failed case may not know its device: its process wrote no figures.
        device = record.get("device", _only(other["device"] for other in content["results"] if "device" in other))
        yield Row(
            (planned.plan, planned.case, record["data"], device),
            f"{planned}, {planned.case.steps} steps, {record['data']}, {device}",
            "tokens/s",
            None if failed else _positive(record["tokens_per_second"]),
            None if failed else record["peak_memory_bytes"],
        )


def _kernel_rows(content: dict[str, Any]) -> Iterator[Row]:
    for row in content["rows"]:
        work, unit = (row["bytes"] / 1e9, "GB/s") if "bytes" in row else (row["flops"] / 1e12, "TFLOP/s")
        case = [row["operation"], row["direction"], *filter(None, [row["mix"]]), f"{row['tokens']:,} tokens"]
        for column, figures in row["columns"].items():
            if column.split(",")[0] == "ours" and "missing" not in figures:
                rate = work / _positive(figures["median"]) if "median" in figures else None
                name = f"{' '.join(case)}: {column}, {content['device']}"
                yield Row(name, name, unit, rate)


def _loss_rows(content: dict[str, Any]) -> Iterator[Row]:
    for record in content["results"]:
        case = f"{record['tokens']:,} tokens, a vocabulary of {record['vocab']:,}, {record['hidden']:,} features"
        head = "frozen head" if record["frozen_head"] else "trained head"
        start = "program from the cache" if record.get("found_program") else "program compiled"
        name = f"loss: {case}, {head}, {start}, {record['device']}"
        yield Row(name, name, "tokens/s", record["tokens"] / _positive(record["seconds"]), record["peak_memory_bytes"])


def _loading_rows(content: dict[str, Any]) -> Iterator[Row]:
    files = "files not in the page cache" if content["cold"] else "files in the page cache"
    name = f"loading {content['model']}, {content['bytes']:,} bytes, {files}, {content['device']}"
    load = content["load"]
    yield Row(name, name, "GB/s", content["bytes"] / 1e9 / _positive(load["seconds"]), load["host_bytes"])


_READERS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "training": _training_rows,
    "kernels": _kernel_rows,
    "loss": _loss_rows,
    "loading": _loading_rows,
}


# Helpers.


def _only(values: Iterator[str]) -> str:
    """Returns the value if all are the same."""
    found = set(values)
    return found.pop() if len(found) == 1 else "unknown device"


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(f"a rate or a time must be positive, got {value!r}")
    return value


def _relative(old: float | None, new: float | None) -> float | None:
    """Returns by what part of `old` the figure changed; rounded, so that 3 % is 3 % and not 2.9999999."""
    return round(new / old - 1, 9) if old and new is not None else None


def _shown(figure: float | None, missing: str = "-") -> str:
    return missing if figure is None else f"{figure:,.2f}"


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{change:+.1%}"


if __name__ == "__main__":
    main()
