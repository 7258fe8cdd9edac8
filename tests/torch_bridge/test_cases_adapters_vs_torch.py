"""Tests that all adapters that are ordinary LoRA are read, and give PEFT's logits, however they were made and saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import torch_bridge
from jaxpack import InputError, TrainConfig, Trainer, Transformer
from jaxpack.model.lora import adapters
from jaxpack.model.weights import weight_of
from tests.torch_bridge import hf

# PEFT calls deprecated functions of transformers, and warns of adapters that it cannot merge.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-4  # for float32 rounding, as between the base models
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SOME = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns folders of base models, one with a head of its own and one whose head is its embedding."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: hf.save_model(folder / name, name)[1] for name in ("llama-untied", "qwen3-tied")}


def trained(base: str, folder: Path, settings: dict[str, Any], **saving: Any) -> Path:
    """Writes an adapter of PEFT whose trained tensors all differ from their first values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **saving)
    return folder


def edit(adapter: Path, change: dict[str, Any]) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | change))


def rename(adapter: Path, new: Callable[[str], str]) -> None:
    tensors = {new(name): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)


def peft_logits(base: str, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return hf.logits(peft.PeftModel.from_pretrained(model, adapter).eval(), tokens)


def same_as_peft(base: str, adapter: Path) -> Transformer:
    """Reads an adapter, requires PEFT's logits, and returns the model."""
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    tokens = hf.random_tokens(2, 24)
    without = np.asarray(model.logits(jnp.asarray(tokens)))
    torch_bridge.load_adapter(model, str(adapter))
    ours, theirs = np.asarray(model.logits(jnp.asarray(tokens))), peft_logits(base, adapter, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    assert np.abs(ours - without).max() > 100 * TOLERANCE, "the adapter does nothing"
    return model


READ: dict[str, dict[str, Any]] = {
    "eva": {"init_lora_weights": "eva"},
    "eva with its config": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "all layers": {"layers_to_transform": [1, 0]},
    "all layers and more": {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"},
    "all layers of lists": {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    "no layers": {"layers_to_transform": []},
    "one layer": {"layers_to_transform": [1], "rank_pattern": {"v_proj": 2}},
    "one layer as a number": {"layers_to_transform": 0},
    "excluded in one layer": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "paths of modules": {"target_modules": ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "v_proj"]},
    "excluded": {"exclude_modules": ["v_proj"]},
    "excluded by a pattern": {"exclude_modules": r".*\.(v_proj|lm_head)"},
    "excluded from all": {"target_modules": "all-linear", "exclude_modules": ["mlp.down_proj", "k_proj"]},
    "excluded head": {"target_modules": r".*(q_proj|head)", "exclude_modules": ["lm_head"]},
    "excluded nothing": {"exclude_modules": ["c_attn"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "names of other models": {"target_modules": ["q_proj", "c_attn", "query_key_value"]},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", READ)
def test_ordinary_adapters_are_read(name: str, bases: dict[str, str], tmp_path: Path):
    adapter = trained(bases["llama-untied"], tmp_path / "adapter", {"target_modules": SOME} | READ[name])
    model = same_as_peft(bases["llama-untied"], adapter)
    torch_bridge.save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_an_adapter_in_a_file_of_torch_is_read(bases: dict[str, str], tmp_path: Path):
    base, settings = bases["llama-untied"], {"target_modules": SOME, "modules_to_save": ["lm_head"]}
    adapter = trained(base, tmp_path / "adapter", settings, safe_serialization=False)
    assert not (adapter / WEIGHTS).exists()
    same_as_peft(base, adapter)
    tensors = torch.load(adapter / "adapter_model.bin")
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, adapter / "adapter_model.bin")
    same_as_peft(base, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"adapter_model.bin must be a file"):
        torch_bridge.load_adapter(torch_bridge.from_pretrained(base)[0], str(adapter))


def test_a_safetensors_file_is_read_rather_than_one_of_torch(bases: dict[str, str], tmp_path: Path):
    adapter = trained(bases["llama-untied"], tmp_path / "adapter", {"target_modules": SOME})
    (adapter / "adapter_model.bin").write_bytes(b"no pickle")
    same_as_peft(bases["llama-untied"], adapter)


def test_names_without_the_prefix_of_peft_are_read(bases: dict[str, str], tmp_path: Path):
    base, settings = bases["llama-untied"], {"target_modules": SOME, "modules_to_save": ["embed_tokens"]}
    adapter = trained(base, tmp_path / "adapter", settings)
    expected = same_as_peft(base, adapter)
    rename(adapter, lambda name: name.removeprefix("base_model.model."))
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    torch_bridge.load_adapter(model, str(adapter))
    tokens = jnp.asarray(hf.random_tokens(1, 24))
    np.testing.assert_array_equal(model.logits(tokens), expected.logits(tokens))
    tensors = load_file(adapter / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {f"base_model.model.{name}": tensors[name] + 1}, adapter / WEIGHTS)
    with pytest.raises(InputError, match="must hold each tensor once, got some with the prefix"):
        torch_bridge.load_adapter(torch_bridge.from_pretrained(base)[0], str(adapter))


# Copies of the embedding and the head beside the adapters (`save_embedding_layers`).


@pytest.mark.parametrize("kind", ["llama-untied", "qwen3-tied"])
def test_unchanged_copies_of_the_embedding_are_passed_over(kind: str, bases: dict[str, str], tmp_path: Path):
    adapter = trained(bases[kind], tmp_path / "adapter", {"target_modules": SOME}, save_embedding_layers=True)
    names = [name for name in load_file(adapter / WEIGHTS) if "lora_" not in name]
    assert len(names) == 2
    model = same_as_peft(bases[kind], adapter)
    assert model.lora_config is not None
    assert model.lora_config.modules_to_save == ()
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(rounded, adapter / WEIGHTS)  # as a run in bfloat16 saves them
    model, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    assert torch_bridge.load_adapter(model, str(adapter)).lora_config.modules_to_save == ()


@pytest.mark.parametrize(
    ("kind", "changed", "whole"),
    [
        ("llama-untied", ["lm_head"], ("lm_head",)),
        ("llama-untied", ["model.embed_tokens"], ("embed_tokens",)),
        ("qwen3-tied", ["model.embed_tokens", "lm_head"], ("embed_tokens", "lm_head")),
    ],
    ids=str,
)
def test_changed_copies_are_read_and_kept(
    kind: str, changed: list[str], whole: tuple, bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    adapter = trained(bases[kind], tmp_path / "adapter", {"target_modules": SOME}, save_embedding_layers=True)
    tensors = load_file(adapter / WEIGHTS)
    for name in changed:
        tensors[f"base_model.model.{name}.weight"] += 0.1
    save_file(tensors, adapter / WEIGHTS)
    model = same_as_peft(bases[kind], adapter)
    assert model.lora_config.modules_to_save == whole
    assert "beside the adapters differ from the base model's" in " ".join(capsys.readouterr().err.split())
    torch_bridge.save_adapter(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == tensors.keys() - {
        f"base_model.model.{name}.weight" for name in {"model.embed_tokens", "lm_head"} - set(changed)
    }


def test_one_changed_copy_of_a_tied_matrix_changes_both(bases: dict[str, str], tmp_path: Path):
    base = bases["qwen3-tied"]
    adapter = trained(base, tmp_path / "adapter", {"target_modules": SOME}, save_embedding_layers=True)
    tensors = load_file(adapter / WEIGHTS)
    del tensors["base_model.model.lm_head.weight"]
    tensors["base_model.model.model.embed_tokens.weight"] += 0.1
    save_file(tensors, adapter / WEIGHTS)
    assert same_as_peft(base, adapter).config.tie_word_embeddings


def test_a_changed_copy_beside_a_trained_matrix_is_the_other_matrix(bases: dict[str, str], tmp_path: Path):
    """The adapter then holds two matrices that differ, one of them under a name that its config does not mention."""
    settings = {"target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = trained(bases["qwen3-tied"], tmp_path / "adapter", settings)
    expected = same_as_peft(bases["qwen3-tied"], adapter)
    edit(adapter, {"modules_to_save": ["embed_tokens"]})
    model, _ = torch_bridge.from_pretrained(bases["qwen3-tied"], dtype="float32")
    torch_bridge.load_adapter(model, str(adapter))
    tokens = jnp.asarray(hf.random_tokens(1, 24))
    np.testing.assert_array_equal(model.logits(tokens), expected.logits(tokens))


# A head and an embedding that the base ties, and that training has driven apart.


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids=str)
def test_tied_matrices_that_were_trained_apart_are_read(
    saved: list[str], bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = bases["qwen3-tied"]
    adapter = trained(base, tmp_path / "adapter", {"target_modules": SOME, "modules_to_save": saved})
    model = same_as_peft(base, adapter)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the head and the embedding were trained apart, although the base model ties them") == 1
    assert not model.config.tie_word_embeddings
    torch_bridge.save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    same_as_peft(base, tmp_path / "again")


@pytest.mark.slow
def test_a_model_that_was_untied_is_merged_and_trained(bases: dict[str, str], tmp_path: Path):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = same_as_peft(bases["qwen3-tied"], trained(bases["qwen3-tied"], tmp_path / "adapter", settings))
    torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32")
    tokens = hf.random_tokens(2, 24)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(hf.logits(merged, tokens), model.logits(jnp.asarray(tokens)), rtol=0, atol=TOLERANCE)
    rows = [{"input_ids": document.tokens, "labels": document.labels} for document in hf.random_documents([20] * 4)]
    config = TrainConfig(max_steps=1, learning_rate=1e-2, max_length=32, per_device_train_batch_size=4)
    head, embedding = np.array(model.lm_head[...]), np.array(weight_of(model.embedding).dense(jnp.float32))
    assert np.isfinite(Trainer(model, None, rows, config).train().losses).all()
    assert (np.asarray(model.lm_head[...]) != head).any()
    np.testing.assert_array_equal(weight_of(model.embedding).dense(jnp.float32), embedding)


def test_tied_matrices_that_are_equal_stay_tied(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture):
    settings = {"target_modules": SOME, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = trained(bases["qwen3-tied"], tmp_path / "adapter", settings)
    edit(adapter, {"ensure_weight_tying": False, "modules_to_save": ["embed_tokens", "lm_head"]})
    assert same_as_peft(bases["qwen3-tied"], adapter).config.tie_word_embeddings
    assert "apart" not in capsys.readouterr().err
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] += 0.1
    save_file(tensors, adapter / WEIGHTS)
    edit(adapter, {"ensure_weight_tying": True})
    with pytest.raises(InputError, match=r"must hold the same matrix .* because of `ensure_weight_tying`"):
        torch_bridge.load_adapter(torch_bridge.from_pretrained(bases["qwen3-tied"])[0], str(adapter))


# Adapters that are refused: each refusal says what to do.


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, r"`init_lora_weights`.*path_initial_model_for_weight_conversion"),
    "fast pissa": ({"init_lora_weights": "pissa_niter_4"}, r"subtracted from the base.*set the field to true"),
    "olora": ({"init_lora_weights": "olora"}, r"`init_lora_weights`.*path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, r"`init_lora_weights`.*path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, r"`init_lora_weights`.*path_initial_model_for_weight_conversion"),
    "loftq": ({"init_lora_weights": "loftq"}, r"PEFT quantises the base weights.*Merge the adapter with PEFT"),
    "unknown start": ({"init_lora_weights": "zeros"}, r"`init_lora_weights`.*'zeros'.*Merge the adapter with PEFT"),
    "magnitudes that are missing": (
        {"use_dora": True},
        r"6 missing tensors .*lora_magnitude_vector.*Use the base model",
    ),
    "a layer of two": (
        {"layers_to_transform": 0},
        r"with its `layers_to_transform`.*6 tensors that.*Use the base model",
    ),
    "no such layer": ({"layers_to_transform": 2}, r"`layers_to_transform`.*must match at least one projection"),
    "layers by name": ({"layers_to_transform": ["0"]}, r"`layers_to_transform`.*must be a list.*Correct the file"),
    "another list": ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, r"`layers_pattern`.*Correct the file"),
    "layers of a pattern": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0, 1]},
        r"`layers_to_transform`.*must be null beside a pattern.*Correct the file",
    ),
    "all excluded": ({"exclude_modules": SOME}, r"`exclude_modules`.*must match at least one projection.*Use the base"),
    "excluded though there": ({"exclude_modules": ["v_proj"]}, r"with its `exclude_modules`.*Use the base model"),
    "exclusion of a number": ({"exclude_modules": [7]}, r"`exclude_modules`.*Correct the file"),
    "an exclusion that is no pattern": ({"exclude_modules": "("}, r"`exclude_modules`.*regular expressions"),
    "head": ({"target_modules": [*SOME, "lm_head"]}, r"2 missing tensors .*lm_head.lora_A.*Use the base model"),
    "bias": ({"bias": "all"}, r"`bias`.*Merge the adapter with PEFT"),
    "whole norms": ({"modules_to_save": ["norm"]}, r"`modules_to_save`.*Merge the adapter with PEFT"),
    "ranks of layers": ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, r"`rank_pattern`.*Merge"),
}


@pytest.fixture(scope="module")
def ordinary(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    """Returns a model and an adapter for it. Tests share the model, since refused adapters leave it unchanged."""
    adapter = trained(bases["llama-untied"], tmp_path_factory.mktemp("ordinary") / "adapter", {"target_modules": SOME})
    return torch_bridge.from_pretrained(bases["llama-untied"], dtype="float32")[0], adapter


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_to_do(name: str, ordinary: tuple[Transformer, Path], tmp_path: Path):
    model, adapter = ordinary
    shutil.copytree(adapter, tmp_path / "changed")
    change, message = REFUSED[name]
    edit(tmp_path / "changed", change)
    with pytest.raises(InputError, match=message):
        torch_bridge.load_adapter(model, str(tmp_path / "changed"))
    assert adapters(model) == {}


def test_a_converted_pissa_adapter_is_read(bases: dict[str, str], tmp_path: Path):
    """The refusal of PiSSA names this way out: PEFT's conversion gives an ordinary adapter with the same results."""
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["llama-untied"])
    settings = {"target_modules": SOME, "init_lora_weights": "pissa", "r": 4, "lora_alpha": 8}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    tokens = hf.random_tokens(2, 24)
    expected = hf.logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = same_as_peft(bases["llama-untied"], tmp_path / "converted")
    np.testing.assert_allclose(ours.logits(jnp.asarray(tokens)), expected, rtol=0, atol=1e-3)
