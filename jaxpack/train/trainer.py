"""The loop around the step: data, progress, metrics, evaluation, checkpoints."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.packing import PackedBatch
from jaxpack.data.reading import Dataset, load_documents
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, check_type, errors_name
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import current_device, free_device_bytes, peak_memory_bytes
from jaxpack.planning.predictions import resolve
from jaxpack.settings import TrainConfig
from jaxpack.train.checkpoint import (
    LATEST,
    Checkpoints,
    Progress,
    find_checkpoint,
    identity_of,
    load_checkpoint,
    notes_of,
)
from jaxpack.train.metrics import METRICS, Reports, open_reports, require_libraries
from jaxpack.train.report import write_report
from jaxpack.train.step import (
    Metrics,
    TrainState,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    split_trainable,
)
from jaxpack.utils.compilation_cache import ProgramCache, size_of
from jaxpack.utils.console import console, progress_bar
from jaxpack.utils.files import from_home, held_folder
from jaxpack.utils.prefetch import prefetched


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did. The rate leaves out compilation, and the first step of each shape where there are others.
    Those inside the run are told apart by when metrics came, which may be a step late.

    Of a run that was resumed, losses and evaluations are those of all of it, rate and seconds those since then.
    """

    losses: np.ndarray  # mean over targets, float64 [steps]
    evaluations: dict[int, float]  # mean loss over the targets of `eval_dataset`, by step
    tokens_per_second: float  # real tokens
    padding_share: float
    compiled_shapes: int
    found_programs: int  # compiled by an earlier run: of these, and of those that evaluate
    compile_seconds: float
    first_step_seconds: float  # from the start of `train()` to the first step's metrics, compilation included
    peak_memory_bytes: int


class Run:
    """A model's way through its batches: what is trained, and a program for each length of rows.

    Attributes:
      state, frozen: what a step changes, and what it does not. The model's trained parameters are set to those of the
        former, which the first step donates.
      started: how many steps are, counted from the run's beginning.
      remat, explanation: see `predictions.resolve`.
      programs, eval_programs: by T, once they are compiled.
    """

    def __init__(self, model: Transformer, batches: Batches, config: TrainConfig, eval_batches: Batches | None = None):
        self._model, self._batches, self._eval_batches = model, batches, eval_batches
        self.started = 0
        graph, trainable, self.frozen = split_trainable(model)
        nnx.update(model, trainable)  # lets go of the arrays that were copied
        self.schedule = make_schedule(config, batches.num_steps)
        optimizer = make_optimizer(config, self.schedule)
        self.state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
        held_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((self.state, self.frozen)))
        self.remat, self.explanation = resolve(config, model, batches, held_bytes)
        has_dropout = any(adapter.dropout for adapter in adapters(model).values())
        self._step = make_train_step(
            graph,
            optimizer,
            remat=self.remat,
            implementation=config.implementation,
            dropout_seed=config.seed if has_dropout else None,
        )
        self._eval_step = make_eval_step(graph, implementation=config.implementation)
        self.programs: dict[int, jax.stages.Compiled] = {}
        self.eval_programs: dict[int, jax.stages.Compiled] = {}

    def compile(self, cache: ProgramCache) -> float:
        """Compiles the programs, all of them so that none holds up the run, or finds them: in so many seconds."""
        begin = time.perf_counter()
        with cache.in_use():
            for shape in self._batches.shapes:
                lowered = self._step.lower(
                    self.state, self.frozen, _abstract(shape), limits=self._batches.limits[shape[-1]]
                )
                self.programs[shape[-1]] = cache.compile(lowered)
            for shape in self._eval_batches.shapes if self._eval_batches is not None else ():
                limits = self._eval_batches.limits[shape[-1]]
                lowered = self._eval_step.lower(self.state.trainable, self.frozen, _abstract(shape), limits=limits)
                program = self.eval_programs[shape[-1]] = cache.compile(lowered)
                _check_room(program, shape)
        return time.perf_counter() - begin

    def resume(self, path: Path, identity: dict[str, Any], notes: dict[str, str]) -> Progress:
        """Goes on from a checkpoint: sets `state` and `started`, and the model's trained parameters."""
        self.state, progress = load_checkpoint(path, self.state, identity, notes)
        nnx.update(self._model, self.state.trainable)
        self.started = len(progress.losses)
        return progress

    def step(self, batch: PackedBatch) -> Metrics:
        """Starts one step, of a batch on the device."""
        self.state, metrics = self.programs[batch.tokens.shape[-1]](self.state, self.frozen, batch)
        self.started += 1
        return metrics

    def steps(self, pauses: Callable[[int], bool] = lambda step: False) -> Iterator[Metrics]:
        """Takes all steps that are left. A step's metrics come when the next is started, so that the device always has
        one to run; but after the first, a step that `pauses` (counted from 1), and the last, with nothing started:
        `state` is then what that step made.

        Where a program is launched kernel by kernel, starting it takes nearly as long as running it, for launches
        queue up: only the time at which the metrics of a pause come is that of the step's end.
        """
        first = self.started + 1
        with self._on_device(self._batches, self.started) as batches_on_device:
            waiting = None
            for batch in batches_on_device:
                metrics = self.step(batch)
                if waiting is not None:
                    yield waiting
                waiting = metrics
                if self.started == first or pauses(self.started):
                    yield waiting
                    waiting = None
            if waiting is not None:
                yield waiting

    def evaluate(self) -> float:
        """The mean loss over all targets of the evaluation's batches. Waits for it, once, at the end."""
        sums = []
        with self._on_device(self._eval_batches) as batches_on_device:
            for batch in batches_on_device:
                program = self.eval_programs[batch.tokens.shape[-1]]
                sums.append(program(self.state.trainable, self.frozen, batch))
        return float(np.sum(jax.device_get(sums), dtype=np.float64)) / self._eval_batches.targets_per_epoch

    def _on_device(self, batches: Batches, begin: int = 0) -> contextlib.closing[Iterator[PackedBatch]]:
        # Named, for a thread does not inherit a `jax.default_device` of its caller's.
        device = self.state.step.sharding
        made = prefetched(lambda step: jax.device_put(batches[begin + step], device), len(batches) - begin)
        return contextlib.closing(made)


