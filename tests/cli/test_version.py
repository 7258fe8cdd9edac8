"""Tests `jaxpack --version` and `jaxpack --help`, which must not wait for jax."""

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import jaxpack
from jaxpack.cli import COMMANDS

SLOW = {"jax", "flax", "optax", "orbax", "torch", "transformers", "pyarrow", "numpy"}


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("-h",), ()], ids=str)
def test_nothing_slow_is_imported_before_a_command_is_chosen(arguments: tuple[str, ...]):
    script = "import sys, jaxpack.cli\ntry: jaxpack.cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if arguments else 2), done.stderr
    loaded = set(done.stderr.split())
    assert "jaxpack.cli" in loaded
    assert not SLOW & loaded
    assert not {f"jaxpack.cli.{name}" for name in COMMANDS} & loaded


def test_the_version_is_that_of_the_installed_package(exit_status: Callable[..., int], capsys: pytest.CaptureFixture):
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"jaxpack {jaxpack.__version__}\n"
    assert jaxpack.__version__ == version("jaxpack")


def test_the_version_is_known_in_a_checkout_that_is_not_installed(tmp_path: Path):
    root = Path(jaxpack.__file__).parent.parent
    script = "import sys; sys.path.insert(0, sys.argv[1]); import jaxpack; print(jaxpack.__version__)"
    isolated = [sys.executable, "-I", "-S", "-c", script, str(root)]  # neither site-packages nor the environment
    done = subprocess.run(isolated, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == jaxpack.__version__


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_on_a_line_of_its_own(
    flag: str, exit_status: Callable[..., int], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_status(flag) == 0
    shown = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in shown[shown.index("Commands:") + 1 :])
    assert listed == COMMANDS


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_own_help(
    name: str, flag: str, exit_status: Callable[..., int], capsys: pytest.CaptureFixture
):
    assert exit_status(name, flag) == 0
    shown = " ".join(capsys.readouterr().out.split())
    command = getattr(importlib.import_module(f"jaxpack.cli.{name}"), name)
    assert f"jaxpack {name} [OPTIONS]" in shown
    assert " ".join(inspect.getdoc(command).split()) in shown
    flags = [
        parameter for parameter in inspect.signature(command).parameters if parameter not in ("context", "config_file")
    ]
    assert [flag for flag in flags if f"--{flag.replace('_', '-')}" not in shown] == []


def test_every_module_with_a_command_is_listed():
    folder = Path(importlib.import_module("jaxpack.cli").__file__).parent
    implementing = {path.stem for path in folder.glob("*.py") if path.read_text().startswith('"""Implements `jaxpack ')}
    assert implementing == set(COMMANDS)


def test_a_misspelt_command_is_told_its_neighbour(exit_status: Callable[..., int], capsys: pytest.CaptureFixture):
    assert exit_status("trian") == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_python_m_jaxpack_is_the_same_program():
    command = [sys.executable, "-m", "jaxpack", "--version"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"jaxpack {jaxpack.__version__}\n"
