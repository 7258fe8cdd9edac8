"""Tests both merges of a 4-bit model: into its dequantised weights, and into the 16-bit weights of its base."""

import errno
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_model
from safetensors.numpy import load_file, save_file

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora
from jaxpack.kernels.weight import DenseWeight
from jaxpack.model import transformer
from jaxpack.model.config import RopeConfig
from jaxpack.model.lora import adapters
from jaxpack.model.nf4 import quantize_nf4
from jaxpack.model.weights import Frozen, MixedWeight, weight_of
from torch_bridge import merged, original
from torch_bridge.io.safetensors_file import header_bytes
from torch_bridge.tensors import model_tensors, tensor_table

WEIGHTS = "model.safetensors"
ALL = LoraConfig(r=4, lora_alpha=8)
SOME = LoraConfig(r=4, lora_alpha=8, target_modules="q_proj,up_proj", rank_pattern="q_proj=2")
WHOLE = LoraConfig(r=4, lora_alpha=8, target_modules="v_proj", modules_to_save="lm_head,embed_tokens")
FUSED = {"architecture": "Phi3ForCausalLM", "fused_projections": True, "rope": RopeConfig(theta=1e4)}
CASES = {
    "untied": ("llama", {}, ALL),
    "some projections, biases": ("qwen2", {}, SOME),
    "fused projections": ("llama", FUSED, LoraConfig(r=4, target_modules="qkv_proj,down_proj")),
    "tied, with head and embedding": ("qwen3", {}, WHOLE),
    "head and embedding": ("llama", {}, WHOLE),
}
each_case = pytest.mark.parametrize("case", CASES)
TOKENS = jnp.arange(40)[None]


def trained(folder: Path, case: str = "untied", dtype: str = "float32", stored: str = "float32") -> Transformer:
    """Writes a base model to `folder`, and returns it in 4 bits with adapters, as after a training.

    The adapters' numbers are multiples of 1/16 and 1/64: their products are exact in float32, in any order.
    """
    family, changes, lora = CASES[case]
    torch_bridge.save_pretrained(small_model(family, dtype=stored, **changes), folder)
    model, _ = torch_bridge.from_pretrained(str(folder), dtype=dtype, load_in_4bit=True)
    return with_adapters(model, lora)


def with_adapters(model: Transformer, lora: LoraConfig) -> Transformer:
    add_lora(model, lora)
    rng = np.random.default_rng(0)
    for adapter in adapters(model).values():
        adapter.lora_a.set_value(jnp.asarray(rng.integers(-4, 5, adapter.lora_a.shape) / 16, jnp.float32))
        adapter.lora_b.set_value(jnp.asarray(rng.integers(-4, 5, adapter.lora_b.shape) / 64, jnp.float32))
    for name in lora.modules_to_save:
        variable = model.embedding if name == "embed_tokens" else model.head_variable
        variable.set_value(variable[...] + jnp.asarray(rng.normal(0, 0.02, variable.shape), variable.dtype))
    return model


