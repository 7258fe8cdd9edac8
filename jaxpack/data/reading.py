"""Reads a dataset (a file or an iterable of rows) into documents."""

import contextlib
import datetime
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpack.constants import IGNORE
from jaxpack.data.bounded import bounded_lines, parquet_rows, too_large
from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.conversation import Conversation, plain
from jaxpack.data.documents import Documents
from jaxpack.data.formats import TEXT_FIELD, Ids, Record, Where, encoder, formats_of, question_of
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console, progress_bar
from jaxpack.utils.files import kind_of, require_data_file
from jaxpack.utils.json_file import parse_json

Dataset = str | os.PathLike | Iterable[Record]  # a JSON, JSONL or Parquet file, a list of dicts, a `datasets.Dataset`

_CHUNK = 1024  # rows that the tokenizer gets at a time; it spreads them over the cores


def load_documents(
    dataset: Dataset | Documents,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    text_field: str = TEXT_FIELD,
    assistant_only_loss: bool = True,
    allow_lost_thoughts: bool = False,
    date: datetime.date | None = None,
) -> Documents:
    """Reads and tokenises a dataset, with a progress bar.

    Each row has one of these formats. The first row decides the format of all rows:

    - `input_ids`, optionally with `labels` (-100 for a token that is not trained on), `completion_mask` or
      `assistant_masks` (0 for such a token) and `attention_mask` (0 for padding, which is cut off).
    - `messages` (or `conversations`), with `role` and `content`, or with ShareGPT's `from` and `value`: written by the
      tokenizer's chat template, and trained on the assistant's text and on the token that ends its turn. The
      template also gets the row's `tools` (a list, or JSON of one), `system` and `chat_template_kwargs`.
    - `prompt` and `completion`: two strings, trained on the completion alone, or two lists of messages, trained on the
      assistant's text in the completion.
    - `text` (or the field that `text_field` names): every token is trained on. A `text_field` other than `text` is used
      whatever other fields the rows have.
    - `instruction`, optionally `input`, and `output`: a question and an answer, written and trained on in the same way
      as `messages`. If the tokenizer has no chat template, they are a prompt and a completion in Alpaca's wording.

    A text or completion that does not end in the tokenizer's EOS token gets one; a chat template writes its own. A
    token is trained on if at least one of its characters belongs to the text to train on. Rows without a token to train
    on are left out, and their number is printed.

    Args:
      dataset: the path of a JSONL (`.jsonl`, `.json`) or Parquet (`.parquet`) file, or any iterable of dicts.
        `Documents` that were loaded before are checked and returned as they are.
      tokenizer: a fast Hugging Face tokenizer; may be None for rows of `input_ids`.
      vocab_size: the model's vocabulary size; token ids from this number on are refused.
      text_field: the key of plain text.
      assistant_only_loss: False trains on every token that a chat template writes: in `messages` and `conversations`,
        in a completion of messages, and in the question and the answer of rows with `instruction`.
      allow_lost_thoughts: True trains on a last answer whose thoughts the chat template leaves out. Thoughts that the
        template leaves out of earlier answers are counted, and the count is printed.
      date: the date for chat templates that write one; None is today.

    Raises:
      InputError: the dataset is empty or unreadable, a row is unreadable, no row has a token to train on, or a
        chat template does not show what the assistant writes. The message says which row, and what it needs.

    Example:
      >>> from jaxpack import load_documents
      >>> documents = load_documents([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}], None, vocab_size=10)
      >>> documents.num_tokens, documents.num_targets
      (3, array([2]))
    """
    if isinstance(dataset, Documents):
        return _within(vocab_size, dataset)
    records, where = _read(dataset)
    template = None
    if tokenizer is not None and getattr(tokenizer, "chat_template", None) is not None:
        template = ChatTemplate(tokenizer, allow_lost_thoughts=allow_lost_thoughts, date=date)
    encode = encoder(records[0], tokenizer, template, text_field, assistant_only_loss, where)
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    with progress_bar("tokenising") as progress:
        bar = progress.add_task("", total=len(records), note="")
        for begin in range(0, len(records), _CHUNK):
            chunk = records[begin : begin + _CHUNK]
            for row, (document, trained) in enumerate(encode(chunk, begin), begin):
                tokens.append(_ids(document, vocab_size, where, row))
                labels.append(_ids(trained, vocab_size, where, row, labels=True))
            progress.advance(bar, len(chunk))
    lengths = np.array([len(document) for document in tokens], np.int64)
    documents = Documents(np.concatenate(tokens), np.concatenate(labels), np.cumsum(lengths) - lengths, lengths)
    if where.diverging:
        console.print(
            f"in {where.diverging:,} rows, the prompt's tokens change when the completion follows: training begins at"
            " the first token that changes"
        )
    if where.written:
        console.print(
            f"in {where.written:,} rows, a chat template has already written the text: it begins with"
            " the BOS token, or ends a turn. No second BOS or end is added"
        )
    if template is not None and template.date_used is not None:
        console.print(
            f"the chat template writes the date {template.date_used}, which the run keeps if it is resumed"
            " (`chat_template_date` sets another)"
        )
    for kind, (count, first) in ({} if template is None else template.left_out).items():
        console.print(
            f"in {count:,} rows, the chat template leaves out {kind} that the row has; the first is {first}",
            style="yellow",
        )
    if template is not None and template.endless:
        console.print(
            f"in {template.endless:,} rows, the assistant's last turn does not end with a special token, so the model"
            " does not learn to stop: the chat template writes none, or writes it outside of its generation tags"
        )
    return _with_targets(documents, tokenizer, where)


