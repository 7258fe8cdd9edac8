"""Where the metrics of a run go: `metrics.jsonl`, and what `report_to` names. A class for each, and one for all."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from jaxpack.errors import InputError, reason
from jaxpack.settings import TrainConfig
from jaxpack.utils.console import console
from jaxpack.utils.files import replace_file

METRICS, ABOUT = "metrics.jsonl", "about.json"
TENSORBOARD = "tensorboard"  # the folder of its events, within `output_dir`

Record = dict[str, float]  # of a step: of training, or, with `eval_loss`, of an evaluation

_LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Destination(Protocol):
    """Takes the records of a run, in their order. What cannot take one raises OSError."""

    name: str

    def write(self, record: Record) -> None:
        """Keeps a record, from then on."""

    def close(self) -> None:
        """Once, after the last record."""


class Reports:
    """The destinations of a run. One that fails is told and closed; the others and the run go on."""

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
        """Hands a record to all."""
        for destination in list(self._destinations):
            try:
                destination.write(record)
            except OSError as error:
                self._destinations.remove(destination)
                with contextlib.suppress(OSError):
                    destination.close()
                _tell(destination, error)


def _tell(destination: Destination, error: OSError) -> None:
    console.print(f"{destination.name} ends here, the run goes on: {reason(error)}", style="yellow")


def require_libraries(config: TrainConfig) -> None:
    """Raises where what `report_to` names is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(_LIBRARIES[name]) is None:
            raise InputError(f"`report_to` {name!r} needs `pip install jaxpack[{name}]`, got no {_LIBRARIES[name]}.")


def open_reports(config: TrainConfig, about: dict[str, Any], after: int | None) -> Reports:
    """Opens the destinations of a run, and writes beside them what the run is made of; without `output_dir`, none.

    Args:
      about: `about.json`, for `run_report`; `settings` in it are those that Weights & Biases shows.
      after: the step that the run in the folder goes on from, whose records up to there stay; None: it is a new one.
    """
    opened: list[Destination] = []
    if config.output_dir is None:
        return Reports(opened)
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "wandb" in config.report_to:  # first: it may refuse, and nothing of ours is there yet
            opened.append(WandB(folder, about["settings"], after))
        replace_file(folder / ABOUT, json.dumps(about, indent=1).encode() + b"\n", "output_dir")
        if "tensorboard" in config.report_to:
            opened.append(TensorBoard(folder / TENSORBOARD, after))
        opened.append(MetricsFile(folder / METRICS, after))
    except (OSError, InputError) as error:
        Reports(opened).__exit__()
        if isinstance(error, InputError):
            raise
        raise InputError(f"`output_dir` must be writable, got {config.output_dir!r}: {reason(error)}.") from error
    return Reports(opened)


class MetricsFile:
    """`metrics.jsonl`: a record a line, whole lines only, each in the file at once."""

    name = METRICS

    def __init__(self, path: Path, after: int | None):
        self._file = path.open("xb" if after is None else "a+b", buffering=0)
        if after is not None:
            kept = [end for end, record in _whole_records(path.read_bytes()) if record["step"] <= after]
            self._file.truncate(kept[-1] if kept else 0)
            self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """A full disk leaves the lines before."""
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
    """The whole records of a run's `metrics.jsonl`; the last line may be half of one, of a run that was killed."""
    try:
        return [record for _, record in _whole_records((folder / METRICS).read_bytes())]
    except OSError as error:
        raise InputError(f"`folder` must hold {METRICS}, got {str(folder)!r}: {reason(error)}.") from error


def _whole_records(content: bytes) -> Iterator[tuple[int, Record]]:
    """The records up to the first line that is none, each with the place where its line ends."""
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
    """An event file of this process, in the folder of those of the run's earlier ones.

    tensorboardX's writer of files, not its `SummaryWriter`: that one's thread would end at a full disk, and the queue
    before it then block the run.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, after: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # two starts within a second, too
        if after is not None:  # what was written of later steps is no longer shown
            start = Event(step=after + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
            self._writer.write_event(start)
        self._writer.flush()

    def write(self, record: Record) -> None:
        """Scalars, at the record's step."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in _tagged(record).items()]
        event = self._event(step=record["step"], wall_time=time.time(), summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, or "jaxpack"; the same one after a resume.

    The step is a value beside the others, and their axis: wandb's own counter would drop the steps that are repeated.
    """

    name = "wandb"

    def __init__(self, folder: Path, settings: dict[str, Any], after: int | None):
        import wandb

        # The file of its last run here has the id in its name.
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
            raise InputError(f"`report_to` must be what can be started, got 'wandb': {reason(error)}.") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Values, with the record's step."""
        try:
            self._run.log(_tagged(record) | {"step": record["step"]})
        except self._error as error:
            raise OSError(reason(error)) from error

    def close(self) -> None:
        """Waits until what is left is sent."""
        self._run.finish()


def _tagged(record: Record) -> dict[str, float]:
    """The values of a record by the names that transformers' Trainer gives them: `train/loss`, `eval/loss`."""
    group = "eval" if "eval_loss" in record else "train"
    return {f"{group}/{name.removeprefix('eval_')}": value for name, value in record.items() if name != "step"}
