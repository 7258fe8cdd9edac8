"""A run trains a model on its batches: it holds the training state and compiles a program for each batch shape."""

import contextlib
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.data.packing import PackedBatch
from jaxpack.errors import InputError
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.objectives.objective import Objective
from jaxpack.objectives.sft import SFT
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.parallel.mesh import make_mesh
from jaxpack.planning.choose import resolve
from jaxpack.settings import TrainConfig
from jaxpack.train.checkpoint import Progress, load_checkpoint
from jaxpack.train.optimizer import resolve_optimizer
from jaxpack.train.step import ComputeMetrics, Metrics, TrainState, make_eval_step, make_train_step, split_trainable
from jaxpack.utils.compilation_cache import ProgramCache
from jaxpack.utils.prefetch import prefetched


class Run:
    """Trains a model on its batches, with one compiled program for each row length.

    Attributes:
      state: the arrays that a step changes. Until the first step, the model and `state` share the arrays of the trained
        parameters. The first step donates these arrays, so the model's are no longer valid after it.
      frozen: the weights that no step changes.
      schedule: the learning rate by step; None if the user's optimizer has its own.
      started: how many steps of the run were started, including those before the checkpoint that it resumed from.
      remat, explanation: the choice of `remat` and the reason for it, see `choose.resolve`.
      programs, eval_programs: the compiled programs by row length T; empty before `compile`.
    """

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        config: TrainConfig,
        eval_batches: Batches | None = None,
        *,
        objective: Objective = SFT(),  # noqa: B008
        optimizer: optax.GradientTransformation | Callable[..., Any] | None = None,
        compute_metrics: ComputeMetrics | None = None,
    ):
        self._model, self._batches, self._eval_batches = model, batches, eval_batches
        self.started = 0
        mesh = make_mesh()
        graph, trainable, self.frozen = split_trainable(model)
        # `split_trainable` copied the trained parameters. The model now takes the copies, so the originals are freed.
        nnx.update(model, trainable)
        optimizer, self.schedule = resolve_optimizer(optimizer, config, batches.num_steps)
        self.state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
        held_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((self.state, self.frozen)))
        self.remat: Remat
        self.remat, self.explanation = resolve(config, model, batches, held_bytes)
        has_dropout = any(adapter.dropout for adapter in adapters(model).values())
        self._step = make_train_step(
            graph,
            optimizer,
            objective=objective,
            remat=self.remat,
            implementation=config.implementation,
            dropout_seed=config.seed if has_dropout else None,
            mesh=mesh,
        )
        self._eval_step = make_eval_step(
            graph,
            objective=objective,
            compute_metrics=compute_metrics,
            implementation=config.implementation,
            mesh=mesh,
        )
        self.programs: dict[int, jax.stages.Compiled] = {}
        self.eval_programs: dict[int, jax.stages.Compiled] = {}

    def compile(self, cache: ProgramCache) -> float:
        """Compiles all programs before the run, or finds them in the cache; returns the seconds that it took."""
        begin = time.perf_counter()
        with cache.in_use():
            for shape in self._batches.shapes:
                lowered = self._step.lower(
                    self.state, self.frozen, _abstract(shape), limits=self._batches.limits[shape[-1]]
                )
                self.programs[shape[-1]] = cache.compile(lowered)
            evaluated = self._eval_batches
            for shape in evaluated.shapes if evaluated is not None else ():
                assert evaluated is not None
                limits = evaluated.limits[shape[-1]]
                lowered = self._eval_step.lower(self.state.trainable, self.frozen, _abstract(shape), limits=limits)
                program = self.eval_programs[shape[-1]] = cache.compile(lowered)
                _check_room(program, shape)
        return time.perf_counter() - begin

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
        """Starts one step on a batch that is on the device, and returns its metrics without waiting for them."""
        self.state, metrics = self.programs[batch.tokens.shape[-1]](self.state, self.frozen, batch)
        self.started += 1
        return metrics

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

        Args:
          pauses: returns whether to pause after a step, counted from 1.
          on_start: is called whenever a step has been started.
        """
        first = self.started + 1
        with self._on_device(self._batches, self.started) as batches_on_device:
            waiting = None
            for batch in batches_on_device:
                metrics = self.step(batch)
                on_start()
                if waiting is not None:
                    yield waiting
                waiting = metrics
                if self.started == first or pauses(self.started):
                    yield waiting
                    waiting = None
            if waiting is not None:
                yield waiting

    def evaluate(self) -> dict[str, float]:
        """Returns means over the evaluation's batches: "loss", the objective's metrics, and the user's metrics.

        Waits for the device once, at the end.
        """
        assert self._eval_batches is not None
        sums = []
        with self._on_device(self._eval_batches) as batches_on_device:
            for batch in batches_on_device:
                program = self.eval_programs[batch.tokens.shape[-1]]
                sums.append(program(self.state.trainable, self.frozen, batch))
        objective, computed = jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *jax.device_get(sums))
        means = {"loss": objective.loss, **objective.metrics}
        means = {name: float(total / (objective.weight or 1)) for name, total in means.items()}
        return means | {name: float(total / (weight or 1)) for name, (total, weight) in computed.items()}

    def _on_device(self, batches: Batches, begin: int = 0) -> contextlib.closing[Generator[PackedBatch, None, None]]:
        # The device is named, because a thread does not inherit its caller's `jax.default_device`.
        device = self.state.step.sharding
        made = prefetched(lambda step: jax.device_put(batches[begin + step], device), len(batches) - begin)
        return contextlib.closing(made)


def _abstract(shape: tuple[int, int, int]) -> PackedBatch:
    return PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])


def _check_room(program: jax.stages.Compiled, shape: tuple[int, ...]) -> None:
    """Raises InputError if an evaluation does not fit on the device; its documents may be longer than in training."""
    memory, free = program.memory_analysis(), free_device_bytes(current_device())
    assert memory is not None
    needed = memory.temp_size_in_bytes
    if free is not None and needed > free:
        raise InputError(
            f"`eval_dataset` must fit on the device: a batch of {' x '.join(map(str, shape))} tokens needs"
            f" {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free. A smaller `max_length` or"
            " `per_device_train_batch_size` needs less."
        )
