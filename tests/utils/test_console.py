"""Tests that the console writes to stderr and never fails, and that text of files cannot control a terminal."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxpack.errors import InputError, errors_name
from jaxpack.utils.console import TextConsole, console, progress_bar


def say() -> None:
    console.print("a líne 😀", style="red")
    with progress_bar("loading") as bar:
        bar.advance(bar.add_task("", total=3, note=""))


def closed() -> IO[str]:
    stream = io.StringIO()
    stream.close()
    return stream


def pipe_without_reader() -> IO[str]:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


STREAMS = {
    "a full disk": lambda: open("/dev/full", "w", buffering=1),  # noqa: SIM115
    "a pipe without a reader": pipe_without_reader,
    "a closed stream": closed,
    "no stderr": lambda: None,
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the stream cannot be flushed at its end
def test_a_console_that_nobody_can_read_never_fails(name, monkeypatch):
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    say()


def test_the_console_writes_to_what_stderr_is_at_the_time(monkeypatch):
    for _ in range(2):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        say()
        assert stream.getvalue() == "a líne 😀\n"


def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    say()
    assert written.getvalue() == b"a l?ne ?\n"


# Text of files: it moves no cursor, sets no title, adds no line, and is not read as markup.

HOSTILE = {
    "a color": "\x1b[31m",
    "the window's title": "\x1b]0;pwned\x07",
    "a cleared screen": "\x1b[2J\x1b[H",
    "the eight-bit form of a control sequence": "\x9b31m",
    "a line written over": "100% done\rerror",
    "a character deleted": "x\x08y",
    "text that runs from right to left": "\u202eexe.txt",
    "a line separator": "a\u2028b",
    "a null": "\0",
    "a link to a file": "\x1b]8;;file:///etc\x1b\\here\x1b]8;;\x1b\\",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("form", [str, Text, lambda text: Rule(Text(text)), lambda text: Panel(Text(text))])
def test_cases_no_text_controls_the_terminal(text, form):
    for terminal in (False, True):
        written = io.StringIO()
        TextConsole(file=written, force_terminal=terminal, color_system=None, width=80).print(form(text))
        assert not CONTROL.search(written.getvalue())


def test_cases_a_table_of_foreign_text_keeps_its_own_lines():
    table = Table("name[red]", "value")
    table.add_row("[link=file:///etc]a[/link] :warning:", "1\x1b[2J\n2")
    written = io.StringIO()
    TextConsole(file=written, width=80).print(table)
    assert "[link=file:///etc]a[/link] :warning:" in written.getvalue()
    assert "name[red]" in written.getvalue()
    assert "1␛[2J" in written.getvalue()
    assert len(written.getvalue().splitlines()) == 6


def test_cases_colors_of_our_own_still_reach_a_terminal():
    written = io.StringIO()
    TextConsole(file=written, force_terminal=True, color_system="standard", legacy_windows=False).print(
        "b\x1b[32m", style="red"
    )
    assert written.getvalue() == "\x1b[31mb␛[32m\x1b[0m\n"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_cases_an_error_is_one_line_without_control_characters(text):
    message = str(InputError(f"{text}\nsaved out/adapter"))
    assert not CONTROL.search(message)
    assert "\n" not in message
    with pytest.raises(InputError) as refused, errors_name(a="b"):
        raise InputError(f"`a` {text}")
    assert not CONTROL.search(str(refused.value))


def test_cases_a_line_cannot_pretend_to_be_two(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    console.print("1 tensor ignored (x\nsaved out/adapter)")
    assert stream.getvalue() == "1 tensor ignored (x␊saved out/adapter)\n"


def test_cases_what_other_libraries_print_is_made_visible_in_the_command_line():
    code = (
        "import logging, warnings\nfrom jaxpack.utils.console import make_output_visible\nmake_output_visible()\n"
        "logging.warning('a log of %s', 'x\\x1b[31m'); warnings.warn('a warning of x\\x1b[31m')\n"
        "try: raise KeyError('y\\x1b[31m')\nexcept KeyError as error: raise RuntimeError('z\\x1b[31m\\x07') from error"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=root)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    for shown in ("a log of x␛[31m", "a warning of x␛[31m", "RuntimeError: z␛[31m␇", "Traceback"):
        assert shown in done.stderr


# Lines in a terminal and in a file.


def shown(*objects: object, terminal: bool = True, width: int = 40, soft_wrap: bool = True, **options: object) -> str:
    written = io.StringIO()
    TextConsole(file=written, force_terminal=terminal, color_system=None, width=width, soft_wrap=soft_wrap).print(
        *objects, **options
    )
    return written.getvalue()


SENTENCE = "the run continues from /tmp/out/checkpoints/1200: 1,200 of 12,000 steps are done"


@pytest.mark.parametrize("width", [30, 40, 79, 80, 81])
@pytest.mark.parametrize("style", [None, "red"])
def test_a_sentence_is_wrapped_at_words_in_a_terminal_and_one_line_in_a_file(width, style):
    lines = shown(SENTENCE, width=width, style=style).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == SENTENCE
    assert all(line.startswith("  ") and line[2] != " " for line in lines[1:])
    assert (len(lines) == 1) == (width >= len(SENTENCE))
    assert shown(SENTENCE, terminal=False, width=width, style=style) == f"{SENTENCE}\n"


def test_a_table_fits_into_a_terminal():
    table = Table("name", "sentence")
    table.add_row("run", SENTENCE)
    lines = shown(table).splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) > 5


@pytest.mark.parametrize("width", [10, 40, 80, 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_command_can_be_copied(width, terminal):
    words = ["jaxpack", "train", "--data", "my rows.jsonl", "--max-steps", "-1", "--prompt", "it's", "--packing"]
    written = io.StringIO()
    TextConsole(file=written, force_terminal=terminal, color_system=None, width=width).print_command(words)
    assert shlex.split(written.getvalue().replace("\\\n", "")) == words
    lines = written.getvalue().splitlines()
    if not terminal:
        assert len(lines) == 1
    elif width >= 40:
        assert max(map(len, lines)) <= width
        assert "--data 'my rows.jsonl'" in written.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_bar_with_its_note_is_one_line(width):
    written = io.StringIO()
    terminal = TextConsole(file=written, force_terminal=True, color_system=None, width=width, soft_wrap=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxpack.utils.console.console", terminal)
        with progress_bar("training", transient=False) as bar:
            bar.update(bar.add_task("", total=12_000, note="loss 12.1280  1,234,567 tokens/s"), completed=11_000)
            terminal.print(SENTENCE)
    drawn = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()))
    assert max(map(len, drawn)) <= width
    bars = [line for line in drawn if line.startswith("t")]
    assert len(bars) > 1
    assert width < 80 or "11000/12000 loss 12.1280  1,234,567 tokens/s 0:00:0" in bars[-1]
