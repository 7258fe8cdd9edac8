"""A run trains a model on its batches: it holds the training state and has a program compiled for each batch shape."""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches, BatchSource
from jaxpack.data.packing import BatchLimits, PackedBatch
from jaxpack.errors import InputError, is_out_of_memory
from jaxpack.model.lora import adapters
from jaxpack.model.shards import deal
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import move_to_host, non_finite, split_trained
from jaxpack.objectives.objective import Objective
from jaxpack.objectives.sft import SFT
from jaxpack.optimizers.optimizer import resolve_optimizer
from jaxpack.optimizers.placement import state_specs
from jaxpack.parallel.allocator import has_block, reserve_small_blocks
from jaxpack.parallel.device import current_device, free_device_bytes, on_host
from jaxpack.parallel.host_memory import is_pinned
from jaxpack.parallel.mesh import DeviceMesh, make_mesh, num_shards
from jaxpack.parallel.placement import bytes_on_device, is_partition, put, replicate
from jaxpack.parallel.processes import exchange
from jaxpack.planning.choose import Choice, choices
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, peak_bytes, search_bytes
from jaxpack.planning.mesh import settings_on
from jaxpack.settings import TrainConfig
from jaxpack.train.checkpoint import Progress, load_checkpoint
from jaxpack.train.evaluation import Evaluation, Shape
from jaxpack.train.feed import Feed
from jaxpack.train.programs import Programs
from jaxpack.train.step import (
    ComputeMetrics,
    Metrics,
    TrainState,
    check_router_aux_loss_coef,
    float32_copies,
    make_train_step,
    temporary_bytes,
)
from jaxpack.utils.compilation_cache import ProgramCache
from jaxpack.utils.console import console
from jaxpack.utils.host import available_host_bytes


class HostCopy(NamedTuple):
    """Holds a copy of a run's state on the host, and the number of steps that led to it."""

    step: int
    state: TrainState  # of numpy arrays


class MemoryShortage(Exception):
    """Says, in a clause, what a program of a run lacks memory for. The run may go on with another choice of `remat`."""


