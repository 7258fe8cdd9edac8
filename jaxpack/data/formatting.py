"""Calls a user's function on each row of a dataset: it returns the text, the messages or the fields to train on."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxpack.data.formats import Record, Where
from jaxpack.errors import InputError

# Takes a row, and returns its text, its messages, or a row in any of the formats of `load_documents`.
FormattingFunc = Callable[[dict[str, Any]], "str | list[dict[str, Any]] | Mapping[str, Any]"]


def check_formatting_func(function: FormattingFunc | None) -> FormattingFunc | None:
    """Returns a function of a user; refuses what cannot be called, before any row is read."""
    if function is not None and not callable(function):
        raise InputError(f"`formatting_func` must be a function from a row to its text, or None, got {function!r:.80}.")
    return function


def refuse_documents(function: FormattingFunc | None) -> None:
    """Refuses a function beside `Documents` of the user, which are tokenised already."""
    if function is not None:
        raise InputError(
            "`formatting_func` must be None for `Documents`, which are tokenised already, got a function. Give it to"
            " `load_documents`, which makes them."
        )


def formatted(records: Iterator[Record], function: FormattingFunc, text_field: str, where: Where) -> Iterator[Record]:
    """Yields what the function makes of each row, as a row.

    An error of the function itself is raised as it is, with a note that names the row.

    Args:
      text_field: the field in which a text is put.
      where: names rows in errors.

    Raises:
      InputError: the function returns something else, such as the texts of several rows.
    """
    for number, record in enumerate(records):
        try:
            made: Any = function(dict(record))  # a copy, since functions of TRL's users may change it
        except Exception as error:
            error.add_note(f"`formatting_func` raised this for {where(number)}.")
            raise
        yield _as_row(made, text_field, where(number))


def _as_row(made: Any, text_field: str, where: str) -> Record:
    if isinstance(made, str):
        return {text_field: made}
    texts = made.get(text_field) if isinstance(made, Mapping) else made
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        raise InputError(
            f"`formatting_func` must return the text of one row, got a list of {len(texts):,} texts for {where}, as a"
            " function of a batch returns. It is called with one row at a time: return one text, without a loop over"
            " rows."
        )
    if isinstance(made, Mapping):
        return made
    if isinstance(made, list) and made and all(isinstance(message, Mapping) for message in made):
        return {"messages": made}
    raise InputError(
        "`formatting_func` must return a text, a list of messages, or a mapping with the fields of a row, got"
        f" {made!r:.80} for {where}."
    )
