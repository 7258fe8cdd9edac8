"""Tests that `jaxpack export` merges a run's adapter into its base model."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers_for_tests import small_tokenizer, write_checkpoint
from transformers import AutoTokenizer

import torch_bridge
from jaxpack import LoraConfig, add_lora, cli
from jaxpack.model.lora import adapters


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Writes a base model and an adapter that changes the base model and names it."""
    parent = tmp_path_factory.mktemp("export")
    base = write_checkpoint(parent / "base")
    model = add_lora(torch_bridge.from_pretrained(str(base))[0], LoraConfig(r=4))
    rng = np.random.default_rng(0)
    for factors in adapters(model).values():
        factors.lora_b.set_value(rng.normal(0, 0.1, factors.lora_b.shape).astype(np.float32))
    torch_bridge.save_adapter(model, str(parent / "adapter"))
    return base, parent / "adapter"


@pytest.fixture
def export(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process. Returns its exit status and its stderr."""

    def export(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jaxpack", "export", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, capfd.readouterr().err

    return export


def test_the_merged_model_is_written_and_verified(folders: tuple[Path, Path], tmp_path: Path, export: Callable):
    base, adapter = folders
    status, shown = export("--model", base, "--adapter", adapter, "--merged", tmp_path / "merged", "--verify")
    assert status == 0
    assert "14 of 14 adapted tensors changed" in shown
    assert f"saved {tmp_path / 'merged'}" in shown
    assert "logits of transformers and jaxpack differ by at most" in shown
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("the cab").input_ids == small_tokenizer()("the cab").input_ids


def test_the_base_is_the_one_that_the_adapter_names(folders: tuple[Path, Path], tmp_path: Path, export: Callable):
    status, _ = export("--adapter", folders[1], "--merged", tmp_path / "merged", "--dtype", "float32")
    assert status == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}


def test_a_disk_that_fills_is_said_of_the_flag_and_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, export: Callable, monkeypatch: pytest.MonkeyPatch
):
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch_bridge.pretrained.write_safetensors", fill)
    status, shown = export("--adapter", folders[1], "--merged", tmp_path / "merged")
    assert status == 2
    assert f"error: `merged` must be writable, got '{tmp_path / 'merged'}': No space left" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({"--quantize": "q8_0"}, "`quantize` must be given with `gguf` only, got 'q8_0'"),
        ({"--adapter": "nowhere"}, "`adapter` must be an existing folder, got 'nowhere'"),
        ({"--adapter": "."}, "`adapter` must be a folder with adapter_config.json"),
        ({"--model": "nowhere"}, "`model` must be an existing folder"),
        ({"--dtype": "int8"}, "`dtype` must be"),
        ({"--merged": "."}, "`merged` must be empty"),
        ({"--merged": "x" * 300}, "`merged` must be a folder"),
        ({"--adapter": "x" * 5000}, "`adapter` must be an existing folder"),
    ],
    ids=str,
)
def test_bad_input(flags: dict[str, str], fragment: str, folders: tuple[Path, Path], tmp_path: Path, export: Callable):
    good = {"--model": folders[0], "--adapter": folders[1], "--merged": tmp_path / "merged"}
    status, shown = export(*(word for pair in (good | flags).items() for word in pair))
    assert status == 2
    lines = [line for line in shown.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert fragment in lines[0]
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_4_bit_model_is_merged_into_either_base(
    folders: tuple[Path, Path], tmp_path: Path, export: Callable
):
    status, shown = export("--adapter", folders[1], "--merged", tmp_path / "one", "--base", folders[0])
    assert status == 2
    assert "`base` must be None for a model without weights in 4 bits" in shown
    status, shown = export("--adapter", folders[1], "--merged", tmp_path / "two", "--load-in-4bit")
    assert status == 0
    assert "into the dequantised 4-bit weights" in shown
    flags = "--load-in-4bit", "--base", folders[0]
    status, shown = export("--adapter", folders[1], "--merged", tmp_path / "three", *flags)
    assert status == 0
    assert f"into the 16-bit weights of {folders[0]}" in shown


def test_a_gguf_file_is_written_beside_the_merged_folder(folders: tuple[Path, Path], tmp_path: Path, export: Callable):
    gguf = pytest.importorskip("gguf")
    flags = "--merged", tmp_path / "merged", "--dtype", "float32", "--gguf", tmp_path / "m.gguf", "--quantize", "f32"
    status, shown = export("--adapter", folders[1], *flags)
    assert status == 0
    assert f"saved {tmp_path / 'm.gguf'}" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "m.gguf", "m.Modelfile"}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(found) == len(merged)
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], merged["model.layers.1.mlp.down_proj.weight"].numpy())
    status, shown = export("--adapter", folders[1], "--gguf", tmp_path / "m.gguf")
    assert status == 2
    assert "`gguf` must be a new file in an existing folder" in shown


def test_a_model_without_an_adapter_is_written_as_gguf(folders: tuple[Path, Path], tmp_path: Path, export: Callable):
    gguf = pytest.importorskip("gguf")
    status, _ = export("--model", folders[0], "--gguf", tmp_path / "model.gguf", "--quantize", "q8_0")
    assert status == 0
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.name"].contents() == "base"


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ([], "`merged` or `gguf` must be given, got none"),
        (["--merged", "out"], "`adapter` must be given with `merged`"),
        (["--gguf", "m.bin"], "`gguf` must end in .gguf"),
        (["--gguf", "m.gguf", "--quantize", "q5_k_m"], "`llama-quantize model.gguf model-q5_k_m.gguf q5_k_m`"),
        (["--gguf", "m.gguf", "--dtype", "float32"], "`merged` must be given with `dtype`"),
        (["--gguf", "m.gguf", "--push-to-hub"], "`merged` must be given with"),
    ],
    ids=str,
)
def test_flags_of_gguf_that_do_not_fit_together(
    flags: list[str], fragment: str, folders: tuple[Path, Path], export: Callable
):
    pytest.importorskip("gguf")
    status, shown = export("--model", folders[0], *flags)
    assert status == 2
    assert fragment in " ".join(shown.split())
