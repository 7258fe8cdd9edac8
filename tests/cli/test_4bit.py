"""Tests `--load-in-4bit` of the commands: a small model is trained, evaluated, resumed, completed and exported."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import torch_bridge
from jaxpack import cli
from jaxpack.errors import InputError
from torch_bridge.tensors import model_tensors

SETTINGS = ["--packing", "--max-length", 64, "--per-device-train-batch-size", 2, "--lora-r", 4]
COURSE = ["--learning-rate", 1e-2, "--eval-steps", 2, "--save-steps", 2]
LONG = "--load-in-4bit"


def run(*arguments: object) -> int:
    """Runs the installed command's entry point in this process, and returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxpack", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


@pytest.fixture(scope="module")
def command(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"the cab {row} " * (1 + row % 3), "completion": f" ab {row}"} for row in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", "--model", base, "--data", data, "--eval-data", data, *SETTINGS, *COURSE]


@pytest.fixture(scope="module")
def trained(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "whole"
    assert run(*command, LONG, "--max-steps", 4, "--output", output) == 0
    return output


def test_a_run_in_4_bits_is_evaluated_and_written(trained: Path, base: Path):
    assert yaml.safe_load((trained / "run.yaml").read_text())["load_in_4bit"] is True
    losses = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]
    assert torch_bridge.base_of(str(trained / "adapter")) == str(base)


@pytest.mark.slow
def test_a_run_in_4_bits_is_resumed_in_4_bits_only(
    trained: Path, command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture
):
    shape = ["--max-steps", 4, "--output", tmp_path / "more"]
    resumed = [*command, *shape, "--resume-from-checkpoint", trained / "checkpoints" / "2"]
    assert run(*resumed) == 2
    assert "`weights in 4 bits` True (here None)" in capsys.readouterr().err
    assert run(*resumed, LONG) == 0
    both = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, tmp_path / "more")]
    for name, tensor in both[0].items():
        np.testing.assert_array_equal(both[1][name], tensor)


def test_text_comes_from_the_model_in_4_bits(trained: Path, capsys: pytest.CaptureFixture):
    asked = ["generate", "--adapter", trained / "adapter", "--prompt", "the cab", "--max-new-tokens", 3]
    assert run(*asked, LONG) == 0
    assert "projections are held in 4 bits (NF4)" in capsys.readouterr().err


def test_an_export_merges_into_the_weights_that_were_trained_against(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    asked = ["export", "--adapter", trained / "adapter", "--dtype", "float32"]
    assert run(*asked, LONG, "--merged", tmp_path / "merged") == 0
    written = load_file(tmp_path / "merged" / "model.safetensors")
    model, _ = torch_bridge.from_pretrained(str(base), dtype="auto", load_in_4bit=True)
    factors = load_file(trained / "adapter" / "adapter_model.safetensors")
    for name, tensor in model_tensors(model):
        expected, module = np.asarray(tensor), f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            product = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            expected = expected + 32 / 4 * product
        np.testing.assert_allclose(written[name], expected, atol=1e-6, err_msg=name)


def test_an_export_says_if_it_merges_into_weights_that_the_adapter_has_never_seen(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    asked = ["export", "--adapter", trained / "adapter"]
    said = "the run trained this adapter beside weights in 4 bits"
    assert run(*asked, "--merged", tmp_path / "without") == 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert run(*asked, LONG, "--merged", tmp_path / "with") == 0
    assert said not in " ".join(capsys.readouterr().err.split())
    (trained / "run.yaml").rename(tmp_path / "run.yaml")  # an adapter may come without its run
    assert run(*asked, "--merged", tmp_path / "alone") == 0
    (tmp_path / "run.yaml").rename(trained / "run.yaml")
    assert said not in " ".join(capsys.readouterr().err.split())


def test_full_finetuning_in_4_bits_is_refused(command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = [flag for flag in command if flag not in ("--lora-r", 4)]
    assert run(*flags, LONG, "--full-finetuning", "--output", tmp_path / "out") == 2
    assert "`load_in_4bit` must be without `full_finetuning`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("inspect", "--model", "Qwen3-0.6B", "--data", command[4], LONG, "--full-finetuning") == 2
    assert "`load_in_4bit` must be without `full_finetuning`" in capsys.readouterr().err


def test_inspect_predicts_a_model_in_4_bits(
    base: Path, command: list[object], monkeypatch: pytest.MonkeyPatch, what_is_inspected: Callable[..., int]
):
    shapes = ["--model", base, "--data", command[4]]
    dense, quantised = what_is_inspected(*shapes), what_is_inspected(*shapes, LONG)
    assert quantised < dense


@pytest.fixture
def what_is_inspected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Returns the bytes of the projections of the model that `jaxpack inspect` predicts."""

    def bytes_of(*arguments: object) -> int:
        found = []

        def inspected(documents: object, config: object, *, model, gpu: object) -> None:
            found.append(sum(x.nbytes for x in (model.blocks.attention.qkv.weight.get_value(),)))
            raise InputError("stopped")

        command = importlib.import_module("jaxpack.cli.inspect")
        monkeypatch.setattr(command, "inspect_documents", inspected)
        assert run("inspect", *arguments) == 2
        return found[0]

    return bytes_of
