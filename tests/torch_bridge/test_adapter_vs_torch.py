"""Tests that PEFT reads jaxpack's adapters like its own: the same files, the same scaling, the same model."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from scipy import stats
from transformers import AutoModelForCausalLM

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora
from jaxpack.model.lora import adapters
from tests.torch_bridge import hf

# PEFT calls deprecated functions of transformers. All other warnings are errors, including PEFT's warnings of missing
# keys and unknown fields.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# float32 rounding as between the base models, a few 1e-6 in practice.
LOGITS_TOLERANCE = 1e-4

LORA = {
    "all-linear": LoraConfig(r=4, lora_alpha=8),
    "subset": LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj")),
    "one": LoraConfig(r=2, lora_alpha=3, target_modules="up_proj"),
    "rslora": LoraConfig(r=4, lora_alpha=8, use_rslora=True),
    "layers": LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "up_proj"), layers_to_transform=1),
}


@pytest.fixture(params=["qwen3-tied", "llama3-untied"])
def checkpoint(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LORA)
def lora(request: pytest.FixtureRequest) -> LoraConfig:
    return LORA[request.param]


def adapted(folder: str, lora: LoraConfig, dtype: str = "float32") -> Transformer:
    """Loads a checkpoint and adds adapters that change its logits."""
    model, _ = torch_bridge.from_pretrained(folder, dtype=dtype)
    add_lora(model, lora)
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    return model


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """Returns the config that a user of PEFT writes for the same adapters."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        target_modules=targets,
        layers_to_transform=list(lora.layers_to_transform) or None,
        task_type="CAUSAL_LM",
    )


def test_peft_computes_the_same_logits(checkpoint: str, lora: LoraConfig, tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "model", checkpoint)
    model = adapted(folder, lora)
    torch_bridge.save_adapter(model, str(tmp_path / "adapter"))
    tokens = hf.random_tokens(2, 40)
    actual, without = np.asarray(model.logits(jnp.asarray(tokens))), hf.logits(base, tokens)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys and unknown fields
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(actual, hf.logits(loaded, tokens), rtol=0, atol=LOGITS_TOLERANCE)
    assert np.abs(actual - without).max() > 100 * LOGITS_TOLERANCE, "the adapter does nothing"

    merged = loaded.merge_and_unload()
    np.testing.assert_allclose(actual, hf.logits(merged, tokens), rtol=0, atol=LOGITS_TOLERANCE)


