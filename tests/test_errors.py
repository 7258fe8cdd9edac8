"""Tests that errors about a missing optional dependency give commands that install it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from models import small_model

import jaxpack
import torch_bridge
from jaxpack.errors import InputError, install_command, not_installed
from jaxpack.utils.figures import new_figure

ROOT = Path(jaxpack.__file__).parent.parent
SOURCES = [path for folder in ("jaxpack", "torch_bridge", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
NAMING = ("install_command", "not_installed")  # their last argument names extras
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_first_command_works_in_a_checkout_and_the_second_with_a_package_index() -> None:
    checkout, index = re.findall(r"`(.*?)`", install_command("hf,torch"))
    assert checkout == "pip install -e '.[hf,torch]'"
    assert index == "pip install 'jaxpack[hf,torch]'"


def test_the_error_names_the_argument_the_package_and_the_command() -> None:
    error = not_installed("`verify`", "torch", "hf,torch")
    assert isinstance(error, InputError)
    assert str(error) == (
        "`verify` needs the Python package torch, which is not installed. Install it with "
        f"{install_command('hf,torch')}."
    )


def test_no_other_module_spells_the_command() -> None:
    assert [path for path in SOURCES if "pip install" in path.read_text()] == [ROOT / "jaxpack" / "errors.py"]


def test_every_extra_that_is_named_exists() -> None:
    named = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", None) in NAMING
            if is_call and isinstance(node.args[-1], ast.Constant):  # else the extra is named like its destination
                named |= set(node.args[-1].value.split(","))
    assert {"hf", "torch", "bench"} <= named <= EXTRAS.keys()
    assert {"tensorboard", "wandb"} <= EXTRAS.keys()


def test_pictures_say_how_to_get_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError) as refused:
        new_figure(2, 1)
    assert str(refused.value) == str(not_installed("Drawing a picture", "matplotlib", "bench"))


def test_a_model_of_the_hub_says_how_to_get_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="`model` must be an existing folder, got 'someone/model'") as refused:
        torch_bridge.from_pretrained("someone/model")
    assert "huggingface_hub" in str(refused.value)
    assert install_command("hf") in str(refused.value)


def test_a_tokenizer_that_is_not_read_says_how_to_get_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch_bridge.save_pretrained(small_model("qwen3"), str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.json").touch()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert torch_bridge.read_config(str(tmp_path / "model"))[1] is None
    assert f"Install transformers with {install_command('hf')}" in " ".join(capsys.readouterr().err.split())
