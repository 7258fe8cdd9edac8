"""The loop around the step: data, progress, metrics."""

import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxpack.batching import Batches
from jaxpack.compilation_cache import ProgramCache, size_of
from jaxpack.config import TrainConfig
from jaxpack.console import console, progress_bar
from jaxpack.data import Dataset, Documents, Tokenizer, load_documents
from jaxpack.errors import InputError, reason
from jaxpack.lora import adapters
from jaxpack.memory import check_host_memory
from jaxpack.packing import PackedBatch
from jaxpack.predictions import resolve
from jaxpack.prefetch import prefetched
from jaxpack.training import Metrics, TrainState, make_optimizer, make_schedule, make_train_step, split_trainable
from jaxpack.transformer import Transformer

_METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did. The rate leaves out compilation, and the first step of each shape where there are others."""

    losses: np.ndarray  # mean over targets, float64 [steps]
    tokens_per_second: float  # real tokens
    padding_share: float
    compiled_shapes: int
    found_programs: int  # of them, found compiled, by an earlier run
    compile_seconds: float
    first_step_seconds: float  # from the start of `train()` to the first step's metrics, compilation included
    peak_memory_bytes: int


class Run:
    """A model's way through its batches: what is trained, and a program for each length of rows.

    Attributes:
      state, frozen: what a step changes, and what it does not. The model's trained parameters are set to those of the
        former, which the first step donates.
      remat, explanation: see `predictions.resolve`.
      programs: by T, once they are compiled.
    """

    def __init__(self, model: Transformer, batches: Batches, config: TrainConfig):
        self._batches = batches
        graph, trainable, self.frozen = split_trainable(model)
        nnx.update(model, trainable)  # lets go of the arrays that were copied
        self.schedule = make_schedule(config, batches.num_steps)
        optimizer = make_optimizer(config, self.schedule)
        self.state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
        held_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((self.state, self.frozen)))
        self.remat, self.explanation = resolve(config, model, batches, held_bytes)
        for _, B, T in batches.shapes:
            check_host_memory(self.remat, model.config, B * T, model.dtype.itemsize)
        has_dropout = any(adapter.dropout for adapter in adapters(model).values())
        self._step = make_train_step(
            graph,
            optimizer,
            remat=self.remat,
            implementation=config.implementation,
            dropout_seed=config.seed if has_dropout else None,
        )
        self.programs: dict[int, jax.stages.Compiled] = {}

    def compile(self, cache: ProgramCache) -> float:
        """Compiles the programs, all of them so that none holds up the run, or finds them: in so many seconds."""
        begin = time.perf_counter()
        with cache.in_use():
            for shape in self._batches.shapes:
                batch = PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])
                lowered = self._step.lower(self.state, self.frozen, batch, limits=self._batches.limits[shape[-1]])
                self.programs[shape[-1]] = cache.compile(lowered)
        return time.perf_counter() - begin

    def step(self, batch: PackedBatch) -> Metrics:
        """Starts one step, of a batch on the device."""
        self.state, metrics = self.programs[batch.tokens.shape[-1]](self.state, self.frozen, batch)
        return metrics

    def steps(self) -> Iterator[Metrics]:
        """Takes all steps. A step's metrics come when the next is started, so that the device always has one to run."""
        # Named, for a thread does not inherit a `jax.default_device` of its caller's.
        on_device = self.state.step.sharding
        prefetch = prefetched(lambda step: jax.device_put(self._batches[step], on_device), len(self._batches))
        with contextlib.closing(prefetch) as batches_on_device:
            waiting = None
            for batch in batches_on_device:
                metrics = self.step(batch)
                if waiting is not None:
                    yield waiting
                waiting = metrics
            yield waiting


