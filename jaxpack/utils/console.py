"""Holds the one console that a run prints to, so that progress bars and lines do not overwrite each other."""

import contextlib
import importlib.util
import sys
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Stderr:
    """Writes to what `sys.stderr` is at the time, and never fails: a run goes on when nobody can read what it prints.

    A write fails if the disk is full to which stderr is redirected, or if the reader of a pipe has ended. Without a
    stderr (`2>&-`), `sys.stderr` is None.
    """

    def write(self, text: str) -> int:
        """Writes a text if that is possible, with "?" for characters that the encoding lacks."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # ValueError: the stream is closed
            try:
                sys.stderr.write(text)
            except UnicodeEncodeError as error:
                sys.stderr.write(text.encode(error.encoding, "replace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if that is possible."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:  # rich asks for `isatty`, `encoding` and `fileno`
        return getattr(sys.stderr, name)


# Markup is off because paths and foreign messages contain brackets. Wrapping is off so that a line stays one line.
console = Console(file=cast(TextIO, _Stderr()), highlight=False, markup=False, soft_wrap=True)

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Replaces control characters by visible signs, so foreign text cannot move the cursor or change text direction."""
    return text.translate(_VISIBLE)


def progress_bar(what: str, *, transient: bool = True) -> Progress:
    """Returns a progress bar, which shows in a terminal or in a notebook with ipywidgets and is disabled elsewhere.

    The bar of a task shows the task's `note` after its count, so each task must have that field.
    """
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not (console.is_terminal or widgets),
    )