def test_peft_finds_every_key_and_no_other(checkpoint: str, lora: LoraConfig, tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "model", checkpoint)
    torch_bridge.save_adapter(adapted(folder, lora), str(tmp_path / "adapter"))
    model = peft.get_peft_model(base, peft_config(lora))

    result = model.load_adapter(tmp_path / "adapter", adapter_name="ours")
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    # The adapters are in their places, to the bit.
    loaded = {name: p.numpy() for name, p in model.state_dict().items() if ".ours." in name}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".ours.", ".") for name in loaded} == written.keys()
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor, written[name.replace(".ours.", ".")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_are_those_that_peft_writes(checkpoint: str, lora: LoraConfig, dtype: str, tmp_path: Path):
    _, folder = hf.save_model(tmp_path / "model", checkpoint, getattr(torch, dtype))
    torch_bridge.save_adapter(adapted(folder, lora, dtype), str(tmp_path / "ours"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert base.dtype == getattr(torch, dtype)
    peft.get_peft_model(base, peft_config(lora)).save_pretrained(tmp_path / "theirs")

    def described(writer: str) -> dict[str, tuple]:
        tensors = load_torch_file(tmp_path / writer / "adapter_model.safetensors")
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    assert described("ours") == described("theirs")

    ours, theirs = (
        json.loads((tmp_path / writer / "adapter_config.json").read_text()) for writer in ("ours", "theirs")
    )
    assert ours.keys() <= theirs.keys()
    # For "all-linear", PEFT lists whole paths in no order; we list their last parts.
    assert ours["target_modules"] == sorted({name.rpartition(".")[2] for name in theirs["target_modules"]})
    for field in ours.keys() - {"target_modules"}:
        assert ours[field] == theirs[field], field


def test_adapters_are_never_initialised_again(checkpoint: str, tmp_path: Path):
    """PEFT runs `init_lora_weights` when it loads; with some kinds (PiSSA) that changes the base weights."""
    base, folder = hf.save_model(tmp_path / "model", checkpoint)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch_bridge.save_adapter(adapted(folder, LORA["all-linear"]), str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True
    unloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").unload()
    for name, tensor in unloaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 12 / 4), (True, 12 / 2)])
def test_scaling_is_alpha_over_r_or_its_root(use_rslora: bool, scaling: float, tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "model", "qwen3-tied")
    lora = LoraConfig(r=4, lora_alpha=12, use_rslora=use_rslora)
    assert lora.scaling == scaling
    torch_bridge.save_adapter(adapted(folder, lora), str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    scalings = [module.scaling["default"] for module in loaded.modules() if hasattr(module, "lora_A")]
    assert len(scalings) == 2 * 7
    assert set(scalings) == {scaling}


def test_a_model_without_adapters_is_refused(tmp_path: Path):
    _, folder = hf.save_model(tmp_path / "model", "qwen3-tied")
    model, _ = torch_bridge.from_pretrained(folder)
    with pytest.raises(InputError, match="`model` must have LoRA adapters"):
        torch_bridge.save_adapter(model, str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


# --- How adapters start ---

_WIDE = LoraConfig(r=32, lora_alpha=64)  # enough numbers for statistics


def layers_of(model: Transformer) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name, adapter in adapters(model).items():
        for layer in range(model.config.num_layers):
            yield f"{name} of layer {layer}", np.asarray(adapter.lora_a[layer]), np.asarray(adapter.lora_b[layer])


def test_lora_a_starts_as_peft_starts_it(checkpoint: str, tmp_path: Path):
    """PEFT uses kaiming_uniform(a=sqrt(5)): uniform in +-1/sqrt(in), with a standard deviation of 1/sqrt(3 in)."""
    base, folder = hf.save_model(tmp_path / "model", checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    add_lora(model, _WIDE)
    theirs = peft.get_peft_model(base, peft_config(_WIDE)).state_dict()
    theirs_by_shape = {tuple(a.shape): a.numpy() for name, a in theirs.items() if "lora_A" in name}

    starts = list(layers_of(model))
    assert len(starts) == 7 * model.config.num_layers
    for name, lora_a, lora_b in starts:
        in_features = lora_a.shape[1]
        bound = 1 / math.sqrt(in_features)
        assert np.abs(lora_a).max() <= bound, name
        # The sample's standard deviation has a relative error of sqrt(0.2 / size) for a uniform distribution.
        tolerance = 5 * math.sqrt(0.2 / lora_a.size)
        assert lora_a.std() == pytest.approx(bound / math.sqrt(3), rel=tolerance), name
        # The draw has the distribution of PEFT's draw. With other seeds, one comparison in 10,000 would fail.
        assert stats.ks_2samp(lora_a.ravel(), theirs_by_shape[lora_a.shape].ravel()).pvalue > 1e-4, name
        assert not lora_b.any(), name
    # No two adapters share a draw: correlations of independent draws have a standard deviation of 1 / sqrt(32 * 48).
    same_size = np.stack([lora_a.ravel() for _, lora_a, _ in starts if lora_a.shape == (32, 48)])
    correlations = np.corrcoef(same_size) - np.eye(len(same_size))
    assert np.abs(correlations).max() < 6 / math.sqrt(32 * 48)


def test_the_seed_decides_the_start(tmp_path: Path):
    _, folder = hf.save_model(tmp_path / "model", "qwen3-tied")

    def start(seed: int) -> np.ndarray:
        model, _ = torch_bridge.from_pretrained(folder)
        add_lora(model, LoraConfig(r=4, seed=seed))
        return np.concatenate([lora_a.ravel() for _, lora_a, _ in layers_of(model)])

    np.testing.assert_array_equal(start(1), start(1))
    assert (start(1) != start(2)).mean() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_no_more_of_the_logits_than_rounding(checkpoint: str, dtype: str, tmp_path: Path):
    _, folder = hf.save_model(tmp_path / "model", checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype=dtype)
    tokens = jnp.asarray(hf.random_tokens(2, 40))
    before = np.asarray(model.logits(tokens))
    add_lora(model, _WIDE)
    # The adapters' factors are channels of the same matmuls, which then add up in another order.
    atol = {"float32": 1e-6, "bfloat16": 2**-7}[dtype] * np.abs(before).max()
    np.testing.assert_allclose(model.logits(tokens), before, rtol=0, atol=atol)