class Trainer:
    """Fine-tunes a model: its adapters where it has any (`add_lora`), else all of it.

    Args:
      model: trained in place; `trainer.model` is the same object.
      tokenizer: turns the dataset's text to tokens, see `load_documents`; may be None for rows of `input_ids`.
      train_dataset: a JSONL or Parquet file, an iterable of dicts, a `datasets.Dataset`, or `Documents`.
      config: how to train.

    Reading, tokenising and planning happen here, so that what is wrong with the input shows before training starts.

    Raises:
      InputError: what was given cannot be trained on; the message says what and where.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        train_dataset: Dataset | Documents,
        config: TrainConfig | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or TrainConfig()
        if self.config.output_dir is not None and Path(self.config.output_dir, _METRICS).exists():
            raise InputError(f"`output_dir` must be without {_METRICS}, got {self.config.output_dir!r} with one.")
        self.documents = load_documents(
            train_dataset,
            tokenizer,
            vocab_size=model.config.vocab_size,
            text_field=self.config.dataset_text_field,
            assistant_only_loss=self.config.assistant_only_loss,
        )
        self.batches = Batches(self.documents, self.config)

    def train(self) -> TrainResult:
        """Runs all steps and leaves the trained weights in `self.model`. Prints the plan, then progress."""
        begin = time.perf_counter()
        config, batches = self.config, self.batches
        cache = ProgramCache(config.compilation_cache_dir)
        run = Run(self.model, batches, config)
        self._print_plan(run.state.trainable, run.frozen)
        if run.explanation is not None:
            console.print(run.explanation)
        if cache.folder is not None:
            size = size_of(cache.folder) / 2**20
            console.print(f"compiled programs are kept in {cache.folder} ({size:.1f} MiB; delete it to clear it)")
        start = _Start(begin, run.compile(cache), cache.found)
        console.print(
            f"programs ready after {start.compile_seconds:.1f} s, {cache.found} of {len(run.programs)} found compiled"
        )
        log = _Log(config, batches, run.schedule, start)
        try:
            with log, contextlib.closing(run.steps()) as steps:
                for metrics in steps:
                    log.step(metrics)
        finally:
            trainable = run.state.trainable
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable)):  # a step that failed took them
                nnx.update(self.model, trainable)
        return log.result()

    def _print_plan(self, trainable: nnx.State, frozen: nnx.State) -> None:
        config, documents, batches = self.config, self.documents, self.batches
        for line in describe(documents, batches, config):
            console.print(line)
        sizes = [sum(x.size for x in jax.tree.leaves(state)) for state in (trainable, frozen)]
        console.print(f"training {sizes[0]:,} of {sum(sizes):,} parameters on {jax.devices()[0].device_kind}")


def describe(documents: Documents, batches: Batches, config: TrainConfig) -> list[str]:
    """The plan of a run in a few lines: what is trained on, what was cut, how rows are filled, which shapes compile."""
    trained = int(documents.num_targets.sum())
    lines = [
        f"{len(documents):,} documents, {documents.num_tokens:,} tokens, {trained:,} of them to train on"
        f" ({trained / documents.num_tokens:.0%})"
    ]
    cut = batches.truncation
    if cut.documents:
        lines.append(
            f"max_length {config.max_length:,} cuts {cut.documents:,} documents"
            f" and loses {cut.tokens:,} tokens ({cut.tokens / documents.num_tokens:.1%})"
        )
    if cut.dropped:
        lines.append(f"{cut.dropped:,} documents are left with nothing to learn by that, and dropped")
    if config.packing:
        lines.append(
            f"packing ({config.packing_strategy}): {batches.num_rows:,} rows of {config.max_length:,} tokens,"
            f" {batches.packing_efficiency:.2%} full, {len(batches.documents) / batches.num_rows:.1f} documents each"
        )
    else:
        lines.append(
            "padding-free: the documents of a step lie end to end" if config.padding_free else "padded batches"
        )
    shapes = ", ".join(f"{A} x {B} x {T}" for A, B, T in batches.shapes)
    lines.append(
        f"steps: {batches.num_steps:,} ({batches.steps_per_epoch:,} an epoch); shapes to compile:"
        f" {len(batches.shapes)} ({shapes}), {batches.padding_share:.2%} of their positions padding"
    )
    return lines


@dataclasses.dataclass(frozen=True)
class _Start:
    """What came before a run's first step."""

    begin: float  # when it was, by `time.perf_counter`
    compile_seconds: float
    found_programs: int


