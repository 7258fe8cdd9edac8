"""Writes the metrics of a run to `metrics.jsonl` and to the destinations in `report_to`, one class for each."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from jaxpack.errors import InputError, not_installed, reason
from jaxpack.parallel.processes import is_first_process
from jaxpack.settings import TrainConfig
from jaxpack.utils.console import console
from jaxpack.utils.files import open_own_file, replace_file
from jaxpack.utils.json_file import read_file

METRICS, ABOUT = "metrics.jsonl", "about.json"
TENSORBOARD = "tensorboard"  # the folder of its events, within `output_dir`

Record = dict[str, float]  # The metrics of an evaluation if `eval_loss` is among them, otherwise those of training.

_LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Destination(Protocol):
    """Takes the records of a run in order, and raises OSError if it cannot take one."""

    name: str

    def write(self, record: Record) -> None:
        """Stores a record for good, before it returns."""

    def close(self) -> None:
        """Closes the destination. Called once, after the last record."""


class Reports:
    """Writes to all destinations of a run. One that fails is closed with a warning; the run and the others go on."""

    def __init__(self, destinations: list[Destination]):
        self._destinations = destinations

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *_: object) -> None:
        for destination in self._destinations:
            try:
                destination.close()
            except OSError as error:
                _tell(destination, error)
        self._destinations = []

    def write(self, record: Record) -> None:
        """Writes a record to every destination."""
        for destination in list(self._destinations):
            try:
                destination.write(record)
            except OSError as error:
                self._destinations.remove(destination)
                with contextlib.suppress(OSError):
                    destination.close()
                _tell(destination, error)


def _tell(destination: Destination, error: OSError) -> None:
    console.print(
        f"{destination.name} ends here, because it cannot be written to: {reason(error)}; the run goes on",
        style="yellow",
    )


def require_libraries(config: TrainConfig) -> None:
    """Raises an `InputError` if the library of a destination in `report_to` is not installed."""
    for name in config.report_to or ():
        if importlib.util.find_spec(_LIBRARIES[name]) is None:
            raise not_installed(f"`report_to` {name!r}", _LIBRARIES[name], name)


def open_reports(config: TrainConfig, about: dict[str, Any], after: int | None) -> Reports:
    """Opens the destinations of a run and writes `about.json` beside them.

    Without `output_dir` there are none, and of several processes only the first one has any.

    Args:
      config: names the destinations and their folder.
      about: the content of `about.json`, for `write_report`; Weights & Biases shows the `settings` in it.
      after: the step from which the run in the folder resumes: its records up to that step stay. None for a new run.

    Raises:
      InputError: `output_dir` cannot be written to, or Weights & Biases does not start.
    """
    opened: list[Destination] = []
    if config.output_dir is None or not is_first_process():
        return Reports(opened)
    folder, destinations = Path(config.output_dir), config.report_to or ()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "wandb" in destinations:  # First: if it refuses, no file of ours is written yet.
            opened.append(WandB(folder, about["settings"], after))
        replace_file(folder / ABOUT, json.dumps(about, indent=1).encode() + b"\n", "output_dir")
        if "tensorboard" in destinations:
            opened.append(TensorBoard(folder / TENSORBOARD, after))
        opened.append(MetricsFile(folder / METRICS, after))
    except (OSError, InputError) as error:
        Reports(opened).__exit__()
        if isinstance(error, InputError):
            raise
        raise InputError(f"`output_dir` must be writable, got {config.output_dir!r}: {reason(error)}.") from error
    return Reports(opened)


class MetricsFile:
    """Writes `metrics.jsonl`, with one record on each line.

    A record is written at once, without a buffer, and either completely or not at all.
    """

    name = METRICS

    def __init__(self, path: Path, after: int | None):
        self._file = open_own_file(path, is_new=after is None)
        if after is not None:
            self._file.seek(0)
            kept = [end for end, record in _whole_records(self._file.read()) if record["step"] <= after]
            self._file.truncate(kept[-1] if kept else 0)
            self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Appends a record. If the disk is full, the lines before it stay whole."""
        end = self._file.tell()
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def read_records(folder: Path) -> list[Record]:
    """Reads the whole records of `metrics.jsonl`, without a half-written last line of a run that was killed."""
    try:
        return [record for _, record in _whole_records(read_file(folder / METRICS))]
    except OSError as error:
        raise InputError(f"`folder` must hold {METRICS}, got {str(folder)!r}: {reason(error)}.") from error


def _whole_records(content: bytes) -> Iterator[tuple[int, Record]]:
    """Yields pairs of the byte offset at which a record's line ends, and the record.

    Stops at the first line that is not a whole record.
    """
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(record["step"], int):
                return
        except (ValueError, TypeError, KeyError):
            return
        end += len(line)
        yield end, record


class TensorBoard:
    """Writes a TensorBoard event file for this process, beside those of the run's earlier processes.

    Uses tensorboardX's file writer and not its `SummaryWriter`. When the disk is full, the thread of a `SummaryWriter`
    ends, its queue fills up, and the full queue blocks the run.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, after: int | None):
        from tensorboardX.event_file_writer import EventsWriter

        # protobuf makes these classes when the modules are imported.
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._event, self._summary = Event, Summary
        if folder.is_symlink():  # its events would be written elsewhere
            raise InputError(
                f"`output_dir` must have a folder {TENSORBOARD!r} of its own, got a link at {str(folder)!r}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # names differ even within one second
        if after is not None:  # TensorBoard then hides what was written for later steps.
            start = Event(step=after + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
            self._writer.write_event(start)
        self._writer.flush()

    def write(self, record: Record) -> None:
        """Writes the values of a record as scalars at its step."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in _tagged(record).items()]
        event = self._event(step=record["step"], wall_time=time.time(), summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class WandB:
    """Logs to a Weights & Biases run in the project WANDB_PROJECT (default "jaxpack"); a resume continues that run.

    The step is logged as a value that serves as the axis: wandb's own counter would drop the steps that a resume
    repeats.
    """

    name = "wandb"

    def __init__(self, folder: Path, settings: dict[str, Any], after: int | None):
        import wandb

        # The name of the last run's file in this folder holds the run id.
        before = [] if after is None else list(folder.glob("wandb/latest-run/run-*.wandb"))
        self._error = wandb.Error
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "jaxpack"),
                name=folder.resolve().name,
                dir=str(folder),
                config=settings,
                id=before[0].stem.removeprefix("run-") if before else None,
                resume="allow",
            )
        except wandb.Error as error:
            raise InputError(
                f"`report_to` must be able to start, got 'wandb', which cannot: {reason(error)}."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Logs the values of a record with its step."""
        try:
            self._run.log(_tagged(record) | {"step": record["step"]})
        except self._error as error:
            raise OSError(reason(error)) from error

    def close(self) -> None:
        """Waits until all values are sent, and ends the run."""
        self._run.finish()


def _tagged(record: Record) -> dict[str, float]:
    """Returns a record's values under the names of transformers' Trainer, such as `train/loss` and `eval/loss`."""
    group = "eval" if "eval_loss" in record else "train"
    return {f"{group}/{name.removeprefix('eval_')}": value for name, value in record.items() if name != "step"}
