"""The trainer fine-tunes a model: it reads the data, runs the steps, and logs, evaluates and saves on the way."""

import contextlib
import dataclasses
import datetime
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.encoding import RowEncoder
from jaxpack.data.evaluation_sets import UNNAMED, EvalDataset, as_given
from jaxpack.data.formatting import FormattingFunc
from jaxpack.data.mixing import hold_out
from jaxpack.data.reading import Dataset, load_for_run
from jaxpack.data.stream import DocumentStream, StreamedBatches, is_stream
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, TrainingError, check_type, errors_name, is_out_of_memory, reason
from jaxpack.model.shards import in_shards
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import TRAINED, num_parameters
from jaxpack.objectives.objective import Objective, check_objective
from jaxpack.objectives.sft import SFT
from jaxpack.optimizers.optimizer import resolve_optimizer
from jaxpack.parallel.device import current_device, peak_memory_bytes
from jaxpack.parallel.mesh import describe_mesh
from jaxpack.parallel.placement import on_one_device
from jaxpack.parallel.processes import Consensus, exchange, is_first_process, watch
from jaxpack.planning.cards import card_of
from jaxpack.planning.cost import StepShape, needed_flops
from jaxpack.planning.mesh import mesh_of
from jaxpack.settings import TrainConfig
from jaxpack.train.callbacks import Callback, EarlyStopping, Events, check_callbacks, check_function
from jaxpack.train.checkpoint import (
    FOLDER,
    LATEST,
    Checkpoints,
    Progress,
    best_checkpoint,
    date_of_run,
    find_checkpoints,
    identity_of,
    notes_of,
)
from jaxpack.train.description import describe, describe_stream, shapes_to_compile
from jaxpack.train.evaluation import evaluate, evaluation_batches, load_sets
from jaxpack.train.metrics import METRICS, open_reports, require_libraries
from jaxpack.train.progress import Log, Start
from jaxpack.train.report import write_report
from jaxpack.train.run import MemoryShortage, Run
from jaxpack.train.signals import StopSignal, error_of
from jaxpack.train.step import ComputeMetrics
from jaxpack.utils.compilation_cache import ProgramCache, size_of
from jaxpack.utils.console import console
from jaxpack.utils.files import from_home, held_folder
from jaxpack.utils.foreign_names import answers_unknown_names


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Holds the results of a finished run, as `Trainer.train` returns them.

    `tokens_per_second` excludes compilation before the first step. It also excludes the first step of each shape, which
    may wait for its program, unless the run has no other steps. The time of a step is taken when its metrics arrive,
    which may be one step later. After a resume, losses and evaluations cover the whole run; the rate and the seconds
    cover only the time since the resume.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=16, lora_alpha=32))
      >>> config = jaxpack.TrainConfig(packing=True, max_length=128, max_steps=2, learning_rate=2e-4)
      >>> result = jaxpack.Trainer(model, tokenizer, "train.jsonl", config).train()
      >>> result.losses.shape
      (2,)
    """

    losses: np.ndarray  # mean over targets, float64 [steps]
    evaluations: dict[int, float]  # mean loss over the targets of `eval_dataset`, by step
    tokens_per_second: float  # real tokens, no padding
    padding_share: float  # the share of the run's positions that hold no token
    compiled_shapes: int  # shapes of training batches, each of which has a program
    found_programs: int  # programs, for training and evaluation, that were found compiled by the end of the run
    compile_seconds: float  # until the programs that the first step needs were ready; others are compiled beside steps
    first_step_seconds: float  # from the start of `train()` to the first step's metrics, compilation included
    peak_memory_bytes: int
    # The share of the devices' published bfloat16 rate that the work for these tokens takes, without what is computed
    # again or for padding; None for a device whose rate is not known.
    peak_share: float | None = None


@answers_unknown_names
class Trainer:
    """Fine-tunes a model: its adapters if it has any (`add_lora`), otherwise all of its weights.

    Creating a trainer reads, tokenises and plans, so that a mistake in the input shows before training starts.

    Args:
      model: the model, which is trained in place; `trainer.model` is the same object.
      tokenizer: turns the dataset's text into tokens, see `load_documents`; may be None for rows of `input_ids`. With
        a `chat_template` in `config`, it gets that template, see `set_chat_template`: save the adapter with it.
      train_dataset: the path of a file or a folder, a pattern of paths, a dataset of the hub and its split
        ("org/name:train"), an iterable of dicts, a `datasets.Dataset`, or `Documents`; or a list of these, each perhaps
        with a weight, as in "rows.jsonl=0.7". See `load_documents`.
      config: the settings of the run; None takes the defaults of `TrainConfig`.
      eval_dataset: rows that are not trained on, in any of the formats. Their loss is computed every `eval_steps`
        steps, in batches like those of training. With `eval_split`, a share of `train_dataset` takes their place. A
        mapping of names to datasets, such as a `datasets.DatasetDict`, has several sets: each has metrics of its own
        ("eval_math_loss" of the set "math"), and "eval_loss", that of all sets together, decides what is best.
      objective: the objective to minimise; None is `SFT`, the cross entropy of all targets. `HiddenObjective` and
        `LogProbObjective` make an objective from a function.
      optimizer: None is the optimizer that `optim` names. A schedule (a function from the step to the learning rate)
        replaces the schedule of `config`. An optax transformation replaces optimizer and schedule, so `optim` must then
        be left at "adamw"; its gradients are still clipped to `max_grad_norm` (0 turns clipping off).
      callbacks: objects that are told of steps, evaluations, checkpoints and the end, see `Callback`.
      compute_metrics: computes metrics of an evaluation: `function(losses, predictions, batch) -> {name: (sum,
        weight)}`. Write it in jax, as it runs within the compiled evaluation. `losses` float32 and `predictions` (the
        likeliest next token) int32 are `[B, T]`, as are the arrays of `batch`. Each metric is its sum over the dataset
        divided by the sum of its weights.
      formatting_func: a function that is called with each row of the datasets (a dict), and returns what is read in its
        place: a text, a list of messages, or a mapping in one of the formats of `load_documents`. None reads the rows.

    Attributes:
      checkpoint: the checkpoint that the run resumes from, or None. If `train` finds that the newest one is damaged, it
        takes the one before.
      date: the date for chat templates that write one: `chat_template_date`, or the day of the run's first start.
      in_place: whether the run continues the one in `output_dir`, which may have stopped before its first checkpoint.
      progress: the losses of all finished steps and the evaluation losses, including those before a resume.
      steps_in_model: the number of steps that `model` is trained for, including those before a resume. After an error,
        these may be fewer than were run; 0 if the weights are lost or not finite.

    Raises:
      InputError: the model cannot be trained on this input; the message says what is wrong and where.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=16, lora_alpha=32))
      >>> config = jaxpack.TrainConfig(packing=True, max_length=128, max_steps=2, learning_rate=2e-4)
      >>> trainer = jaxpack.Trainer(model, tokenizer, "train.jsonl", config)
      >>> result = trainer.train()
      >>> torch_bridge.save_adapter(trainer.model, "out/adapter")
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        train_dataset: Dataset | Documents,
        config: TrainConfig | None = None,
        eval_dataset: EvalDataset | None = None,
        *,
        objective: Objective | None = None,
        optimizer: optax.GradientTransformation | optax.Schedule | None = None,
        callbacks: Sequence[Callback] = (),
        compute_metrics: ComputeMetrics | None = None,
        formatting_func: FormattingFunc | None = None,
    ):
        watch()
        config = TrainConfig() if config is None else config
        check_type("model", model, Transformer)
        check_type("config", config, TrainConfig)
        if not jax.tree.leaves(nnx.state(model, TRAINED)):
            raise InputError(
                "`model` must have weights to train, got a model whose weights are all frozen, as those of a model in 4"
                " bits are. Add adapters with `add_lora`, or read a 16-bit model to train all weights."
            )
        self.mesh = mesh_of(config, model)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.objective = _objective(config) if objective is None else check_objective(objective)
        if objective is not None:
            _require_plain_loss(config)
        self.optimizer, self.callbacks, self.compute_metrics = optimizer, check_callbacks(callbacks), compute_metrics
        self.formatting_func = formatting_func
        if config.early_stopping_patience is not None:
            self.callbacks.append(EarlyStopping(config.early_stopping_patience, config.early_stopping_threshold))
        resolve_optimizer(optimizer, config, 1, model)  # Raises here if it is no optimizer.
        check_function("compute_metrics", compute_metrics)
        if config.eval_split is not None and eval_dataset is not None:
            raise InputError(
                f"`eval_split` must be None with an `eval_dataset`, got {config.eval_split:g}. Leave one of them out."
            )
        is_evaluated = eval_dataset is not None or config.eval_split is not None
        if compute_metrics is not None and not is_evaluated:
            raise InputError(
                "`compute_metrics` must be None without an `eval_dataset`, got a function. Pass the `eval_dataset` to"
                " compute the metrics on, or set `eval_split`."
            )
        _check_evaluation(config, given=is_evaluated)
        require_libraries(config)
        self._find_previous_run()
        # A run that goes on keeps its date, or a template that writes the date would make other tokens tomorrow.
        kept = date_of_run(self._checkpoints)
        given = config.chat_template_date
        date = datetime.date.fromisoformat(given) if given is not None else kept or datetime.date.today()
        self.date = datetime.date.fromisoformat(exchange(date.isoformat())[0])
        self.progress, self.steps_in_model = Progress(), 0
        self._identity: dict[str, Any] = {}
        self.eval_documents: dict[str, Documents] = {}  # by the names of the sets; one set may have the name ""
        with errors_name(dataset="train_dataset", documents="train_dataset"):
            if is_stream(train_dataset, config):
                self.batches = self._stream(train_dataset)
            else:
                self.batches = self._plan_batches(self._load(train_dataset))
        self.config = self.batches.config.in_whole_steps(self.batches.num_steps)
        _check_evaluation(self.config, given=is_evaluated)
        with errors_name(dataset="eval_dataset", documents="eval_dataset"):
            if eval_dataset is not None:
                self.eval_documents = load_sets(eval_dataset, self._load)
            self.eval_batches = evaluation_batches(self.eval_documents, config, self.objective, self.mesh.size)

    def _find_previous_run(self) -> None:
        """Sets `checkpoint` and `in_place` from the folders that `output_dir` and `resume_from_checkpoint` name."""
        config = self.config
        self._checkpoints = find_checkpoints(config)
        self.checkpoint = next(iter(self._checkpoints), None)
        output = None if config.output_dir is None else Path(config.output_dir)
        self.in_place = output is not None and (
            config.resume_from_checkpoint == LATEST
            or (self.checkpoint is not None and self.checkpoint.resolve().parent.parent == output.resolve())
        )
        if output is not None and not self.in_place and (output / METRICS).exists():
            raise InputError(
                f"`output_dir` must not hold {METRICS}, got {config.output_dir!r}, which holds the one of another run."
                " Choose another folder, or continue that run with `resume_from_checkpoint` 'latest'."
            )

    def _agree_on_checkpoints(self) -> None:
        """Refuses a folder that not all processes see: each reads the checkpoint that they resume from."""
        paths = [str(path.resolve()) for path in self._checkpoints]
        if any(others != paths for others in exchange(paths)):
            raise InputError(
                "`output_dir` must be one folder that all processes see, on a file system that they share, got"
                f" {self.config.output_dir!r}, in which they find different checkpoints."
            )

    def _load(self, dataset: Dataset | Documents) -> Documents:
        return load_for_run(
            self.config,
            dataset,
            self.tokenizer,
            vocab_size=self.model.config.vocab_size,
            date=self.date,
            documents_together=self.objective.documents_together,
            formatting_func=self.formatting_func,
        )

    def _plan_batches(self, documents: Documents) -> Batches:
        """Plans the batches of a whole dataset, without the rows that are held out for evaluation."""
        config, together = self.config, self.objective.documents_together
        if config.eval_split is not None:
            documents, held = hold_out(documents, config.eval_split, documents_together=together, seed=config.seed)
            self.eval_documents = {UNNAMED: held}
        self.documents = documents
        return Batches(documents, config, together, num_devices=self.mesh.size)

    def _stream(self, dataset: Dataset | Documents) -> StreamedBatches:
        """Reads the first rows of a stream."""
        config, together = self.config, self.objective.documents_together
        if together > 1:
            raise InputError(
                f"`objective` must take documents one by one if the data is read as a stream, got one that takes"
                f" {together} together. Pass a list or a file, which is read whole."
            )
        if config.eval_split is not None:
            raise InputError(
                f"`eval_split` must be None if the data is read as a stream, got {config.eval_split:g}. Pass an"
                " `eval_dataset`."
            )
        encoder = RowEncoder.of_run(
            config,
            self.tokenizer,
            self.model.config.vocab_size,
            date=self.date,
            formatting_func=self.formatting_func,
        )
        with errors_name(text_field="dataset_text_field"):
            stream = DocumentStream(dataset, encoder)
            batches = StreamedBatches(stream, config, num_devices=self.mesh.size)
        self.documents = batches.documents
        return batches

    def train(self, on_start: Callable[[], object] = lambda: None) -> TrainResult:
        """Runs all steps and leaves the trained weights in `self.model`.

        Prints the plan, then the progress, and writes a report at the end.

        SIGINT (Ctrl-C), SIGTERM or SIGHUP ends the run after the step that is running. The run then saves a checkpoint
        if there is an `output_dir`, and raises KeyboardInterrupt or SystemExit. A second signal ends it at once. The
        answer to the first is printed at once, however long the step takes.

        An error ends the run, too, and is raised again. The run then saves a checkpoint of the last whole state, and
        `model` holds its weights. If a step finds too little memory and `remat` is "auto", the run goes on with a
        choice of `remat` that needs less.

        If the run was stopped and `train` is called again, the same rules hold as in a new process: the run continues
        with `resume_from_checkpoint`, and is refused without it if `output_dir` holds a run.

        Args:
          on_start: is called before the first step, once all checks have passed.

        Raises:
          InputError: the checkpoint to resume from is damaged or belongs to another run, another run is in
            `output_dir`, or the device has too little memory.
          TrainingError: the trained weights are no longer finite.
        """
        output = self.config.output_dir
        with contextlib.ExitStack() as stack:
            if output is not None and is_first_process():
                stack.enter_context(held_folder(Path(output), "output_dir"))
            return self._train(on_start)

    def evaluate(self, dataset: EvalDataset | None = None) -> dict[str, float]:
        """Returns the metrics of `model` as it is now, trained or not, see `jaxpack.evaluate`.

        Args:
          dataset: rows in any of the formats, or several sets by their names; None is the trainer's `eval_dataset`.

        Raises:
          InputError: there is no dataset, or it cannot be read.
        """
        is_tokenised = dataset is None or isinstance(dataset, Documents)
        dataset = as_given(self.eval_documents) if dataset is None else dataset
        if dataset is None:
            raise InputError("`dataset` must be given to a trainer without an `eval_dataset`, got None.")
        return evaluate(
            self.model,
            self.tokenizer,
            dataset,
            dataclasses.replace(self.config, chat_template_date=self.date.isoformat()),
            objective=self.objective,
            compute_metrics=self.compute_metrics,
            formatting_func=None if is_tokenised else self.formatting_func,
        )

    def _train(self, on_start: Callable[[], object]) -> TrainResult:
        begin, self._is_together = time.perf_counter(), False
        self._find_previous_run()  # Again, because an earlier call may have been stopped.
        self._agree_on_checkpoints()  # Before the first process writes anything.
        cache = ProgramCache(self.config.compilation_cache_dir)
        run = Run(
            self.model,
            self.batches,
            self.config,
            self.eval_batches,
            objective=self.objective,
            optimizer=self.optimizer,
            compute_metrics=self.compute_metrics,
            mesh=self.mesh,
        )
        plan = self._plan(run)
        for line in plan:
            console.print(line)
        events = Events(self.callbacks)
        is_lazy = self.model.pending is not None
        if not is_lazy:
            self._resume(run)
        if cache.folder is not None:
            size, folder = size_of(cache.folder) / 2**20, from_home(Path(cache.folder))
            console.print(f"compiled programs are kept in {folder} for later runs ({size:.1f} MiB; it may be deleted)")
        with contextlib.ExitStack() as stack:
            stack.callback(run.close)
            # A checkpoint's folder has the number of its step. A lazy model reads it later.
            later = self.checkpoint.name if is_lazy and self.checkpoint is not None else ""
            first_step = int(later) if later.isdecimal() else run.started
            start = Start(begin, run.compile(cache, begin=first_step))
            console.print(_compiled(run, start, cache.found))
            if is_lazy:  # A checkpoint belongs to a run by its weights, too.
                run.read_weights(cache)
                self._resume(run)
            exchange(None)  # All have read the checkpoint, before the first process changes the folder.
            stack.callback(self._write_back, run)
            stop = stack.enter_context(StopSignal(self._answer))
            in_place = self.in_place
            while (log := self._attempt(run, start, events, stop, plan, on_start, in_place=in_place)) is None:
                run.compile(cache, wait_for_all=True)  # Memory is scarce, and XLA's search for kernels takes some.
                on_start, in_place = lambda: None, True
            exchange(None)  # The first process has written everything.
            if self.config.load_best_model_at_end:
                self._load_best(run)
        self._report()
        result = self._result(log, start, cache.found)
        events.add("end", result)
        events.tell()
        return result

    def _attempt(
        self,
        run: Run,
        start: Start,
        events: Events,
        stop: StopSignal,
        plan: list[str],
        on_start: Callable[[], object],
        *,
        in_place: bool,
    ) -> Log | None:
        """Runs the steps that are left, and saves the last whole state if an error ends them.

        Returns None if a step found too little memory and the run can go on from an earlier state. All its programs
        must then be compiled, most often with another choice of `remat`.
        """
        with contextlib.ExitStack() as stack:
            checkpoints = self._open_checkpoints(run, events)
            if checkpoints is not None:
                stack.callback(checkpoints.close)
            after = run.started if in_place else None
            reports = stack.enter_context(open_reports(self.config, self._about(run, plan), after))
            log = Log(self.config, self.batches, run.schedule, start, self.progress, reports)
            on_start()
            stack.enter_context(log)
            try:
                self._steps(run, log, checkpoints, events, stop)
                self._is_together = True
                return log
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and stop.received:
                    raise  # The state is saved already.
                if jax.process_count() > 1:
                    raise  # The others may know nothing of it: nothing can be done together any more.
                whole = self._catch_up(run, log)
                done = len(self.progress.losses)
                whole = whole or self._go_back(run, checkpoints)
                if not (is_out_of_memory(error) or isinstance(error, MemoryShortage)):
                    self._save_what_is_left(run, checkpoints, whole)
                    raise
                is_known = isinstance(error, MemoryShortage)
                shortage = str(error) if is_known else "the device ran out of memory in a step"
                # The step may fit when no program is compiled beside it: the choice must not depend on that.
                is_beside = run.last_beside > done
                if whole and (is_beside or run.has_next_choice):
                    if is_beside:
                        console.print(f"{shortage} while a program was compiled; all others are compiled first now")
                    else:
                        run.take_next_choice(shortage)
                    console.print(f"the run goes on after step {run.started}; steps to repeat: {done - run.started}")
                    return None
                self._save_what_is_left(run, checkpoints, whole)
                raise run.no_room(shortage) from error

    def _steps(self, run: Run, log: Log, checkpoints: Checkpoints | None, events: Events, stop: StopSignal) -> None:
        """Runs the steps that are left, with their evaluations and checkpoints, until the last or until a stop."""
        num_steps, progress = self.batches.num_steps, self.progress

        def saves(step: int) -> bool:
            every = 0 if checkpoints is None else self.config.steps_between_saves
            return every > 0 and (step % every == 0 or step == num_steps)

        asked = Consensus(lambda: 2 * stop.received + events.ends, run.mesh)
        last = num_steps
        if run.started and (ended := self._ended_by(events)) is not None:
            # The run would have heard of it once its next step had been started.
            last = min(num_steps, ended + 1 + asked.delay)
            if run.started >= last:
                console.print(f"ended after step {run.started}, because {events.asker} asked for it in an earlier run")
                return

        def pauses(step: int) -> bool:
            asked.ask()
            return asked.answer > 0 or saves(step) or self._evaluates(step) or step == last

        def evaluate_at(step: int) -> None:
            metrics = run.evaluate()
            progress.evaluations[step] = metrics[UNNAMED]["loss"]
            events.add("evaluation", step, log.evaluation(step, metrics))

        if self.config.eval_on_start and not run.started:
            evaluate_at(0)
            log.go_on()
        was_finite = True
        with contextlib.closing(run.steps(pauses, events.tell)) as steps:
            for metrics in steps:
                measured = log.step(metrics)
                step = len(progress.losses)
                events.add("step", step, measured)
                is_finite = math.isfinite(measured["loss"] + measured["grad_norm"])
                if not is_finite:
                    figures = self._require_finite(run, measured)
                    if was_finite:
                        console.print(f"{figures}, but the weights are finite, so the run goes on", style="yellow")
                was_finite = is_finite
                if step < run.started:
                    events.tell()
                    continue  # The next step is running already.
                if self._evaluates(step):
                    evaluate_at(step)
                stops, ends = divmod(asked.answer, 2)  # Read once: a signal may come between the two uses.
                ends = (ends or step == last) and step < num_steps
                if stops or ends or saves(step) or step == num_steps:
                    self._require_finite(run, measured)
                if checkpoints is not None and (stops or ends or saves(step)):
                    self._save(run, checkpoints)
                if ends and not stops:
                    log.record()
                    console.print(f"ended after step {step}, because {events.asker} asked for it")
                    break
                if stops:
                    log.record()
                    saved = checkpoints is not None and checkpoints.wait()
                    how = "saved as a checkpoint" if saved else "without a checkpoint"
                    console.print(f"stopped after step {step}, {how}")
                    events.tell()
                    self._report()
                    exchange(None)  # The first process has written everything.
                    self._is_together = True
                    error = error_of(stops)
                    if saved:
                        error.add_note('To go on, train with `resume_from_checkpoint="latest"`.')
                    raise error
                log.go_on()
            else:
                if len(progress.losses) < num_steps:
                    self._end_with_stream(run, log, checkpoints, evaluate_at)

    def _ended_by(self, events: Events) -> int | None:
        """Tells callbacks of the evaluations so far; returns the step of the first at which one ends the run."""
        told = [events.tell_earlier(step, loss) for step, loss in self.progress.evaluations.items()]
        return next((step for step, ends in zip(self.progress.evaluations, told, strict=True) if ends), None)

    def _end_with_stream(
        self, run: Run, log: Log, checkpoints: Checkpoints | None, evaluate_at: Callable[[int], None]
    ) -> None:
        """Evaluates and saves after the last step for which a stream had documents, unless that is done already."""
        step = run.started
        if self.eval_batches and step not in self.progress.evaluations:
            evaluate_at(step)
        if checkpoints is not None:
            newest = checkpoints.newest()
            if newest is None or int(newest.name) < step:
                self._save(run, checkpoints)
        log.record()
        console.print(
            f"ended after step {step:,} of {self.batches.num_steps:,}, because the stream ended, and can be read only"
            " once",
            style="yellow",
        )

    def _save(self, run: Run, checkpoints: Checkpoints) -> None:
        """Starts to save the state of a run after its last step."""
        self.progress.stream = self.batches.state_at(run.started)
        copy = run.copy_state()
        checkpoints.save(run.started, run.state if copy is None else copy.state, self.progress)

    def _answer(self, number: int) -> None:
        """Answers a signal at once, since the step that is running may take long."""
        saving = "" if self.config.output_dir is None else ", saving"
        again = "press again to stop now" if number == signal.SIGINT else "a second signal stops the run at once"
        console.print(f"stopping after this step{saving}; {again}", style="yellow")

    def _require_finite(self, run: Run, measured: dict[str, float]) -> str:
        """Raises TrainingError if the run's weights are not finite, because no later step can mend them.

        Otherwise returns a clause with the loss and the gradient's norm of the last step.
        """
        step, faults = len(self.progress.losses), run.faults()
        figures = f"the loss of step {step} is {measured['loss']:.4g} and its gradient norm {measured['grad_norm']:.4g}"
        if not faults:
            return figures
        others = f" and {len(faults) - 1} other arrays" if len(faults) > 1 else ""
        config = self.config
        clips = 0 < config.max_grad_norm <= 1
        clipping = "" if clips else f", a `max_grad_norm` of 1 (it was {config.max_grad_norm:g})"
        raise TrainingError(
            f"the run's weights must stay finite, but after step {run.started}, {faults[0]}{others} hold NaN or"
            f" infinity: {figures}. What usually helps is a lower `learning_rate` (it was {config.learning_rate:g}),"
            f" more `warmup_steps`{clipping}, or bfloat16 instead of float16. If it happens again in step {step}, look"
            " at the rows of that step."
        )

    def _catch_up(self, run: Run, log: Log) -> bool:
        """Logs the steps that were started before an error, and returns whether the state after them is whole."""
        try:
            for metrics in run.metrics_left():
                log.step(metrics)
            log.record()
            return len(self.progress.losses) == run.started and not run.faults()
        except Exception:  # The device or the disk may fail again; an earlier state is then the last whole one.
            return False

    def _go_back(self, run: Run, checkpoints: Checkpoints | None) -> bool:
        """Puts the last whole state into a run, and returns whether there is one: a copy on the host or a checkpoint.

        Forgets the losses of later steps.
        """
        try:
            if run.copy is not None:
                run.restore(run.copy)
            if run.copy is None or run.faults():
                newest = None if checkpoints is None else checkpoints.newest()
                if newest is None:
                    return False
                notes = notes_of(run.choice.note, self.config.implementation)
                _, progress = run.resume([newest], self._identity, notes)
                self.batches.resume(run.started, progress.stream)
            self.batches.state_at(run.started)  # Raises if a stream cannot be read again.
        except Exception as error:  # A device that has failed may take no arrays.
            console.print(f"the last whole state could not be loaded: {reason(error):.200}", style="yellow")
            return False
        del self.progress.losses[run.started :]
        for step in [step for step in self.progress.evaluations if step > run.started]:
            del self.progress.evaluations[step]
        return True

    def _save_what_is_left(self, run: Run, checkpoints: Checkpoints | None, whole: bool) -> None:
        """Saves the state of a run that an error has ended, unless its last checkpoint has that state already."""
        if not whole or not run.started:
            console.print("an error ended the run, and there is no whole state of a finished step to save", style="red")
            return
        saved = False
        if checkpoints is not None:
            newest = checkpoints.newest()
            saved = newest is not None and int(newest.name) >= run.started
            if not saved:
                self._save(run, checkpoints)
                saved = checkpoints.wait()
        how = "saved as a checkpoint" if saved else "without a checkpoint"
        console.print(
            f"an error ended the run; its last whole state is that after step {run.started}, {how}", style="red"
        )
        self._report()

    def _result(self, log: Log, start: Start, found_programs: int) -> TrainResult:
        return TrainResult(
            losses=np.array(self.progress.losses),
            evaluations=self.progress.evaluations,
            tokens_per_second=log.rate(0),
            padding_share=self.batches.padding_share,
            compiled_shapes=len(self.batches.shapes),
            found_programs=found_programs,
            compile_seconds=start.compile_seconds,
            first_step_seconds=log.first_step_seconds,
            peak_memory_bytes=peak_memory_bytes(),
            peak_share=None if self._peak_tokens is None else log.rate(0) / self._peak_tokens,
        )

    @functools.cached_property
    def _peak_tokens(self) -> float | None:
        """Returns the tokens per second that the devices would reach at their published rate, if it is known."""
        card = card_of(current_device().device_kind)
        if card is None:
            return None
        return self.mesh.size * card.peak_flops / needed_flops(StepShape.of_run(self.model, self.batches))

    def _write_back(self, run: Run) -> None:
        """Writes the trained parameters of a run back to the model."""
        self.steps_in_model = 0
        if jax.process_count() > 1 and not self._is_together:
            return
        if run.is_whole():  # A step that failed has taken the parameters: then there is nothing to write back.
            parameters = run.state.trainable, run.frozen
            # Where matrices stay in shards, all else stays on their devices, because one program takes both.
            nnx.update(self.model, *(parameters if in_shards(parameters) else on_one_device(parameters)))
            self.steps_in_model = 0 if run.faults() else run.started

    def _evaluates(self, step: int) -> bool:
        if not self.eval_batches:
            return False
        every = self.config.save_steps if self.config.eval_steps is None else self.config.eval_steps
        return step == self.batches.num_steps or (every > 0 and step % every == 0)

    def _resume(self, run: Run) -> None:
        """Loads the checkpoint to resume from, if any, and sets `progress`."""
        config, self.progress, self._identity = self.config, Progress(), {}
        if config.output_dir is None and self.checkpoint is None:
            return
        datasets = {"train_dataset": self.documents, "eval_dataset": as_given(self.eval_documents)}
        self._identity = identity_of(self.model, config, run.state, run.frozen, self.mesh.size, **datasets)
        if isinstance(self.batches, StreamedBatches):
            self._identity["train_dataset"] = f"a stream that begins with {self._identity['train_dataset']}"
        if not isinstance(self.objective, SFT):
            self._identity["objective"] = type(self.objective).__name__
        if self._checkpoints:
            notes = notes_of(run.choice.note, config.implementation)
            self.checkpoint, self.progress = run.resume(self._checkpoints, self._identity, notes)
            self.batches.resume(run.started, self.progress.stream)
            done = f"{run.started:,} of {self.batches.num_steps:,} steps are done"
            console.print(f"the run continues from {self.checkpoint}: {done}")
        elif config.resume_from_checkpoint is not None:
            console.print(f"there is no checkpoint in {config.output_dir}: the run starts from the beginning")
        if config.output_dir is not None:
            every = config.steps_between_saves
            when = f"every {every:,} steps and at the end" if every else "when the run is stopped"
            best = "" if not self.eval_batches else " and the one with the lowest evaluation loss"
            kept = f"the last {config.save_total_limit}{best} are kept" if config.save_total_limit else "all are kept"
            console.print(f"checkpoints are saved {when} in {Path(config.output_dir) / FOLDER}; {kept}")

    def _load_best(self, run: Run) -> None:
        """Puts the weights of the checkpoint with the lowest evaluation loss into a run."""
        best = best_checkpoint(Path(self.config.output_dir or "") / FOLDER, self.progress.evaluations)
        if best is None:
            console.print("no checkpoint has an evaluation loss, so the last weights stay", style="yellow")
            return
        run.resume([best], self._identity, notes_of(run.choice.note, self.config.implementation))
        loss = self.progress.evaluations[run.started]
        console.print(f"the model has the weights of step {run.started:,}, with the lowest evaluation loss: {loss:.4f}")

    def _open_checkpoints(self, run: Run, events: Events) -> Checkpoints | None:
        config = self.config
        if config.output_dir is None:
            return None
        notes = notes_of(run.choice.note, config.implementation)
        on_saved = functools.partial(events.add, "save")
        template = getattr(self.tokenizer, "chat_template", None)
        checkpoints = Checkpoints(
            config.output_dir,
            config.save_total_limit,
            self._identity,
            notes,
            self.date,
            self.model.config.name_or_path,
            on_saved,
            template if isinstance(template, str) else "",  # a tokenizer may also have several by name
        )
        checkpoints.set_aside(after=run.started)
        return checkpoints

    def _plan(self, run: Run) -> list[str]:
        """Returns lines that describe the data, the steps, and the number of parameters that are trained."""
        if isinstance(self.batches, StreamedBatches):
            lines = describe_stream(self.batches, self.config)
        else:
            lines = describe(self.documents, self.batches, self.config)
        held = "" if self.config.eval_split is None else f" held out (eval_split {self.config.eval_split:g})"
        for name, evaluated in self.eval_batches.items():
            lines.append(
                f"evaluation{name and f' of {name}'}: {len(self.eval_documents[name]):,} documents{held},"
                f" {evaluated.targets_per_epoch:,} tokens to predict, {evaluated.truncation.documents:,} documents cut"
                f" by max_length; shapes to compile: {shapes_to_compile(evaluated)}"
            )
        sizes = [num_parameters(state) for state in (run.state.trainable, run.frozen)]
        where = current_device().device_kind if self.mesh.size == 1 else describe_mesh(self.mesh)
        lines.append(f"training {sizes[0]:,} of {sum(sizes):,} parameters on {where}")
        return lines if run.choice.reason is None else [*lines, run.choice.reason]

    def _about(self, run: Run, plan: list[str]) -> dict[str, Any]:
        """Returns the content of `about.json`: the facts that `write_report` needs in addition to the metrics."""
        lora = self.model.lora_config
        return {
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "after": run.started,
            "num_steps": self.batches.num_steps,
            "padding_share": self.batches.padding_share,
            "model": self.model.config.name_or_path or self.model.config.architecture,
            "device": current_device().device_kind,
            "versions": {name: _version(name) for name in ("jaxpack", "jax", "jaxlib", "flax")},
            "remat": run.remat,
            "peak_tokens_per_second": self._peak_tokens,
            "plan": plan,
            **({} if UNNAMED in self.eval_batches or not self.eval_batches else {"eval_sets": list(self.eval_batches)}),
            "settings": vars(self.config) | ({} if lora is None else {"adapters": vars(lora)}),
        }

    def _report(self) -> None:
        """Writes the report. A report that cannot be written prints a warning, because the run itself is done."""
        if self.config.output_dir is not None and is_first_process():
            try:
                console.print(f"wrote the report {write_report(self.config.output_dir)}")
            except InputError as error:
                console.print(f"the report could not be written: {error}", style="yellow")