class _Log:
    """Keeps a run's metrics: a progress bar, a line every `logging_steps`, and the same in `metrics.jsonl`."""

    def __init__(self, config: TrainConfig, batches: Batches, schedule: optax.Schedule, start: _Start):
        self._config, self._batches, self._start = config, batches, start
        steps = np.arange(batches.num_steps)
        self._learning_rates = np.asarray(jax.vmap(schedule)(steps))  # here, for a read-back would wait for the device
        self._warm = ~batches.is_first_of_its_shape
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._file = _MetricsFile(config.output_dir)
        self._progress = progress_bar("training", transient=False)

    def __enter__(self) -> "_Log":
        self._progress.start()
        self._bar = self._progress.add_task("", total=self._batches.num_steps, note="")
        self._last = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()

    def step(self, metrics: Metrics) -> None:
        """Waits for a step's metrics and counts the step as done."""
        loss, grad_norm = map(float, jax.device_get(metrics))
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        self._losses.append(loss)
        done = len(self._losses)
        if done == 1:
            self._first_step_seconds, compiling = now - self._start.begin, self._start.compile_seconds
            self._progress.console.print(
                f"first step after {self._first_step_seconds:.1f} s, {compiling:.1f} s of them for programs"
            )
        self._progress.update(self._bar, completed=done, note=f"loss {loss:.4f}")
        if done % self._config.logging_steps and done != self._batches.num_steps:
            return
        since = (done - 1) // self._config.logging_steps * self._config.logging_steps
        record = {
            "step": done,
            "epoch": round(done / self._batches.steps_per_epoch, 4),
            "loss": float(np.mean(self._losses[since:])),
            "grad_norm": grad_norm,
            "learning_rate": float(self._learning_rates[done - 1]),
            "tokens_per_second": self._rate(since),
            "padding_share": float(
                1 - self._batches.tokens_per_step[since:done].sum() / self._batches.positions_per_step[since:done].sum()
            ),
            "peak_memory_bytes": peak_memory_bytes(),
            "compiled_shapes": len(self._batches.shapes),
            "compile_seconds": self._start.compile_seconds,
        }
        self._file.write(record)
        self._progress.console.print(
            "step {step:>5}  loss {loss:.4f}  norm {grad_norm:.3f}  lr {learning_rate:.2e}  "
            "{tokens_per_second:>7,.0f} tok/s  pad {padding_share:.1%}  {gib:.1f} GiB".format(
                **record, gib=record["peak_memory_bytes"] / 2**30
            )
        )

    def result(self) -> TrainResult:
        return TrainResult(
            losses=np.array(self._losses),
            tokens_per_second=self._rate(0),
            padding_share=self._batches.padding_share,
            compiled_shapes=len(self._batches.shapes),
            found_programs=self._start.found_programs,
            compile_seconds=self._start.compile_seconds,
            first_step_seconds=self._first_step_seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _rate(self, since: int) -> float:
        """Real tokens a second from step `since` on: of the steps whose program had run before, where there are any."""
        steps = slice(since, len(self._losses))
        counted = self._warm[steps] | ~self._warm[steps].any()
        return float(
            self._batches.tokens_per_step[steps][counted].sum() / np.array(self._seconds[steps])[counted].sum()
        )


class _MetricsFile:
    """`metrics.jsonl`, a record a line, whole lines only. A full disk ends the file, with a warning, not the run."""

    def __init__(self, output_dir: str | None):
        self._file = None
        if output_dir is not None:
            try:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                self._file = (Path(output_dir) / _METRICS).open("xb", buffering=0)
            except OSError as error:
                raise InputError(f"`output_dir` must be writable, got {output_dir!r}: {reason(error)}.") from error

    def write(self, record: dict[str, float]) -> None:
        if self._file is None:
            return
        end = self._file.tell()
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as error:
            self._file.truncate(end)
            self.close()
            console.print(f"metrics.jsonl ends here, the run goes on: {reason(error)}", style="yellow")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def peak_memory_bytes() -> int:
    """The most memory held so far: the GPU allocator's own peak, or, on a CPU, that of the whole process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None:
        return statistics["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
