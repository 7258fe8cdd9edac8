"""Tests that weights cross between jaxpack and torch, in memory or through folders, without losing a bit."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora
from tests.torch_bridge import hf

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def parameters(model: Transformer) -> dict[str, np.ndarray]:
    """Returns copies of the parameters' bits by path."""
    state = nnx.state(model, nnx.Param)
    return {
        jax.tree_util.keystr(path): np.array(x).view(f"u{x.dtype.itemsize}")
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same_bits(actual: Transformer, expected: Transformer) -> None:
    ours, theirs = parameters(actual), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


# --- from_torch ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", hf.CHECKPOINTS)
def test_from_torch_equals_from_pretrained(checkpoint: str, dtype: str, tmp_path: Path):
    module, folder = hf.save_model(tmp_path, checkpoint, getattr(torch, dtype))
    live = torch_bridge.from_torch(module, dtype=dtype)
    read, _ = torch_bridge.from_pretrained(folder, dtype=dtype)
    assert live.dtype == read.dtype == jnp.dtype(dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(live))} == {jnp.dtype(dtype)}
    assert_same_bits(live, read)
    assert dataclasses.replace(live.config, name_or_path=folder) == read.config


@pytest.mark.slow
def test_a_module_on_the_host_becomes_a_model_on_the_device_of_jax():
    """JAX has two CPU devices here, and DLPack's arrays are on the first."""
    program = """
import jax, torch_bridge
from flax import nnx
from tests.torch_bridge import hf
first, second = jax.devices()
jax.config.update("jax_default_device", second)
model = torch_bridge.from_torch(hf.make_model("qwen3-tied"))
assert {device for x in jax.tree.leaves(nnx.state(model)) for device in x.devices()} == {second}
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_weights_of_another_dtype_are_rounded_to_nearest(tmp_path: Path):
    """A bfloat16 model has the values to which torch rounds the float32 weights."""
    module, folder = hf.save_model(tmp_path, "qwen3-tied")
    rounded = torch_bridge.from_torch(hf.make_model("qwen3-tied", torch.bfloat16), dtype="bfloat16")
    assert_same_bits(torch_bridge.from_torch(module, dtype="bfloat16"), rounded)
    assert_same_bits(torch_bridge.from_pretrained(folder, dtype="bfloat16")[0], rounded)


@pytest.mark.parametrize("checkpoint", ["qwen3-tied", "llama3-untied"])
def test_module_and_model_share_no_memory(checkpoint: str):
    module = hf.make_model(checkpoint)
    model = torch_bridge.from_torch(module, dtype="float32")
    with torch.no_grad():  # no read of the old values may still be pending
        for parameter in module.parameters():
            parameter.fill_(7.0)
    assert_same_bits(model, torch_bridge.from_torch(hf.make_model(checkpoint), dtype="float32"))

    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param):
            parameter.set_value(jnp.zeros_like(parameter[...]))
    assert all((parameter == 7.0).all() for parameter in module.parameters())


@pytest.mark.parametrize(
    "view", [lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]], ids=["transposed", "slice"]
)
def test_tensors_that_are_views_are_read(view: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path):
    """A weight may have its own strides or be a view into a larger tensor."""
    module, folder = hf.save_model(tmp_path, "llama-untied")
    for linear in module.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight = torch.nn.Parameter(view(linear.weight.detach()))
            assert not linear.weight.is_contiguous()
    assert_same_bits(
        torch_bridge.from_torch(module, dtype="float32"), torch_bridge.from_pretrained(folder, dtype="float32")[0]
    )


def peft_model() -> torch.nn.Module:
    return peft.get_peft_model(hf.make_model("qwen3-tied"), peft.LoraConfig(target_modules=["q_proj"]))


def with_a_config_of_another_kind() -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.config = {"hidden_size": 2}
    return module


@pytest.mark.parametrize(
    "make",
    [
        peft_model,
        lambda: peft_model().base_model.model,  # its weights have other names
        lambda: torch.nn.Linear(2, 2),
        with_a_config_of_another_kind,
        lambda: hf.make_model("qwen3-tied").to("meta"),
        lambda: hf.make_model("qwen3-tied").model,  # a model without a head
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)),
    ],
    ids=["peft", "inside-peft", "no-transformers", "other-config", "offloaded", "no-head", "gpt2"],
)
def test_other_modules_are_refused(make: Callable[[], torch.nn.Module]):
    with pytest.raises(InputError, match=r"`module` must|`architectures` must be"):
        torch_bridge.from_torch(make())


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16"])
def test_other_dtypes_are_refused(dtype: str, tmp_path: Path):
    """Both readers, `from_pretrained` and `from_torch`, refuse the dtypes."""
    module, folder = hf.save_model(tmp_path, "qwen3-tied")
    with pytest.raises(InputError, match="`dtype` must be"):
        torch_bridge.from_pretrained(folder, dtype=dtype)
    with pytest.raises(InputError, match="`dtype` must be"):
        torch_bridge.from_torch(module, dtype=dtype)


def with_head_in_file(folder: Path, head: torch.Tensor) -> str:
    """Writes a tied checkpoint whose file has a head all the same, as some published checkpoints do."""
    hf.save_model(folder, "qwen3-tied")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": head.detach().clone()}, file, metadata={"format": "pt"})
    return str(folder)


def test_a_head_that_repeats_the_tied_embedding_changes_nothing(tmp_path: Path):
    module = hf.make_model("qwen3-tied")
    read, _ = torch_bridge.from_pretrained(with_head_in_file(tmp_path, module.lm_head.weight), dtype="float32")
    assert_same_bits(read, torch_bridge.from_torch(module, dtype="float32"))


def test_a_head_that_is_not_the_tied_embedding_is_not_dropped(tmp_path: Path):
    """transformers 5 computes with this head, whatever the config says, so dropping it would change the model."""
    module = hf.make_model("qwen3-tied")
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach() + 1)
    folder = with_head_in_file(tmp_path, module.lm_head.weight)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        torch_bridge.from_pretrained(folder, dtype="float32")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        torch_bridge.from_torch(module, dtype="float32")


def test_a_merged_peft_model_is_a_plain_one():
    model = peft_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    merged = model.merge_and_unload()
    tokens = hf.random_tokens(1, 20)
    # The tolerance is for float32 rounding, as in the parity tests.
    np.testing.assert_allclose(
        torch_bridge.from_torch(merged, dtype="float32").logits(jnp.asarray(tokens)),
        hf.logits(merged, tokens),
        rtol=0,
        atol=1e-4,
    )


# --- save_pretrained ---


@pytest.fixture(params=["one-file", "sharded"])
def shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Returns whether checkpoints are sharded; a shard of 20 kB holds one or a few matrices of the small models."""
    if request.param == "sharded":
        monkeypatch.setattr("torch_bridge.io.folder._SHARD_BYTES", 20_000)
    return request.param == "sharded"


