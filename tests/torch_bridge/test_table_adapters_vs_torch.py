"""Tests adapters of the embedding and the head against PEFT: logits, loss, gradients, files and merged models."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora, resize_vocab
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.kernels.token_log_probs import token_log_probs
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import segment_positions
from jaxpack.train.step import split_trainable
from tests.torch_bridge import hf

# PEFT calls deprecated functions of transformers, and warns of tied matrices and of copies that it saves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-4  # for float32 rounding, as between the base models
KINDS = ("llama-untied", "qwen3-tied", "gemma3-tied")  # the last one scales embeddings and caps logits
TARGETS = {"head": "lm_head,q_proj", "embedding": "embed_tokens,v_proj", "both": "lm_head,embed_tokens"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: hf.save_model(folder / name, name)[1] for name in KINDS}


def adapted(base: str, targets: str, **settings: Any) -> Transformer:
    """Adds adapters that change the logits; the embedding's and the head's have ranks of their own."""
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    ranks = {name: rank for name, rank in (("lm_head", 3), ("embed_tokens", 5)) if name in targets}
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern=ranks, **settings))
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    return model


def in_peft(base: str, adapter: Path, *, train: bool = False) -> Any:
    module = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(module, adapter, is_trainable=train).eval()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same_logits_and_so_does_the_merged_model(
    kind: str, targets: str, bases: dict[str, str], tmp_path: Path
):
    model, tokens = adapted(bases[kind], TARGETS[targets]), hf.random_tokens(2, 24)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    expected = np.asarray(model.logits(jnp.asarray(tokens)))
    without = np.asarray(torch_bridge.from_pretrained(bases[kind], dtype="float32")[0].logits(jnp.asarray(tokens)))
    assert np.abs(expected - without).max() > 100 * TOLERANCE, "the adapter does nothing"
    theirs = hf.logits(in_peft(bases[kind], tmp_path / "adapter"), tokens)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=TOLERANCE)

    back = torch_bridge.load_adapter(
        torch_bridge.from_pretrained(bases[kind], dtype="float32")[0], str(tmp_path / "adapter")
    )
    np.testing.assert_array_equal(back.logits(jnp.asarray(tokens)), expected)

    assert torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32") < TOLERANCE
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(hf.logits(merged, tokens), expected, rtol=0, atol=TOLERANCE)
    assert not merged.config.tie_word_embeddings
    assert model.config.tie_word_embeddings == (kind != "llama-untied"), "merging changed the model"


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_peft(kind: str, targets: str, bases: dict[str, str], tmp_path: Path):
    model, tokens = adapted(bases[kind], TARGETS[targets]), hf.random_tokens(2, 24)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    labels = np.where(np.random.default_rng(1).random(tokens.shape) < 0.3, -100, tokens)
    targets_of = np.concatenate([labels[:, 1:], np.full((2, 1), -100)], axis=1).astype(np.int32)
    graph, trainable, frozen = split_trainable(model)
    cap = model.config.final_logit_softcapping

    def loss(trainable: nnx.State, *, alone: bool) -> jax.Array:
        one, segments = nnx.merge(graph, trainable, frozen), jnp.ones(tokens.shape, jnp.int32)
        operands = one.head_operands(one(jnp.asarray(tokens), segments, segment_positions(segments)))
        if alone:
            return -jnp.sum(token_log_probs(*operands, jnp.asarray(targets_of), softcap=cap))
        return linear_cross_entropy(*operands, jnp.asarray(targets_of), softcap=cap, chunk=16)

    module = in_peft(bases[kind], tmp_path / "adapter", train=True)
    logits = module(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits
    flat = torch.from_numpy(targets_of.astype(np.int64)).reshape(-1)
    theirs = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), flat, reduction="sum")
    theirs.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    for alone in (False, True):
        ours, state = jax.jit(jax.value_and_grad(lambda t, alone=alone: loss(t, alone=alone)))(trainable)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)
        like = nnx.merge(graph, state, frozen)  # the gradients in the place of the factors
        found = torch_bridge.adapter.adapter_tensors(like)
        assert found.keys() == gradients.keys()
        for name, gradient in found.items():
            largest = np.abs(gradients[name]).max()
            assert largest > 0, name
            np.testing.assert_allclose(
                gradient, gradients[name], rtol=0, atol=TOLERANCE * max(1, largest), err_msg=name
            )


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_adapters_of_peft_are_read_and_written_again(kind: str, targets: str, bases: dict[str, str], tmp_path: Path):
    """PEFT writes a copy of each base matrix that has an adapter."""
    names, tokens = TARGETS[targets].split(","), hf.random_tokens(2, 24)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[kind])
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=names)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "adapter"))
    ours, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    torch_bridge.load_adapter(ours, str(tmp_path / "adapter"))
    np.testing.assert_allclose(ours.logits(jnp.asarray(tokens)), hf.logits(model, tokens), rtol=0, atol=TOLERANCE)
    torch_bridge.save_adapter(ours, tmp_path / "again")
    again, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert again.keys() == {name for name in before if "base_layer" not in name}
    assert all(torch.equal(again[name], before[name]) for name in again)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_resized_model_has_such_adapters_too(kind: str, bases: dict[str, str], tmp_path: Path):
    model = torch_bridge.from_pretrained(bases[kind], dtype="float32")[0]
    add_lora(resize_vocab(model, 101), LoraConfig(r=4, target_modules=TARGETS["both"]))
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    tokens = np.arange(77, 101)[None]
    expected = np.asarray(model.logits(jnp.asarray(tokens)))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(bases[kind])
    module.resize_token_embeddings(101)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").eval()
    np.testing.assert_allclose(hf.logits(loaded, tokens), expected, rtol=0, atol=TOLERANCE)
    back = torch_bridge.load_adapter(
        torch_bridge.from_pretrained(bases[kind], dtype="float32")[0], str(tmp_path / "adapter")
    )
    np.testing.assert_array_equal(back.logits(jnp.asarray(tokens)), expected)
    resize_vocab(back, 104)
    np.testing.assert_allclose(back.logits(jnp.asarray(tokens))[..., :101], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_adapter_that_peft_wrote_after_a_resizing_is_read(kind: str, bases: dict[str, str], tmp_path: Path):
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(bases[kind])
    module.resize_token_embeddings(101)
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head", "embed_tokens"])
    theirs = peft.get_peft_model(module, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    torch_bridge.load_adapter(model, str(tmp_path / "adapter"))
    tokens = np.arange(77, 101)[None]
    np.testing.assert_allclose(model.logits(jnp.asarray(tokens)), hf.logits(theirs, tokens), rtol=0, atol=TOLERANCE)


def test_a_copy_of_another_base_is_refused(bases: dict[str, str], tmp_path: Path):
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["llama-untied"])
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"])
    peft.get_peft_model(base, settings).save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.1
    save_file(tensors, path)
    with pytest.raises(InputError, match="must hold the base model's lm_head beside an adapter of it"):
        torch_bridge.load_adapter(torch_bridge.from_pretrained(bases["llama-untied"])[0], str(tmp_path / "adapter"))


def test_what_cannot_be_combined_is_refused(bases: dict[str, str]):
    def add(kind: str, **settings: Any) -> None:
        add_lora(torch_bridge.from_pretrained(bases[kind])[0], LoraConfig(r=4, **settings))

    with pytest.raises(InputError, match="`use_dora` must be off with lm_head in `target_modules`"):
        add("llama-untied", target_modules="lm_head", use_dora=True)
    with pytest.raises(InputError, match="must be without lm_head, because `modules_to_save` trains the same matrix"):
        add("llama-untied", target_modules="lm_head", modules_to_save="lm_head")
    with pytest.raises(InputError, match="must be without embed_tokens, because `modules_to_save`"):
        add("qwen3-tied", target_modules="embed_tokens,q_proj", modules_to_save="lm_head,embed_tokens")
    add("llama-untied", target_modules="embed_tokens,q_proj", modules_to_save="lm_head")