class Run:
    """Trains a model on its batches, with one compiled program for each row length.

    Attributes:
      state: the arrays that a step changes. Until the first step, the model and `state` share the arrays of the trained
        parameters. The first step donates these arrays, so the model's are no longer valid after it.
      frozen: the weights that no step changes.
      schedule: the learning rate by step; None if the user's optimizer has its own.
      mesh: the devices of the run.
      optimizer_bytes: the bytes of the optimizer's state on each device.
      started: how many steps of the run were started, including those before the checkpoint that it resumed from.
      choice: what was chosen, and the reason for it, see `choose.choices`.
      programs: the programs of the steps and of the evaluation, which `compile` makes; None before.
      last_beside: the number of the last step that was started while one of `programs` was compiled; 0 without any.
      evaluation: the evaluation of `eval_batches`, which are the batches of each set by its name; None without any.
      copy: the last copy of a small state on the host. `steps` makes one before the first step of each shape, because
        such a step may find too little memory, and an error destroys the state that a step was given.
    """

    def __init__(
        self,
        model: Transformer,
        batches: BatchSource,
        config: TrainConfig,
        eval_batches: Mapping[str, Batches] | None = None,
        *,
        objective: Objective = SFT(),  # noqa: B008
        optimizer: optax.GradientTransformation | Callable[..., Any] | None = None,
        compute_metrics: ComputeMetrics | None = None,
        mesh: DeviceMesh | None = None,
    ):
        self._model, self._batches, self._config = model, batches, config
        check_router_aux_loss_coef(config.router_aux_loss_coef, model.config)
        self.started = 0
        self.copy: HostCopy | None = None
        self._waiting: deque[Metrics] = deque()  # the metrics of started steps that were not yielded
        self.mesh = mesh = make_mesh() if mesh is None else mesh
        if model.pending is not None:  # The weights are then read to where they belong.
            nnx.update(model, *(deal(state, mesh) for state in split_trained(model)[1:]))
        if not adapters(model):  # All weights are trained, and the run's state is made from them.
            model.read_weights()
        graph, trainable, frozen = split_trained(model)
        # The model takes the copies, and what lies on the mesh, so that the originals are freed.
        trainable = float32_copies(deal(trainable, mesh))
        nnx.update(model, trainable)
        self.frozen = deal(frozen, mesh)
        nnx.update(model, self.frozen)
        del frozen
        optimizer, self.schedule = resolve_optimizer(optimizer, config, batches.num_steps, model)
        self.state = TrainState(trainable, _initial(optimizer, trainable, mesh), replicate(jnp.int32(0), mesh))
        held_bytes, optimizer_bytes = (
            sum(
                bytes_on_device(leaf)
                for leaf in jax.tree.leaves(held)
                if isinstance(leaf, jax.Array) and not is_pinned(leaf)
            )
            for held in ((self.state, self.frozen), self.state.optimizer)
        )
        has_dropout = any(adapter.dropout for adapter in adapters(model).values())
        draws = has_dropout or config.neftune_noise_alpha is not None
        self._make_step = functools.partial(
            make_train_step,
            graph,
            optimizer,
            objective=objective,
            implementation=config.implementation,
            dropout_seed=config.seed if draws else None,
            neftune_noise_alpha=config.neftune_noise_alpha,
            router_aux_loss_coef=config.router_aux_loss_coef,
            mesh=mesh,
        )
        self.optimizer_bytes = optimizer_bytes
        more = {"optimizer_bytes": optimizer_bytes, "compiles_first": model.pending is not None}
        try:
            self._choices = deque(choices(settings_on(config, mesh), model, batches, held_bytes, **more))
        except InputError as error:
            if mesh.size == 1 or num_shards(mesh) > 1:
                raise
            raise InputError(f"{error} With `mesh` 'fsdp={mesh.size}' the devices share the weights.") from error
        self._take(self._choices.popleft())
        self.programs: Programs | None = None
        self.last_beside = 0
        self._ready: dict[Shape, jax.stages.Compiled] = {}  # programs of steps for which there is enough memory
        self._decisive = self._largest  # the shape whose program decides whether the choice of `remat` fits
        self._room = 0  # bytes that were free as one block
        self._unlimited: jax.stages.Compiled | None = None
        self._cache: ProgramCache | None = None
        self.evaluation = None
        if eval_batches:
            self.evaluation = Evaluation(
                model,
                eval_batches,
                objective=objective,
                compute_metrics=compute_metrics,
                implementation=config.implementation,
                mesh=mesh,
            )
        self._walls: list[jax.Array] = []

    def _take(self, choice: Choice) -> None:
        """Takes a choice, and moves to the host's memory the weights that the choice keeps there."""
        self.choice = choice
        weights, embedding = choice.offloads
        move_to_host(self._model, layers=weights, embedding=embedding)
        _, _, self.frozen = split_trained(self._model)

    @property
    def remat(self) -> Remat:
        """Returns what the backward pass of the run computes again."""
        return self.choice.remat

    def compile(self, cache: ProgramCache, *, begin: int | None = None, wait_for_all: bool = False) -> float:
        """Compiles the programs that the first steps need, or finds them in the cache; returns the seconds it took.

        That is the program of the first step. Unless memory is ample by a prediction, the program of the largest shape
        comes before it: if it needs more memory than there is, the run takes the next choice of `remat`, aloud. A
        thread then compiles the others while steps run: those of other row lengths in the order of their first use, and
        then the evaluation's. A step or an evaluation that needs one of them waits for it. `close` ends the thread.

        The evaluation's programs come second if it takes place before the first step, or if its batches are larger than
        those of training, so that one that does not fit is refused before the first step.

        All programs are compiled here if the device has too little memory for XLA's search for kernels beside a step.
        So they are in a run of several processes: XLA shares this search among them, so all must compile all programs.

        Args:
          begin: the first step, counted from 0, if it is not the one after `started`.
          wait_for_all: whether to compile all programs here.

        Raises:
          InputError: no choice is left, or an evaluation needs more memory than there is.
        """
        start, self._cache = time.perf_counter(), cache
        begin = self.started if begin is None else begin
        while (shortage := _of_any(self._compile(cache, begin, wait_for_all))) is not None:
            self.take_next_choice(shortage)
        return time.perf_counter() - start

    def close(self) -> None:
        """Ends the thread that compiles programs. Waits for the one that it is at, and leaves out the others."""
        if self.programs is not None:
            self.programs.close()

    def read_weights(self, cache: ProgramCache) -> None:
        """Reads the model's weights, if they are still in their files, after the first programs are compiled.

        XLA's search for kernels needs much memory for a moment, so it comes before the weights, unless there is room
        for both. If a program then finds too little memory beside them, the run takes the next choice, aloud, and
        compiles again.

        Raises:
          InputError: the weights do not fit, or no choice is left.
        """
        if self._model.pending is None:
            return
        self._model.read_weights()
        _, _, self.frozen = split_trained(self._model)
        program, self._room = self.program(self._decisive), 0
        if (shortage := _of_any(self._shortage(program, self._decisive))) is not None:
            self.take_next_choice(shortage)
            self.compile(cache, wait_for_all=True)

    def _compile(self, cache: ProgramCache, begin: int, wait_for_all: bool) -> str | None:
        """Compiles as `compile` does, with one choice; returns what there is too little memory for, if any."""
        self.close()
        self._ready, self._unlimited, self._room, self.last_beside = {}, None, 0, 0
        self.programs = programs = Programs(cache)
        shapes, waits = self._shapes_from(begin), wait_for_all or jax.process_count() > 1
        self._decisive = shapes[0] if shapes and not waits and self._has_room_beside(None) else self._largest
        programs.add(_step_of(self._decisive), self._lower(self._decisive))
        # The others are lowered while XLA compiles this one. They wait until it is known to fit.
        others = [shape for shape in shapes if shape != self._decisive]
        steps = {_step_of(shape): self._lower(shape) for shape in others}
        evaluations, is_early = self._lower_evaluation(), False
        if evaluations:
            is_early = self._config.eval_on_start and not begin
            is_early |= max(map(math.prod, evaluations)) > math.prod(self._largest[1:])
        evaluated = {_evaluation_of(shape): lowered for shape, lowered in evaluations.items()}
        try:
            program = self.program(self._decisive, beside_steps=False)
            waits = waits or not self._has_room_beside(program)
            for name, lowered in ({**evaluated, **steps} if is_early else {**steps, **evaluated}).items():
                programs.add(name, lowered)
            for shape in others if waits else shapes[:1]:
                self.program(shape, beside_steps=False)
            if evaluations and (is_early or waits):
                self._take_evaluation(beside_steps=False)
        except MemoryShortage as shortage:
            return str(shortage)
        return None

    @property
    def _largest(self) -> Shape:
        return max(self._batches.shapes, key=math.prod)

    def _shapes_from(self, begin: int) -> list[Shape]:
        """Returns the shapes of the steps from `begin` on, in the order of their first use."""
        shapes = {shape[-1]: shape for shape in self._batches.shapes}
        lengths, first = np.unique(self._batches.row_lengths[begin:], return_index=True)
        return [shapes[int(length)] for length in lengths[np.argsort(first)]]

    def _lower(self, shape: Shape, limits: BatchLimits | None = None) -> jax.stages.Lowered:
        choice = self.choice
        step = self._make_step(remat=choice.remat, loss_chunk=choice.loss_chunk, **choice.fetches)
        limits = self._batches.limits[shape[-1]] if limits is None else limits
        return step.lower(self.state, self.frozen, self._feed.abstract(shape), limits=limits)

    def _lower_evaluation(self) -> dict[Shape, jax.stages.Lowered]:
        if self.evaluation is None:
            return {}
        return self.evaluation.lower(self._feed, self.state.trainable, self.frozen, **self.choice.fetches)

    def program(self, shape: Shape, *, beside_steps: bool = True) -> jax.stages.Compiled:
        """Returns the program of a shape, and waits until it is compiled, see `Programs.get`.

        Raises:
          MemoryShortage: compiling it ran out of memory, or it needs more than there is.
        """
        if shape in self._ready:
            return self._ready[shape]
        assert self.programs is not None
        name = _step_of(shape)
        if name not in self.programs:  # The run began at another step than was expected.
            self.programs.add(name, self._lower(shape))
        try:
            program = self.programs.get(name, beside_steps=beside_steps)
        except jax.errors.JaxRuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryShortage(f"compiling {name} ran out of memory") from error
            raise
        if (shortage := self._shortage(program, shape)) is not None:
            raise MemoryShortage(shortage)
        self._ready[shape] = program
        return program

    def _take_evaluation(self, *, beside_steps: bool = True) -> None:
        """Waits until all programs of the evaluation are compiled.

        Raises:
          InputError: one needs more memory than there is.
        """
        assert self.evaluation is not None
        assert self.programs is not None
        shapes = {shape for batches in self.evaluation.batches.values() for shape in batches.shapes}
        get = functools.partial(self.programs.get, beside_steps=beside_steps)
        self.evaluation.take({shape: get(_evaluation_of(shape)) for shape in sorted(shapes)})

    def _has_room_beside(self, program: jax.stages.Compiled | None) -> bool:
        """Returns whether XLA can search for kernels while this program runs.

        Without a program: whether it surely could while any step runs, if predictions were a third too low.
        """
        step = StepShape.of_run(self._model, self._batches, self._largest[-1], self.optimizer_bytes)
        step = dataclasses.replace(step, **self.choice.of_step)
        needed = 2 * search_bytes(step)  # twice, because what XLA allocates may lie in the middle of what is free
        limit, free = self._config.memory_limit, self._free_bytes()
        peak = peak_bytes(step, self.remat)
        if program is None:
            surely = 4 / 3 * (peak - argument_bytes(step) + needed)
            fits = limit is None or argument_bytes(step) + surely <= limit * 2**30
            return fits and (free is None or surely <= free)
        if limit is not None and peak + needed > limit * 2**30:
            return False
        return free is None or temporary_bytes(program) + needed <= free

    def _free_bytes(self) -> int | None:
        """Returns the bytes that are free on the device once all weights are read; None if that is not known."""
        if (free := free_device_bytes(current_device())) is None:
            return None
        unread = [leaf for leaf in jax.tree.leaves(self.frozen) if isinstance(leaf, jax.ShapeDtypeStruct)]
        return free - sum(bytes_on_device(leaf) for leaf in unread if not is_pinned(leaf))

    def _shortage(self, program: jax.stages.Compiled, shape: Shape) -> str | None:
        """Says what a step of this shape lacks, if it finds too little memory on the device; otherwise None."""
        needed, free = temporary_bytes(program), self._free_bytes()
        if free is None or needed <= self._room:
            return None
        if needed <= free and has_block(needed, current_device()):
            self._room = needed
            return None
        if self.programs is not None and self.programs.is_busy:  # XLA's search for kernels takes memory for a moment.
            self.programs.wait()
            return self._shortage(program, shape)
        return f"{_step_of(shape)} needs {needed / 2**30:.1f} GiB in one block, and {free / 2**30:.1f} GiB are free"

    @property
    def has_next_choice(self) -> bool:
        """Returns whether there is a choice that needs less memory."""
        return bool(self._choices)

    def take_next_choice(self, shortage: str) -> None:
        """Takes the next choice, which needs less memory, and says so; `compile` must follow.

        Args:
          shortage: a clause that says what there is too little memory for.

        Raises:
          InputError: no choice is left.
        """
        if not self._choices:
            raise self.no_room(shortage)
        console.print(f"{self.choice} does not fit: {shortage}", style="yellow")
        self._take(self._choices.popleft())
        console.print(f"the run takes {self.choice.reason or self.choice}", style="yellow")

    def no_room(self, shortage: str) -> InputError:
        """Returns the error of a run that has too little memory, with what to do instead."""
        advice = ["a smaller `per_device_train_batch_size` or `max_length`"]
        if self.mesh.size > 1 and num_shards(self.mesh) == 1:
            advice.append(f"`mesh` 'fsdp={self.mesh.size}', with which the devices share the weights")
        if others := [choice.remat for choice in self._choices if choice.remat != self.remat]:
            advice.append(f'`remat` "{others[0]}"')
        elif self._config.remat != "auto":
            advice.append('`remat` "auto"')
        return InputError(
            f'`remat` must be a choice that fits on the device, got "{self.remat}": {shortage}. Choose'
            f" {' or '.join(advice)}."
        )

    def resume(self, paths: list[Path], identity: dict[str, Any], notes: dict[str, str]) -> tuple[Path, Progress]:
        """Loads the first checkpoint that is not damaged, and returns its path and progress.

        Sets `state`, `started` and the model's trained parameters.
        """
        num_steps = self._batches.num_steps
        path, self.state, progress = load_checkpoint(paths, self.state, identity, notes, num_steps)
        nnx.update(self._model, self.state.trainable)
        self.started = len(progress.losses)
        return path, progress

    def step(self, batch: PackedBatch) -> Metrics:
        """Starts one step on a batch that is on the device, and returns its metrics without waiting for them.

        Raises:
          MemoryShortage: its program does not fit on the device.
        """
        shape = batch.tokens.shape
        is_limited = self._batches.is_limited(self.started)
        program = self.program(shape) if is_limited else self._without_limits(shape)
        is_beside = self.programs is not None and self.programs.is_busy
        self.state, metrics = program(self.state, self.frozen, batch)
        self.started += 1
        if is_beside:
            self.last_beside = self.started
        return metrics

    def _without_limits(self, shape: Shape) -> jax.stages.Compiled:
        """Returns the program for batches that are not within the limits, which is compiled when it is first needed."""
        if self._unlimited is None:
            console.print(
                f"step {self.started + 1} has more documents in a row, or more tokens to train on, than the first rows"
                " of the stream let expect: compiling a program for any number of them"
            )
            assert self._cache is not None
            with self._cache.in_use():
                self._unlimited = self._cache.compile(self._lower(shape, BatchLimits()))
        return self._unlimited

    def steps(
        self, pauses: Callable[[int], bool] = lambda step: False, on_start: Callable[[], None] = lambda: None
    ) -> Generator[Metrics, None, None]:
        """Runs all steps that are left, and yields the metrics of each.

        A step's metrics are yielded once the next step is started, so that the device always has work. After the first
        step, at a pause and after the last step, they are yielded before another step is started: `state` is then the
        result of this step.

        Some programs are launched kernel by kernel. The queue of launches is then full, so starting a step takes nearly
        as long as running it. At a pause, a step's metrics still arrive when the step ends. Otherwise they wait until
        the next step is started, so they arrive up to one step later.

        If this generator ends early, the metrics of the steps that were started are left to `metrics_left`.

        Args:
          pauses: returns whether to pause after a step, counted from 1. It is called once for each step.
          on_start: is called whenever a step has been started.
        """
        first, ran = self.started + 1, set()
        self._reserve()
        with self._feed.batches(self._batches, self.started) as batches_on_device:
            for batch in batches_on_device:
                if batch.tokens.shape not in ran:
                    yield from self.metrics_left()
                    self.copy_state()
                    ran.add(batch.tokens.shape)
                self._waiting.append(self.step(batch))
                on_start()
                if len(self._waiting) > 1:
                    yield self._waiting.popleft()
                if pauses(self.started) or self.started == first:
                    yield from self.metrics_left()
            yield from self.metrics_left()

    def metrics_left(self) -> Generator[Metrics, None, None]:
        """Yields the metrics of the steps that were started and not yet yielded, in order."""
        while self._waiting:
            yield self._waiting.popleft()

    def _reserve(self) -> None:
        """Keeps the arrays of a batch away from the block of memory that a step needs."""
        several = len(self._batches.shapes) > 1
        if free_device_bytes(device := current_device()) is not None and several and not self._walls:
            largest = math.prod(self._largest) * np.dtype(np.int32).itemsize
            self._walls = reserve_small_blocks(largest, _SMALL_BLOCKS, device)

    def copy_state(self) -> HostCopy | None:
        """Copies the state to the host, waiting for the steps that were started; returns None if it is large."""
        if jax.process_count() > 1:  # A step that fails in one of them ends them all.
            return None
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        available = available_host_bytes()
        if size > _COPIED_BYTES or (available is not None and size > available // 4):
            return None
        if self.copy is None or self.copy.step != self.started:
            self.copy = HostCopy(self.started, jax.tree.map(on_host, self.state))
        return self.copy

    def restore(self, copy: HostCopy) -> None:
        """Goes back to the state in `copy`."""
        # An uncommitted array stays uncommitted, so that the same program runs.
        self.state = jax.tree.map(
            lambda x, old: put(x, old.sharding if old.committed else None), copy.state, self.state
        )
        self.started = copy.step
        self._waiting.clear()

    def is_whole(self) -> bool:
        """Returns whether the state can be read; it cannot after a step that failed. Waits for the steps."""
        try:
            leaves = jax.tree.leaves(self.state)
            return not any(leaf.is_deleted() for leaf in leaves) and jax.block_until_ready(leaves) is not None
        except jax.errors.JaxRuntimeError:
            return False

    def faults(self) -> list[str]:
        """Returns the names of the trained parameters that are not finite, such as `blocks.mlp.down.lora_a`.

        Waits for the steps that were started.

        Raises:
          JaxRuntimeError: a step failed, and the state is lost.
        """
        return non_finite(self.state.trainable)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns the metrics of each evaluation set, see `Evaluation.run`. Waits until its programs are compiled.

        Raises:
          InputError: an evaluation needs more memory than there is.
        """
        assert self.evaluation is not None
        if not self.evaluation.programs:
            self._take_evaluation()
        return self.evaluation.run(self._feed, self.state.trainable, self.frozen)

    def on_device(self, batch: PackedBatch) -> PackedBatch:
        """Returns a batch on the run's devices, each with its rows."""
        return self._feed.put(batch)

    @property
    def _feed(self) -> Feed:
        return Feed.of(self._model, self.mesh)


def _initial(optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: DeviceMesh) -> optax.OptState:
    """Returns the optimizer's state before the first step, in shards where the parameters are."""
    if mesh.size == 1:
        return optimizer.init(trainable)
    partition = state_specs(jax.eval_shape(optimizer.init, trainable), trainable, mesh)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), partition, is_leaf=is_partition)
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


_SMALL_BLOCKS = 32  # four arrays each for the batches of the running step and of those that are prefetched, and losses
_COPIED_BYTES = 4 * 2**30  # the largest state that is copied to the host


def _of_any(*shortages: str | None) -> str | None:
    """Returns the first shortage that this process found, or another one, so that all take the next choice together."""
    own = next((shortage for shortage in shortages if shortage is not None), None)
    return next((shortage for shortage in exchange(own) if shortage is not None), None)


def _step_of(shape: Shape) -> str:
    """Returns the name of a step's program."""
    return f"a step of {' x '.join(map(str, shape))} tokens"


def _evaluation_of(shape: Shape) -> str:
    return f"an evaluation of {' x '.join(map(str, shape))} tokens"
