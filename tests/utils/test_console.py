"""Tests that the console writes to stderr, and that a run goes on where stderr cannot be written to."""

import io
import os
import sys
from typing import IO

import pytest

from jaxpack.utils.console import console, progress_bar


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