def _compiled(run: Run, start: Start, found: int) -> str:
    """Returns a line that says how many programs are ready."""
    assert run.programs is not None
    ready, programs = run.programs.num_ready, len(run.programs)
    if ready == programs:
        return f"programs are ready after {start.compile_seconds:.1f} s; {found} of {programs} were found compiled"
    return (
        f"{ready} of {programs} programs are ready after {start.compile_seconds:.1f} s, {found} of them found compiled;"
        " the others are compiled while the first steps run"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"  # jaxpack runs from a source folder without being installed


def _objective(config: TrainConfig) -> SFT:
    return SFT(label_smoothing_factor=config.label_smoothing_factor, z_loss_coef=config.z_loss_coef)


def _require_plain_loss(config: TrainConfig) -> None:
    """Refuses settings of the cross entropy that an objective of one's own would not read."""
    for name in ("label_smoothing_factor", "z_loss_coef"):
        if value := getattr(config, name):
            raise InputError(
                f"`{name}` must be 0 with an `objective` of your own, which does not read it, got {value}. For the"
                f" cross entropy, leave `objective` out."
            )


def _check_evaluation(config: TrainConfig, *, given: bool) -> None:
    every = config.eval_steps
    for name in ("eval_on_start", "load_best_model_at_end"):
        if getattr(config, name) and not given:
            raise InputError(f"`{name}` must be false without an `eval_dataset` or an `eval_split`, got true.")
    if config.early_stopping_patience is not None and not given:
        raise InputError(
            "`early_stopping_patience` must be None without an `eval_dataset` or an `eval_split`, got"
            f" {config.early_stopping_patience}. Pass data to evaluate on, or leave it out."
        )
    if config.load_best_model_at_end and config.save_steps == 0:
        raise InputError("`save_steps` must be above 0 with `load_best_model_at_end`, got 0.")
    if every is None:
        return
    if not given:
        raise InputError(f"`eval_steps` must be None without an `eval_dataset` or an `eval_split`, got {every}.")
    if min(every, config.save_steps or 1) < 1:
        return  # The number of steps is not known yet.
    if config.output_dir is not None and config.steps_between_saves % every:
        raise InputError(
            f"`save_steps` must be a multiple of `eval_steps` ({every}), so that it is known which checkpoint is the "
            f"best, got {config.save_steps}."
        )
