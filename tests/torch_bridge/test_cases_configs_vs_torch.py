"""Tests of fields of `config.json` that some programs write, leave out, or read in another way than others do."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import small_config, small_model
from safetensors.numpy import load_file, save_file

import torch_bridge
from jaxpack import InputError
from tests.torch_bridge import hf
from torch_bridge.config_json import config_from_hf, config_to_hf


def edited(folder: Path, change: dict[str, Any], drop: tuple[str, ...] = ()) -> str:
    """Changes fields of a folder's `config.json`, and returns the folder's path."""
    fields = json.loads((folder / "config.json").read_text()) | change
    fields = {name: value for name, value in fields.items() if name not in drop}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


# Fields of transformers 4 beside those of version 5.


@pytest.mark.parametrize("family", sorted(set(hf.FAMILIES) - {"llama_longrope"}))
def test_the_fields_of_both_versions_say_the_same(family: str):
    """A Llama with LongRoPE is left out: version 4 passes over its factor."""
    model = hf.make_model(f"{family}-untied")
    config = config_from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
    fields = config_to_hf(config)
    without = {name: value for name, value in fields.items() if name != "rope_parameters"}
    assert config_from_hf(without) == config_from_hf(fields) == config


FOLDERS = ("qwen3-untied", "llama3-untied", "gemma3-tied", "phi4_mini-tied")


@pytest.fixture(scope="module", params=FOLDERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that we wrote, with the fields of both versions. Tests restore its `config.json`."""
    folder = tmp_path_factory.mktemp("saved")
    model, _ = torch_bridge.from_pretrained(hf.save_model(folder / "base", request.param)[1], dtype="float32")
    torch_bridge.save_pretrained(model, folder / "model")
    return folder / "model"


@pytest.fixture
def config(saved: Path):
    text = (saved / "config.json").read_text()
    yield json.loads(text)
    (saved / "config.json").write_text(text)


def test_verify_accepts_a_folder_that_both_versions_read(saved: Path, capsys: pytest.CaptureFixture):
    assert torch_bridge.verify(str(saved)) < 1e-4
    assert "transformers 4" not in capsys.readouterr().err


def test_verify_refuses_another_theta_or_none(saved: Path, config: dict[str, Any]):
    message = (
        r"must describe the same RoPE to transformers 4 and 5, got .*takes .*theta=.*theta=.*Write the folder again"
    )
    with pytest.raises(InputError, match=message):
        torch_bridge.verify(edited(saved, {"rope_theta": 3e4}))
    with pytest.raises(InputError, match="got one from which transformers 4 takes an error"):
        torch_bridge.verify(edited(saved, {"rope_theta": "a million"}))
    if config["rope_theta"] not in (1e4, 1e6):  # the defaults of the families
        with pytest.raises(InputError, match=message):
            torch_bridge.verify(edited(saved, config, drop=("rope_theta",)))


def test_verify_refuses_another_scaling_or_none(saved: Path, config: dict[str, Any]):
    if config["rope_scaling"] is None:
        pytest.skip("a model without a scaling")
    with pytest.raises(InputError, match="must describe the same RoPE to transformers 4 and 5"):
        torch_bridge.verify(edited(saved, {}, drop=("rope_scaling",)))
    with pytest.raises(InputError, match=r"must describe the same RoPE|must agree with `rope_parameters`"):
        torch_bridge.verify(edited(saved, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))


def test_verify_refuses_two_dtypes(saved: Path, config: dict[str, Any]):
    with pytest.raises(InputError, match=r"`torch_dtype` and `dtype` .* must be the same.*'float16' and 'float32'"):
        torch_bridge.verify(edited(saved, {"torch_dtype": "float16"}))
    assert torch_bridge.verify(edited(saved, {"torch_dtype": "torch.float32"})) < 1e-4