def deltas(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the exact changes of the adapters by the names of tensors, in float64."""
    found, changes = adapters(model), {}
    for name, (entry, layer) in tensor_table(model.config).items():
        if entry.projection in found and entry.path.endswith(".weight"):
            adapter = found[entry.projection]
            lora_a, lora_b = (np.asarray(x[layer], np.float64) for x in (adapter.lora_a, adapter.lora_b))
            changes[name] = adapter.scaling * lora_b @ lora_a
    return changes


@pytest.mark.one_in(5)
@each_case
def test_a_merge_into_the_dequantised_weights_computes_what_was_trained(case: str, tmp_path: Path):
    model = trained(tmp_path / "base", case)
    assert torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32") < 1e-4
    read, _ = torch_bridge.from_pretrained(str(tmp_path / "merged"), dtype="float32")
    np.testing.assert_allclose(read.logits(TOKENS), model.logits(TOKENS), atol=1e-4)
    written, changes = load_file(tmp_path / "merged" / WEIGHTS), deltas(model)
    for name, tensor in model_tensors(model):
        exact = np.asarray(tensor, np.float64) + changes.get(name, 0)
        np.testing.assert_array_equal(written[name], exact.astype(np.float32), err_msg=name)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the comparison of logits out, which takes most of the time of a merge this small."""
    monkeypatch.setattr(merged, "_compare", lambda *_: merged._Compared(0.0, 0.0, 1.0))


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", None)])
@each_case
def test_a_merge_into_the_base_is_the_base_plus_the_change_rounded_once(
    case: str, stored: str, dtype: str | None, tmp_path: Path
):
    model = trained(tmp_path / "base", case, stored=stored)
    base, changes = load_file(tmp_path / "base" / WEIGHTS), deltas(model)
    whole = model.lora_config.modules_to_save
    own = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    mine = {name: np.asarray(x) for name, x in model_tensors(model) if name in [own[module] for module in whole]}

    torch_bridge.save_merged(model, tmp_path / "merged", dtype=dtype, base=str(tmp_path / "base"))
    written = load_file(tmp_path / "merged" / WEIGHTS)
    assert written.keys() == base.keys()
    for name, tensor in written.items():
        assert tensor.dtype == jnp.dtype(dtype or "bfloat16")
        exact = np.asarray(mine.get(name, base[name]), np.float64) + changes.get(name, 0)
        np.testing.assert_array_equal(tensor, exact.astype(np.float32).astype(tensor.dtype), err_msg=name)
    assert bool(mine) == bool(whole)


@pytest.mark.parametrize("into_base", [False, True])
def test_the_figure_is_that_of_the_model_that_is_read_from_the_files(into_base: bool, tmp_path: Path):
    """Also if the stored numbers are bfloat16, and the model computes in float32."""
    model = trained(tmp_path / "base", stored="bfloat16")
    base = str(tmp_path / "base") if into_base else None
    difference = torch_bridge.save_merged(model, tmp_path / "merged", base=base)
    read, _ = torch_bridge.from_pretrained(str(tmp_path / "merged"), dtype="float32")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (1, 64)), jnp.int32)
    np.testing.assert_allclose(difference, jnp.abs(read.logits(tokens) - model.logits(tokens)).max(), atol=1e-5)
    assert difference > 1e-3  # bfloat16, and with a base other weights than the adapters were trained with


def test_weights_that_stand_for_bfloat16_are_merged_into_float32_without_another_rounding(tmp_path: Path):
    """As in a folder that bitsandbytes made of a bfloat16 model, when it is read for a computation in float32."""
    torch_bridge.save_pretrained(small_model("llama", dtype="bfloat16"), tmp_path / "base")
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "base"), dtype="bfloat16", load_in_4bit=True)
    model.dtype = jnp.dtype("float32")
    with_adapters(model, ALL)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32") < 1e-4


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("base", [None, "base"])
def test_weights_that_wait_in_their_files_are_read(base: str | None, tmp_path: Path):
    torch_bridge.save_pretrained(small_model("llama"), tmp_path / "base")
    base = base and str(tmp_path / base)
    for name, lazy in (("one", False), ("two", True)):
        model, _ = torch_bridge.from_pretrained(str(tmp_path / "base"), dtype="float32", load_in_4bit=True, lazy=lazy)
        torch_bridge.save_merged(with_adapters(model, ALL), tmp_path / name, base=base)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("into_base", [False, True])
def test_layers_in_16_bits_among_those_in_4_are_merged_too(into_base: bool, tmp_path: Path):
    model = trained(tmp_path / "base")
    plain, _ = torch_bridge.from_pretrained(str(tmp_path / "base"), dtype="float32")
    down = plain.blocks.feed_forward.down
    stack, rows = down.weight[...], tuple(size for _, size in down.projections)
    parts = (DenseWeight(stack[:1]), quantize_nf4(stack[1:], rows))
    model.blocks.feed_forward.down.weight = Frozen(MixedWeight(parts, ((0, 0), (1, 0))))
    base = str(tmp_path / "base") if into_base else None
    torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32", base=base)
    written = load_file(tmp_path / "merged" / WEIGHTS)
    weights = dict(model_tensors(plain if into_base else model))
    for name, change in deltas(model).items():
        exact = np.asarray(weights[name], np.float64) + change
        np.testing.assert_array_equal(written[name], exact.astype(np.float32), err_msg=name)


