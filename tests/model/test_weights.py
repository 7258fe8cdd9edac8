"""A model with frozen weights in another form trains, is planned, read and written like one with dense weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from int8_weight import Int8Weight, dense_twin, mixed, mixed_nf4
from models import random_documents, small_config, small_model

import torch_bridge
from jaxpack import Batches, LoraConfig, PackedBatch, TrainConfig, Trainer, Transformer, add_lora, generate
from jaxpack.bench.models import abstract_model, random_model
from jaxpack.errors import InputError
from jaxpack.kernels.weight import DenseWeight
from jaxpack.model.lora import adapters
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.presets import SHAPES
from jaxpack.model.remat import OFFLOADED, compiler_options
from jaxpack.model.weights import (
    TRAINED,
    Frozen,
    freeze,
    is_trained,
    move_to_host,
    num_parameters,
    store_dense,
    weight_of,
)
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, loss_bytes
from jaxpack.train.step import loss_and_gradients, split_trainable
from torch_bridge.tensors import fill, model_tensors

STORES = {"int8": Int8Weight.of, "mixed": mixed, "nf4": nf4_store(32), "mixed nf4": mixed_nf4}
CHOICES = ["offload", *(pytest.param(r, marks=pytest.mark.slow) for r in ("full", "none", "keep_projections"))]
all_stores = pytest.mark.parametrize("store", STORES)
# Where programs are compiled, a model that mixes both forms shows what each form alone does.
either_store = pytest.mark.parametrize(
    "store", ["nf4", "mixed", *(pytest.param(store, marks=pytest.mark.slow) for store in ("int8", "mixed nf4"))]
)


@functools.cache
def adapted(store: str, *, family: str = "qwen3", dropout: float = 0.0) -> Transformer:
    """Makes a small model with frozen weights in that form and nonzero adapters; callers must not change it."""
    model = small_model(family, num_layers=3)
    freeze(model, STORES[store])
    add_lora(model, LoraConfig(r=8, lora_dropout=dropout))
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.05 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    return model


@functools.cache
def batch():
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=1)
    return jax.tree.map(jnp.asarray, Batches(random_documents([17, 2, 40, 3, 22, 31, 9, 28]), config)[0])


@pytest.mark.parametrize("remat", CHOICES)
@either_store
def test_loss_and_gradients_are_those_of_the_dense_twin(store, remat):
    model = adapted(store)

    def results(model):
        graph, trainable, frozen = split_trainable(model)
        return jax.jit(functools.partial(loss_and_gradients, graph, remat=remat))(trainable, frozen, batch())

    (loss, gradients), (want, want_gradients) = results(model), results(dense_twin(model))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("remat", ["none", "keep_projections", "keep_attention", "full", *OFFLOADED])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@all_stores
def test_the_derivative_keeps_the_weights_as_they_are_stored(store, dropout, remat):
    model = adapted(store, dropout=dropout)
    graph, trainable, frozen = split_trainable(model)

    def kept(trainable, frozen, *row):
        def hidden(trainable):
            key = jax.random.key(0) if dropout else None
            return nnx.merge(graph, trainable, frozen)(*row, remat=remat, implementation="pallas", dropout_key=key)

        return jax.tree.leaves(jax.vjp(hidden, trainable)[1])

    residuals = jax.eval_shape(kept, trainable, frozen, *3 * [jax.ShapeDtypeStruct((1, 128), jnp.int32)])
    ranks = range(33)  # rows or columns of adapter factors appended to a matrix
    matrices = {linear.weight.shape[-2:] for linear in linears(model)}
    shapes = {(o + r, i) for o, i in matrices for r in ranks} | {(o, i + r) for o, i in matrices for r in ranks}
    stored = [(x.shape, x.dtype) for x in jax.tree.leaves([weight_of(x.weight) for x in linears(model)])]
    kept_arrays = [(x.shape, x.dtype) for x in residuals]
    assert set(stored) & set(kept_arrays)
    matrices_kept = {array for array in kept_arrays if array[0][-2:] in shapes and array[0][-2] != 128}
    assert matrices_kept <= set(stored)


def linears(model: Transformer):
    block = model.blocks
    return block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down


@either_store
def test_a_run_predicts_its_bytes_and_trains_and_goes_on(store, tmp_path):
    documents = random_documents([60, 60, 60, 60])
    options = {"max_length": 128, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path)}

    def trainer(**changes):
        model = nnx.clone(adapted(store))
        return Trainer(model, None, documents, TrainConfig(**options | changes))

    first = trainer(max_steps=4, save_steps=2)
    frozen = jax.tree.leaves(nnx.state(first.model, Frozen))
    assert StepShape.of_run(first.model, first.batches).frozen_bytes == sum(leaf.nbytes for leaf in frozen)
    before = [np.array(leaf) for leaf in frozen]
    result = first.train()
    assert result.losses[-1] < result.losses[0]
    for leaf, was in zip(jax.tree.leaves(nnx.state(first.model, Frozen)), before, strict=True):
        np.testing.assert_array_equal(leaf, was)
    again = Trainer(
        nnx.clone(adapted(store)),
        None,
        documents,
        TrainConfig(
            **options
            | {"output_dir": str(tmp_path / "more"), "max_steps": 4, "save_steps": 2}
            | {"resume_from_checkpoint": str(tmp_path / "checkpoints" / "2")}
        ),
    )
    np.testing.assert_array_equal(again.train().losses, result.losses)
    other = nnx.clone(adapted(store))
    freeze_again = weight_of(other.embedding)
    other.embedding = Frozen(jax.tree.map(lambda x: x + 1, freeze_again))
    config = TrainConfig(
        **options
        | {"output_dir": str(tmp_path / "other"), "max_steps": 4, "save_steps": 2}
        | {"resume_from_checkpoint": str(tmp_path / "checkpoints" / "2")}
    )
    with pytest.raises(InputError, match="frozen embedding"):
        Trainer(other, None, documents, config).train()


@either_store
def test_the_arguments_of_the_compiled_step_have_the_bytes_that_are_predicted(store):
    model = adapted(store)
    graph, trainable, frozen = split_trainable(model)
    program = jax.jit(functools.partial(loss_and_gradients, graph)).lower(trainable, frozen, batch()).compile()
    got = program.memory_analysis().argument_size_in_bytes
    step = StepShape.of(model, batch().tokens.shape)
    predicted = argument_bytes(step) - step.optimizer_bytes
    assert predicted <= got <= predicted * 1.001 + 2**14  # XLA gives each array a multiple of 64 bytes


def test_a_head_that_is_stored_in_another_form_is_predicted_with_its_dense_copy():
    model = adapted("int8")
    one, other = (loss_bytes(StepShape.of(form, (1, 2, 128))) for form in (model, dense_twin(model)))
    assert one - other == 4 * math.prod(model.head.shape)


@either_store
def test_text_is_that_of_the_dense_twin(store):
    prompts = [[5, 17, 3], [9, 2, 44, 1, 8], [60]]
    model = adapted(store)
    assert generate(model, prompts, max_new_tokens=12) == generate(dense_twin(model), prompts, max_new_tokens=12)


@either_store
def test_merging_adds_adapters_to_what_they_were_trained_beside(store, tmp_path):
    model = adapted(store)
    tokens = jnp.arange(40)[None]
    assert torch_bridge.save_merged(model, str(tmp_path / "merged"), dtype="float32") < 1e-4
    merged, _ = torch_bridge.from_pretrained(str(tmp_path / "merged"), dtype="float32")
    np.testing.assert_allclose(merged.logits(tokens), model.logits(tokens), atol=1e-4)


@either_store
def test_a_checkpoint_is_read_into_the_form_and_written_from_it(store):
    source = small_model("qwen3", num_layers=3)
    want = small_model("qwen3", num_layers=3)
    freeze(want, STORES[store])
    model = small_model("qwen3", num_layers=3, vocab_size=97)
    freeze(model, lambda dense, module: STORES[store](jnp.zeros_like(dense), module))

    tensors = dict(model_tensors(source))

    class Tensors:
        description = "a model"

        def shapes(self):
            return {name: tensor.shape for name, tensor in tensors.items()}

        def read(self, name, first, last, buffer):
            return np.asarray(tensors[name][first:last])

    fill(model, Tensors())
    for got, expected in zip(*(jax.tree.leaves(nnx.state(x, Frozen)) for x in (model, want)), strict=True):
        np.testing.assert_array_equal(got, expected)
    for (name, got), (_, expected) in zip(model_tensors(model), model_tensors(dense_twin(want)), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_a_random_model_of_another_form_has_weights_that_are_not_zero():
    model = random_model(small_config("qwen3"), LoraConfig(r=4), store=Int8Weight.of)
    assert all(np.asarray(weight_of(linear.weight).codes).any(axis=(1, 2)).all() for linear in linears(model))
    assert all(isinstance(weight_of(linear.weight), Int8Weight) for linear in linears(model))


def test_adapters_freeze_all_else_and_saved_modules_stay_trained():
    model = add_lora(small_model("llama"), LoraConfig(r=4, modules_to_save="lm_head"))
    trained = {name for name in ("embedding", "lm_head") if is_trained(getattr(model, name))}
    assert trained == {"lm_head"}
    assert not any(is_trained(linear.weight) for linear in linears(model))
    assert not is_trained(model.norm.scale)
    assert not is_trained(model.blocks.attention_norm.scale)
    weight = weight_of(model.blocks.feed_forward.down.weight)
    assert isinstance(weight, DenseWeight)
    assert math.prod(weight.shape) * 4 == weight.nbytes


def test_a_module_to_save_is_trained_from_its_dense_form():
    model = small_model("llama")
    freeze(model, Int8Weight.of)
    dense = weight_of(model.lm_head).dense(jnp.float32)
    add_lora(model, LoraConfig(r=4, modules_to_save="lm_head"))
    np.testing.assert_array_equal(model.lm_head[...], dense)
    assert isinstance(weight_of(model.embedding), Int8Weight)


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["full", "offload", "none"])
@all_stores
def test_a_compiled_step_holds_one_dense_matrix_at_a_time(store, remat):
    """A step holds no more than with dense weights, where each matrix is copied together with its adapter factor."""
    config = dataclasses.replace(SHAPES["Qwen3-0.6B"], num_layers=8)

    def temporary_bytes(form) -> int:
        layers_only = lambda w, module: form(w, module) if w.ndim == 3 else DenseWeight(w)  # noqa: E731
        model = abstract_model(config, LoraConfig(r=16), store=layers_only)
        graph, trainable, frozen = nnx.split(model, TRAINED, ...)
        rows = PackedBatch(*4 * [jax.ShapeDtypeStruct((1, 4, 1024), jnp.int32)])
        step = jax.jit(
            functools.partial(loss_and_gradients, graph, remat=remat), compiler_options=compiler_options(remat)
        )
        return step.lower(trainable, frozen, rows).compile().memory_analysis().temp_size_in_bytes

    dense = temporary_bytes(store_dense)
    largest = 2 * 2 * config.intermediate_size * config.hidden_size  # gate and up, bfloat16
    assert temporary_bytes(STORES[store]) <= dense + largest // 2


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("store", [store_dense, nf4_store()], ids=["dense", "nf4"])
def test_parameters_count_alike_in_every_form_and_place(store, place):
    model = small_model("qwen3")
    want = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    freeze(model, store)
    move_to_host(model, layers=place == "host", embedding=place == "host")
    assert num_parameters(nnx.state(model)) == want
