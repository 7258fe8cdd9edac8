"""Tests that DoRA is PEFT's: logits, loss, gradients, files both ways, and merged weights."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import torch_bridge
from jaxpack import LoraConfig, Transformer, add_lora
from jaxpack.model.lora import adapters
from tests.torch_bridge import hf
from tests.torch_bridge.test_parity_vs_torch import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    assert_close,
    in_peft,
    jaxpack_step,
    torch_step,
)

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOLERANCE = 1e-4  # for float32 rounding, as between the base models
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LORA = {
    "all": LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "some": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="q_proj,o_proj,layers.1.mlp.down_proj"),
}


def with_dora(folder: str, lora: LoraConfig) -> Transformer:
    """Loads a checkpoint with adapters whose factors and magnitudes all matter."""
    model = add_lora(torch_bridge.from_pretrained(folder, dtype="float32")[0], lora)
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
        noise = 0.1 * jax.random.normal(jax.random.key(100 + i), adapter.magnitude.shape)
        adapter.magnitude.set_value(adapter.magnitude[...] * (1 + noise))
    return model


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("llama_biases-untied", "some"), pytest.param("qwen3-tied", "all", marks=pytest.mark.slow)],
)
def test_logits_loss_and_gradients_are_those_of_peft(checkpoint: str, name: str, tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "base", checkpoint)
    model = with_dora(folder, LORA[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys and unknown fields
        theirs = in_peft(model, base, tmp_path / "adapter")
    tokens = hf.random_tokens(2, 40)
    ours = np.asarray(model.logits(jnp.asarray(tokens)))
    np.testing.assert_allclose(ours, hf.logits(theirs, tokens), rtol=0, atol=TOLERANCE)
    actual, expected = jaxpack_step(model, "packed"), torch_step(theirs)
    assert abs(actual.loss - expected.loss) <= LOSS_TOLERANCE
    # PEFT's parameter has a `.weight` behind its name, which its files do not have.
    gradients = {key.replace("magnitude_vector.weight", "magnitude_vector"): x for key, x in expected.gradients.items()}
    assert_close(actual.gradients, gradients, GRADIENT_TOLERANCE)


def save_peft(base: torch.nn.Module, folder: Path, settings: dict[str, Any]) -> None:
    """Writes an adapter of PEFT whose factors and magnitudes all differ from their first values."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", use_dora=True, **settings)
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def test_an_adapter_of_peft_is_read_merged_and_written_to_the_byte(tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "base", "qwen3-tied")
    settings = {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1], "use_rslora": True}
    save_peft(base, tmp_path / "adapter", settings)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    torch_bridge.load_adapter(model, str(tmp_path / "adapter"))
    assert model.lora_config.use_dora
    fresh, _ = hf.save_model(tmp_path / "fresh", "qwen3-tied")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    tokens = hf.random_tokens(2, 40)
    np.testing.assert_allclose(model.logits(jnp.asarray(tokens)), hf.logits(theirs, tokens), rtol=0, atol=TOLERANCE)
    torch_bridge.save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()

    difference = torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32")
    assert difference < TOLERANCE
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for key, tensor in theirs.merge_and_unload().state_dict().items():
        if key in merged:
            np.testing.assert_allclose(merged[key], tensor, rtol=0, atol=1e-6, err_msg=key)


def test_magnitudes_start_as_peft_starts_them(tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "base", "llama-untied")
    model = add_lora(torch_bridge.from_pretrained(folder, dtype="float32")[0], LORA["all"])
    theirs = peft.get_peft_model(base, peft.LoraConfig(use_dora=True, target_modules="all-linear")).state_dict()
    for name, adapter in adapters(model).items():
        for layer in range(model.config.num_layers):
            (key,) = [key for key in theirs if f"layers.{layer}." in key and f"{name}.lora_magnitude" in key]
            np.testing.assert_allclose(adapter.magnitude[layer], theirs[key], rtol=1e-6)
