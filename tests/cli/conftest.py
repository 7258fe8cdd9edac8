"""What the tests of the commands share. Imports of jaxpack wait until the filters of warnings are set."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers_for_tests import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base")


@pytest.fixture
def exit_status(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the installed command's entry point in this process, with these arguments: its exit status."""

    from jaxpack import cli

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["jaxpack", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0

    return run
