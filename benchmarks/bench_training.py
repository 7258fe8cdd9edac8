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

from jaxpack import LoraConfig, TrainConfig, Transformer, add_lora
from jaxpack.batching import Batches
from jaxpack.config import ModelConfig, Remat
from jaxpack.data import load_documents
from jaxpack.packing import PackedBatch
from jaxpack.trainer import peak_memory_bytes
from jaxpack.training import TrainState, make_optimizer, make_schedule, make_train_step, split_trainable

WARM_UP = 3


def random_model(config: ModelConfig, lora: LoraConfig | None) -> Transformer:
    """A model of the right shapes with weights of the right size, made without holding any of them twice."""

    def make() -> Transformer:
        model = Transformer(config, rngs=nnx.Rngs(0))
        return model if lora is None else add_lora(model, lora)

    graph, state = nnx.split(nnx.eval_shape(make))
    block = 0.02 * jax.random.normal(jax.random.key(0), (1 << 20,), jnp.float32)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if any(getattr(key, "key", None) == "scale" for key in path):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.jit(lambda block: jnp.resize(block.astype(leaf.dtype), leaf.shape))(block)

    leaves = sorted(jax.tree_util.tree_leaves_with_path(state), key=lambda item: -item[1].size)
    filled = {path: jax.block_until_ready(fill(path, leaf)) for path, leaf in leaves}
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(lambda path, _: filled[path], state))


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
    result = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / options.steps,
        "peak_memory_bytes": peak_memory_bytes(),
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "host_temporary_bytes": analysis.host_temp_size_in_bytes,
        "compile_seconds": compile_seconds,
        "shapes": batches.shapes,
        "padding_share": batches.padding_share,
        "losses": losses + more,
    }
    if options.profile:
        from timing import jax_kernel_events

        final = batches.num_steps
        events = jax_kernel_events(lambda: jax.block_until_ready(run(state, final - 1, final)[0]))
        result["kernels"] = by_name(events)
    return result


def by_name(events: list) -> list[dict[str, Any]]:
    """The kernels of a step, longest first: how often each ran, and its seconds in all."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        found[event.name].append(event.seconds)
    rows = [{"name": name, "count": len(times), "seconds": float(np.sum(times))} for name, times in found.items()]
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
        f" {result['peak_memory_bytes'] / 2**30:6.2f} GiB, compiled in {result['compile_seconds']:.0f} s"
    ]
    lines += [f"  {1e3 * k['seconds']:8.2f} ms {k['count']:5} x {k['name']}" for k in result.get("kernels", [])[:40]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
