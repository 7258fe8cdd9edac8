"""Fixtures that the tests of the commands share. They import jaxpack late, after the warning filters are set."""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers_for_tests import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base")


@pytest.fixture
def exit_status(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the installed command's entry point in this process and returns its exit status."""

    from jaxpack import cli

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["jaxpack", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0

    return run


@pytest.fixture
def assert_refused(
    exit_status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[[list[object], Iterable[str]], None]:
    """Asserts that a command ends with one sentence, which has some fragments, and writes nothing."""

    def check(arguments: list[object], fragments: Iterable[str]) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert exit_status(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert line.endswith(".")
        for fragment in fragments:
            assert fragment in line
        assert sorted(tmp_path.rglob("*")) == before

    return check


class Stopped(Exception):
    """Is raised in place of training."""


@pytest.fixture
def what_is_trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Returns what `jaxpack train` would use for its arguments: model, data, configs, adapter. Loads no model."""

    from jaxpack import cli

    def run(*arguments: object) -> dict[str, Any]:
        found: dict[str, Any] = {"lora": None, "adapter": None}

        def from_pretrained(model: str, dtype: str | None, load_in_4bit: bool, lazy: bool) -> tuple[None, None]:
            found.update(model=model, dtype=dtype, load_in_4bit=load_in_4bit)
            return None, None

        def trainer(model: object, tokenizer: object, data: object, config: object, eval_data: object) -> None:
            found.update(data=data, config=config, eval_data=eval_data)
            raise Stopped

        command = importlib.import_module("jaxpack.cli.train")
        monkeypatch.setattr(command.torch_bridge, "from_pretrained", from_pretrained)
        monkeypatch.setattr(command.torch_bridge, "load_adapter", lambda _, path: found.update(adapter=path))
        monkeypatch.setattr(command, "add_lora", lambda _, config: found.update(lora=config))
        monkeypatch.setattr(command, "require_room", lambda *_: None)
        monkeypatch.setattr(command, "split_trained", lambda *_: (None, {}, None))
        monkeypatch.setattr(command, "Trainer", trainer)
        monkeypatch.setattr(sys, "argv", ["jaxpack", "train", *map(str, arguments)])
        with pytest.raises(Stopped):
            cli.main()
        return found

    return run
