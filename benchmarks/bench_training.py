"""One training step at a model's real size: tokens a second, memory, compile time, and what its time goes into.

    PYTHONPATH=. python benchmarks/bench_training.py --lengths LENGTHS.csv --model Qwen3-4B --remat offload none

Each configuration runs in a process of its own, on random weights and documents of the lengths in LENGTHS.csv
(as in `bench_main_job.py`), through the trainer's own batches and step. Real tokens are counted, of steps after the
program is warm; peak memory is the allocator's own. With --profile, the kernels of one step by their share of it.
"""

import argparse
import collections
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from cases import MODELS, documents
from flax import nnx
from timing import Event, jax_kernel_events

from jaxpack import LoraConfig, TrainConfig, Transformer, add_lora
from jaxpack.batching import Batches
from jaxpack.config import ModelConfig, Remat
from jaxpack.data import load_documents
from jaxpack.packing import PackedBatch
from jaxpack.predictions import Job, predict, rates_of
from jaxpack.trainer import peak_memory_bytes
from jaxpack.training import TrainState, make_optimizer, make_schedule, make_train_step, split_trainable

WARM_UP = 3
COPIES = ("MemcpyD2H", "MemcpyH2D")  # between device and host: on streams of their own


def noise(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Uniform, of standard deviation 0.02: a hash of each index, in one pass that needs no memory but the result's."""
    x = jax.lax.iota(jnp.uint32, math.prod(like.shape)) * jnp.uint32(2654435761)
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(73244475)
    return ((x.astype(jnp.float32) * 2.0**-32 - 0.5) * (0.02 * 12**0.5)).astype(like.dtype).reshape(like.shape)


def random_model(config: ModelConfig, lora: LoraConfig | None) -> Transformer:
    """A model of the right shapes with weights of the right size, made without holding any of them twice."""

    def make() -> Transformer:
        model = Transformer(config, rngs=nnx.Rngs(0))
        return model if lora is None else add_lora(model, lora)

    graph, state = nnx.split(nnx.eval_shape(make))

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if any(getattr(key, "key", None) == "scale" for key in path):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.jit(noise, static_argnums=0)(leaf)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one configuration here."""
    train = TrainConfig(
        packing=options.layout == "packed",
        padding_free=options.layout == "padding-free",
        max_length=options.max_length,
        per_device_train_batch_size=options.rows,
        max_steps=WARM_UP + options.steps,
        remat=options.here,
        implementation=options.implementation,
        learning_rate=1e-4,
    )
    config = MODELS[options.model]
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    model = random_model(config, None if options.full_finetuning else LoraConfig(r=16))
    rows = documents(options.lengths, options.documents)
    batches = Batches(load_documents(rows, None, vocab_size=model.config.vocab_size), train)
    graph, trainable, frozen = split_trainable(model)
    nnx.update(model, trainable)  # lets go of the arrays that were copied
    schedule = make_schedule(train, batches.num_steps)
    optimizer = make_optimizer(train, schedule)
    step = make_train_step(graph, optimizer, remat=train.remat, implementation=train.implementation)
    state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))

    begin = time.perf_counter()
    programs = {}
    for shape in batches.shapes:
        batch = PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])
        programs[shape[-1]] = step.lower(state, frozen, batch, limits=batches.limits[shape[-1]]).compile()
    compile_seconds = time.perf_counter() - begin
    analysis = programs[batches.shapes[0][-1]].memory_analysis()

    def run(state: TrainState, first: int, last: int) -> tuple[TrainState, list[float], float]:
        losses = []
        begin = time.perf_counter()
        for i in range(first, last):
            batch = jax.device_put(batches[i])
            state, metrics = programs[batch.tokens.shape[-1]](state, frozen, batch)
            losses.append(metrics.loss)
        losses = [float(loss) for loss in losses]
        return state, losses, time.perf_counter() - begin

    state, losses, _ = run(state, 0, WARM_UP)
    state, more, seconds = run(state, WARM_UP, batches.num_steps)
    tokens = int(batches.tokens_per_step[WARM_UP:].sum())
    predicted = predict(Job.of_run(model, batches), rates_of(jax.devices()[0].device_kind))[options.here]
    result = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / options.steps,
        "peak_memory_bytes": peak_memory_bytes(),
        "predicted_peak_bytes": predicted.peak_bytes,
        "predicted_step_seconds": predicted.seconds,
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "host_temporary_bytes": analysis.host_temp_size_in_bytes,
        "compile_seconds": compile_seconds,
        "shapes": batches.shapes,
        "padding_share": batches.padding_share,
        "losses": losses + more,
    }
    if options.profile:
        final = batches.num_steps
        events = jax_kernel_events(lambda: jax.block_until_ready(run(state, final - 1, final)[0]))
        result["kernels"] = by_name(events)
    return result


def by_name(events: list[Event]) -> list[dict[str, Any]]:
    """What ran in a step, longest first: how often and its seconds; of copies also those while a kernel ran."""
    found: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        found[event.name].append(event)
    computing = sorted((e.start, e.start + e.seconds) for e in events if not e.name.startswith(COPIES))
    begins, ends = np.array(computing).T

    def hidden(copy: Event) -> float:
        """Kernels run one after another on their stream, so their time within the copy's adds up."""
        last = copy.start + copy.seconds
        return float(np.sum(np.clip(np.minimum(ends, last) - np.maximum(begins, copy.start), 0, None)))

    rows = [
        {
            "name": name,
            "count": len(members),
            "seconds": sum(event.seconds for event in members),
            **({"hidden_seconds": sum(map(hidden, members))} if name.startswith(COPIES) else {}),
        }
        for name, members in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def main() -> None:
    """One process for each configuration, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-4B")
    parser.add_argument("--remat", nargs="+", choices=get_args(Remat), default=["offload", "keep_projections"])
    parser.add_argument("--layout", choices=("packed", "padding-free", "padded"), default="packed")
    parser.add_argument("--rows", type=int, default=16, help="of a step; documents unless packed")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--implementation", choices=("xla", "pallas"))
    parser.add_argument("--full-finetuning", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, help="a model of fewer layers")
    parser.add_argument("--here", choices=get_args(Remat), help="this choice alone, in this process: a line of JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options)), flush=True)
        return
    results = []
    for remat in options.remat:
        command = [sys.executable, __file__, *sys.argv[1:], "--here", remat]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        failed = {"failed": process.returncode}
        result = failed if process.returncode else json.loads(process.stdout.splitlines()[-1])
        results.append({"model": options.model, "layout": options.layout, "remat": remat, **result})
        print(line_of(results[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps({"benchmark": "training", "results": results}, indent=1) + "\n")


def line_of(result: dict[str, Any]) -> str:
    """A configuration and its figures."""
    name = f"{result['model']:12} {result['layout']:12} {result['remat']:17}"
    if "failed" in result:
        return f"{name} failed with exit code {result['failed']}"
    lines = [
        f"{name} {result['tokens_per_second']:>9,.0f} tokens/s {result['step_seconds']:.3f} s"
        f" {result['peak_memory_bytes'] / 2**30:6.2f} GiB, predicted {result['predicted_step_seconds']:.3f} s"
        f" {result['predicted_peak_bytes'] / 2**30:.2f} GiB, compiled in {result['compile_seconds']:.0f} s"
    ]
    for kernel in result.get("kernels", [])[:40]:
        lines.append(f"  {1e3 * kernel['seconds']:8.2f} ms {kernel['count']:5} x {kernel['name']}")
        if "hidden_seconds" in kernel:
            lines[-1] += f", {1e3 * kernel['hidden_seconds']:.2f} ms of it beside kernels"
    return "\n".join(lines)


if __name__ == "__main__":
    main()
