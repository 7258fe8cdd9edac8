"""Runs cases one after another, each in its own process, and keeps their results in a file."""

import dataclasses
import datetime
import json
import math
import subprocess
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
Measure = Callable[[Planned, float | None], Record]  # (case, seconds) -> its figures, or {"failed": why}


class OutOfTime(Exception):
    """Reports that too little time was left for a case, which then has no record."""


class Results:
    """Holds one record per plan, data and case, and rewrites a JSON file (unless `path` is None) after each.

    The records of an existing file are kept until they are measured again. If there is no file, its folder is made.
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
        """Returns all records, in the order in which their cases were first added."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Adds a record; it replaces a record of the same case in the same plan on the same data."""
        self._records[_key(record)] = record
        if self._path is not None:
            content = json.dumps({"benchmark": "training", "results": self.records}, indent=1) + "\n"
            replace_file(self._path, content.encode(), "output")

    def of(self, planned: Planned, data: str) -> Record | None:
        """Returns the record of a case on this data (figures or a failure), or None."""
        return self._records.get(_key(planned.record(data=data)))

    def longest(self, planned: Planned) -> float:
        """Returns the most seconds that a case of the same system and model took, or 0 if none is recorded."""
        alike = planned.case.system, planned.case.model
        return max((r["process_seconds"] for r in self.records if (r["system"], r["model"]) == alike), default=0.0)


def read_records(path: Path) -> list[Record]:
    """Reads the records of a results file, and raises InputError if it is not one."""
    try:
        records = json.loads(path.read_text())["results"]
        for record in records:
            _key(record), record["process_seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"`output` must be a file of results or not exist yet, got {str(path)!r}, which cannot be read: {error!r}."
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
    """Measures every case, prints a line for each, and saves it at once; after a failure the next case runs.

    Args:
      data: the name of the documents in the records.
      seconds: the time for all cases. A case that needs more than is left, going by `Results.longest`, is not started;
        a case that runs out of time is stopped and not recorded. None is no limit.
      only_missing: skips cases that `results` already has.
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
            console.print(f"{planned}: not measured, because there is no time left")
            continue
        record = planned.record(data=data, date=today, process_seconds=time.monotonic() - begin, **figures)
        results.add(record)
        console.print(f"{planned}: {line_of(record)}")


def line_of(record: Record) -> str:
    """Returns the figures of a record as one short line."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    return (
        f"{record['tokens_per_second']:,.0f} tokens/s, {record['step_seconds']:.3f} s a step,"
        f" {record['peak_memory_bytes'] / 2**30:.2f} GiB, {record['padding_share']:.1%} padding,"
        f" {record['process_seconds']:.0f} s in all"
    )


def in_own_process(command: list[str], request: Any, *, seconds: float | None = None, **options: Any) -> Record:
    """Runs `command REQUEST RESULT`, two JSON files: the process reads the request and writes the answer.

    The output of the process is shown only if it fails: its last 20 lines. A failure is an answer, too:
    {"failed": why}. `options` go to `subprocess.run`.

    Raises:
      OutOfTime: the process took longer than `seconds`.
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
        if answered.exists():  # a process may crash at its very end, after it has answered
            record = json.loads(answered.read_text())
        else:
            last = next((line.strip() for line in reversed(lines) if line.strip()), "the process printed nothing")
            record = {"failed": f"exit code {process.returncode}: {last[:300]}"}
        if "failed" in record:
            for line in lines[-20:]:
                console.print(line)
        return record


def answer(result: Path, measure: Callable[[], Record]) -> None:
    """Writes the result of `measure`, or the error that it raises, to the file that `in_own_process` reads."""
    try:
        record = measure()
    except Exception as error:
        record = {"failed": f"{type(error).__name__}: {reason(error)[:300]}"}
        if not isinstance(error, InputError):
            traceback.print_exc()
    result.write_text(json.dumps(record))


def request_of(planned: Planned, **more: Any) -> Record:
    """Returns the request to measure a case, for `in_own_process`."""
    return {"case": dataclasses.asdict(planned.case), **more}
