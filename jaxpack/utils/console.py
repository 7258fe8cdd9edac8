"""Holds the one console that a run prints to, and sees to it that text of files cannot control the terminal."""

import contextlib
import importlib.util
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from jaxpack.errors import one_line, visible


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


class TextConsole(Console):
    """Prints text as it is: without markup, emoji codes or highlighting, and with control characters made visible.

    Text of files reaches a terminal only through such a console. A string is one line: a newline in it, which can only
    come from a file, becomes a visible sign. In a terminal, a string that is too wide is wrapped at words. Tables and
    other renderables keep their lines.
    """

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        self.push_render_hook(_MakeVisible())

    @property
    def room(self) -> int | None:
        """Returns the columns of the terminal, or None if the console writes elsewhere, where a line may be long."""
        return self.width if self.is_terminal else None

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints like rich's console, but without control characters from the text."""
        if self.room is not None:
            options.setdefault("soft_wrap", False)
        super().print(*(self._line(item) if isinstance(item, str) else item for item in objects), **options)

    def _line(self, text: str) -> str | Text:
        text = one_line(text)
        if self.room is None or cell_len(text) <= self.room:
            return text
        return Text(f"\n{_INDENT}").join(Text(text).wrap(self, max(1, self.room - len(_INDENT))))

    def print_command(self, words: Sequence[str]) -> None:
        """Prints a command that can be copied to a shell: in a terminal, its lines break before flags, after a "\\".

        A word that is wider than the terminal is left whole.
        """
        parts: list[str] = []  # each is a flag with its values
        for word in map(shlex.quote, words):
            if parts and not word.startswith("--"):
                parts[-1] += f" {word}"
            else:
                parts.append(word)
        lines = [_INDENT]
        for part in parts:
            if self.room is not None and cell_len(f"{lines[-1]}{part} \\") > self.room and lines[-1].strip():
                lines.append(2 * _INDENT)
            lines[-1] += f"{part} "
        super().print(Text("\\\n".join(map(one_line, lines)).rstrip()), soft_wrap=True)


_INDENT = "  "  # before the lines that continue a sentence


class _MakeVisible(RenderHook):
    """Replaces control characters in all text that a console renders; rich's own control codes stay."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(item) for item in renderables]


class _Visible:
    def __init__(self, renderable: ConsoleRenderable):
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


# Outside a terminal, wrapping is off so that a line stays one line.
console = TextConsole(file=cast(TextIO, _Stderr()), soft_wrap=True)


def make_output_visible() -> None:
    """Makes control characters visible in what other libraries print: warnings, log records and tracebacks.

    They quote names and texts of files, too. The change holds for the whole process, so only the command line makes it.
    """
    sys.excepthook = _print_traceback
    warnings.formatwarning = _format_warning
    logging.setLogRecordFactory(_VisibleRecord)


class _VisibleRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return visible(super().getMessage())


_format_warning_as_before = warnings.formatwarning


def _format_warning(*about: Any, **options: Any) -> str:
    return visible(_format_warning_as_before(*about, **options))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _Stderr().write(visible("".join(traceback.format_exception(kind, error, trace))))


def progress_bar(what: str, *, transient: bool = True) -> Progress:
    """Returns a progress bar, which shows in a terminal or in a notebook with ipywidgets and is disabled elsewhere.

    The bar of a task shows the task's `note` after its count, so each task must have that field. The bar itself takes
    what room the others leave, up to 40 columns.
    """
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return Progress(
        TextColumn(what),
        BarColumn(bar_width=None, table_column=Column(max_width=40)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
        transient=transient,
        disable=not (console.is_terminal or widgets),
    )