def test_verify_warns_of_a_folder_for_transformers_5_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, folder = hf.save_model(tmp_path, "qwen3-tied")
    edited(tmp_path, {}, drop=("rope_theta", "rope_scaling", "torch_dtype"))
    assert torch_bridge.verify(folder) < 1e-4
    said = " ".join(capsys.readouterr().err.split())
    assert "only transformers 5 reads config.json as it is meant: transformers 4 takes" in said
    assert "theta=10000" in said
    assert "theta=1000000" in said


# A config without `architectures`.


@pytest.mark.parametrize("missing", [{}, {"architectures": None}, {"architectures": []}], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma2", "gemma3"])
def test_the_model_type_stands_in_for_the_architecture(family: str, missing: dict[str, Any]):
    model = hf.make_model(f"{family}-tied")
    fields = model.config.to_dict()
    expected = config_from_hf(fields | {"architectures": [type(model).__name__]})
    assert config_from_hf({name: fields[name] for name in fields if name != "architectures"} | missing) == expected


def test_a_folder_without_architectures_is_read_and_written_with_them(tmp_path: Path):
    hf.save_model(tmp_path / "base", "qwen2-tied")
    model, _ = torch_bridge.from_pretrained(edited(tmp_path / "base", {}, drop=("architectures",)), dtype="float32")
    torch_bridge.save_pretrained(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert torch_bridge.verify(str(tmp_path / "model")) < 1e-4


@pytest.mark.parametrize("model_type", ["gpt2", None, ["qwen3"]], ids=str)
def test_an_unknown_model_type_is_refused_with_the_known_ones(model_type: Any):
    with pytest.raises(InputError, match=r"`architectures` must be .*or `model_type` one of .*'qwen3'.*got None and"):
        config_from_hf({"model_type": model_type, "vocab_size": 7})


# Tensors that the model does not need.


SURPLUS = {
    "model.rotary_emb.inv_freq": np.ones(4, np.float64),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(10, np.float64),
    "model.embed_positions": np.ones(3, np.int64),
    "model.layers.0.attn.masked_bias": np.array([True, False]),
    "model.calibration": np.ones((2, 3), np.uint8),
}


@pytest.mark.parametrize("name", SURPLUS)
def test_an_ignored_tensor_of_another_dtype_does_not_refuse_a_file(name: str, tmp_path: Path):
    model = small_model("llama")
    torch_bridge.save_pretrained(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {name: SURPLUS[name]}, file)
    read, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32")
    tokens = jnp.asarray(hf.random_tokens(1, 9))
    np.testing.assert_array_equal(read.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize("name", SURPLUS)
def test_an_ignored_tensor_of_another_dtype_does_not_refuse_a_file_of_torch(name: str, tmp_path: Path):
    theirs, folder = hf.save_model(tmp_path, "llama-untied")
    (tmp_path / "model.safetensors").unlink()
    surplus = torch.from_numpy(SURPLUS[name])
    torch.save(theirs.state_dict() | {name: surplus}, tmp_path / "pytorch_model.bin")
    read, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    tokens = hf.random_tokens(1, 9)
    np.testing.assert_allclose(read.logits(jnp.asarray(tokens)), hf.logits(theirs, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8"])
def test_a_tensor_of_the_model_of_another_dtype_is_refused_by_name(dtype: str, tmp_path: Path):
    torch_bridge.save_pretrained(small_model("llama"), tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].astype(dtype)}, file)
    code = {"float64": "F64", "int32": "I32", "uint8": "U8"}[dtype]
    with pytest.raises(InputError, match=f"1 tensor that cannot be read \\({name} of dtype {code}\\)"):
        torch_bridge.from_pretrained(str(tmp_path / "model"))


# Quantised models.


SIBLINGS = {
    "unsloth/Qwen3-4B-bnb-4bit": "unsloth/Qwen3-4B",
    "unsloth/Qwen3-4B-unsloth-bnb-4bit": "unsloth/Qwen3-4B",
    "unsloth/phi-4-bnb-4bit": "unsloth/phi-4",
    "Qwen/Qwen3-8B-AWQ": "Qwen/Qwen3-8B",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-0.6B-FP8": "Qwen/Qwen3-0.6B",
    "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ": "mistralai/Mistral-7B-Instruct-v0.2",
    "RedHatAI/Qwen3-4B-quantized.w4a16": "Qwen/Qwen3-4B",
    "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV": "meta-llama/Meta-Llama-3-8B-Instruct",
    "someone/gemma-2-2b-it-gptq-4bit-128g": "someone/gemma-2-2b-it",
    "mlx-community/Qwen3-4B-4bit-DWQ": "Qwen/Qwen3-4B",
    "someone/Llama-3.2-1B-MXFP4": "someone/Llama-3.2-1B",
    "/data/models/Qwen3-4B-bnb-4bit": "Qwen3-4B",
    "./Qwen3-4B-bnb-4bit": "Qwen3-4B",
    "/cache/huggingface/hub/models--unsloth--Qwen3-4B-bnb-4bit/snapshots/0123abc": "unsloth/Qwen3-4B",
}
_TYPES = {"Mistral": "mistral", "Llama": "llama", "gemma": "gemma2"}


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_quantised_base_names_its_16_bit_sibling(name: str):
    family = next((family for word, family in _TYPES.items() if word in name), "qwen3")
    fields = config_to_hf(small_config("qwen3")) | {"quantization_config": {"quant_method": "x"}}
    architecture = {"qwen3": "Qwen3", "mistral": "Mistral", "llama": "Llama", "gemma2": "Gemma2"}[family]
    fields |= {"model_type": family, "architectures": [f"{architecture}ForCausalLM"]}
    with pytest.raises(InputError, match=r"`quantization_config` must be null.*'quant_method'") as refused:
        config_from_hf(fields, name)
    assert f"probably {SIBLINGS[name]!r}." in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"_name_or_path": "Qwen/Qwen3-4B"}, "mine/best-model", "probably 'Qwen/Qwen3-4B'"),
        ({"_name_or_path": "Qwen/Qwen3-4B-AWQ"}, "best-model", "probably 'Qwen/Qwen3-4B'"),
        ({"quantization_config": {"model_name_or_path": "Qwen/Qwen3-4B"}}, "best", "probably 'Qwen/Qwen3-4B'"),
        ({"_name_or_path": "/home/me/x"}, "mine/Qwen3-4B-nf4", "probably 'mine/Qwen3-4B'"),
        ({}, "mine/best-model", "the model's card on the hub names it as its base model"),
        ({"_name_or_path": "mine/best-model"}, "mine/best-model", "the model's card on the hub"),
        ({"_name_or_path": 7}, "", "the model's card on the hub"),
        ({"_name_or_path": "a" * 10**6}, "-" * 10**6, "the model's card on the hub"),
        ({"quantization_config": None, "quantization": {"bits": 4}}, "mlx-community/Qwen3-4B-4bit", "'Qwen/Qwen3-4B'"),
    ],
    ids=range(9),
)
def test_a_quantised_base_of_another_name_says_where_to_look(fields: dict[str, Any], name: str, expected: str):
    fields = config_to_hf(small_config("qwen3")) | {"quantization_config": {"quant_method": "awq"}} | fields
    with pytest.raises(InputError, match=re.escape(expected)):
        config_from_hf(fields, name)


@pytest.mark.parametrize("ending", ["qweight", "weight_packed"])
def test_weights_that_are_quantised_without_a_word_in_the_config_are_recognised(ending: str, tmp_path: Path):
    folder = tmp_path / "Qwen3-4B-GPTQ"
    torch_bridge.save_pretrained(small_model("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.{ending}"] = tensors.pop(f"{name}.weight").astype(np.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing tensor .*probably 'Qwen3-4B'"):
        torch_bridge.from_pretrained(str(folder))
