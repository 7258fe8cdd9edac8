"""Shows and records the metrics of a run while it trains."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax

from jaxpack.data.batching import BatchSource
from jaxpack.data.evaluation_sets import prefix_of, public_metrics
from jaxpack.parallel.device import peak_memory_bytes
from jaxpack.settings import TrainConfig
from jaxpack.train.checkpoint import Progress
from jaxpack.train.metrics import Reports
from jaxpack.train.step import Metrics
from jaxpack.utils.console import console, progress_bar

_ROOM_FOR_EVALUATION = 100  # columns of a terminal from which on the bar shows the evaluation loss, too
_FORMS = {"loss": ".4f", "perplexity": ".2f"}  # of an evaluation's metrics
_SHORTER = {"gradient norm": "grad norm", "learning rate": "lr", "peak memory": "peak"}  # names in a narrow terminal


@dataclasses.dataclass(frozen=True)
class Start:
    """Holds the facts about a run that are known before its first step."""

    begin: float  # start of `train()`, by `time.perf_counter`
    compile_seconds: float  # until the programs of the first steps were ready


class Log:
    """Shows a progress bar; every `logging_steps` steps, prints a line of metrics and writes a record to `reports`.

    Attributes:
      first_step_seconds: seconds from the start of `train()` to the first step's metrics; 0 before that.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: BatchSource,
        schedule: optax.Schedule | None,
        start: Start,
        progress: Progress,
        reports: Reports,
    ):
        self._batches, self._start, self._done = batches, start, progress
        self._every = int(config.logging_steps)
        self._reports = reports
        self._first = len(progress.losses)  # number of steps that were done before this process
        steps = np.arange(batches.num_steps)
        # Computed before the first step: reading values back later would wait for the device.
        self._learning_rates = None if schedule is None else np.asarray(jax.vmap(schedule)(steps))
        self._warm = ~batches.is_first_of_its_shape(self._first)
        self._seconds = [0.0] * self._first
        self.first_step_seconds = 0.0
        self._grad_norm = 0.0  # of the last step
        self._more: dict[str, float] = {}  # the objective's own metrics of the last step
        self._recorded = self._first
        self._progress = progress_bar("training", transient=False)

    def __enter__(self) -> "Log":
        self._progress.start()
        self._bar = self._progress.add_task("", total=self._batches.num_steps, completed=self._first, note="")
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def go_on(self) -> None:
        """Restarts the clock: the next step is timed from now on, and not from the end of the step before."""
        self._last = time.perf_counter()

    def step(self, metrics: Metrics) -> dict[str, float]:
        """Waits for a step's metrics, counts the step as done, and returns them by name."""
        loss, self._grad_norm, more = jax.tree.map(float, jax.device_get(metrics))
        self._more = more or {}
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        self._done.losses.append(loss)
        done = len(self._done.losses)
        if done == self._first + 1:
            self.first_step_seconds, compiling = now - self._start.begin, self._start.compile_seconds
            self._progress.console.print(
                f"the first step ended after {self.first_step_seconds:.1f} s, of which compiling took {compiling:.1f} s"
            )
        evaluated = "".join(f"  eval loss {loss:.4f}" for loss in list(self._done.evaluations.values())[-1:])
        rate = self.rate(max(0, done - self._every))
        if console.room is not None and console.room < _ROOM_FOR_EVALUATION:
            evaluated = ""
        self._progress.update(self._bar, completed=done, note=f"loss {loss:.4f}{evaluated}  {rate:,.0f} tokens/s")
        if done % self._every == 0 or done == self._batches.num_steps:
            self.record()
        return {"loss": loss, "grad_norm": self._grad_norm, **self._more}

    def record(self) -> None:
        """Records the steps since the last multiple of `logging_steps`, unless they are recorded already."""
        done = len(self._done.losses)
        if self._recorded == done:
            return
        self._recorded = done
        since = (done - 1) // self._every * self._every
        record = {
            "step": done,
            **self._epoch(done),
            "loss": float(np.mean(self._done.losses[since:])),
            "grad_norm": self._grad_norm,
            **self._more,
            **({} if self._learning_rates is None else {"learning_rate": float(self._learning_rates[done - 1])}),
            "tokens_per_second": self.rate(since),
            "padding_share": self._batches.padding_share_of(slice(since, done)),
            "peak_memory_bytes": peak_memory_bytes(),
            "compiled_shapes": len(self._batches.shapes),
            "compile_seconds": self._start.compile_seconds,
            "first_step_seconds": self.first_step_seconds,
        }
        self._reports.write(record)
        parts = [
            f"step {done:>5}",
            f"loss {record['loss']:.4f}",
            *(f"{name} {value:.4g}" for name, value in self._more.items()),
            f"gradient norm {self._grad_norm:.3f}",
            *([f"learning rate {record['learning_rate']:.2e}"] if "learning_rate" in record else []),
            f"{record['tokens_per_second']:>7,.0f} tokens/s",
            f"padding {record['padding_share']:.1%}",
            f"peak memory {record['peak_memory_bytes'] / 2**30:.1f} GiB",
        ]
        self._progress.console.print(fitted(parts, console.room))

    def evaluation(self, step: int, metrics: dict[str, dict[str, float]]) -> dict[str, float]:
        """Records the metrics of evaluation sets, see `Evaluation.run`, and returns them by their public names."""
        public = public_metrics(metrics)
        self._reports.write({"step": step, **self._epoch(step), **public})
        for name, of_set in metrics.items():
            parts = (f"{metric} {value:{_FORMS.get(metric, '.4g')}}" for metric, value in of_set.items())
            self._progress.console.print(f"step {step:>5}  eval {prefix_of(name)}{'  '.join(parts)}")
        return public

    def _epoch(self, done: int) -> dict[str, float]:
        epochs = self._batches.epochs(done)
        return {} if epochs is None else {"epoch": round(epochs, 4)}

    def rate(self, since: int) -> float:
        """Returns the rate from step `since` on, in tokens a second without padding.

        The first step of each shape is left out, unless no other steps ran.
        """
        steps = slice(max(since, self._first), len(self._done.losses))
        counted = self._warm[steps] | ~self._warm[steps].any()
        seconds = np.array(self._seconds[steps])[counted].sum()
        return float(self._batches.tokens_per_step[steps][counted].sum() / seconds) if seconds else 0.0


def fitted(parts: Sequence[str], room: int | None) -> str:
    """Joins the parts of a line, and makes it fit into `room` columns: first by shorter names, then without its end.

    The first two parts always stay. None is room for everything.
    """
    line = "  ".join(parts)
    if room is None or len(line) <= room:
        return line
    for name, shorter in _SHORTER.items():
        parts = [part.replace(name, shorter) for part in parts]
    while len(line := "  ".join(parts)) > room and len(parts) > 2:
        parts = parts[:-1]
    return line
