"""Tests how folders in 4 bits are read and refused, with tensors that are written by hand. Needs no torch."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_config, small_model
from safetensors.numpy import load_file, save_file

import torch_bridge
import torch_bridge.tensors
from jaxpack import LoraConfig, TrainConfig, Trainer, Transformer, add_lora
from jaxpack.errors import InputError
from jaxpack.kernels.dequantize import NF4_VALUES
from jaxpack.model.linear import Linear
from jaxpack.model.nf4 import NF4Weight, nf4_store, quantize_nf4
from jaxpack.model.weights import TRAINED, Frozen, freeze, weight_of
from torch_bridge.config_json import config_from_hf, config_to_hf
from torch_bridge.pretrained import described_store
from torch_bridge.tensors import model_tensors

WEIGHTS = "model.safetensors"
STATE = "quant_state.bitsandbytes__nf4"
UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def stored(name: str, matrix: np.ndarray, block_size: int = 64, *, nested: bool = True) -> dict[str, np.ndarray]:
    """Returns the tensors with which bitsandbytes stores a matrix."""
    arrays = quantize_nf4(jnp.asarray(matrix), (len(matrix),), block_size, nested).arrays
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block_size, "dtype": str(matrix.dtype)}
    state["shape"] = list(matrix.shape)
    tensors = {
        "": np.asarray(arrays.codes).view(np.uint8).reshape(-1, 1),
        ".absmax": np.asarray(arrays.absmax[0]),
        ".quant_map": NF4_VALUES,
    }
    if nested:
        tensors |= {".nested_absmax": np.asarray(arrays.scales[0]), ".nested_quant_map": np.asarray(arrays.table)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(arrays.means[0, 0])}
    tensors |= {f".{STATE}": as_bytes(state)}
    return {name + end: tensor for end, tensor in tensors.items()}


def as_bytes(state: object) -> np.ndarray:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def write(folder: Path, family: str = "llama", *, quantised: Callable[[str], bool] = lambda name: True) -> str:
    """Writes a small model whose projections, or some of them, are in 4 bits."""
    torch_bridge.save_pretrained(small_model(family), folder)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith("_proj.weight") and quantised(name)]:
        tensors |= stored(name, tensors[name])
    save_file(tensors, folder / WEIGHTS)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("nf4") / "Model-bnb-4bit")


def changed(folder: str, place: Path, change: Callable[[dict[str, np.ndarray]], object]) -> str:
    """Copies a folder with its tensors changed."""
    place.mkdir()
    (place / "config.json").write_text((Path(folder) / "config.json").read_text())
    tensors = load_file(Path(folder) / WEIGHTS)
    change(tensors)
    save_file(tensors, place / WEIGHTS)
    return str(place)


def frozen(model: Transformer) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model, Frozen))


def test_codes_are_placed_as_they_are_stored(folder: str):
    expected = small_model("llama")
    freeze(expected, nf4_store())
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    assert not jax.tree.leaves(nnx.state(model, TRAINED))
    for ours, wanted in zip(frozen(model), frozen(expected), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_in_4bit_is_the_dense_model_quantised(dtype: str, tmp_path: Path):
    expected = small_model("qwen3", dtype=jnp.dtype(dtype))
    torch_bridge.save_pretrained(expected, tmp_path / "model")
    freeze(expected, nf4_store())
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype=dtype, load_in_4bit=True)
    for ours, wanted in zip(frozen(model), frozen(expected), strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, wanted)
    assert {type(weight_of(model.embedding)).__name__, model.dtype.name} == {"DenseWeight", dtype}


def test_load_in_4bit_changes_nothing_of_a_folder_in_4_bits(folder: str, tmp_path: Path):
    some = write(tmp_path / "some", quantised=lambda name: "layers.0" in name)
    for path in (folder, some):
        kinds = [torch_bridge.from_pretrained(path, load_in_4bit=asked)[0] for asked in (False, True)]
        for before, after in zip(*map(frozen, kinds), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("in_4bit", [True, False], ids=["stored", "quantised"])
def test_the_device_never_holds_the_dense_projections(
    in_4bit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """At any write there are the model in 4 bits, and the one or two tensors that are being placed."""
    config = small_config("llama", hidden_size=64, intermediate_size=128, num_layers=8)
    dense = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    torch_bridge.save_pretrained(dense, tmp_path / "model")
    if in_4bit:
        tensors = load_file(tmp_path / "model" / WEIGHTS)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors |= stored(name, tensors[name])
        save_file(tensors, tmp_path / "model" / WEIGHTS)
    del dense
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    held = []
    place = torch_bridge.tensors._place
    monkeypatch.setattr(
        torch_bridge.tensors,
        "_place",
        lambda *x: (held.append(sum(array.nbytes for array in jax.live_arrays()) - before), place(*x))[1],
    )
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32", load_in_4bit=not in_4bit)
    model_bytes = sum(leaf.nbytes for leaf in frozen(model))
    largest = 4 * config.hidden_size * config.intermediate_size
    assert model_bytes <= max(held) <= model_bytes + 3 * largest
    linears = [weight_of(x.weight) for x in (model.blocks.attention.qkv, model.blocks.feed_forward.gate_up)]
    assert all(isinstance(weight, NF4Weight) for weight in linears)
    assert "56 projections are held in 4 bits (NF4). All projections take" in capsys.readouterr().err


def test_a_matrix_whose_rows_are_no_words_is_dense_and_exact(tmp_path: Path):
    """Rows of 44 elements."""
    config = small_config("llama", hidden_size=44)
    torch_bridge.save_pretrained(Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    flat = stored(UP, tensors[UP].reshape(-1, 8), nested=False)  # the same order of elements
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(tensors[UP].shape)}
    expected = np.asarray(quantize_nf4(jnp.asarray(tensors[UP].reshape(-1, 8)), (440,), 64, False).dense("float32"))
    save_file(tensors | flat | {f"{UP}.{STATE}": as_bytes(state)}, tmp_path / "model" / WEIGHTS)
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32")
    np.testing.assert_array_equal(np.asarray(dict(model_tensors(model))[UP]).reshape(-1, 8), expected)


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_head_in_4_bits_is_compared_with_the_embedding(differs: bool, tmp_path: Path):
    torch_bridge.save_pretrained(small_model("qwen3"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    matrix = tensors["model.embed_tokens.weight"]
    tensors |= stored("model.embed_tokens.weight", matrix) | stored("lm_head.weight", matrix * (1 + differs))
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    if differs:
        with pytest.raises(InputError, match="tie_word_embeddings"):
            torch_bridge.from_pretrained(str(tmp_path / "model"))
        return
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32")
    expected = np.asarray(quantize_nf4(jnp.asarray(matrix), (97,)).dense("float32"))
    np.testing.assert_array_equal(np.asarray(weight_of(model.embedding).dense("float32")), expected)


def test_what_is_written_is_dense_and_says_so(folder: str, tmp_path: Path):
    config = json.loads((Path(folder) / "config.json").read_text()) | {"quantization_config": NF4}
    copy = changed(folder, tmp_path / "copy", lambda _: None)
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    model, _ = torch_bridge.from_pretrained(copy, dtype="float32")
    torch_bridge.save_pretrained(model, tmp_path / "dense")
    add_lora(model, LoraConfig(r=2, target_modules="q_proj"))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    assert torch_bridge.base_of(str(tmp_path / "adapter")) == copy
    expected = dict(model_tensors(model))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    written = load_file(tmp_path / "dense" / WEIGHTS)
    assert written.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_array_equal(written[name], np.asarray(wanted), err_msg=name)


# Refused.


def state_with(**changes: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        state = json.loads(tensors[f"{UP}.{STATE}"].tobytes())
        tensors[f"{UP}.{STATE}"] = as_bytes({name: x for name, x in (state | changes).items() if x is not None})

    return change


def tensor(end: str, value: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        was = tensors.pop(UP + end)
        if value is not None:
            tensors[UP + end] = value(was)

    return change


BROKEN = {
    "without .absmax": tensor(".absmax", None),
    "without .quant_map": tensor(".quant_map", None),
    "without .nested_quant_map": tensor(".nested_quant_map", None),
    "has nested_blocksize, nested_dtype, nested_offset, which": tensor(".nested_absmax", None),
    "without .quant_state.bitsandbytes__nf4": tensor(f".{STATE}", None),
    "no JSON": tensor(f".{STATE}", lambda x: x[:-3]),
    "must be a JSON object": tensor(f".{STATE}", lambda x: as_bytes([1])),
    "at most 4,096 bytes": tensor(f".{STATE}", lambda x: np.tile(x, 50)),
    "must be uint8 of at most": tensor(f".{STATE}", lambda x: x.astype(np.int32)),
    "codes must have 1,920 bytes": tensor("", lambda x: x[:-1]),
    ".absmax must be uint8 of 60 numbers": tensor(".absmax", lambda x: x[:-1]),
    ".absmax must be uint8 of 60 numbers, got float32": tensor(".absmax", lambda x: x.astype(np.float32)),
    ".nested_absmax must be float32 of 1 numbers": tensor(".nested_absmax", lambda x: np.tile(x, 2)),
    "16 values of NF4, got others": tensor(".quant_map", lambda x: x[::-1].copy()),
    "lacks blocksize": state_with(blocksize=None),
    "lacks nested_offset": state_with(nested_offset=None),
    "has zeros, which": state_with(zeros=1),
    "`quant_type` must be nf4, got 'fp4'": state_with(quant_type="fp4"),
    "`blocksize` must be 32, .* or 4096, got 16": state_with(blocksize=16),
    "got 8192": state_with(blocksize=8192),
    "got 64.0": state_with(blocksize=64.0),
    "`dtype` must be bfloat16, float16 or float32": state_with(dtype="float64"),
    "`shape` must be two sizes": state_with(shape=[3840]),
    "`shape` must be two sizes, got .True": state_with(shape=[True, 3840]),
    "1 tensor of the wrong shape": state_with(shape=[48, 80]),
    "must have 4,000,000,000 bytes": state_with(shape=[80_000, 100_000]),
    "`nested_blocksize` must be 256": state_with(nested_blocksize=128),
    "`nested_dtype` must be float32": state_with(nested_dtype="float16"),
    "`nested_offset` must be a float32 number, got 'a'": state_with(nested_offset="a"),
    "`nested_offset` must be a float32 number, got 1e": state_with(nested_offset=1e300),
}


@pytest.mark.parametrize("message", BROKEN)
def test_cases_of_a_wrong_description_are_refused_before_anything_is_read(
    message: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = changed(folder, tmp_path / "broken", BROKEN[message])
    monkeypatch.setattr(torch_bridge.tensors, "zeros_at", lambda _: pytest.fail("arrays were made"))
    with pytest.raises(InputError, match=message) as refused:
        torch_bridge.from_pretrained(path)
    assert UP in str(refused.value)
    assert len(str(refused.value)) < 700


def test_all_wrong_matrices_are_named_together(folder: str, tmp_path: Path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{UP}.absmax"], tensors[f"{DOWN}.quant_map"], tensors["model.norm.weight"]

    path = changed(folder, tmp_path / "broken", change)
    with pytest.raises(
        InputError, match=r"1 missing tensor .model.norm.weight.; 2 tensors that cannot be read"
    ) as told:
        torch_bridge.from_pretrained(path)
    assert f"{UP} of 4 bits without .absmax" in str(told.value)
    assert f"{DOWN} of 4 bits without .quant_map" in str(told.value)


FORMATS = {
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "AWQ": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "FP8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "MXFP4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "torchao": {"quant_method": "torchao"},
    "HQQ": {"quant_method": "hqq"},
    "another format": {"bits": 4},
    "bitsandbytes' int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bitsandbytes' fp4": NF4 | {"bnb_4bit_quant_type": "fp4"},
}


@pytest.mark.parametrize("form", FORMATS)
def test_other_formats_are_refused_by_name_with_the_sibling(form: str):
    fields = config_to_hf(small_config("qwen3")) | {"quantization_config": FORMATS[form]}
    with pytest.raises(InputError, match=rf"got {form}: .*probably 'Qwen/Qwen3-4B'\. `load_in_4bit` holds"):
        config_from_hf(fields, "Qwen/Qwen3-4B-4bit")


TENSORS = {
    "bitsandbytes' int8": {".weight": np.int8, ".SCB": np.float32},
    "GPTQ": {".qweight": np.int32, ".qzeros": np.int32, ".scales": np.float16, ".g_idx": np.int32},
    "AWQ or GPTQ": {".qweight": np.int32, ".qzeros": np.int32, ".scales": np.float16},
    "compressed-tensors": {".weight_packed": np.int32, ".weight_scale": np.float16},
    "FP8": {".weight": np.uint8, ".weight_scale_inv": np.float32},
    "MXFP4": {"_blocks": np.uint8, "_scales": np.uint8},
}


@pytest.mark.parametrize("form", TENSORS)
def test_other_formats_are_recognised_by_their_tensors(form: str, tmp_path: Path):
    torch_bridge.save_pretrained(small_model("qwen3"), tmp_path / "Qwen3-4B-4bit")
    path = tmp_path / "Qwen3-4B-4bit" / WEIGHTS
    tensors = load_file(path)
    matrix = tensors.pop(UP)
    tensors |= {UP.removesuffix(".weight") + end: matrix.astype(dtype) for end, dtype in TENSORS[form].items()}
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf", in {form}\. Use the 16-bit model .*probably 'Qwen3-4B'"):
        torch_bridge.from_pretrained(str(path.parent))


def test_a_wrong_type_of_load_in_4bit_is_refused(folder: str):
    with pytest.raises(InputError, match="`load_in_4bit` must be true or false, got 'yes'"):
        torch_bridge.from_pretrained(folder, load_in_4bit="yes")


# Trained.


def test_a_model_in_4_bits_without_adapters_is_not_trained(folder: str):
    model, _ = torch_bridge.from_pretrained(folder)
    with pytest.raises(InputError, match=r"`model` must have weights to train, .* Add adapters with `add_lora`"):
        Trainer(model, None, random_documents([9, 9]), TrainConfig(max_length=128, max_steps=1))


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_head_and_embedding_are_trained_beside_the_adapters(family: str, tmp_path: Path):
    model, _ = torch_bridge.from_pretrained(write(tmp_path / "base", family), dtype="float32")
    add_lora(model, LoraConfig(r=2, target_modules="q_proj", modules_to_save=("lm_head", "embed_tokens")))
    before = {name: np.array(x) for name, x in model_tensors(model)}
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2)
    result = Trainer(model, None, random_documents([60, 60]), config).train()
    assert result.losses[1] < result.losses[0]
    changes = {name for name, x in model_tensors(model) if not np.array_equal(before[name], x)}
    assert changes == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if family == "llama" else set())
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    again, _ = torch_bridge.from_pretrained(str(tmp_path / "base"), dtype="float32")
    torch_bridge.load_adapter(again, str(tmp_path / "adapter"))
    for (name, ours), (_, theirs) in zip(model_tensors(again), model_tensors(model), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_predictions_know_that_a_folder_is_in_4_bits(folder: str, tmp_path: Path):
    matrix, linear = jnp.ones((1, 64, 64)), Linear(64, {"one": 64}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    copy = changed(folder, tmp_path / "copy", lambda _: None)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    for quantisation, nested in ((NF4, False), (NF4 | {"bnb_4bit_use_double_quant": True}, True)):
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
        weight = described_store(copy)(matrix, linear)
        assert isinstance(weight, NF4Weight)
        assert weight.is_nested == nested
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert not isinstance(described_store(copy)(matrix, linear), NF4Weight)
