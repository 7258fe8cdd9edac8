"""What the README shows runs: its Python as it stands, its shell command with the same flags."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from readme_blocks import blocks, command
from tokenizers_for_tests import write_checkpoint

from jaxpack.cli import main


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be: a checkpoint and a dataset under the names that the README has for them."""
    write_checkpoint(tmp_path / "path" / "to" / "Qwen3-4B")
    rows = [{"prompt": "one and one", "completion": " is two"}, {"prompt": "two and two", "completion": " is four"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(text: str) -> str:
    assert "200" in text and "4096" in text
    return text.replace("200", "2").replace("4096", "128")


def test_the_python_of_the_readme_runs(user_folder: Path):
    (code,) = blocks("python")
    exec(shortened(code), {})
    assert (user_folder / "out" / "adapter" / "adapter_model.safetensors").is_file()


def run_command(start: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str] = str):
    monkeypatch.setattr(sys, "argv", shlex.split(change(command(start))))
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None)


def test_the_data_of_the_readme_is_inspected(user_folder: Path, monkeypatch: pytest.MonkeyPatch):
    run_command("jaxpack inspect", monkeypatch)
    assert (user_folder / "lengths.png").is_file()


def test_the_commands_of_the_readme_train_and_generate(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_command("jaxpack train", monkeypatch, shortened)
    assert (user_folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    run_command("jaxpack generate", monkeypatch)
    shown = capsys.readouterr().out
    assert "two and two" in shown and "without the adapter" in shown
