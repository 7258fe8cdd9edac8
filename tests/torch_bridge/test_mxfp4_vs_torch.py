"""Tests that GPT-OSS' experts in MXFP4 are read as they are, and compute what transformers computes."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import torch_bridge
from jaxpack import InputError, LoraConfig, add_lora
from jaxpack.bench.models import abstract_model
from jaxpack.model.lora import adapters
from jaxpack.model.mxfp4 import MXFP4Weight
from jaxpack.model.nf4 import NF4Weight
from tests.torch_bridge import hf, mxfp4

TOKENS = hf.random_tokens(2, 60)
EXPERTS = ("gate_up", "down")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.PreTrainedModel, str]:
    return mxfp4.save(tmp_path_factory.mktemp("mxfp4") / "model")


def logits(model) -> np.ndarray:
    return np.asarray(model.logits(jnp.asarray(TOKENS)))


def test_experts_stay_in_mxfp4_and_decode_to_the_bits_of_transformers(saved):
    _, path = saved
    model, _ = torch_bridge.from_pretrained(path, dtype="bfloat16")
    tensors = load_file(Path(path) / mxfp4.WEIGHTS)
    for module, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        weight = getattr(model.blocks.feed_forward, module).weight.get_value()
        assert isinstance(weight, MXFP4Weight)
        for layer in range(model.config.num_layers):
            stored = f"model.layers.{layer}.mlp.experts.{name}"
            theirs = convert_moe_packed_tensors(tensors[f"{stored}_blocks"], tensors[f"{stored}_scales"])
            rows = theirs.transpose(1, 2)  # [E, out, in]
            if module == "gate_up":
                rows = torch.cat([rows[:, ::2], rows[:, 1::2]], dim=1)
            expected = rows.reshape(-1, rows.shape[2]).view(torch.int16).numpy()
            np.testing.assert_array_equal(np.asarray(weight.at(layer).dense(jnp.bfloat16)).view(np.int16), expected)


def test_logits_equal_transformers(saved):
    reference, path = saved
    model, _ = torch_bridge.from_pretrained(path, dtype="float32")
    expected = hf.logits(reference, TOKENS)
    assert expected.std() > 0.5, "a tolerance would say little"
    np.testing.assert_allclose(logits(model), expected, atol=1e-4, rtol=0)


def test_an_adapter_on_experts_is_merged_into_a_folder_that_transformers_reads(saved, tmp_path):
    _, path = saved
    model, _ = torch_bridge.from_pretrained(path, dtype="float32")
    add_lora(model, LoraConfig(r=4, target_parameters="gate_up_proj,down_proj"))
    for number, adapter in enumerate(adapters(model).values()):
        noise = np.random.default_rng(number).normal(size=adapter.lora_b.shape)
        adapter.lora_b.set_value(jnp.asarray(0.1 * noise, jnp.float32))
    torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    np.testing.assert_allclose(hf.logits(merged, TOKENS), logits(model), atol=1e-4, rtol=0)


def test_load_in_4bit_quantises_the_other_projections(saved):
    _, path = saved
    model, _ = torch_bridge.from_pretrained(path, dtype="float32", load_in_4bit=True)
    assert isinstance(model.blocks.attention.qkv.weight.get_value(), NF4Weight)
    assert isinstance(model.blocks.feed_forward.down.weight.get_value(), MXFP4Weight)


def test_a_prediction_without_weights_knows_their_bytes(saved):
    _, path = saved
    config, _ = torch_bridge.read_config(path)
    model, _ = torch_bridge.from_pretrained(path, dtype="bfloat16")
    planned = abstract_model(config, LoraConfig(r=4), store=torch_bridge.pretrained.described_store(path))
    for module in EXPERTS:
        weights = (getattr(one.blocks.feed_forward, module).weight.get_value() for one in (planned, model))
        assert len({weight.nbytes for weight in weights}) == 1


@pytest.mark.parametrize("lost", ["scales", "blocks"])
def test_a_folder_without_scales_or_codes_is_refused_by_name(lost, saved, tmp_path):
    _, path = saved
    tensors = load_file(Path(path) / mxfp4.WEIGHTS)
    del tensors[f"model.layers.1.mlp.experts.down_proj_{lost}"]
    save_file(tensors, tmp_path / mxfp4.WEIGHTS)
    (tmp_path / "config.json").write_text((Path(path) / "config.json").read_text())
    with pytest.raises(InputError, match=r"missing tensors \(model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"):
        torch_bridge.from_pretrained(str(tmp_path))


def test_mxfp4_of_another_family_is_refused(tmp_path):
    _, path = hf.save_model(tmp_path / "model", "qwen3-tied")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="got MXFP4"):
        torch_bridge.from_pretrained(path)
