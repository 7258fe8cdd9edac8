"""Tests that trained weights that are not finite are never saved or generated from."""

import jax.numpy as jnp
import pytest
from models import small_model
from safetensors.numpy import load_file, save_file
from short_runs import LORA

import jaxpack
import torch_bridge
from jaxpack import InputError
from jaxpack.model.lora import adapters

VALUES = pytest.mark.parametrize("value", [jnp.nan, jnp.inf], ids=["nan", "inf"])


def spoiled_adapter(value):
    model = small_model("qwen3", lora=LORA)
    factor = adapters(model)["o_proj"].lora_b
    factor.set_value(factor[...].at[1, 2, 3].set(value))
    return model


@VALUES
def test_cases_such_an_adapter_is_not_saved(value, tmp_path):
    with pytest.raises(InputError, match=r"`model` must have trained weights that are finite.*lora.o_proj.lora_b\."):
        torch_bridge.save_adapter(spoiled_adapter(value), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@VALUES
def test_cases_such_an_adapter_is_not_read(value, tmp_path):
    torch_bridge.save_adapter(small_model("qwen3", lora=LORA), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = max(tensors)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = small_model("qwen3")
    with pytest.raises(InputError, match=f"must hold finite numbers, got NaN or infinity in {name}. The training"):
        torch_bridge.load_adapter(model, str(tmp_path))
    assert not adapters(model)


@VALUES
def test_cases_such_an_adapter_is_not_merged(value, tmp_path):
    with pytest.raises(InputError, match="`model` must have"):
        torch_bridge.save_merged(spoiled_adapter(value), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@VALUES
def test_cases_such_a_model_is_not_saved(value, tmp_path):
    model = small_model("qwen3")
    model.embedding.set_value(model.embedding[...].at[5, 5].set(value))
    with pytest.raises(InputError, match="NaN or infinity in embedding"):
        torch_bridge.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@VALUES
def test_cases_such_an_adapter_generates_nothing(value):
    with pytest.raises(InputError, match="`model` must have trained weights that are finite"):
        jaxpack.generate(spoiled_adapter(value), [[1, 2, 3]], max_new_tokens=1)
