"""Prints how steps on eight simulated devices differ from steps on one; runs in its own process.

`python meshes.py [CASE ...]` prints a JSON object: for each case and mesh the largest relative difference of a
gradient, that of the sums, the collectives of the compiled program, and the elements that they give; and the losses of
a training.
"""

import json
import math
import re
import sys
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import random_documents, small_model

from jaxpack import SFT, Batches, LogProbObjective, LoraConfig, Objective, TrainConfig, add_lora
from jaxpack.constants import Remat
from jaxpack.model.lora import adapters
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.shards import deal, specs
from jaxpack.model.weights import freeze
from jaxpack.optimizers.optimizer import make_optimizer
from jaxpack.optimizers.placement import state_specs
from jaxpack.parallel.mesh import make_mesh
from jaxpack.parallel.placement import batch_sharding, place, replicate
from jaxpack.train.step import TrainState, make_eval_step, make_train_step, objective_and_gradients, split_trainable

COLLECTIVE = re.compile(r" = (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
LENGTHS = [17, 40, 3, 31, 9, 28, 5, 64, 70, 80, 55, 33] * 8
OF_A_DEVICE = {"busiest_expert", "unused_experts"}  # means over devices, of the tokens of each
EXPERTS = ("gate_up_proj", "down_proj")


def squares(log_probs, batch):
    return jnp.sum(log_probs**2), jnp.sum(batch.segment_ids > 0), {"sum": jnp.sum(log_probs)}


class Case(NamedTuple):
    """Describes a step, and the meshes `(data, fsdp)` that it is compared on; `rows` are those of all devices."""

    meshes: tuple[tuple[int, int], ...]
    lora: LoraConfig | None = LoraConfig(r=8)
    family: str = "qwen3"
    layout: str = "packed"
    rows: int = 8
    remat: Remat = "full"
    in_4bit: bool = False
    changes: dict[str, int] = {}  # noqa: RUF012
    settings: dict[str, Any] = {"gradient_accumulation_steps": 1}  # noqa: RUF012
    objective: Objective = SFT()
    dropout: bool = False


CASES = {
    "adapters, in micro-batches": Case(
        ((8, 1), (2, 4)),
        settings={"gradient_accumulation_steps": 2},
        lora=LoraConfig(r=8, lora_dropout=0.3),
        dropout=True,
    ),
    "adapters, in shards": Case(((1, 8),), LoraConfig(r=8, use_dora=True)),
    "all weights, padded": Case(
        ((8, 1), (1, 8)), lora=None, layout="padded", rows=16, family="llama", changes={"vocab_size": 104}
    ),
    "all weights kept": Case(((2, 4),), lora=None, remat="none"),
    "4 bits, padding-free, offloaded": Case(
        ((8, 1), (2, 4)), LoraConfig(r=8, layers_to_transform=1), in_4bit=True, layout="padding-free", remat="offload"
    ),
    "experts": Case(
        ((1, 8),), family="qwen3_moe", remat="keep_attention", lora=LoraConfig(r=8, target_parameters=EXPERTS)
    ),
    "experts, all weights": Case(((4, 2),), family="qwen3_moe", lora=None),
    "objective": Case(((8, 1),), objective=LogProbObjective(squares), remat="offload"),
}


def model_of(case: Case) -> Any:
    if not case.in_4bit:
        return small_model(case.family, lora=case.lora, **case.changes)
    model = small_model(case.family, hidden_size=64, intermediate_size=128)
    freeze(model, nf4_store())
    assert case.lora is not None
    add_lora(model, case.lora)
    for adapter in adapters(model).values():
        adapter.lora_b.set_value(0.05 * jax.random.normal(jax.random.key(0), adapter.lora_b.shape))
    return model


def measure(case: Case) -> dict[str, Any]:
    graph, trainable, frozen = split_trainable(model_of(case))
    parameters = trainable, frozen
    layers = model_of(case).config.num_layers
    config = TrainConfig(max_length=128, **case.settings)
    found, one = {}, None
    for data, fsdp in ((1, 1), *case.meshes):
        mesh = make_mesh(jax.devices()[: data * fsdp], fsdp=fsdp)
        assert case.rows % mesh.size == 0
        of_layout = config.in_layout(case.layout, case.rows // mesh.size)
        batch = Batches(random_documents(LENGTHS), of_layout, num_devices=mesh.size)[0]

        def step(parameters, batch, mesh=mesh):
            options = {"objective": case.objective, "remat": case.remat, "mesh": mesh}
            key = jax.random.key(0) if case.dropout else None
            return objective_and_gradients(graph, *parameters, batch, dropout_key=key, **options)

        arguments = deal(parameters, mesh), jax.device_put(batch, batch_sharding(mesh))
        program = jax.jit(step).lower(*arguments).compile()
        sums, gradients = jax.device_get(program(*arguments))
        gradients = jax.tree.leaves(gradients)
        one = one or (sums, gradients)
        errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(one[1], gradients, strict=True)]
        same = sums.metrics.keys() - OF_A_DEVICE
        metrics = [(one[0].loss, sums.loss), *((one[0].metrics[name], sums.metrics[name]) for name in same)]
        collectives = [(kind, shape) for shape, kind in COLLECTIVE.findall(program.as_text())]
        gathered = [shape for kind, shape in collectives if kind == "all-gather"]
        found[f"{data}x{fsdp}"] = {
            "gradients": float(max(errors)),
            "sums": float(max(abs(a - b) / abs(a) for a, b in metrics)),
            "weight": float(sums.weight),
            "collectives": dict(Counter(kind for kind, _ in collectives)),
            "gathered": sum(map(elements, gathered)),
            "traced": str(jax.make_jaxpr(step)(*arguments)).count("all_gather["),
            "of_a_layer": elements_of_a_layer(parameters, mesh, layers),
        }
    return found


def elements(shape: str) -> int:
    """Returns the number of elements of an array in a program's text, such as `f32[2,3]{1,0}`."""
    return math.prod(int(size) for size in re.findall(r"\d+", re.search(r"\[(.*?)\]", shape)[1]))


def elements_of_a_layer(parameters: Any, mesh: Any, layers: int) -> int:
    """Returns the number of elements of a layer's arrays that are in shards, when they are whole."""
    placed = jax.tree.leaves(specs(parameters, mesh), is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
    pairs = zip(jax.tree.leaves(parameters), placed, strict=True)
    return sum(leaf.size // layers for leaf, spec in pairs if "fsdp" in spec)


def train(data: int, fsdp: int, lora: LoraConfig | None) -> list[float]:
    """Returns the losses of four steps, with moments in 8 bits, and of an evaluation."""
    mesh = make_mesh(jax.devices()[: data * fsdp], fsdp=fsdp)
    config = TrainConfig(max_length=128, max_steps=4, packing=True, per_device_train_batch_size=8 // mesh.size)
    batches = Batches(random_documents([50] * 64), config, num_devices=mesh.size)
    graph, trainable, frozen = split_trainable(
        model := small_model("llama", lora=lora, hidden_size=128, vocab_size=256)
    )
    optimizer = make_optimizer(TrainConfig(optim="adamw_8bit"), optax.constant_schedule(1e-2), model)
    moments = optimizer.init(trainable)
    state = TrainState(
        deal(trainable, mesh),
        place(moments, state_specs(moments, trainable, mesh), mesh),
        replicate(jnp.int32(0), mesh),
    )
    frozen, losses = deal(frozen, mesh), []
    step = make_train_step(graph, optimizer, mesh=mesh)
    for i in range(4):
        state, metrics = step(state, frozen, jax.device_put(batches[i], batch_sharding(mesh)))
        losses.append(float(metrics.loss))
    evaluated = make_eval_step(graph, mesh=mesh)(
        state.trainable, frozen, jax.device_put(batches[0], batch_sharding(mesh))
    )
    return [*losses, float(evaluated.objective.loss)]


if __name__ == "__main__":
    results = {name: measure(CASES[name]) for name in sys.argv[1:] or CASES}
    trained = {"adapters": LoraConfig(r=96, target_modules="q_proj,o_proj"), "all": None}
    for name, lora in trained.items():
        results[f"training {name}"] = [train(*mesh, lora) for mesh in ((1, 1), (8, 1), (2, 4))]
    print(json.dumps(results))