def load_prompts(dataset: Dataset, *, chat: bool) -> list[str | Conversation]:
    """Reads the question of each row of a dataset, in the formats of `load_documents` that have a question.

    These formats are `prompt` (a string or messages), `messages` or `conversations` (without the answer at their end),
    and `instruction` with its `input`.

    Args:
      chat: True takes a string as a user's message. False takes it as a text to continue, and puts instructions in
        Alpaca's wording.

    Raises:
      InputError: the dataset is empty or unreadable, or a row is unreadable. The message says which one.
    """
    records, where = _read(dataset)
    records = [plain(record, drop_none=where.of_arrow) for record in records]
    return [question_of(record, row, where, chat) for row, record in enumerate(records)]


def _within(vocab_size: int, documents: Documents) -> Documents:
    if not len(documents):
        raise InputError("`dataset` must have at least one document, got none.")
    for name, ids in (("tokens", documents.tokens), ("labels", documents.labels)):
        if len(wrong := _outside(ids, vocab_size, labels=name == "labels")):
            raise InputError(
                f"Documents must have {name} in [0, {vocab_size}), the model's vocabulary, got {wrong[0]}."
            )
    return documents


def _ids(values: Ids, vocab_size: int, where: Where, row: int, *, labels: bool = False) -> np.ndarray:
    array = np.asarray(values, np.int64)
    if len(wrong := _outside(array, vocab_size, labels=labels)):
        name = "Labels other than -100" if labels else "Token ids"
        raise InputError(
            f"{name} must be in [0, {vocab_size}), the model's vocabulary, got {wrong[0]} in {where(row)}."
        )
    return array.astype(np.int32)


def _outside(ids: np.ndarray, vocab_size: int, *, labels: bool) -> np.ndarray:
    """Returns the ids that are not in the vocabulary; as a label, -100 is allowed."""
    wrong = (ids < 0) | (ids >= vocab_size)
    return ids[wrong & (ids != IGNORE) if labels else wrong]


def _with_targets(documents: Documents, tokenizer: Tokenizer | None, where: Where) -> Documents:
    """Returns the documents with a token to train on; prints how many have none, and shows the first of these."""
    keep = documents.num_targets > 0
    if keep.all():
        return documents
    row = int(np.argmin(keep))
    tokens = documents.tokens[documents.starts[row] :][: documents.lengths[row]].tolist()
    shown = repr(tokenizer.decode(tokens[:64])) if tokenizer is not None else str(tokens[:64])
    masked = "every label is -100, or there is no turn of the assistant, or fewer than two tokens"
    if not keep.any():
        raise InputError(
            f"At least one row must have a token to train on after its first token, got {len(keep):,} rows with none"
            f" ({masked}); the first is {where(row)}: {shown}."
        )
    console.print(
        f"{int((~keep).sum()):,} of {len(keep):,} rows have nothing to learn ({masked}) and are left out;"
        f" the first is {where(row)}: {shown}",
        style="yellow",
    )
    return documents[keep]


def _read(dataset: Dataset) -> tuple[Sequence[Record], Where]:
    records, where = _read_file(Path(dataset)) if isinstance(dataset, str | os.PathLike) else _read_rows(dataset)
    if not records:
        raise InputError(f"`dataset` must have at least one row, got none in {where.source}.")
    return records, where


