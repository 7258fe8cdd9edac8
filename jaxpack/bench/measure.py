"""Measures one case of jaxpack in this process: the trainer's own `Run`, timed step by step."""

import dataclasses
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import numpy as np

from jaxpack.bench.cases import Case
from jaxpack.constants import RematSetting
from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import current_device, peak_memory_bytes
from jaxpack.parallel.mesh import num_shards
from jaxpack.planning.cards import rates_of
from jaxpack.planning.choose import predict
from jaxpack.planning.cost import StepShape
from jaxpack.planning.mesh import mesh_of
from jaxpack.planning.scaling import mesh_seconds
from jaxpack.settings import TrainConfig
from jaxpack.train.run import Run
from jaxpack.utils.compilation_cache import ProgramCache

WARM_UP = 3  # steps that are not timed


def train_config(case: Case) -> TrainConfig:
    """Returns the `TrainConfig` of a case's run."""
    return TrainConfig(
        max_length=case.max_length,
        max_steps=WARM_UP + case.steps,
        remat=cast(RematSetting, case.remat),  # a case of ours has no other; opponents have their own
        implementation=case.implementation,
        learning_rate=case.learning_rate,
        optim=case.optim,
        memory_limit=case.memory_limit,
        offload_weights=case.offload_weights,
        offload_embedding=case.offload_embedding,
        mesh=case.mesh,
        lr_scheduler_type="constant",
    ).in_layout(case.layout, case.rows)


def measure(
    case: Case,
    model: Transformer,
    documents: Documents,
    *,
    profiled: Callable[[Callable[[], object]], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Trains for a few steps, which consumes the model, and returns the figures of `case`.

    Rates count real tokens, over the steps after the warm-up whose program has run before. As in training, the host
    waits for the device only where such steps begin and end. Therefore the sum of their times is exact. The time of a
    single step, from the previous loss to its own, is not: a loss may arrive when most of the next step has run.
    All programs are compiled before the first step, and that time is a figure of its own. Peak memory is the
    allocator's, of the whole process.

    Args:
      profiled: if given, is called with a function that runs one more step and waits for it; its result becomes the
        figure "kernels".
    """
    config = train_config(case)
    mesh = mesh_of(config, model)
    batches = Batches(documents, config, num_devices=mesh.size)
    run = Run(model, batches, config, mesh=mesh)
    lengths = [int(length) for length in np.unique(batches.row_lengths)]
    steps = {length: StepShape.of_run(model, batches, length, run.optimizer_bytes) for length in lengths}
    reads_last = model.pending is not None
    cache = ProgramCache(config.compilation_cache_dir)
    compile_seconds = run.compile(cache, wait_for_all=True)
    run.read_weights(cache)
    timed = timed_steps(batches)
    edges = set(np.flatnonzero(timed[1:] != timed[:-1]) + 1)

    losses: list[float] = []
    ends = [time.perf_counter()]
    for metrics in run.steps(pauses=edges.__contains__):
        losses.append(float(metrics.loss))
        ends.append(time.perf_counter())

    if not np.isfinite(losses).all():  # a matmul of numbers that are all NaN takes less power, and thus less time
        raise ValueError(f"the losses are not finite, so the rates mean nothing: {losses}")

    seconds = np.diff(ends)
    rates, fsdp = rates_of(current_device().device_kind), num_shards(mesh)
    steps = {
        length: dataclasses.replace(step, compiles_first=reads_last, **run.choice.of_step)
        for length, step in steps.items()
    }
    predicted = {
        length: mesh_seconds(step, run.remat, rates, mesh.size // fsdp, fsdp) for length, step in steps.items()
    }
    memory = run.program(max(batches.shapes, key=math.prod)).memory_analysis()
    assert memory is not None
    figures = {
        "tokens_per_second": float(batches.tokens_per_step[timed].sum() / seconds[timed].sum()),
        "step_seconds": float(seconds[timed].mean()),
        "peak_memory_bytes": peak_memory_bytes(),
        "padding_share": batches.padding_share,
        "compile_seconds": compile_seconds,
        "found_programs": cache.found,  # programs that an earlier process compiled
        "warm_up_seconds": float(ends[WARM_UP] - ends[0]),
        "each_step_seconds": seconds[WARM_UP:].tolist(),
        "loss_seconds": (np.array(ends[1:]) - ends[0]).tolist(),  # from the first step's start to each loss
        "tokens": batches.tokens_per_step.tolist(),
        "losses": losses,
        "shapes": batches.shapes,
        "chosen_remat": run.remat,
        **{f"chosen_{name}": value for name, value in run.choice.of_step.items()},
        "predicted_step_seconds": float(np.mean([predicted[length] for length in batches.row_lengths[timed]])),
        "predicted_peak_bytes": max(predict(step, rates)[run.remat].peak_bytes for step in steps.values()),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "host_temporary_bytes": memory.host_temp_size_in_bytes,
        "device": current_device().device_kind,
        "devices": mesh.size,
        "imbalance": batches.imbalance,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
    }
    if profiled is not None:
        batch = run.on_device(batches[len(batches) - 1])
        figures["kernels"] = profiled(lambda: float(run.step(batch).loss))
    return figures


def timed_steps(batches: Batches) -> np.ndarray:
    """Marks the steps that count, bool `[num_steps]`: those after the warm-up that are not the first of their shape."""
    after = np.arange(batches.num_steps) >= WARM_UP
    warm = after & ~batches.is_first_of_its_shape()
    return warm if warm.any() else after
