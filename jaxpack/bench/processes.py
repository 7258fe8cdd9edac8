"""Cases one after another, each in a process of its own, and the file that keeps what they measured."""

import dataclasses
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxpack.bench.cases import Planned, case_of
from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console
from jaxpack.utils.files import replace_file

Record = dict[str, Any]
Measure = Callable[[Planned, float | None], Record]  # a case's figures, or {"failed": why}, within so many seconds


class OutOfTime(Exception):
    """There was not enough time left for a case: nothing is known of it."""


class Results:
    """Records by what they are of, in a JSON file (or None) that is written anew after each.

    A file that is there is read, and its records kept, but for those that are measured again; else its folder is made.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._records: dict[tuple, Record] = {}
        if path is not None and path.exists():
            self._records = {_key(record): record for record in read_records(path)}
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def records(self) -> list[Record]:
        """All of them, in the order in which their cases came first."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Adds a record, in the place of one of the same case in the same plan on the same data."""
        self._records[_key(record)] = record
        if self._path is not None:
            content = json.dumps({"benchmark": "training", "results": self.records}, indent=1) + "\n"
            replace_file(self._path, content.encode(), "output")

    def of(self, planned: Planned, data: str) -> Record | None:
        """What is known of a case on such data: figures or a failure."""
        return self._records.get(_key(planned.record(data=data)))

    def longest(self, planned: Planned) -> float:
        """The seconds that a case of the same system and model took at most, as far as is known."""
        alike = planned.case.system, planned.case.model
        return max((r["process_seconds"] for r in self.records if (r["system"], r["model"]) == alike), default=0.0)


def read_records(path: Path) -> list[Record]:
    """The records of a file of results."""
    try:
        records = json.loads(path.read_text())["results"]
        for record in records:
            _key(record), record["process_seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"`output` must be a file of results or not exist yet, got {str(path)!r}: {error!r}."
        ) from error
    return records


def _key(record: Record) -> tuple:
    return record["plan"], record["data"], case_of(record)


def run_all(
    plan: Iterable[Planned],
    results: Results,
    measure: Measure,
    *,
    data: str,
    seconds: float | None = None,
    only_missing: bool = False,
) -> None:
    """Measures every case, prints a line for each, and keeps it at once. One that fails is recorded, the rest goes on.

    Args:
      data: what the documents are called in the records.
      seconds: a case that would take longer, going by `Results.longest`, is not started, and one that does is stopped
        and not recorded; None is no end.
      only_missing: leaves out what `results` has.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for planned in plan:
        if only_missing and results.of(planned, data):
            continue
        begin = time.monotonic()
        try:
            if end - begin <= results.longest(planned):
                raise OutOfTime
            figures = measure(planned, None if seconds is None else end - begin)
        except OutOfTime:
            console.print(f"{planned}: no time left")
            continue
        record = planned.record(data=data, date=today, process_seconds=time.monotonic() - begin, **figures)
        results.add(record)
        console.print(f"{planned}: {line_of(record)}")


def line_of(record: Record) -> str:
    """The figures of a record in a few words."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    return (
        f"{record['tokens_per_second']:,.0f} tokens/s, {record['step_seconds']:.3f} s a step,"
        f" {record['peak_memory_bytes'] / 2**30:.2f} GiB, {record['padding_share']:.1%} padding,"
        f" {record['process_seconds']:.0f} s in all"
    )


def in_own_process(command: list[str], request: Any, *, seconds: float | None = None, **options: Any) -> Record:
    """Runs `command REQUEST RESULT`, with the request as JSON in one file and the answer, JSON, in the other.

    What it prints is kept back, and its end shown where it fails, which is an answer: {"failed": why}. `options` are
    those of `subprocess.run`.

    Raises:
      OutOfTime: it took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="jaxpack-bench-") as folder:
        asked, answered, log = (Path(folder, name) for name in ("request.json", "result.json", "log.txt"))
        asked.write_text(json.dumps(request))
        with log.open("w") as output:
            try:
                process = subprocess.run(
                    [*command, str(asked), str(answered)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    **options,
                )
            except subprocess.TimeoutExpired:
                raise OutOfTime from None
        lines = log.read_text(errors="replace").splitlines()
        if answered.exists():  # one may crash at its very end, when it has answered
            record = json.loads(answered.read_text())
        else:
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            record = {"failed": f"exit code {process.returncode}: {last[:300]}"}
        if "failed" in record:
            print(*lines[-20:], sep="\n", file=sys.stderr, flush=True)
        return record


def answer(result: Path, measure: Callable[[], Record]) -> None:
    """Writes what `measure` gives to the file that `in_own_process` reads, or the error that it raises."""
    try:
        record = measure()
    except Exception as error:
        record = {"failed": f"{type(error).__name__}: {reason(error)[:300]}"}
        if not isinstance(error, InputError):
            traceback.print_exc()
    result.write_text(json.dumps(record))


def request_of(planned: Planned, **more: Any) -> Record:
    """What a process is asked to measure."""
    return {"case": dataclasses.asdict(planned.case), **more}