def test_both_figures_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture):
    model, base = trained(tmp_path / "base"), str(tmp_path / "base")
    kept = torch_bridge.save_merged(model, tmp_path / "a")
    one = capsys.readouterr().err
    assert (
        "merged in bfloat16 into the dequantised 4-bit weights, with which the adapters were trained: 14 of 14" in one
    )
    assert f"differ from the trained model's by at most {kept:.2e} (" in one
    other = torch_bridge.save_merged(model, tmp_path / "b", base=base)
    two = capsys.readouterr().err
    assert f"merged in bfloat16 into the 16-bit weights of {base}: 14 of 14" in two
    assert f"differ from the trained model's by at most {other:.2e} (" in two
    assert f"weights of {base} (with that as `base`), the logits would differ by at most {other:.2e}" in one
    assert f"dequantised 4-bit weights (without `base`), the logits would differ by at most {kept:.2e}" in two
    assert kept < other / 3


@pytest.mark.usefixtures("no_figures")
def test_a_base_that_is_not_at_hand_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = trained(tmp_path / "Qwen3-4B-unsloth-bnb-4bit")
    (tmp_path / "Qwen3-4B-unsloth-bnb-4bit").rename(tmp_path / "moved")
    torch_bridge.save_merged(model, tmp_path / "a")
    assert "`base` merges into 16-bit weights instead: name the model that was quantised" in capsys.readouterr().err


def test_adapters_that_change_less_than_the_4_bits_are_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(merged, "_compare", lambda *_: merged._Compared(0.2, 0.1, 0.1))
    torch_bridge.save_merged(trained(tmp_path / "base"), tmp_path / "merged", base=str(tmp_path / "base"))
    assert "the change to other weights changes the logits by more than the adapters do" in capsys.readouterr().err


