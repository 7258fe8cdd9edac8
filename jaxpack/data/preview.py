"""Decodes a row of a run's batches, to show its documents and which of their tokens are trained on."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.jupyter import JupyterMixin
from rich.rule import Rule
from rich.text import Text

from jaxpack.constants import IGNORE
from jaxpack.data.batching import Batches
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, visible


class Span(NamedTuple):
    """Holds adjacent tokens that are either all trained on or all not, as text, or as ids without a tokenizer."""

    text: str
    num_tokens: int
    trained: bool


@dataclasses.dataclass(frozen=True)
class ShownRow(JupyterMixin):
    """Holds a decoded row of a run, as `show_row` returns it: the spans of each document, and the amount of padding.

    rich can print a `ShownRow`, and a notebook displays it.

    Example:
      >>> from jaxpack import Batches, TrainConfig, load_documents, show_row
      >>> documents = load_documents([{"input_ids": [7, 8, 9]}, {"input_ids": [3, 4]}], None, vocab_size=10)
      >>> row = show_row(Batches(documents, TrainConfig(max_length=128)), 0, tokenizer=None)
      >>> [[span.text for span in spans] for spans in row.documents]
      [['7 ', '8 9 '], ['3 ', '4 ']]
    """

    number: int
    documents: tuple[tuple[Span, ...], ...]
    padding: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = console.no_color or console.color_system is None
        before, after = ("[[", "]]") if plain else ("", "")
        legend = "[[trained on]], other text: not" if plain else "green: trained on, grey: not"
        title = f"row {self.number}: {_count(len(self.documents), 'document')}; {legend}"
        yield Rule(Text(title), align="left", style="bold")
        for number, spans in enumerate(self.documents, 1):
            total = sum(span.num_tokens for span in spans)
            trained = sum(span.num_tokens for span in spans if span.trained)
            title = f"document {number}: {_count(total, 'token')}, {trained:,} trained on"
            yield Rule(title, align="left", style="cyan")
            text = Text()
            for span in spans:
                shown = visible(span.text)
                text.append(before + shown + after if span.trained else shown, "green" if span.trained else "grey50")
            yield text
        yield Rule(f"padding: {_count(self.padding, 'position')}", align="left", style="cyan")


def show_row(batches: Batches, number: int, tokenizer: Tokenizer | None) -> ShownRow:
    """Decodes a row of a run's batches; `number` counts rows from the first of the run.

    Raises:
      InputError: the run has no such row.

    Example:
      >>> import rich
      >>> from jaxpack import Batches, TrainConfig, load_documents, show_row
      >>> documents = load_documents([{"input_ids": [7, 8, 9]}], None, vocab_size=10)
      >>> row = show_row(Batches(documents, TrainConfig(max_length=128)), 0, tokenizer=None)  # rich.print(row) shows it
      >>> row.padding
      125
    """
    A, B, _ = batches.shapes[0]
    if not 0 <= number < batches.num_steps * A * B:
        raise InputError(f"`show_row` must be in [0, {batches.num_steps * A * B}), the run's rows, got {number}.")
    step, place = divmod(number, A * B)
    tokens, segment_ids, _, targets = (array.reshape(A * B, -1)[place] for array in batches[step])
    trained = np.concatenate([[False], targets[:-1] != IGNORE])  # a target is the next token
    documents = []
    for segment in range(1, segment_ids.max(initial=0) + 1):
        inside = segment_ids == segment
        documents.append(_spans(tokens[inside].tolist(), trained[inside], tokenizer))
    return ShownRow(number, tuple(documents), int((segment_ids == 0).sum()))


def _spans(tokens: list[int], trained: np.ndarray, tokenizer: Tokenizer | None) -> tuple[Span, ...]:
    spans, begin, shown = [], 0, 0
    whole = "" if tokenizer is None else tokenizer.decode(tokens)
    for end in [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]:
        if tokenizer is None:
            text = " ".join(map(str, tokens[begin:end])) + " "
        else:
            # A character that straddles two spans goes to the second one.
            upto = len(whole) if end == len(tokens) else len(tokenizer.decode(tokens[:end]).rstrip("\ufffd"))
            text, shown = whole[shown:upto], upto
        spans.append(Span(text, end - begin, bool(trained[begin])))
        begin = end
    return tuple(spans)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
