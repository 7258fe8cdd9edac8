"""Encodes the rows of datasets into documents, and counts what their user should know of them."""

import datetime
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxpack.constants import IGNORE
from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.documents import Documents
from jaxpack.data.formats import Encoded, Format, RowSettings, Where, format_of
from jaxpack.data.formatting import FormattingFunc, check_formatting_func, formatted, refuse_documents
from jaxpack.data.named_templates import set_chat_template
from jaxpack.data.rows import Rows
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig
from jaxpack.utils.console import console


class EncodedRows(NamedTuple):
    """Holds documents of successive rows, one for each row, end to end.

    `tokens` and `labels` are int32 `[total]`, `lengths` is int64 `[rows]`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class RowEncoder:
    """Encodes rows with one tokenizer, and prints what was met in them.

    Args:
      settings: says how rows are read; None takes the defaults.
      formatting_func, allow_lost_thoughts, date: see `load_documents`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        settings: RowSettings | None = None,
        *,
        formatting_func: FormattingFunc | None = None,
        allow_lost_thoughts: bool = False,
        date: datetime.date | None = None,
    ):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._settings = RowSettings() if settings is None else settings
        self._formatting_func = check_formatting_func(formatting_func)
        self._template = None
        if tokenizer is not None and getattr(tokenizer, "chat_template", None) is not None:
            self._template = ChatTemplate(tokenizer, allow_lost_thoughts=allow_lost_thoughts, date=date)
        self._said: set[str] = set()
        self._where: Where | None = None  # of the file that was begun last
        self._counts: Counter[str] = Counter()  # what was met in the files before

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        *,
        date: datetime.date | None,
        formatting_func: FormattingFunc | None,
    ) -> "RowEncoder":
        """Returns the encoder of a run's rows, and gives the tokenizer the run's chat template.

        Args:
          date: the date for chat templates that write one; None is that of the settings, or today.
        """
        if config.chat_template is not None:
            set_chat_template(tokenizer, config.chat_template)
        if date is None and config.chat_template_date is not None:
            date = datetime.date.fromisoformat(config.chat_template_date)
        return cls(
            tokenizer,
            vocab_size,
            RowSettings.of_run(config),
            formatting_func=formatting_func,
            allow_lost_thoughts=config.allow_lost_thoughts,
            date=date,
        )

    def begin(self, rows: Rows) -> Format | None:
        """Returns the format of the rows of a file, which its first row decides; None if it has no rows."""
        if (function := self._formatting_func) is not None:
            rows.records = formatted(rows.records, function, self._settings.text_field, rows.where)
        first = next(rows.records, None)
        if first is None:
            return None
        rows.records = itertools.chain([first], rows.records)
        self._count()
        self._where = rows.where
        return format_of(first, self._tokenizer, self._template, self._settings, rows.where, self.say_once)

    @property
    def why_masked(self) -> str:
        """Returns the reasons for which a row may have no token to train on, in words."""
        if (parts := self._settings.parts) is not None:
            return f"there is no `response_part`, {parts.response!r:.80}, or nothing after it"
        return "every label is -100, or there is no turn of the assistant, or fewer than two tokens"

    def check(self, documents: Documents) -> Documents:
        """Returns documents of a user, which lie between the rows, if they can be used."""
        refuse_documents(self._formatting_func)
        return check_documents(documents, self._vocab_size)

    def encode(self, rows: Rows, form: Format, begin: int = 0) -> Iterator[EncodedRows]:
        """Yields the documents of the rows of a file, a chunk at a time; the first of these rows is row `begin`.

        While a chunk is tokenised in another thread, the next one is read and prepared.
        """
        chunks = rows.chunks()
        begun: Callable[[], EncodedRows] | None = None
        while True:
            try:
                chunk = next(chunks, None)
                following = None
                if chunk is not None:
                    following = functools.partial(self._checked, form.encode(chunk, begin), rows.where, begin)
                    begin += len(chunk)
            finally:  # An error of earlier rows takes the place of one of later rows.
                done = None if begun is None else begun()
            if done is not None:
                yield done
            if following is None:
                return
            begun = following

    def say_what_was_met(self) -> None:
        """Prints what the user should know of the rows, with the number of rows in which it was met."""
        self._count()
        template = self._template
        if diverging := self._counts["diverging"]:
            console.print(
                f"in {diverging:,} rows, the prompt's tokens change when the completion follows: training begins at the"
                " first token that changes"
            )
        if written := self._counts["written"]:
            console.print(
                f"in {written:,} rows, a chat template has already written the text: it begins with"
                " the BOS token, or ends a turn. No second BOS or end is added"
            )
        if (unasked := self._counts["unasked"]) and (parts := self._settings.parts) is not None:
            console.print(
                f"in {unasked:,} rows, there is no `instruction_part`, {parts.instruction!r:.80}: all that follows the"
                " first `response_part` is trained on, but for further response parts",
                style="yellow",
            )
        if template is None:
            return
        if template.date_used is not None:
            console.print(
                f"the chat template writes the date {template.date_used}, which the run keeps if it is resumed"
                " (`chat_template_date` sets another)"
            )
        for kind, (count, first) in template.left_out.items():
            console.print(
                f"in {count:,} rows, the chat template leaves out {kind} that the row has; the first is {first}",
                style="yellow",
            )
        if template.endless:
            console.print(
                f"in {template.endless:,} rows, the assistant's last turn does not end with a special token, so the"
                " model does not learn to stop: the chat template writes none, or writes it outside of its generation"
                " tags"
            )

    def _count(self) -> None:
        """Adds what was met in the file that was begun last, which is then forgotten: a stream may have many files."""
        if self._where is not None:
            self._counts.update({name: getattr(self._where, name) for name in ("diverging", "written", "unasked")})
        self._where = None

    def say_once(self, line: str) -> None:
        """Prints a line, unless it was printed before."""
        if line not in self._said:  # the files of a folder are often alike
            self._said.add(line)
            console.print(line)

    def _checked(self, encoded: Encoded, where: Where, begin: int) -> EncodedRows:
        """Waits for the documents of rows, the first of which is row `begin`, and checks them."""
        pairs = [(np.asarray(ids, np.int64), np.asarray(labels, np.int64)) for ids, labels in encoded]
        tokens, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
        for flat, is_labels in ((tokens, False), (labels, True)):
            if _outside(flat, self._vocab_size, labels=is_labels).any():
                self._refuse([pair[is_labels] for pair in pairs], where, begin, labels=is_labels)
        lengths = np.array([len(ids) for ids, _ in pairs], np.int64)
        return EncodedRows(tokens.astype(np.int32), labels.astype(np.int32), lengths)

    def _refuse(self, rows: list[np.ndarray], where: Where, begin: int, *, labels: bool) -> None:
        name = "Labels other than -100" if labels else "Token ids"
        for row, ids in enumerate(rows, begin):
            if (wrong := _outside(ids, self._vocab_size, labels=labels)).any():
                raise InputError(
                    f"{name} must be in [0, {self._vocab_size}), the model's vocabulary, got {ids[wrong][0]} in"
                    f" {where(row)}.{_remedy(ids[wrong][0])}"
                )


def check_documents(documents: Documents, vocab_size: int) -> Documents:
    """Returns documents of a user whose tokens and labels are in the vocabulary."""
    if not len(documents):
        raise InputError("`dataset` must have at least one document, got none.")
    for name, ids in (("tokens", documents.tokens), ("labels", documents.labels)):
        if (wrong := _outside(ids, vocab_size, labels=name == "labels")).any():
            raise InputError(
                f"Documents must have {name} in [0, {vocab_size}), the model's vocabulary, got {ids[wrong][0]}."
                f"{_remedy(ids[wrong][0])}"
            )
    return documents


def _remedy(token: int) -> str:
    """Returns what to do about a token id, or a label, that is outside of the vocabulary."""
    if token < 0:
        return ""
    return (
        " If tokens were added to the tokenizer, give the model rows for them: `jaxpack.resize_vocab(model,"
        " len(tokenizer))`, or `--resize-vocab` of `jaxpack train`."
    )


def _outside(ids: np.ndarray, vocab_size: int, *, labels: bool) -> np.ndarray:
    """Returns a mask of the ids that are not in the vocabulary; as a label, -100 is allowed."""
    wrong = (ids < 0) | (ids >= vocab_size)
    return wrong & (ids != IGNORE) if labels else wrong