def test_the_second_model_stays_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program that computes with the base holds no matrix of it, and asks for a layer at a time."""
    model = trained(tmp_path / "base")
    view = original.with_original_weights(model, str(tmp_path / "base"))
    held = {id(x) for x in jax.tree.leaves(nnx.state(model))}
    assert all(x.size <= 97 * 48 / 10 for x in jax.tree.leaves(nnx.state(view)) if id(x) not in held)
    seen = []
    read = original.LayersInFiles.read
    monkeypatch.setattr(
        original.LayersInFiles,
        "read",
        lambda self, *place, **rows: seen.append(part := read(self, *place, **rows)) or part,
    )
    program = transformer._logits.lower(*nnx.split(merged._merged(view, "float32")), TOKENS, jnp.ones_like(TOKENS))
    assert not seen  # a constant of the program would be read here
    assert len(program.as_text()) < 1e6
    program.compile()
    assert not seen
    jax.block_until_ready(merged._merged(view, "float32").logits(TOKENS))
    assert max(part.size for part in seen) == max(97 * 48, 2 * 80 * 48)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def other_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    rng = np.random.default_rng(1)
    save_file({name: rng.normal(0, 0.05, x.shape).astype(x.dtype) for name, x in tensors.items()}, folder / WEIGHTS)


def twice_as_large(folder: Path) -> None:
    save_file({name: 2 * x for name, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS)


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": np.zeros((128, 48), np.float32)}, folder / WEIGHTS)


def of_integers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": np.zeros((97, 48), np.int8)}, folder / WEIGHTS)


def edited(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def of_another_family(folder: Path) -> None:
    edited(folder, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)


def in_4_bits(folder: Path) -> None:
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edited(folder, quantization_config=nf4)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_numbers,
            "`base` must be the model from which the 4-bit weights were made, got another model: model.lay",
        ),
        (twice_as_large, "differs from the model's 4-bit weights by 100% of their size"),
        (without_a_tensor, r"`base` must hold the tensors that .* with 1 missing tensor \(model.norm.weight\)"),
        (of_another_shape, r"lm_head.weight is \[128, 48\] and must be \[97, 48\]"),
        (of_integers, r"1 tensor that cannot be read \(lm_head.weight of dtype I8\)"),
        (of_another_family, "`base` must be a LlamaForCausalLM, as the model is, got .* a MistralForCausalLM"),
        (in_4_bits, "16-bit model that it was made from"),
    ],
)
def test_another_base_is_refused(change, message: str, tmp_path: Path):
    model = trained(tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(InputError, match=message):
        torch_bridge.save_merged(model, tmp_path / "merged", base=str(tmp_path / "base"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_missing_base_is_refused(tmp_path: Path):
    model = trained(tmp_path / "base")
    with pytest.raises(InputError, match="`base` must be an existing folder"):
        torch_bridge.save_merged(model, tmp_path / "merged", base=str(tmp_path / "nowhere"))


def test_a_base_for_a_model_in_16_bits_is_refused(tmp_path: Path):
    model = small_model("llama", lora=ALL)
    with pytest.raises(InputError, match="`base` must be None for a model without weights in 4 bits"):
        torch_bridge.save_merged(model, tmp_path / "merged", base="owner/name")


@pytest.mark.usefixtures("no_figures")
def test_a_relative_of_the_base_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = trained(tmp_path / "base")
    torch_bridge.save_merged(model, tmp_path / "a", base=str(tmp_path / "base"))
    assert "probably a relative" not in capsys.readouterr().err
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    rng = np.random.default_rng(1)
    save_file(
        {name: x + (x.std() * rng.normal(0, 0.05, x.shape)).astype(x.dtype) for name, x in tensors.items()},
        tmp_path / "base" / WEIGHTS,
    )
    torch_bridge.save_merged(model, tmp_path / "b", base=str(tmp_path / "base"))
    assert "It is probably a relative of the model" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_base_that_was_rounded_to_bfloat16_in_between_is_none(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = trained(tmp_path / "base")
    save_file(
        {name: x.astype(jnp.bfloat16) for name, x in load_file(tmp_path / "base" / WEIGHTS).items()},
        tmp_path / "base" / WEIGHTS,
    )
    torch_bridge.save_merged(model, tmp_path / "merged", base=str(tmp_path / "base"))
    assert "probably a relative" not in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("into_base", [False, True])
def test_a_disk_that_fills_midway_leaves_nothing(into_base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = trained(tmp_path / "base")
    monkeypatch.setattr("torch_bridge.io.folder._SHARD_BYTES", 20_000)
    header, shards = header_bytes, []

    def fill(*arguments: object) -> bytes:
        shards.append(arguments)
        if len(shards) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return header(*arguments)

    monkeypatch.setattr("torch_bridge.io.folder.header_bytes", fill)
    with pytest.raises(InputError, match=re.escape(f"got '{tmp_path / 'merged'}': No space left")):
        torch_bridge.save_merged(model, tmp_path / "merged", base=str(tmp_path / "base") if into_base else None)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("into_base", [False, True])
def test_too_little_memory_for_the_figures_costs_only_the_figures(
    into_base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    model = trained(tmp_path / "base")

    def logits(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")

    monkeypatch.setattr(Transformer, "logits", logits)
    base = str(tmp_path / "base") if into_base else None
    assert np.isnan(torch_bridge.save_merged(model, tmp_path / "merged", base=base))
    assert (tmp_path / "merged" / WEIGHTS).exists()
    assert "the device has too little memory to compare the merged model's logits" in capsys.readouterr().err


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", ["untied", "tied, with head and embedding"])
def test_an_adapter_of_a_4_bit_model_names_its_base_and_is_read_again(case: str, tmp_path: Path):
    model = trained(tmp_path / "base", case)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert torch_bridge.base_of(str(tmp_path / "adapter")) == str(tmp_path / "base")
    base = torch_bridge.base_of(str(tmp_path / "adapter"))
    again, _ = torch_bridge.from_pretrained(base, dtype="float32", load_in_4bit=True)
    torch_bridge.load_adapter(again, str(tmp_path / "adapter"))
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))
    assert not weight_of(again.blocks.attention.qkv.weight).is_dense