@pytest.mark.parametrize("checkpoint", hf.CHECKPOINTS)
def test_transformers_reads_what_is_written(checkpoint: str, shards: bool, tmp_path: Path):
    original, folder = hf.save_model(tmp_path / "theirs", checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    torch_bridge.save_pretrained(model, str(tmp_path / "ours"))

    assert (tmp_path / "ours" / "model.safetensors").exists() != shards
    assert (len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3) == shards
    reread, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched keys
    assert type(reread) is type(original)
    assert reread.dtype == torch.float32
    tokens = hf.random_tokens(2, 150)
    # Weights and code are the same. Only the order of sums may differ, with the alignment of memory.
    np.testing.assert_allclose(hf.logits(reread, tokens), hf.logits(original, tokens), rtol=0, atol=1e-6)
    if checkpoint.endswith("-tied"):
        assert reread.lm_head.weight is reread.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpoint", ["qwen3-tied", "qwen3-untied", "llama-tied", "llama3-untied"])
def test_a_written_folder_is_read_back_to_the_bit(checkpoint: str, dtype: str, shards: bool, tmp_path: Path):
    model = torch_bridge.from_torch(hf.make_model(checkpoint), dtype=dtype)
    torch_bridge.save_pretrained(model, str(tmp_path / "model"))
    reread, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype=dtype)
    assert_same_bits(reread, model)


