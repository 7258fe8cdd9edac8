"""Where a run speaks to people: one console, so that progress bars and lines do not overwrite each other."""

import importlib.util

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# No markup: paths and other people's messages have brackets of their own. No wrapping: a line is a line.
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Text of others, with signs for control characters: none moves a terminal's cursor, or turns its text around."""
    return text.translate(_VISIBLE)


def progress_bar(what: str, *, transient: bool = True) -> Progress:
    """A progress bar for a terminal, or for a notebook that has widgets; elsewhere nothing.

    A task's `note` is shown behind it.
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
