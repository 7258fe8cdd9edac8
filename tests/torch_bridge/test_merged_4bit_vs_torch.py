"""Tests merges of 4-bit models against transformers, PEFT and bitsandbytes."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

import torch_bridge
from jaxpack import LoraConfig, Transformer, add_lora
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.weights import MixedWeight, freeze, weight_of
from tests.torch_bridge import hf, nf4
from tests.torch_bridge.nf4 import bnb

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT calls deprecated functions of transformers
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear"),
]


def trained(base: str, *, freezes: bool = True) -> Transformer:
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    if freezes:
        freeze(model, nf4_store(nested=False))  # bitsandbytes on a CPU looks nested magnitudes up approximately
    add_lora(model, LoraConfig(r=4, lora_alpha=8))
    rng = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.LoRAParam):
            parameter.set_value(parameter[...] + rng.normal(0, 0.1, parameter.shape).astype(np.float32))
    return model


@pytest.mark.parametrize("checkpoint", ["qwen3-tied", pytest.param("phi3-untied", marks=pytest.mark.slow)])
def test_a_merge_into_the_dequantised_weights_is_pefts(checkpoint: str, tmp_path: Path):
    """The merged folder computes what PEFT does with the adapter beside bitsandbytes' weights.

    PEFT's own merge quantises the sum again: so does bitsandbytes with the merged weights, to the same codes.
    """
    _, base = hf.save_model(tmp_path / "base", checkpoint)
    model = trained(base)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    assert torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32") < 1e-4
    config = nf4.config(bnb_4bit_use_double_quant=False)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, **options)
    theirs = peft.PeftModel.from_pretrained(quantised, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **options).eval()
    tokens = hf.random_tokens(2, 40)
    expected = hf.logits(theirs, tokens)
    np.testing.assert_allclose(hf.logits(merged, tokens), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(model.logits(jnp.asarray(tokens))), expected, rtol=0, atol=1e-4)

    ours, compared = load_file(tmp_path / "merged" / "model.safetensors"), 0
    for name, module in theirs.merge_and_unload().named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            codes, _ = bnb.functional.quantize_4bit(ours[f"{name}.weight"], quant_type="nf4")
            same = (codes.view(-1) == module.weight.data.view(torch.uint8).view(-1)).float().mean()
            assert same > 0.999, name  # a sum that lies between two codes may be rounded to either
            compared += 1
    assert compared == 2 * {"qwen3-tied": 7, "phi3-untied": 4}[checkpoint]


def test_a_merge_into_the_base_is_pefts_with_the_base(tmp_path: Path):
    reference, base = hf.save_model(tmp_path / "base", "llama-untied")
    model = trained(base)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32", base=base)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_folder_in_4_bits_with_a_layer_in_16_is_merged_into_either_base(tmp_path: Path):
    folder = nf4.save(tmp_path, "qwen3-tied", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"])
    model = trained(folder, freezes=False)
    assert isinstance(weight_of(model.blocks.feed_forward.down.weight), MixedWeight)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    assert torch_bridge.base_of(str(tmp_path / "adapter")) == folder
    assert torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32") < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    tokens = hf.random_tokens(2, 40)
    theirs = peft.PeftModel.from_pretrained(nf4.load(folder), tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(hf.logits(merged, tokens), hf.logits(theirs, tokens), rtol=0, atol=1e-4)

    base = str(tmp_path / "base")
    torch_bridge.save_merged(model, tmp_path / "other", dtype="float32", base=base)
    reference = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "other" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-6, err_msg=name)
