"""Tests that `pytorch_model.bin` is read as weights and nothing else, and only if there are no safetensors."""

import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import torch_bridge
import torch_bridge.tensors
from jaxpack.errors import InputError, install_command
from jaxpack.model.transformer import Transformer
from tests.torch_bridge import hf

WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"


def assert_same(actual: Transformer, expected: Transformer) -> None:
    leaves = zip(*(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (actual, expected)), strict=True)
    for ours, theirs in leaves:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def save_bin(folder: Path, checkpoint: str, dtype: torch.dtype = torch.float32, shards: int = 1) -> torch.nn.Module:
    """Writes a random checkpoint as `pytorch_model.bin`, whole or in shards, as transformers 4 did."""
    model, _ = hf.save_model(folder, checkpoint, dtype)
    (folder / WEIGHTS).unlink()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if checkpoint.endswith("-tied"):
        del tensors["lm_head.weight"]
    names = [BIN] if shards == 1 else [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    file_of = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensor for name, tensor in tensors.items() if file_of[name] == file}, folder / file)
    if shards > 1:
        (folder / f"{BIN}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_are_those_of_the_module(shards: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_bridge.tensors, "_PIECE", 50 * 48)
    module = save_bin(tmp_path, "qwen3-tied", getattr(torch, dtype), shards)
    read, _ = torch_bridge.from_pretrained(str(tmp_path), dtype=dtype)
    assert_same(read, torch_bridge.from_torch(module, dtype=dtype))


def test_tensors_with_strides_and_shared_storage_are_read(tmp_path: Path):
    module = save_bin(tmp_path, "llama-untied")
    tensors = torch.load(tmp_path / BIN, weights_only=True)
    stacked = torch.stack([tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]])
    tensors |= {f"model.layers.{i}.mlp.up_proj.weight": stacked[i] for i in (0, 1)}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    torch.save(tensors, tmp_path / BIN)
    read, _ = torch_bridge.from_pretrained(str(tmp_path), dtype="float32")
    assert_same(read, torch_bridge.from_torch(module, dtype="float32"))


def test_safetensors_are_preferred(tmp_path: Path):
    hf.save_model(tmp_path, "qwen3-tied")
    (tmp_path / BIN).write_bytes(b"no weights")
    torch_bridge.from_pretrained(str(tmp_path))


class Malicious:
    def __reduce__(self) -> tuple:
        return print, ("the pickle ran its code",)


def legacy(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / BIN, _use_new_zipfile_serialization=False)


def cut(folder: Path) -> None:
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:-2000])


def broken_pickle(folder: Path) -> None:
    """Breaks the pickle inside a zip file that stays whole."""
    with zipfile.ZipFile(folder / BIN) as good:
        contents = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(folder / BIN, "w") as bad:
        for name, content in contents.items():
            bad.writestr(name, content[: len(content) // 2] if name.endswith("data.pkl") else content)


def saved(content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / BIN)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = torch.load(folder / BIN, weights_only=True)
        torch.save(tensors | {name: change(tensors[name])}, folder / BIN)

    return damage


def rewritten(change: Callable[[str, bytes], bytes | None] = lambda name, content: content, **options: int) -> Callable:
    """Writes the records of a file anew, with `change` applied to each; `options` are those of `zipfile.ZipFile`."""

    def damage(folder: Path) -> None:
        with zipfile.ZipFile(folder / BIN) as good:
            contents = {name: good.read(name) for name in good.namelist()}
        with zipfile.ZipFile(folder / BIN, "w", **options) as bad:
            for name, content in contents.items():
                if (changed := change(name, content)) is not None:
                    bad.writestr(name, changed)

    return damage


def one_compressed(folder: Path) -> None:
    """Compresses one record among plain ones."""
    rewritten()(folder)
    with zipfile.ZipFile(folder / BIN) as good:
        contents = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(folder / BIN, "w") as bad:
        for name, content in contents.items():
            method = zipfile.ZIP_DEFLATED if name.endswith("data/1") else zipfile.ZIP_STORED
            bad.writestr(name, content, compress_type=method)


def twice(folder: Path) -> None:
    with zipfile.ZipFile(folder / BIN, "a") as both, warnings.catch_warnings(action="ignore"):
        name = next(name for name in both.namelist() if name.endswith("data/0"))
        both.writestr(name, bytes(len(both.read(name))))


def shorter_storage(name: str, content: bytes) -> bytes:
    """Cuts a storage: the tensor in it would take in the bytes of its neighbours."""
    return content[:-64] if name.endswith("data/0") else content


def bomb(name: str, content: bytes) -> bytes:
    """Describes the tensors at great length."""
    return content[:-1] + b"0" * (5 << 20) + content[-1:] if name.endswith("data.pkl") else content


def pickled(opcodes: bytes) -> Callable:
    return rewritten(lambda name, content: b"\x80\x02" + opcodes if name.endswith("data.pkl") else content)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "damage",
    [
        saved({"a": Malicious()}),
        lambda folder: (folder / BIN).write_bytes(pickle.dumps(Malicious())),
        legacy,
        cut,
        broken_pickle,
        lambda folder: (folder / BIN).write_bytes(b"PK\x03\x04" + bytes(1000)),
        lambda folder: (folder / BIN).write_bytes(b""),
        saved([torch.ones(2)]),
        saved({"a": 7}),
        saved({7: torch.ones(2)}),
        rewritten(compression=zipfile.ZIP_DEFLATED),
        rewritten(compression=zipfile.ZIP_LZMA),
        one_compressed,
        twice,
        rewritten(shorter_storage),
        rewritten(bomb),
        rewritten(lambda name, content: None if name.endswith("data/0") else content),
        rewritten(lambda name, content: None if name.endswith("data.pkl") else content),
        pickled(b"r\xff\xff\xff\x1fN."),  # a memo of half a billion entries
        pickled(b"\x96" + (10**10).to_bytes(8, "little") + b"."),  # an array of ten billion bytes
        pickled(b"\x8a\x04" + b"\xff" * 4 + b"."),
        pickled(b"(" * 100_000),
        replaced(NORM, torch.Tensor.double),
        replaced(NORM, torch.Tensor.to_sparse),
        replaced(NORM, lambda x: x.to("meta")),
        replaced(NORM, lambda x: x[:-1]),
        replaced(NORM, lambda x: torch.ones(1).expand(10**9)),  # a billion numbers in a file of a few bytes
    ],
)
def test_cases_what_is_no_weights_is_one_clear_error(damage: Callable, tmp_path: Path, capfd: pytest.CaptureFixture):
    save_bin(tmp_path, "llama-untied")
    damage(tmp_path)
    with pytest.raises(InputError) as refused:
        torch_bridge.from_pretrained(str(tmp_path))
    message = str(refused.value)
    assert BIN in message or NORM in message
    assert "\n" not in message
    assert len(message) < 500
    assert "ran its code" not in capfd.readouterr().out


def test_without_torch_the_error_says_what_is_missing(tmp_path: Path):
    save_bin(tmp_path, "qwen3-tied")
    code = (
        f"import sys; sys.modules['torch'] = None; import torch_bridge; torch_bridge.from_pretrained({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError" in last
    assert BIN in last
    assert install_command("torch") in last
