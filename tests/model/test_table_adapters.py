"""Tests adapters of the embedding and the head in training, checkpoints and generation."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_documents, small_model

import torch_bridge
from jaxpack import LoraConfig, TrainConfig, Trainer, add_lora, generate
from jaxpack.data.packing import PackedBatch
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.model.lora import adapters, without_adapters
from jaxpack.model.transformer import Transformer, segment_positions
from jaxpack.model.weights import Frozen, move_to_host
from jaxpack.objectives.forward import Forward
from jaxpack.objectives.sft import SFT

BOTH = LoraConfig(r=4, lora_alpha=8, target_modules="lm_head,embed_tokens,q_proj")


def batch(rows: int = 1) -> PackedBatch:
    tokens = jax.random.randint(jax.random.key(0), (rows, 128), 0, 97)
    segments = jnp.ones((rows, 128), jnp.int32)
    return PackedBatch(tokens, segments, segment_positions(segments), jnp.roll(tokens, -1, axis=1))


def test_new_adapters_change_nothing_and_start_as_those_of_peft(family: str):
    model, tokens = small_model(family), jnp.arange(20)[None]
    before = model.logits(tokens)
    add_lora(model, BOTH)
    np.testing.assert_allclose(model.logits(tokens), before, rtol=0, atol=1e-6)
    head, embedding = (adapters(model)[name] for name in ("lm_head", "embed_tokens"))
    for adapter in (head, embedding):
        assert (adapter.lora_a.shape, adapter.lora_b.shape) == ((1, 4, 48), (1, 97, 4))
        assert not np.any(adapter.lora_b[...])
    assert np.abs(head.lora_a[...]).max() <= 1 / np.sqrt(48)
    assert 0.8 < np.std(embedding.lora_a[...]) < 1.2  # of 192 values: within five standard errors


def test_all_linear_leaves_both_out_and_a_pattern_may_name_them(family: str):
    assert not {"lm_head", "embed_tokens"} & adapters(add_lora(small_model(family), LoraConfig(r=2))).keys()
    pattern = LoraConfig(r=2, target_modules=".*(q_proj|lm_head)")
    assert adapters(add_lora(small_model(family), pattern)).keys() == {"q_proj", "lm_head"}
    without = LoraConfig(r=2, target_modules="q_proj,lm_head", exclude_modules="lm_head")
    assert adapters(add_lora(small_model(family), without)).keys() == {"q_proj"}
    layers = LoraConfig(r=2, target_modules="q_proj,lm_head", layers_to_transform=1)
    assert adapters(add_lora(small_model(family), layers)).keys() == {"q_proj"}, "PEFT leaves out the head, too"


def trainer(model: Transformer, **settings: Any) -> Trainer:
    config = TrainConfig(max_length=32, per_device_train_batch_size=4, learning_rate=1e-2, **settings)
    return Trainer(model, None, random_documents([20] * 8), config)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_run_trains_resumes_and_hands_on_the_adapters(family: str, dtype: Any, tmp_path: Path):
    settings = {"max_steps": 2, "save_steps": 1}

    def model() -> Transformer:
        return add_lora(small_model(family, dtype=dtype), BOTH)

    first = trainer(model(), output_dir=str(tmp_path / "run"), **settings)
    result = first.train()
    for name in ("lm_head", "embed_tokens"):
        assert np.abs(adapters(first.model)[name].lora_b[...]).max() > 1e-3
    again = trainer(model(), resume_from_checkpoint=str(tmp_path / "run/checkpoints/1"), **settings)
    np.testing.assert_array_equal(again.train().losses, result.losses)
    loaded = torch_bridge.load_adapter(small_model(family, dtype=dtype), str(tmp_path / "run/checkpoints/latest"))
    tokens = jnp.arange(20)[None]
    np.testing.assert_array_equal(loaded.logits(tokens), first.model.logits(tokens))


def test_generation_computes_with_both(family: str):
    model = small_model(family, lora=BOTH)
    for name in ("lm_head", "embed_tokens"):
        adapter = adapters(model)[name]
        adapter.lora_b.set_value(jax.random.normal(jax.random.key(7), adapter.lora_b.shape))
    prompt = [5, 9, 11]
    (written,) = generate(model, [prompt], max_new_tokens=4, temperature=0.0)
    expected = list(prompt)
    for _ in range(4):
        expected.append(int(jnp.argmax(model.logits(jnp.array([expected]))[0, -1])))
    assert written == expected[3:]
    (plain,) = generate(without_adapters(model), [prompt], max_new_tokens=4, temperature=0.0)
    assert plain != written


def test_dropout_acts_on_the_head_and_not_on_the_embedding(family: str):
    def loss(targets: str, key: int | None) -> float:
        model = small_model(family, lora=LoraConfig(r=4, target_modules=targets, lora_dropout=0.5))
        dropout_key = None if key is None else jax.random.key(key)
        return float(SFT()(Forward(model, batch(), dropout_key=dropout_key)).loss)

    assert len({loss("lm_head", key) for key in (None, 1, 2)}) == 3
    assert len({loss("embed_tokens", key) for key in (None, 1, 2)}) == 1


def test_scores_and_log_probabilities_are_those_of_the_logits(family: str):
    model, rows = small_model(family, lora=BOTH), batch(2)
    forward = Forward(model, rows)
    expected = jax.nn.log_softmax(model.logits(rows.tokens))
    picked = jnp.take_along_axis(expected, rows.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(forward.log_probs, picked, rtol=0, atol=1e-5)
    np.testing.assert_allclose(forward.scores.losses, -picked, rtol=0, atol=1e-5)
    np.testing.assert_allclose(SFT()(forward).loss, -picked.sum(), rtol=1e-5)
    plain = Forward(without_adapters(model), rows).log_probs
    np.testing.assert_array_equal(forward.reference_log_probs, plain)
    assert np.abs(plain - picked).max() > 1e-3


def test_a_head_with_an_adapter_stays_on_the_device(family: str):
    model = small_model(family, lora=LoraConfig(r=4, target_modules="lm_head"))
    move_to_host(model, embedding=True)
    assert isinstance(model.head_variable, Frozen)
    assert not isinstance(model.head_variable.get_value(), HostMatrix)
    other = small_model(family, lora=LoraConfig(r=4, target_modules="embed_tokens"))
    expected = other.logits(batch().tokens)
    move_to_host(other, embedding=True)
    assert isinstance(other.embedding.get_value(), HostMatrix)
    np.testing.assert_allclose(other.logits(batch().tokens), expected, rtol=0, atol=1e-6)