@pytest.mark.parametrize("checkpoint", ["qwen3-tied", "llama3-untied"])
def test_shards_that_transformers_writes_are_read(checkpoint: str, tmp_path: Path):
    module = hf.make_model(checkpoint)
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read, _ = torch_bridge.from_pretrained(str(tmp_path), dtype="float32")
    assert_same_bits(read, torch_bridge.from_torch(module, dtype="float32"))


@pytest.mark.parametrize("checkpoint", ["qwen3-tied", "llama3-untied"])
def test_a_model_that_came_from_no_folder_has_a_whole_config(checkpoint: str, tmp_path: Path):
    module = hf.make_model(checkpoint)
    torch_bridge.save_pretrained(torch_bridge.from_torch(module, dtype="bfloat16"), str(tmp_path / "ours"))
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.dtype == torch.bfloat16  # as `dtype` in the config says
    tokens = hf.random_tokens(2, 150)
    # The same weights and the same code, as above.
    np.testing.assert_allclose(
        hf.logits(reread, tokens), hf.logits(hf.make_model(checkpoint, torch.bfloat16), tokens), rtol=0, atol=1e-6
    )


@pytest.fixture(params=["qwen3-tied", "llama-untied", "llama3-untied"])
def transformers_4(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Returns a checkpoint's name and its folder, with the config that transformers 4 would have written."""
    _, folder = hf.save_model(tmp_path / "theirs", request.param)
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    return request.param, folder


def test_a_config_of_transformers_4_keeps_its_meaning(transformers_4: tuple[str, str], tmp_path: Path):
    checkpoint, folder = transformers_4
    model, _ = torch_bridge.from_pretrained(folder, dtype="bfloat16")
    torch_bridge.save_pretrained(model, str(tmp_path / "ours"))
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.dtype == torch.bfloat16
    tokens = hf.random_tokens(2, 150)
    expected = hf.logits(hf.make_model(checkpoint, torch.bfloat16), tokens)
    # The same weights and the same code, as above.
    np.testing.assert_allclose(hf.logits(reread, tokens), expected, rtol=0, atol=1e-6)


def test_a_written_config_does_not_contradict_itself(transformers_4: tuple[str, str], tmp_path: Path):
    """`torch_dtype` became `dtype`, and `rope_theta` moved into `rope_parameters`: if both are written, they agree."""
    _, folder = transformers_4
    model, _ = torch_bridge.from_pretrained(folder, dtype="bfloat16")
    torch_bridge.save_pretrained(model, str(tmp_path / "ours"))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written.get("torch_dtype", "bfloat16") == "bfloat16"
    theta = written["rope_parameters"]["rope_theta"]
    assert written.get("rope_theta", theta) == theta


def test_what_the_config_says_besides_is_kept(tmp_path: Path):
    original, folder = hf.save_model(tmp_path / "theirs", "llama-untied")
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    torch_bridge.save_pretrained(model, str(tmp_path / "ours"))
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.config.max_position_embeddings == original.config.max_position_embeddings == 512
    assert reread.config.to_dict() == original.config.to_dict() | {"_name_or_path": reread.config.name_or_path}


def test_adapters_are_not_left_out_in_silence(tmp_path: Path):
    model = torch_bridge.from_torch(hf.make_model("qwen3-tied"))
    add_lora(model, LoraConfig())
    with pytest.raises(InputError, match="`model` must be without LoRA adapters"):
        torch_bridge.save_pretrained(model, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_model_without_a_folder_is_written_with_the_config_that_it_was_read_with(tmp_path: Path):
    """Models from the hub or from memory have no folder; the path in the model's name is not read again."""
    module = hf.make_model("llama-untied")
    module.generation_config.eos_token_id = [3, 5]
    torch_bridge.save_pretrained(torch_bridge.from_torch(module, dtype="float32"), str(tmp_path / "ours"))
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.config.max_position_embeddings == module.config.max_position_embeddings == 512
    assert reread.generation_config.eos_token_id == [3, 5]