def _abstract(shape: tuple[int, int, int]) -> PackedBatch:
    return PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])


class Trainer:
    """Fine-tunes a model: its adapters where it has any (`add_lora`), else all of it.

    Args:
      model: trained in place; `trainer.model` is the same object.
      tokenizer: turns the dataset's text to tokens, see `load_documents`; may be None for rows of `input_ids`.
      train_dataset: a JSONL or Parquet file, an iterable of dicts, a `datasets.Dataset`, or `Documents`.
      config: how to train.
      eval_dataset: rows that are not trained on, of any of the formats; their loss is taken as `eval_steps` says, in
        batches like those of training.

    Attributes:
      checkpoint: the one that the run goes on from, or None.
      in_place: whether the run continues that of `output_dir`, which may have been stopped before its first checkpoint.
      progress: what `train()` has measured so far, of steps that are done, those before a resume among them.

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
        eval_dataset: Dataset | Documents | None = None,
    ):
        config = TrainConfig() if config is None else config
        check_type("model", model, Transformer)
        check_type("config", config, TrainConfig)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        _check_evaluation(config, eval_dataset is not None)
        require_libraries(config)
        self._look_behind()
        self.progress = Progress()
        with errors_name(dataset="train_dataset"):
            self.documents = self._load(train_dataset)
        self.batches = Batches(self.documents, config)
        self.eval_documents = self.eval_batches = None
        if eval_dataset is not None:
            once = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1}
            with errors_name(dataset="eval_dataset"):
                self.eval_documents = self._load(eval_dataset)
            self.eval_batches = Batches(self.eval_documents, dataclasses.replace(config, **once))

    def _look_behind(self) -> None:
        """Sets `checkpoint` and `in_place`, by what is there."""
        config = self.config
        self.checkpoint = find_checkpoint(config)
        output = None if config.output_dir is None else Path(config.output_dir)
        self.in_place = output is not None and (
            config.resume_from_checkpoint == LATEST
            or (self.checkpoint is not None and self.checkpoint.resolve().parent.parent == output.resolve())
        )
        if output is not None and not self.in_place and (output / METRICS).exists():
            raise InputError(f"`output_dir` must be without {METRICS}, got {config.output_dir!r} with one.")

    def _load(self, dataset: Dataset) -> Documents:
        with errors_name(text_field="dataset_text_field"):
            return load_documents(
                dataset,
                self.tokenizer,
                vocab_size=self.model.config.vocab_size,
                text_field=self.config.dataset_text_field,
                assistant_only_loss=self.config.assistant_only_loss,
            )

    def train(self, on_start: Callable[[], object] = lambda: None) -> TrainResult:
        """Runs all steps and leaves the trained weights in `self.model`. Prints the plan, then progress, and writes a
        report at the end. `on_start` is called when there is nothing left to refuse, before the first step.

        SIGINT (Ctrl-C) or SIGTERM ends the run after the step that is running, with a checkpoint where there is an
        `output_dir`: then it raises KeyboardInterrupt or SystemExit. A second one does not wait.

        Called again, after a stop, it goes on or is refused as a new process would be.

        Raises:
          InputError: the checkpoint to go on from is of another run, or damaged; another run is in `output_dir`.
        """
        output = self.config.output_dir
        with contextlib.nullcontext() if output is None else held_folder(Path(output), "output_dir"):
            return self._train(on_start)

    def _train(self, on_start: Callable[[], object]) -> TrainResult:
        begin = time.perf_counter()
        config, batches = self.config, self.batches
        self._look_behind()  # once more: an earlier call may have been stopped
        cache = ProgramCache(config.compilation_cache_dir)
        run = Run(self.model, batches, config, self.eval_batches)
        plan = self._plan(run)
        for line in plan:
            console.print(line)
        checkpoints = self._resume(run)
        progress = self.progress
        if cache.folder is not None:
            size, folder = size_of(cache.folder) / 2**20, from_home(Path(cache.folder))
            console.print(f"compiled programs are kept in {folder} ({size:.1f} MiB; delete it to clear it)")
        start = _Start(begin, run.compile(cache), cache.found)
        programs = len(run.programs) + len(run.eval_programs)
        console.print(f"programs ready after {start.compile_seconds:.1f} s, {cache.found} of {programs} found compiled")
        reports = open_reports(config, self._about(run, plan), after=run.started if self.in_place else None)
        log = _Log(config, batches, run.schedule, start, progress, reports)

        def saves(step: int) -> bool:
            every = 0 if checkpoints is None else config.steps_between_saves
            return every > 0 and (step % every == 0 or step == batches.num_steps)

        def pauses(step: int) -> bool:
            return stop.asked or saves(step) or self._evaluates(step)

        with contextlib.ExitStack() as stack:
            if checkpoints is not None:
                stack.callback(checkpoints.close)
            stack.callback(self._take, run)
            stack.enter_context(reports)
            on_start()
            stop = stack.enter_context(_Stop())
            stack.enter_context(log)
            for metrics in stack.enter_context(contextlib.closing(run.steps(pauses))):
                log.step(metrics)
                step = len(progress.losses)
                if step < run.started:
                    continue  # the next one is running
                if self._evaluates(step):
                    progress.evaluations[step] = run.evaluate()
                    log.evaluation()
                stops = stop.asked  # once: a signal may come between the two
                if checkpoints is not None and (stops or saves(step)):
                    checkpoints.save(step, run.state, progress)
                if stops:
                    log.record()
                    saved = checkpoints is not None and checkpoints.wait()
                    console.print(f"stopped after step {step}, {'saved' if saved else 'without a checkpoint'}")
                    self._report()
                    raise stop.error()
                log.go_on()
        self._report()
        return log.result()

    def _take(self, run: Run) -> None:
        """Gives the model what the run has trained."""
        trainable = run.state.trainable
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable)):  # a step that failed took them
            nnx.update(self.model, trainable)

    def _evaluates(self, step: int) -> bool:
        if self.eval_batches is None:
            return False
        every = self.config.save_steps if self.config.eval_steps is None else self.config.eval_steps
        return step == self.batches.num_steps or (every > 0 and step % every == 0)

    def _resume(self, run: Run) -> Checkpoints | None:
        """Sets `progress` to what the run has behind it; where it is saved."""
        config, checkpoints, self.progress = self.config, None, Progress()
        if config.output_dir is None and self.checkpoint is None:
            return None
        datasets = {"train_dataset": self.documents, "eval_dataset": self.eval_documents}
        identity = identity_of(self.model, config, run.state, run.frozen, **datasets)
        notes = notes_of(run.remat, config.implementation)
        if self.checkpoint is not None:
            self.progress = run.resume(self.checkpoint, identity, notes)
            console.print(f"goes on from {self.checkpoint}: {run.started:,} of {self.batches.num_steps:,} steps done")
        elif config.resume_from_checkpoint is not None:
            console.print(f"no checkpoint in {config.output_dir}: starts from the beginning")
        if config.output_dir is not None:
            checkpoints = Checkpoints(config.output_dir, config.save_total_limit, identity, notes)
            every = config.steps_between_saves
            when = f"every {every:,} steps and at the end" if every else "when it is stopped"
            console.print(f"saved {when} in {checkpoints.folder}; the last {config.save_total_limit} are kept")
        return checkpoints

    def _plan(self, run: Run) -> list[str]:
        """What is trained on what, in a few lines."""
        lines = describe(self.documents, self.batches, self.config)
        if self.eval_batches is not None:
            evaluated = self.eval_batches
            lines.append(
                f"evaluation: {len(self.eval_documents):,} documents, {evaluated.targets_per_epoch:,} tokens to"
                f" predict, {evaluated.truncation.documents:,} documents cut by max_length; shapes to compile:"
                f" {_shapes(evaluated)}"
            )
        sizes = [sum(x.size for x in jax.tree.leaves(state)) for state in (run.state.trainable, run.frozen)]
        lines.append(f"training {sizes[0]:,} of {sum(sizes):,} parameters on {current_device().device_kind}")
        return lines if run.explanation is None else [*lines, run.explanation]

    def _about(self, run: Run, plan: list[str]) -> dict[str, Any]:
        """What `run_report` tells of a run beside its metrics."""
        lora = self.model.lora_config
        return {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "after": run.started,
            "num_steps": self.batches.num_steps,
            "padding_share": self.batches.padding_share,
            "model": self.model.config.name_or_path or self.model.config.architecture,
            "device": current_device().device_kind,
            "versions": {name: _version(name) for name in ("jaxpack", "jax", "jaxlib", "flax")},
            "remat": run.remat,
            "plan": plan,
            "settings": vars(self.config) | ({} if lora is None else {"adapters": vars(lora)}),
        }

    def _report(self) -> None:
        """A run that is done is not ended by what is wrong with its report."""
        if self.config.output_dir is not None:
            try:
                console.print(f"wrote {write_report(self.config.output_dir)}")
            except InputError as error:
                console.print(f"there is no report: {error}", style="yellow")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"  # run from its folder


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
    if first := int(batches.documents.num_targets.sum()) - batches.targets_per_epoch:
        lines.append(f"{first:,} tokens to train on come first in a piece of a document: nothing predicts them there")
    if config.packing:
        lines.append(
            f"packing ({config.packing_strategy}): {batches.num_rows:,} rows of {config.max_length:,} tokens,"
            f" {batches.packing_efficiency:.2%} full, {len(batches.documents) / batches.num_rows:.1f} documents each"
        )
    else:
        lines.append(
            "padding-free: the documents of a step lie end to end" if config.padding_free else "padded batches"
        )
    lines.append(
        f"steps: {batches.num_steps:,} ({batches.steps_per_epoch:,} an epoch); shapes to compile:"
        f" {len(batches.shapes)} ({_shapes(batches)}), {batches.padding_share:.2%} of their positions padding"
    )
    return lines


def _shapes(batches: Batches) -> str:
    return ", ".join(f"{A} x {B} x {T}" for A, B, T in batches.shapes)


def _check_evaluation(config: TrainConfig, given: bool) -> None:
    every = config.eval_steps
    if every is None:
        return
    if not given:
        raise InputError(f"`eval_steps` must be None without an `eval_dataset`, got {every}.")
    if config.output_dir is not None and config.steps_between_saves % every:
        raise InputError(
            f"`save_steps` must be a multiple of `eval_steps` ({every}), so that it is known which checkpoint is the "
            f"best, got {config.save_steps}."
        )


class _Stop:
    """Within it, the first SIGINT or SIGTERM is noted, for the loop to end in order; the next one acts as ever.

    Outside the main thread, and where a signal is ignored (`nohup`), nothing changes.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self._received is not None

    def error(self) -> BaseException:
        """What the run ends with, as it would have without us: KeyboardInterrupt, or the exit status of the signal."""
        return KeyboardInterrupt() if self._received == signal.SIGINT else SystemExit(128 + self._received)

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: not Python's to put back
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self.__exit__()


