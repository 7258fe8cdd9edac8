"""Tests that a run compiles its programs before a lazy model reads its weights, and is otherwise the same run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_model

import torch_bridge
from jaxpack import LoraConfig, TrainConfig, Trainer, add_lora, generate
from jaxpack.errors import InputError
from jaxpack.model.weights import Frozen, split_trained
from jaxpack.planning.choose import Choice
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import autotuning_bytes
from jaxpack.train.run import Run

OPTIONS = {"max_length": 128, "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "packing": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    torch_bridge.save_pretrained(small_model("qwen3"), path)
    return str(path)


def read(folder: str, *, lazy: bool, **options):
    return torch_bridge.from_pretrained(folder, dtype="float32", lazy=lazy, **options)[0]


def abstract(model) -> list:
    return [leaf for leaf in jax.tree.leaves(nnx.state(model, Frozen)) if isinstance(leaf, jax.ShapeDtypeStruct)]


def trained(model, **changes):
    trainer = Trainer(model, None, random_documents([60, 50, 40, 30, 20]), TrainConfig(**OPTIONS | changes))
    return trainer.train().losses, jax.tree.leaves(split_trained(model)[1])


@pytest.mark.parametrize("load_in_4bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lazy_model_trains_as_one_that_was_read_at_once(folder, load_in_4bit, monkeypatch):
    order = []
    compiled, was_read = Run.compile, Run.read_weights
    monkeypatch.setattr(
        Run, "compile", lambda run, cache, **more: order.append(len(abstract(lazy))) or compiled(run, cache, **more)
    )
    monkeypatch.setattr(Run, "read_weights", lambda run, cache: order.append("read") or was_read(run, cache))
    lazy, at_once = (
        add_lora(read(folder, lazy=lazy, load_in_4bit=load_in_4bit), LoraConfig(r=4)) for lazy in (True, False)
    )
    frozen = len(jax.tree.leaves(nnx.state(lazy, Frozen)))
    losses, parameters = trained(lazy)
    assert order == [frozen, "read"]  # No frozen array was there when the programs were compiled.
    assert not abstract(lazy)
    want, want_parameters = trained(at_once)
    np.testing.assert_array_equal(losses, want)
    for got, expected in zip(parameters, want_parameters, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_whoever_needs_the_weights_reads_them(folder, tmp_path):
    want = read(folder, lazy=False)
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(read(folder, lazy=True).logits(tokens), want.logits(tokens))
    assert generate(read(folder, lazy=True), [[3, 4]], max_new_tokens=3) == generate(want, [[3, 4]], max_new_tokens=3)
    torch_bridge.save_pretrained(read(folder, lazy=True), tmp_path / "copy")
    np.testing.assert_array_equal(read(str(tmp_path / "copy"), lazy=False).logits(tokens), want.logits(tokens))
    whole = add_lora(read(folder, lazy=True), LoraConfig(r=4, modules_to_save=("embed_tokens", "lm_head")))
    assert not abstract(whole)
    losses, _ = trained(read(folder, lazy=True), max_steps=1)  # All weights are trained.
    assert np.isfinite(losses).all()


def test_the_search_for_kernels_is_predicted_without_weights_that_are_read_later():
    model = add_lora(small_model("qwen3"), LoraConfig(r=4))
    step = StepShape.of(model, (1, 2, 128))
    later = dataclasses.replace(step, compiles_first=True)
    assert autotuning_bytes(step) - autotuning_bytes(later) == step.frozen_bytes


def test_a_step_that_does_not_fit_beside_the_weights_takes_the_next_choice(folder, monkeypatch, capsys):
    # Before the weights are read, any program fits; after that, only one of the second choice.
    choices = [Choice("none"), Choice("full")]
    monkeypatch.setattr("jaxpack.train.run.choices", lambda *_, **__: list(choices))
    monkeypatch.setattr(
        Run,
        "_shortage",
        lambda run, program, shape: "a step lacks memory" if run.remat == "none" and not abstract(run._model) else None,
    )
    losses, _ = trained(add_lora(read(folder, lazy=True), LoraConfig(r=4)))
    said = capsys.readouterr().err
    assert 'remat "none" does not fit: a step lacks memory' in said
    assert 'the run takes remat "full"' in said
    assert len(losses) == 3
    choices.pop()
    with pytest.raises(InputError, match="a step lacks memory"):
        trained(add_lora(read(folder, lazy=True), LoraConfig(r=4)))
