"""Tests that the README's examples run: its Python as written, its shell commands with the same flags.

Also tests that everything which the README and the pages of `docs/` name exists.
"""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from readme_blocks import README, ROOT, blocks, command
from shared_data import beside
from tokenizers_for_tests import write_checkpoint

from jaxpack import cli
from jaxpack.cli import main
from jaxpack.utils.foreign_names import ALIASES, OPPOSITES

PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in (ROOT / "docs").glob("*.md")}
LENGTHS = "token_length_from,token_length_to,documents\n5,20,3\n20,90,1\n"


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a reader's folder: a checkpoint and a dataset under the names that the README uses."""
    write_checkpoint(tmp_path / "path" / "to" / "Qwen3-4B")
    rows = [{"prompt": "one and one", "completion": " is two"}, {"prompt": "two and two", "completion": " is four"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(text: str) -> str:
    assert "200" in text
    assert "4096" in text
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


def test_what_the_readme_shows_of_an_inspection_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def of_alpaca(inspect: str) -> str:
        shown = inspect.split(" --picture")[0].replace("path/to/", "")
        return shown.replace("--data train.jsonl", f"--lengths {beside('alpaca_lengths.csv')} --memory-limit 120")

    run_command("jaxpack inspect", monkeypatch, of_alpaca)
    said = re.sub("[│┃]", " ", capsys.readouterr().out).split()
    (shown,) = (part for part in README.split("```\n") if "padding-free *" in part)
    for words in filter(None, map(str.split, shown.splitlines())):
        assert any(said[i : i + len(words)] == words for i in range(len(said))), words


def test_the_commands_of_the_readme_train_and_generate(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_command("jaxpack train --model", monkeypatch, shortened)
    assert (user_folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    run_command("jaxpack generate", monkeypatch)
    shown = capsys.readouterr().out
    assert "two and two" in shown
    assert "without the adapter" in shown


def test_the_command_of_the_readme_trains_in_4_bits(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_command("jaxpack train --load-in-4bit", monkeypatch, shortened)
    assert (user_folder / "out-4bit" / "adapter" / "adapter_model.safetensors").is_file()
    assert "are held in 4 bits" in " ".join(capsys.readouterr().err.split())


def test_a_users_model_and_data_are_measured_as_the_readme_says(user_folder: Path, monkeypatch: pytest.MonkeyPatch):
    figures = dict.fromkeys(("tokens_per_second", "step_seconds", "peak_memory_bytes", "padding_share"), 0.5)
    figures |= {"compile_seconds": 0.0, "found_programs": 0, "warm_up_seconds": 0.0, "device": "none"}
    monkeypatch.setattr("jaxpack.cli.bench.measure_elsewhere", lambda *_: figures)  # else 24 cases
    run_command("jaxpack bench", monkeypatch)
    assert (user_folder / "bench" / "results_ablation.png").is_file()


def test_the_benchmarks_commands_plan_and_draw(tmp_path: Path):
    (tmp_path / "LENGTHS.csv").write_text(LENGTHS)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    environment, *lines = command("export PYTHONPATH=.").strip().splitlines()
    assert environment == "export PYTHONPATH=."
    measure, draw = (shlex.split(line) for line in lines)
    for program, script, *flags in ([*measure, "--seconds", "0"], draw):
        assert program == "python"
        # as a shell
        flags = [path for flag in flags for path in sorted(glob.glob(flag, root_dir=tmp_path)) or [flag]]
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nowhere"},
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or "no time left" in done.stderr
    assert done.returncode == 0
    drawn = {Path(line) for line in done.stdout.splitlines() if line.endswith(".png")}
    pages = README + PAGES["docs/benchmarks.md"].replace("](../", "](")
    pictures = set(re.findall(r"!\[.*?\]\((.*?)\)", pages))
    assert drawn == set(map(Path, pictures))
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_every_block_of_the_readme_is_run_or_is_of_make_and_pip():
    here = ["export PYTHONPATH=.", "jaxpack bench", "jaxpack train", "jaxpack generate", "jaxpack inspect"]
    others = [block for block in blocks("console") if not block.startswith(tuple(here))]
    make, pip = others  # the first block runs these tests and then the demo
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in make.splitlines()} <= targets
    assert pip.startswith("pip install")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str):
    text = PAGES[page]
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert {name for names in re.findall(r"pip install '\.\[(.*?)\]'", text) for name in names.split(",")} <= extras

    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    tops = "jaxpack/", "torch_bridge/", "tests/", "benchmarks/", "docs/", "notebooks/"
    named = {path for path in code if path.startswith(tops) and " " not in path}
    assert [path for path in named if not (ROOT / path).exists()] == []

    group = typer.main.get_command(cli.app)
    context = typer.Context(group)
    commands = (group.get_command(context, name) for name in group.list_commands(context))
    options = [option for known in commands for option in known.params]
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    flags = {"--help", *re.findall(r'add_argument\("(--[a-z-]+)"', scripts)}
    flags |= {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    flags |= {f"--{alias.replace('_', '-')}" for alias in (*ALIASES, *OPPOSITES)}
    shown = re.findall(r"(?<![\w-])--(?!xla_)[a-z][a-z0-9_-]+", text)  # XLA's own flags aside
    assert {flag.replace("_", "-") for flag in shown} - flags == set()

    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, page, "exec")