@dataclasses.dataclass(frozen=True)
class _Start:
    """What came before a run's first step."""

    begin: float  # when it was, by `time.perf_counter`
    compile_seconds: float
    found_programs: int


class _Log:
    """Keeps a run's metrics: a progress bar, a line every `logging_steps`, and the same in `metrics.jsonl`."""

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        schedule: optax.Schedule,
        start: _Start,
        progress: Progress,
        reports: Reports,
    ):
        self._config, self._batches, self._start, self._done = config, batches, start, progress
        self._reports = reports
        self._first = len(progress.losses)  # step of this process, where it went on from a checkpoint
        steps = np.arange(batches.num_steps)
        self._learning_rates = np.asarray(jax.vmap(schedule)(steps))  # here, for a read-back would wait for the device
        self._warm = ~batches.is_first_of_its_shape(self._first)
        self._seconds = [0.0] * self._first
        self._first_step_seconds = 0.0
        self._grad_norm = 0.0  # of the last step
        self._recorded = self._first
        self._progress = progress_bar("training", transient=False)

    def __enter__(self) -> "_Log":
        self._progress.start()
        self._bar = self._progress.add_task("", total=self._batches.num_steps, completed=self._first, note="")
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def go_on(self) -> None:
        """A step is timed from the one before, or from here."""
        self._last = time.perf_counter()

    def step(self, metrics: Metrics) -> None:
        """Waits for a step's metrics and counts the step as done."""
        loss, self._grad_norm = map(float, jax.device_get(metrics))
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        was_finite = math.isfinite(sum(self._done.losses[-1:]))
        self._done.losses.append(loss)
        done = len(self._done.losses)
        if was_finite and not math.isfinite(loss + self._grad_norm):
            what = f"loss of step {done} is {loss}"
            if math.isfinite(loss):
                what = f"gradient of step {done} has norm {self._grad_norm}"
            line = f"the {what}: no step makes up for it; a lower `learning_rate` may avoid it"
            self._progress.console.print(line, style="yellow")
        if done == self._first + 1:
            self._first_step_seconds, compiling = now - self._start.begin, self._start.compile_seconds
            self._progress.console.print(
                f"first step after {self._first_step_seconds:.1f} s, {compiling:.1f} s of them for programs"
            )
        evaluated = "".join(f"  eval loss {loss:.4f}" for loss in list(self._done.evaluations.values())[-1:])
        rate = self._rate(max(0, done - self._config.logging_steps))
        self._progress.update(self._bar, completed=done, note=f"loss {loss:.4f}{evaluated}  {rate:,.0f} tok/s")
        if done % self._config.logging_steps == 0 or done == self._batches.num_steps:
            self.record()

    def record(self) -> None:
        """Writes down the steps since the last multiple of `logging_steps`, unless they are."""
        done = len(self._done.losses)
        if self._recorded == done:
            return
        self._recorded = done
        since = (done - 1) // self._config.logging_steps * self._config.logging_steps
        record = {
            "step": done,
            "epoch": round(done / self._batches.steps_per_epoch, 4),
            "loss": float(np.mean(self._done.losses[since:])),
            "grad_norm": self._grad_norm,
            "learning_rate": float(self._learning_rates[done - 1]),
            "tokens_per_second": self._rate(since),
            "padding_share": float(
                1 - self._batches.tokens_per_step[since:done].sum() / self._batches.positions_per_step[since:done].sum()
            ),
            "peak_memory_bytes": peak_memory_bytes(),
            "compiled_shapes": len(self._batches.shapes),
            "compile_seconds": self._start.compile_seconds,
            "first_step_seconds": self._first_step_seconds,
        }
        self._reports.write(record)
        self._progress.console.print(
            "step {step:>5}  loss {loss:.4f}  norm {grad_norm:.3f}  lr {learning_rate:.2e}  "
            "{tokens_per_second:>7,.0f} tok/s  pad {padding_share:.1%}  {gib:.1f} GiB".format(
                **record, gib=record["peak_memory_bytes"] / 2**30
            )
        )

    def evaluation(self) -> None:
        """Writes down the last evaluation, of the last step."""
        step, loss = list(self._done.evaluations.items())[-1]
        perplexity = math.exp(min(loss, 700.0))  # within float64
        epoch = round(step / self._batches.steps_per_epoch, 4)
        self._reports.write({"step": step, "epoch": epoch, "eval_loss": loss, "eval_perplexity": perplexity})
        self._progress.console.print(f"step {step:>5}  eval loss {loss:.4f}  perplexity {perplexity:.2f}")

    def result(self) -> TrainResult:
        return TrainResult(
            losses=np.array(self._done.losses),
            evaluations=self._done.evaluations,
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
        steps = slice(max(since, self._first), len(self._done.losses))
        counted = self._warm[steps] | ~self._warm[steps].any()
        seconds = np.array(self._seconds[steps])[counted].sum()
        return float(self._batches.tokens_per_step[steps][counted].sum() / seconds) if seconds else 0.0


def _check_room(program: jax.stages.Compiled, shape: tuple[int, ...]) -> None:
    """Refuses an evaluation that the device has no room for beside the run: its documents may be longer."""
    needed, free = program.memory_analysis().temp_size_in_bytes, free_device_bytes(current_device())
    if free is not None and needed > free:
        raise InputError(
            f"`eval_dataset` must leave room on the device: {' x '.join(map(str, shape))} tokens need"
            f" {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} that are free; a smaller `max_length` or"
            " `per_device_train_batch_size` needs less."
        )
