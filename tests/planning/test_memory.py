"""Tests that predicted bytes agree with the model's own arrays and with the memory of compiled steps."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from measured_runs import id_of
from models import small_config, small_model
from planned_steps import GIB, H200, LORA, PADDING_FREE_RUNS, abstract_model, model_of

from jaxpack import LoraConfig, TrainConfig, Transformer
from jaxpack.data.packing import PackedBatch
from jaxpack.model.lora import add_lora
from jaxpack.optimizers.optimizer import make_optimizer, make_schedule, state_bytes
from jaxpack.planning.choose import predict
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, host_bytes, peak_bytes
from jaxpack.train.step import TrainState, make_train_step, split_trainable


@pytest.mark.parametrize(
    "row", [row for row in PADDING_FREE_RUNS if (row["model"], row["remat"]) == ("Qwen3-4B", "offload")], ids=id_of
)
def test_short_steps_take_what_choosing_their_kernels_takes(row):
    step = StepShape.of(model_of(row), max(map(tuple, row["shapes"])))
    remat, peak = row["remat"], row["peak_memory_bytes"]
    assert peak_bytes(step, remat) < 0.9 * peak
    assert predict(step, H200)[remat].peak_bytes == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("lora", [LoraConfig(r=64), None], ids=["lora", "full"])
def test_arguments_are_those_of_the_step(family, lora, optim):
    model = small_model(family, lora=lora, dtype=jnp.bfloat16)
    _, trainable, frozen = split_trainable(model)
    config = TrainConfig(optim=optim)
    state = make_optimizer(config, make_schedule(config, 1), model).init(trainable)
    arrays = jax.tree.leaves((trainable, frozen, state))
    batch = 4 * 3 * 2 * 128 * 4
    step = StepShape.of(model, (3, 2, 128), optimizer_bytes=state_bytes(config, model))
    assert argument_bytes(step) == sum(x.nbytes for x in arrays) + batch


def compiled_temporary_bytes(model: Transformer, shape: tuple[int, int, int]) -> int:
    """Returns the bytes that XLA needs here, beside the arguments, for a step that recomputes everything."""
    graph, trainable, frozen = split_trainable(model)
    optimizer = make_optimizer(TrainConfig(), optax.constant_schedule(1e-3))
    step = make_train_step(graph, optimizer, remat="full", implementation="xla")
    state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
    batch = PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])
    return step.lower(state, frozen, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_of_all_weights_take_the_memory_of_a_step_with_few_tokens(accumulation):
    # With so few tokens only gradients count. A CPU then needs the buffers of a GPU, and without accumulation also a
    # copy of the gradients that the loop over layers has made.
    config = small_config("llama", hidden_size=512, intermediate_size=1536, num_heads=8, head_dim=64, vocab_size=4096)
    model = Transformer(config, rngs=nnx.Rngs(0))
    shape = (accumulation, 1, 128)
    step = StepShape.of(model, shape)
    predicted = peak_bytes(step, "full") - argument_bytes(step)
    copied = 4 * step.trained if accumulation == 1 else 0
    assert predicted + copied == pytest.approx(compiled_temporary_bytes(model, shape), rel=0.1)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_head_that_is_trained_whole_beside_adapters_takes_its_memory(tied):
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_heads": 8, "head_dim": 64, "vocab_size": 16384}
    whole = ("lm_head", "embed_tokens") if tied else "lm_head"
    lora = LoraConfig(r=4, target_modules="q_proj", modules_to_save=whole)
    model = add_lora(Transformer(small_config("llama", tie_word_embeddings=tied, **sizes), rngs=nnx.Rngs(0)), lora)
    step = StepShape.of(model, (1, 1, 128))
    predicted = peak_bytes(step, "full") - argument_bytes(step)
    copied = 0 if tied else 4 * step.trained  # a CPU divides the gradient of an untied head into a new array
    assert predicted + copied == pytest.approx(compiled_temporary_bytes(model, (1, 1, 128)), rel=0.1)


def test_frozen_weights_in_float32_are_cast_as_trained_ones_are():
    model = small_model("llama", dtype=jnp.bfloat16)
    assert not StepShape.of(add_lora(nnx.clone(model), LORA), (1, 1, 128)).casts_weights
    _, trainable, _ = split_trainable(model)
    nnx.update(model, trainable)  # as full fine-tuning leaves the model
    for tuned in (model, add_lora(nnx.clone(model), LORA)):
        step = StepShape.of(tuned, (1, 1, 128))
        assert step.casts_weights
        assert host_bytes(step, "offload") == step.num_layers * 128 * 48 * 2


# GiB beside the arguments that full fine-tuning of Qwen3-0.6B needs on an H200 (2026-11-27, jax 0.11.2:
# `temp_size_in_bytes` of the step compiled there). Key: remat, micro-batches; value: one and five rows of 1,024 tokens.
TEMPORARY = {
    ("full", 1): (2.545, 3.031),
    ("full", 2): (4.423, 5.907),
    ("keep_projections", 1): (3.019, 6.014),
    ("keep_projections", 2): (4.303, 8.284),
    ("none", 1): (3.034, 7.797),
    ("none", 2): (5.246, 10.018),
}


@pytest.mark.parametrize(("choice", "measured"), TEMPORARY.items(), ids=str)
def test_gradients_of_all_weights_take_the_memory_that_a_gpu_needs_for_them(choice, measured):
    remat, accumulation = choice
    for rows, temporary in zip((1, 5), measured, strict=True):
        step = StepShape.of(abstract_model("Qwen3-0.6B", None), (accumulation, rows, 1024))
        assert peak_bytes(step, remat) == pytest.approx(argument_bytes(step) + temporary * GIB, rel=0.1)
