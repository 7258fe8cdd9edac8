"""Tests what a terminal of 80 or 140 columns shows: every line fits, and no word is broken."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import tempfile
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from forked_runs import Runs
from rich.cells import cell_len

from jaxpack.cli.help import EXAMPLES, GROUPS

WIDTHS = (80, 140)


class Terminal(NamedTuple):
    """Runs commands of `jaxpack` in a pseudo-terminal; `files` are the flags of a model and a dataset."""

    run: Runs
    files: list[object]
    folder: Path

    def show(self, columns: int, *arguments: object, **options) -> tuple[int, str]:
        """Returns a command's exit status and all that it wrote to a terminal, without the terminal's control codes."""
        controller, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (40, columns))
        written = []

        def read() -> None:
            with contextlib.suppress(OSError):  # the terminal is closed
                while part := os.read(controller, 65536):
                    written.append(part)

        reading = threading.Thread(target=read)
        reading.start()
        status = self.run(*arguments, log=os.ttyname(terminal), **options)
        os.close(terminal)
        reading.join()
        os.close(controller)
        return status, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(written).decode()).replace("\r\n", "\n")


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:  # a path that fits in a line
        patch.delenv("COLUMNS", raising=False)
        patch.setenv("TERM", "xterm")
        folder = Path(name)
        run = Runs(folder / "programs")

        from tokenizers_for_tests import write_checkpoint  # while the process of the runs imports, too

        rows = [{"prompt": f"the cab {row} " * (1 + row % 9), "completion": f" ab {row}"} for row in range(40)]
        for file, some in (("rows", rows), ("eval", rows[:5])):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        files = ["--model", write_checkpoint(folder / "base"), "--data", folder / "rows.jsonl"]
        yield Terminal(run, files, folder)
        run.close()


def require_fit(shown: str, columns: int) -> None:
    wide = [line for line in re.split(r"[\r\n]", shown) if cell_len(line) > columns]
    assert wide == []


def words_of(shown: str) -> str:
    """Returns what is shown as one line: a word that was broken has a space in it."""
    return " ".join(shown.split())


def shell_words(command: str) -> list[str]:
    """Returns the words that a shell reads from lines that end with backslashes."""
    return shlex.split(command.replace("\\\n", ""))


SHAPE = ["--packing", "--max-length", 64, "--per-device-train-batch-size", 2, "--lora-r", 4, "--logging-steps", 2]


@pytest.mark.parametrize("columns", [80, pytest.param(140, marks=pytest.mark.slow)])
def test_a_run_fits_from_start_to_end(columns: int, terminal: Terminal):
    output = terminal.folder / f"run-{columns}"
    evaluation = ["--eval-data", terminal.folder / "eval.jsonl", "--eval-steps", 4, "--save-steps", 8]
    flags = [*terminal.files, "--output", output, *SHAPE, *evaluation, "--max-steps", 8]
    status, shown = terminal.show(columns, "train", *flags)
    assert status == 0, shown
    require_fit(shown, columns)
    for line in json.loads((output / "about.json").read_text())["plan"]:
        assert line in words_of(shown)
    assert f"saved {output}/adapter" in words_of(shown)
    steps = [line for line in shown.splitlines() if line.startswith("step ") and "tokens/s" in line]
    assert [int(line.split()[1]) for line in steps] == [2, 4, 6, 8]
    for line in steps:
        assert re.search(r"loss \d\.\d{4}  .*norm \d+\.\d{3}  .*\d\.\d\de-\d\d +[\d,]+ tokens/s", line)
        assert ("peak memory" in line) == (columns == 140)
    bars = re.findall(r"training ([━╸╺ ]*) \d/8 (.*)", shown)
    assert all(4 <= len(bar) <= 40 for bar, _ in bars)
    assert re.match(r"loss \d\.\d{4} .*[\d,]+ tokens/s 0:00:\d\d 0:00:00", bars[-1][1])


def test_a_run_that_is_stopped_answers_and_ends_with_the_command_that_goes_on(terminal: Terminal):
    output = terminal.folder / "a run's folder"  # its name has to be quoted
    flags = [*terminal.files, "--output", output, *SHAPE, "--max-steps", 30, "--resume-from-checkpoint", "latest"]
    stop = {"moment": ["step", 3, 0.0], "number": signal.SIGINT}
    status, shown = terminal.show(80, "train", *flags, **stop)
    assert status == 130
    require_fit(shown, 80)
    answer, end = "\nstopping after this step, saving; press again to stop now\n", "\nstopped after step "
    assert shown.count(answer) == shown.count(end) == 1
    assert shown.index(answer) < shown.index(end)
    before, command = shown.split("\nto go on:\n")
    assert f"saved {output}/adapter" in words_of(before)
    assert shell_words(command) == ["jaxpack", "train", *map(str, flags)]


def test_an_inspection_fits_and_says_its_verdict_first(terminal: Terminal):
    shown = {}
    for columns in WIDTHS:
        flags = ["--gpu", "H200", "--max-length", 64, "--packing", "--batch-size", 2]
        status, shown[columns] = terminal.show(columns, "inspect", *terminal.files, *flags)
        assert status == 0
        require_fit(shown[columns], columns)
    verdict, row, *_ = words_of(shown[80]).partition("row 0")
    assert re.search(r"Padding takes \d+% of the work in padded batches of \d+ documents", verdict)
    assert "tokens a second" in verdict
    assert row
    narrow, wide = (re.findall(r"[^\s─-╿▀-▟…]+", shown[columns]) for columns in WIDTHS)
    assert sorted(narrow) == sorted(wide)  # so at 80 columns nothing is broken or left out


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_help_of_train_is_in_groups_and_cuts_no_name(columns: int, terminal: Terminal):
    from jaxpack.cli import LazyGroup

    status, shown = terminal.show(columns, "train", "--help")
    assert status == 0
    require_fit(shown, columns)
    assert max(map(len, shown.splitlines())) > columns - 10
    *_, options, example = re.split(r"^(?=\S.*:$)", shown, flags=re.MULTILINE)
    headings = [line.removesuffix(":") for line in shown.splitlines() if re.match(r"\S.*:$", line)]
    assert headings == [*GROUPS, "Other options", "Example"]
    assert re.findall(r"--[\w-]+", options) == ["--help"]  # every other flag has a group, see `GROUPS`
    assert example.split(maxsplit=1)[1].rstrip() == "\n".join(f"  {line}" for line in EXAMPLES["train"]).strip()
    command = LazyGroup(name="jaxpack").get_command(None, "train")
    for option in command.params:
        assert option.help in words_of(shown)
        for name in (*option.opts, *option.secondary_opts):
            assert re.search(rf"(^  |, | / ){name}\b(?!-)", shown, re.MULTILINE)
    defaults = re.findall(r"\[default: (.*?)\]", words_of(shown))
    assert {"1024", "2e-05", "off", "on", "adamw"} <= set(defaults)
    assert not {"False", "True", "", "()"} & set(defaults)


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_example_of_the_help_is_a_command(command: str):
    from jaxpack.cli import LazyGroup

    first, name, *arguments = shell_words("\n".join(EXAMPLES[command]))
    assert (first, name) == ("jaxpack", command)
    LazyGroup(name="jaxpack").get_command(None, command).make_context(name, arguments)
