"""Predictions agree with what was measured and with the model's own arrays."""

import functools
import itertools
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from models import small_config, small_model

from benchmarks.cases import MODELS
from jaxpack import LoraConfig, TrainConfig, Transformer, add_lora
from jaxpack.config import Remat
from jaxpack.packing import PackedBatch
from jaxpack.predictions import RATES, Job, argument_bytes, peak_bytes, predict, rates_of
from jaxpack.training import TrainState, make_optimizer, make_schedule, make_train_step, split_trainable

H200 = RATES["H200"]
RESULTS = Path(__file__).parent.parent / "benchmarks/results"


@functools.cache
def abstract_model(name: str, lora: LoraConfig | None) -> Transformer:
    """Of its real size, without arrays."""

    def make() -> Transformer:
        model = Transformer(MODELS[name], rngs=nnx.Rngs(0))
        return model if lora is None else add_lora(model, lora)

    return nnx.eval_shape(make)


LORA = LoraConfig(r=16)


def measured() -> list[dict]:
    results = [
        row for path in RESULTS.glob("*_h200_training_*.json") for row in json.loads(path.read_text())["results"]
    ]
    return [row for row in results if row["system"] == "jaxpack" and row["layout"] == "packed"]


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['model']}-{row['remat']}")
def test_predictions_are_within_a_tenth_of_what_was_measured(row):
    # Alpaca's documents, weighted by their tokens: 80 keys a token.
    job = Job.of(abstract_model(row["model"], LORA), max(map(tuple, row["shapes"])), keys_per_token=80)
    prediction = predict(job, H200)[row["remat"]]
    assert prediction.peak_bytes == pytest.approx(row["peak_memory_bytes"], rel=0.1)
    assert prediction.seconds == pytest.approx(row["step_seconds"], rel=0.1)
    assert argument_bytes(job) == pytest.approx(row["argument_bytes"], abs=100)  # counters
    assert prediction.host_bytes == row["host_temporary_bytes"]


def test_both_ends_were_measured():
    assert {"offload", "none"} <= {row["remat"] for row in measured()}


@pytest.mark.parametrize("lora", [LoraConfig(r=8), None], ids=["lora", "full"])
def test_arguments_are_those_of_the_step(family, lora):
    model = small_model(family, lora=lora, dtype=jnp.bfloat16)
    _, trainable, frozen = split_trainable(model)
    config = TrainConfig()
    moments = [x for x in jax.tree.leaves(make_optimizer(config, make_schedule(config, 1)).init(trainable)) if x.ndim]
    arrays = [*jax.tree.leaves((trainable, frozen)), *moments]
    batch = 4 * 3 * 2 * 128 * 4
    assert argument_bytes(Job.of(model, (3, 2, 128))) == sum(x.nbytes for x in arrays) + batch


@pytest.mark.parametrize(("remat", "accumulation"), [("full", 1), ("full", 2), ("keep_projections", 2)])
def test_gradients_of_all_weights_take_the_memory_of_a_step_with_few_tokens(remat, accumulation):
    # Where nothing else counts, a CPU's buffers are a GPU's.
    config = small_config("llama", hidden_size=512, intermediate_size=1536, num_heads=8, head_dim=64, vocab_size=4096)
    model = Transformer(config, rngs=nnx.Rngs(0))
    graph, trainable, frozen = split_trainable(model)
    optimizer = make_optimizer(TrainConfig(), optax.constant_schedule(1e-3))
    step = make_train_step(graph, optimizer, remat=remat, implementation="xla")
    state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
    shape = (accumulation, 1, 128)
    batch = PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])
    temporary = step.lower(state, frozen, batch).compile().memory_analysis().temp_size_in_bytes
    job = Job.of(model, shape)
    assert peak_bytes(job, remat) - argument_bytes(job) == pytest.approx(temporary, rel=0.1)


@pytest.mark.parametrize("lora", [LORA, LoraConfig(r=8, target_modules="q_proj,v_proj"), None], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1024), (4, 2, 4096), (1, 1, 16384)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_to_keep_more_takes_more_memory_and_less_time(name, shape, lora):
    predictions = predict(Job.of(abstract_model(name, lora), shape), H200)
    offload, *others = (predictions[remat] for remat in get_args(Remat))
    for less, more in itertools.pairwise(others):
        assert less.peak_bytes <= more.peak_bytes and less.seconds > more.seconds
    assert offload.peak_bytes <= others[0].peak_bytes and offload.seconds > others[0].seconds


def test_a_slow_link_is_waited_for():
    job = Job.of(abstract_model("Qwen3-4B", LORA), (1, 16, 1024))
    seconds = [predict(job, H200._replace(link=link))["offload"].seconds for link in (100e9, 50e9, 5e9)]
    copy = 36 * 16 * 1024 * 2560 * 2 / 5e9  # in each direction: longer than a pass
    assert seconds[0] < seconds[1] < 1.02 * seconds[0]
    assert 2 * copy < seconds[2] < 2 * copy + seconds[0]


def test_rates_go_by_the_device():
    assert rates_of("NVIDIA H200") == H200 != rates_of("NVIDIA H100 80GB HBM3")
    assert all(a <= b for a, b in zip(rates_of("NVIDIA X1"), RATES["H100"], strict=True))
