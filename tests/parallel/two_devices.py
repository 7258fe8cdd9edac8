"""Prints how a step on two simulated devices differs from a step on one; runs in its own process.

`python two_devices.py` prints a JSON list: for each case its name, the largest relative difference of a gradient, the
difference of the losses, and the collectives of the compiled program.
"""

import functools
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import random_documents, small_model

from jaxpack import SFT, Batches, LogProbObjective, LoraConfig, TrainConfig
from jaxpack.optimizers.optimizer import make_optimizer
from jaxpack.parallel.mesh import make_mesh
from jaxpack.parallel.placement import batch_sharding, replicate
from jaxpack.train.step import TrainState, make_eval_step, make_train_step, objective_and_gradients, split_trainable

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def squares(log_probs, batch):
    return jnp.sum(log_probs**2), jnp.sum(batch.segment_ids > 0), {"sum": jnp.sum(log_probs)}


PACKED = {"packing": True, "per_device_train_batch_size": 2}
CASES = {
    "packed, in micro-batches": (LoraConfig(r=8), PACKED | {"gradient_accumulation_steps": 2}, SFT(), "full"),
    "padded, all weights": (None, {"padding_free": False, "per_device_train_batch_size": 4}, SFT(), "full"),
    "objective": (LoraConfig(r=8), PACKED, LogProbObjective(squares), "offload"),
}


def measure(lora, settings, objective, remat):
    batches = Batches(
        random_documents([17, 40, 3, 31, 9, 28, 5, 64, 70, 80, 55, 33]), TrainConfig(max_length=128, **settings)
    )
    graph, trainable, frozen = split_trainable(small_model("qwen3", lora=lora))
    found = []
    for count in (1, 2):
        mesh = make_mesh(jax.devices()[:count])
        step = functools.partial(objective_and_gradients, graph, objective=objective, remat=remat, mesh=mesh)
        arguments = (
            replicate(trainable, mesh),
            replicate(frozen, mesh),
            jax.device_put(batches[0], batch_sharding(mesh)),
        )
        program = jax.jit(step).lower(*arguments).compile()
        sums, gradients = jax.device_get(program(*arguments))
        found.append((sums, jax.tree.leaves(gradients), Counter(COLLECTIVE.findall(program.as_text()))))
    (one, of_one, alone), (two, of_two, together) = found
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(of_one, of_two, strict=True)]
    metrics = [(one.loss, two.loss), *((one.metrics[name], two.metrics[name]) for name in one.metrics)]
    return {
        "gradients": float(max(errors)),
        "sums": float(max(abs(a - b) / abs(a) for a, b in metrics)),
        "weights": [float(one.weight), float(two.weight)],
        "collectives": [dict(alone), dict(together)],
    }


def train(count):
    """Returns the losses of four steps, with moments in 8 bits, and of an evaluation, on `count` devices."""
    batches = Batches(
        random_documents([50] * 16),
        TrainConfig(max_length=128, max_steps=4, packing=True, per_device_train_batch_size=2),
    )
    mesh = make_mesh(jax.devices()[:count])
    graph, trainable, frozen = split_trainable(
        small_model("llama", lora=LoraConfig(r=96, target_modules="q_proj,o_proj"))
    )
    optimizer = make_optimizer(TrainConfig(optim="adamw_8bit"), optax.constant_schedule(1e-2))
    state = replicate(TrainState(trainable, optimizer.init(trainable), jnp.int32(0)), mesh)
    frozen, losses = replicate(frozen, mesh), []
    step = make_train_step(graph, optimizer, mesh=mesh)
    for i in range(4):
        state, metrics = step(state, frozen, jax.device_put(batches[i], batch_sharding(mesh)))
        losses.append(float(metrics.loss))
    evaluated = make_eval_step(graph, mesh=mesh)(
        state.trainable, frozen, jax.device_put(batches[0], batch_sharding(mesh))
    )
    return [*losses, float(evaluated.objective.loss)]


if __name__ == "__main__":
    results = {name: measure(*case) for name, case in CASES.items()}
    print(json.dumps(results | {"training": [train(1), train(2)]}))
