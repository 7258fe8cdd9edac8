"""Tests that transformers reads merged folders without a warning and computes what PEFT does with the adapter."""

import functools
import json
import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from tokenizers_for_tests import small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora
from jaxpack.model.lora import adapters
from tests.torch_bridge import hf
from torch_bridge import merged

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LORA = {
    "all-linear": LoraConfig(r=4, lora_alpha=8),
    "some": LoraConfig(
        r=4, lora_alpha=8, target_modules="q_proj,up_proj,layers.1.mlp.down_proj", rank_pattern="q_proj=2"
    ),
    "head": LoraConfig(r=4, lora_alpha=8, target_modules="v_proj", modules_to_save="lm_head,embed_tokens"),
}


def adapted(folder: str, lora: LoraConfig, dtype: str = "float32", size: float = 0.1) -> Transformer:
    model, _ = torch_bridge.from_pretrained(folder, dtype=dtype)
    add_lora(model, lora)
    rng = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.LoRAParam):
            noise = rng.normal(0, size, parameter.shape).astype(np.float32)
            parameter.set_value((parameter[...] + noise).astype(parameter.dtype))
    return model


def reread(folder: Path, caplog: pytest.LogCaptureFixture) -> torch.nn.Module:
    """Reads a folder with transformers and requires no warning, no log record, no missing or unexpected key."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with caplog.at_level(logging.WARNING):
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert caplog.records == []
    return model


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("checkpoint", ["qwen3-tied", pytest.param("llama3-untied", marks=pytest.mark.slow)])
def test_transformers_computes_what_peft_does(
    checkpoint: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base, folder = hf.save_model(tmp_path / "base", checkpoint)
    model = adapted(folder, LORA[name])
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(model))]
    difference = torch_bridge.save_merged(model, str(tmp_path / "merged"), dtype="float32")
    assert difference < 1e-4
    for after, old in zip(jax.tree.leaves(nnx.state(model)), before, strict=True):
        np.testing.assert_array_equal(after, old)  # merging leaves the model itself unchanged

    torch_bridge.save_adapter(model, str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = hf.random_tokens(2, 40)
    expected = hf.logits(theirs, tokens)
    ours = reread(tmp_path / "merged", caplog)
    np.testing.assert_allclose(hf.logits(ours, tokens), expected, rtol=0, atol=1e-4)
    # Each weight, of size 0.1 to 1, agrees to a few units in float32's last place.
    for key, tensor in theirs.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key], tensor, rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        ("float32", "bfloat16"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float16", "float16", marks=pytest.mark.slow),
    ],
)
def test_sixteen_bits_are_rounded_once(dtype: str, written: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Each weight is the float32 sum rounded to nearest: no other number of this dtype is nearer to the sum."""
    _, folder = hf.save_model(tmp_path / "base", "llama-untied")
    model = adapted(folder, LORA["all-linear"], dtype)
    model.source_files += (("generation_config.json", json.dumps({"eos_token_id": [3, 5]})),)
    torch_bridge.save_merged(model, str(tmp_path / "merged"), small_tokenizer())
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, written)}
    q_proj = adapters(model)["q_proj"]
    exact = np.asarray(model.blocks.attention.qkv.weight[1, :80], np.float64)
    exact = exact + 2.0 * np.asarray(q_proj.lora_b[1], np.float64) @ np.asarray(q_proj.lora_a[1], np.float64)
    got = tensors["model.layers.1.self_attn.q_proj.weight"].double().numpy()
    half_a_unit = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[written] * 2.0 ** np.ceil(np.log2(np.abs(exact)) + 1e-9)
    assert (np.abs(got - exact) <= half_a_unit + 1e-6).all()  # 1e-6: the float32 sum's own rounding

    ours = reread(tmp_path / "merged", caplog)
    assert ours.dtype == getattr(torch, written)
    assert ours.generation_config.eos_token_id == [3, 5]
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("the cab").input_ids
        == small_tokenizer()("the cab").input_ids
    )


def test_shards_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    _, folder = hf.save_model(tmp_path / "base", "qwen3-tied")
    model = adapted(folder, LORA["some"])
    torch_bridge.save_merged(model, str(tmp_path / "one"))
    monkeypatch.setattr("torch_bridge.io.folder._SHARD_BYTES", 20_000)
    torch_bridge.save_merged(model, str(tmp_path / "many"))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (reread(tmp_path / name, caplog).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_figures_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, folder = hf.save_model(tmp_path / "base", "qwen3-tied")
    difference = torch_bridge.save_merged(adapted(folder, LORA["some"]), str(tmp_path / "merged"))
    assert 1e-4 < difference < 0.5  # bfloat16 weights against float32 weights
    shown = capsys.readouterr().err
    assert "merged in bfloat16: 5 of 5 adapted tensors changed; the merged model's logits differ from" in shown
    assert f"from the trained model's by at most {difference:.2e} (" in shown
    assert "4 bits" not in shown
    assert "by more than" not in shown


def test_a_merge_that_rounding_hides_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, folder = hf.save_model(tmp_path / "base", "qwen3-tied")
    torch_bridge.save_merged(adapted(folder, LORA["some"], size=1e-4), str(tmp_path / "merged"))
    assert "rounding to bfloat16 changes the logits by more than the adapters do" in capsys.readouterr().err


def test_a_wrong_merge_shows_in_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The figure does not come from the merge alone: it is large if the merge leaves the scaling out."""
    _, folder = hf.save_model(tmp_path / "base", "qwen3-tied")
    # No other test has this scaling, so none shares a compiled program with this one.
    model, merge = adapted(folder, LoraConfig(r=4, lora_alpha=12, target_modules="q_proj,up_proj")), merged.merge
    monkeypatch.setattr(merged, "merge", lambda *arguments: merge(*arguments[:4], 1.0, arguments[5]))
    assert torch_bridge.save_merged(model, str(tmp_path / "merged"), dtype="float32") > 1e-2


def new(model: Transformer) -> Transformer:
    return add_lora(model, LoraConfig(r=4))


def filled(model: Transformer, value: float) -> Transformer:
    """Adds adapters and sets one factor to `value`; a value of 1e6 is infinite in float16 alone."""
    factor = adapters(new(model))["up_proj"].lora_b
    factor.set_value(jnp.full_like(factor[...], value))
    return model


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (lambda model: model, None, "`model` must have LoRA adapters to merge"),
        (new, None, "`model` must have adapters that change a weight, got adapters that change none in bfloat16"),
        (new, "int8", "`dtype` must be"),
        (
            functools.partial(filled, value=1e6),
            "float16",
            "`model` must have finite logits after merging, got merged .* `dtype` 'float16'",
        ),
        (
            functools.partial(filled, value=jnp.nan),
            None,
            "`model` must have finite logits, got NaN or infinite logits before anything was merged",
        ),
    ],
)
def test_a_merge_that_is_none_leaves_no_folder(make, dtype: str | None, message: str, tmp_path: Path):
    model, _ = torch_bridge.from_pretrained(hf.save_model(tmp_path / "base", "qwen3-tied")[1], dtype="float32")
    with pytest.raises(InputError, match=message):
        torch_bridge.save_merged(make(model), str(tmp_path / "merged"), dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