def _read_rows(dataset: Any) -> tuple[Sequence[Record], Where]:
    if isinstance(dataset, Mapping):  # a `datasets.DatasetDict`, most likely
        raise InputError(
            f"`dataset` must be an iterable of rows, such as one split, got a mapping with the keys {sorted(dataset)}."
        )
    if not isinstance(dataset, Iterable):
        raise InputError(f"`dataset` must be a file or an iterable of rows, got {dataset!r:.80}.")
    records = list(dataset)
    for row, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise InputError(f"Every row must be a mapping, got {record!r:.80} in row {row} of the dataset.")
    return records, Where("the dataset", of_arrow=hasattr(dataset, "features"))  # a `datasets.Dataset`


def _read_file(path: Path) -> tuple[Sequence[Record], Where]:
    require_data_file(path, "dataset")
    try:
        if path.suffix.lower() in (".jsonl", ".json") or (not path.suffix and kind_of(path) == "a pipe"):
            return _read_json(path)
        if path.suffix.lower() == ".parquet":
            return parquet_rows(path), Where(str(path), of_arrow=True)
    except MemoryError as error:
        raise too_large(path, "the memory is full") from error
    except OSError as error:
        raise InputError(f"`dataset` must be a file that can be read, got {str(path)!r}: {reason(error)}.") from error
    raise InputError(f"`dataset` must end in .jsonl, .json or .parquet, got {str(path)!r}.")


def _read_json(path: Path) -> tuple[Sequence[Record], Where]:
    """Reads JSON Lines, or a file that is one JSON value: an array of rows, or an object that is a row or has the rows.

    The file is read once, because it may be a pipe.
    """
    with path.open("rb") as file:
        read = bounded_lines(file, path)
        number, first = next((line for line in enumerate(map(_stripped, read), 1) if line[1]), (1, b""))
        lines = itertools.chain([first], read)
        if not first.startswith((b"[", b"{")) or (first.startswith(b"{") and _is_json(first)):
            records, where = _read_lines(lines, number, path)
            return (records, where) if len(records) > 1 else _rows_within(records, where, path)
        whole = b"\n".join(lines)
    try:
        value = parse_json(whole.decode(), finite=False)
    except ValueError as error:
        if first.startswith(b"{") and isinstance(error, json.JSONDecodeError):
            return _read_lines([first], number, path)  # and says what is wrong with the first line
        raise InputError(
            f"{path} must be JSON Lines, or one JSON array of objects, got one value that cannot be read:"
            f" {reason(error)}."
        ) from error
    return _rows_within([value], Where(str(path)), path) if isinstance(value, dict) else _read_array(value, str(path))


def _rows_within(records: list[Record], where: Where, path: Path) -> tuple[Sequence[Record], Where]:
    """Returns the rows in a list that a file's only object holds; the object itself if it is a row, or holds none."""
    if not records or formats_of(records[0]):
        return records, where
    lists = {
        key: value
        for key, value in records[0].items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and formats_of(value[0])
    }
    if len(lists) > 1:
        raise InputError(f"{path} must have the rows of one dataset, got lists of rows in the fields {sorted(lists)}.")
    if not lists:
        return records, where
    ((key, rows),) = lists.items()
    others = [f"`{other}`" for other in records[0] if other != key]
    rest = f"; not used: {', '.join(others)}" if others else ""
    console.print(f"the rows of {path} are those of its field `{key}`{rest}")
    return _read_array(rows, f"`{key}` of {path}")


def _read_array(records: list, source: str) -> tuple[list[Record], Where]:
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"Each item of the array in {source} must be an object, got {record!r:.80} as item {row}.")
    return records, Where(source)


def _read_lines(lines: Iterable[bytes], first: int, path: Path) -> tuple[list[Record], Where]:
    """Reads JSON Lines; `first` is the number of the first of the lines in the file."""
    records, numbers = [], []
    for number, line in enumerate(map(_stripped, lines), first):
        if not line:
            continue
        try:
            record = parse_json(line.decode(), finite=False)
        except ValueError as error:
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
            raise InputError(f"Line {number} of {path} must be a JSON object, one row on each line: {why}.") from error
        if not isinstance(record, dict):
            text = line[:320].decode(errors="replace")[:80]
            raise InputError(f"Line {number} of {path} must be a JSON object, one row on each line, got {text!r}.")
        records.append(record)
        numbers.append(number)
    return records, Where(str(path), numbers)


def _stripped(line: bytes) -> bytes:
    """Removes white space around a line, and a byte order mark before it: joined files have marks within."""
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _is_json(line: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(line)
        return True
    return False
