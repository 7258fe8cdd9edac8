"""Records to documents: what a user's rows say, as token ids and which of them are trained on."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpack.console import console, progress_bar
from jaxpack.errors import InputError, reason
from jaxpack.packing import IGNORE

Record = Mapping[str, Any]
Dataset = str | os.PathLike | Iterable[Record]  # a JSONL or Parquet file, a list of dicts, a `datasets.Dataset`

_CHUNK = 1024  # rows handed to the tokenizer at a time; it spreads them over the cores


class Tokenizer(Protocol):
    """What is used of a Hugging Face fast tokenizer."""

    eos_token_id: int | None
    chat_template: str | None

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Mapping[str, list[list[int]]]: ...
    def apply_chat_template(
        self, conversation: list, *, tokenize: bool, add_generation_prompt: bool = False
    ) -> Any: ...
    def decode(self, token_ids: list[int]) -> str: ...
    def save_pretrained(self, save_directory: str | os.PathLike) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end in two flat arrays.

    `tokens` and `labels` are int32 `[total]`; a label is the token where it is trained on and -100 where it is not, as
    in Hugging Face (unshifted). Document `d` is the `lengths[d]` tokens from `starts[d]` on, both int64 `[documents]`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """Tokens that each document trains on, int64 `[documents]`. Its first token is none: nothing predicts it."""
        return self.targets_within(self.starts, self.lengths)

    def targets_within(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens that pieces of documents train on, int64: all but the first of each that have a label."""
        trained = np.concatenate([[0], np.cumsum(self.labels != IGNORE)])
        ends = starts + lengths
        return trained[ends] - trained[np.minimum(starts + 1, ends)]

    def truncate(self, max_length: int) -> "Documents":
        """The same documents, without what they have beyond `max_length` tokens. Copies no token."""
        return dataclasses.replace(self, lengths=np.minimum(self.lengths, max_length))

    def __getitem__(self, which: np.ndarray) -> "Documents":
        """The documents that an index or mask array selects. Copies no token."""
        return dataclasses.replace(self, starts=self.starts[which], lengths=self.lengths[which])


def load_documents(
    dataset: Dataset, tokenizer: Tokenizer | None, *, vocab_size: int, text_field: str = "text"
) -> Documents:
    """Reads and tokenises a dataset, with a progress bar.

    Each row is in one of the formats of TRL's `SFTTrainer`; all rows are in the first row's:

    - `input_ids`, optionally `labels` (-100 where a token is not trained on): taken as they are.
    - `messages`: through the tokenizer's chat template; every token is trained on.
    - `prompt` and `completion`, two strings or two lists of messages: trained on the completion alone.
    - `text` (or what `text_field` names): every token is trained on.

    Strings that do not end in the tokenizer's EOS token get one; a chat template sees to its own.

    Args:
      dataset: the path of a JSONL (`.jsonl`, `.json`) or Parquet (`.parquet`) file, or any iterable of dicts.
      tokenizer: a Hugging Face tokenizer; None will do for rows of `input_ids`.
      vocab_size: token ids from here on are refused.
      text_field: the key of the plain-text format.

    Raises:
      InputError: the dataset is empty or unreadable, or a row is; the message says which row, and what it needs.
    """
    records, where = _read(dataset)
    if not records:
        raise InputError(f"The dataset must have at least one row, got none in {where.source}.")
    encode = _encoder(records[0], tokenizer, text_field, where)
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    with progress_bar("tokenising") as progress:
        bar = progress.add_task("", total=len(records), note="")
        for begin in range(0, len(records), _CHUNK):
            chunk = records[begin : begin + _CHUNK]
            for row, (document, trained) in enumerate(encode(chunk, begin), begin):
                tokens.append(_ids("Token ids", document, vocab_size, where, row))
                labels.append(_ids("Labels other than -100", trained, vocab_size, where, row))
            progress.advance(bar, len(chunk))
    lengths = np.array([len(document) for document in tokens], np.int64)
    documents = Documents(np.concatenate(tokens), np.concatenate(labels), np.cumsum(lengths) - lengths, lengths)
    _require_targets(documents, tokenizer, where)
    if where.diverging:
        console.print(
            f"in {where.diverging:,} rows the prompt's tokens change when the completion follows:"
            " they are trained on from where they do"
        )
    return documents


def _ids(name: str, values: Sequence[int], vocab_size: int, where: "_Where", row: int) -> np.ndarray:
    array = np.asarray(values, np.int64)
    wrong = array[((array < 0) | (array >= vocab_size)) & ((array != IGNORE) | (name == "Token ids"))]
    if len(wrong):
        raise InputError(
            f"{name} must be in [0, {vocab_size}), the model's vocabulary, got {wrong[0]} in {where(row)}."
        )
    return array.astype(np.int32)


def _require_targets(documents: Documents, tokenizer: Tokenizer | None, where: "_Where") -> None:
    masked = np.flatnonzero(documents.num_targets == 0)
    if len(masked) == 0:
        return
    row = int(masked[0])
    tokens = documents.tokens[documents.starts[row] :][: documents.lengths[row]].tolist()
    shown = repr(tokenizer.decode(tokens[:64])) if tokenizer is not None else str(tokens[:64])
    raise InputError(
        f"Every row must have at least one token to learn after its first, got {len(masked)} of {len(documents)} rows"
        f" with none (every label masked, or fewer than two tokens); the first is {where(row)}: {shown}."
    )


class _Where:
    """Names a row as its user knows it: a line of a file, or an index. Counts what is told at the end."""

    def __init__(self, source: str, lines: Sequence[int] | None = None):
        self.source, self.lines = source, lines
        self.diverging = 0  # rows whose prompt is no prefix of prompt and completion

    def __call__(self, row: int) -> str:
        return f"row {row} of {self.source}" if self.lines is None else f"line {self.lines[row]} of {self.source}"


def _read(dataset: Dataset) -> tuple[Sequence[Record], _Where]:
    if not isinstance(dataset, str | os.PathLike):
        if isinstance(dataset, Mapping):  # a `datasets.DatasetDict`, most likely
            raise InputError(f"`dataset` must be rows, such as one split, got a mapping of {sorted(dataset)}.")
        records = list(dataset)
        for row, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise InputError(f"Every row must be a mapping, got {record!r:.80} in row {row} of the dataset.")
        return records, _Where("the dataset")
    path = Path(dataset)
    if not path.is_file():
        raise InputError(f"`dataset` must be an existing file, got {str(path)!r}.")
    if path.suffix in (".jsonl", ".json"):
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist(), _Where(str(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} must be a readable Parquet file: {reason(error)}.") from error
    raise InputError(f"`dataset` must end in .jsonl, .json or .parquet, got {str(path)!r}.")


def _read_jsonl(path: Path) -> tuple[list[Record], _Where]:
    records, lines = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                why = (
                    f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
                )
                raise InputError(f"Line {number} of {path} must be a JSON object, one row a line: {why}.") from error
            if not isinstance(record, dict):
                raise InputError(f"Line {number} of {path} must be a JSON object, got {text[:80]!r}.")
            records.append(record)
            lines.append(number)
    return records, _Where(str(path), lines)


Rows = Sequence[Record]
Encoded = Iterator[tuple[Sequence[int], Sequence[int]]]  # ids and labels of each row
Encoder = Callable[[Rows, int], Encoded]  # from rows, and the number of the first of them


def _encoder(first: Record, tokenizer: Tokenizer | None, text_field: str, where: _Where) -> Encoder:
    """Chooses the format by the first row: a function from rows, and the number of the first, to ids and labels."""
    if "input_ids" in first:
        return lambda rows, begin: _encode_ids(rows, begin, first.get("labels") is not None, where)
    if tokenizer is None:
        raise InputError(
            f"`tokenizer` must be given for rows without `input_ids`, got None and a row of {sorted(first)}."
        )
    if "messages" in first:
        return lambda rows, begin: _encode_messages(rows, begin, tokenizer, where)
    if "prompt" in first and "completion" in first:
        return lambda rows, begin: _encode_prompts(rows, begin, type(first["prompt"]), tokenizer, where)
    if text_field in first:
        return lambda rows, begin: _encode_text(rows, begin, tokenizer, text_field, where)
    formats = f"`input_ids`, `messages`, `prompt` and `completion`, or `{text_field}`"
    raise InputError(f"A row must have {formats}, got {sorted(first)} in {where(0)}.")


def _column(rows: Rows, begin: int, key: str, kinds: tuple[type, ...], where: _Where) -> list:
    """The values under `key`, each checked to be there, of one of `kinds` and not empty of meaning."""
    for row, record in enumerate(rows, begin):
        if key not in record:
            raise InputError(
                f"Every row must have the field `{key}`, as the first has, got {sorted(record)} in {where(row)}."
            )
        if not isinstance(record[key], kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"`{key}` must be a {expected}, got {record[key]!r:.80} in {where(row)}.")
    return [record[key] for record in rows]


def _encode_ids(rows: Rows, begin: int, has_labels: bool, where: _Where) -> Encoded:
    kinds = (list, tuple, np.ndarray)
    ids = _integers(_column(rows, begin, "input_ids", kinds, where), begin, "input_ids", where)
    labelled = rows
    if not has_labels:  # then a row may have labels and need not: without, it is trained on whole
        labelled = [row if row.get("labels") is not None else {"labels": row["input_ids"]} for row in rows]
    labels = _integers(_column(labelled, begin, "labels", kinds, where), begin, "labels", where)
    for row, (document, trained) in enumerate(zip(ids, labels, strict=True), begin):
        if len(trained) != len(document):
            raise InputError(
                f"`labels` must be as long as `input_ids` ({len(document)}), got {len(trained)} in {where(row)}."
            )
        yield document, trained


def _integers(column: list, begin: int, name: str, where: _Where) -> list[np.ndarray]:
    arrays = []
    for row, values in enumerate(column, begin):
        try:
            array = np.asarray(values, dtype=None if len(values) else np.int64)
        except (ValueError, OverflowError):  # ragged, or past 64 bits
            array = np.empty(0)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(f"`{name}` must be a flat list of integers, got {values!r:.80} in {where(row)}.")
        arrays.append(array)
    return arrays


def _encode_text(rows: Rows, begin: int, tokenizer: Tokenizer, text_field: str, where: _Where) -> Encoded:
    for ids in _tokenize(_column(rows, begin, text_field, (str,), where), begin, tokenizer, where):
        ids = _with_eos(ids, tokenizer)
        yield ids, ids


def _encode_messages(rows: Rows, begin: int, tokenizer: Tokenizer, where: _Where) -> Encoded:
    conversations = _column(rows, begin, "messages", (list,), where)
    for ids in _render(conversations, begin, tokenizer, where):
        yield ids, ids


def _encode_prompts(rows: Rows, begin: int, kind: type, tokenizer: Tokenizer, where: _Where) -> Encoded:
    prompts = _column(rows, begin, "prompt", (str, list) if kind not in (str, list) else (kind,), where)
    completions = _column(rows, begin, "completion", (kind,), where)
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if kind is str:
        prompt_ids = _tokenize(prompts, begin, tokenizer, where)
        whole_ids = [_with_eos(ids, tokenizer) for ids in _tokenize(whole, begin, tokenizer, where)]
    else:
        prompt_ids = _render(prompts, begin, tokenizer, where, add_generation_prompt=True)
        whole_ids = _render(whole, begin, tokenizer, where)
    for prompt, ids in zip(prompt_ids, whole_ids, strict=True):
        # A token may straddle the border: then it is trained on, with the completion.
        prefix = _common_prefix(prompt, ids)
        where.diverging += prefix + 1 < len(prompt)
        yield ids, [IGNORE] * prefix + list(ids[prefix:])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = min(len(a), len(b))
    return next((i for i in range(shared) if a[i] != b[i]), shared)


def _render(conversations: list, begin: int, tokenizer: Tokenizer, where: _Where, **options) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("`tokenizer` must have a chat template for rows of messages, got one without.")
    texts = []
    for row, conversation in enumerate(conversations, begin):
        try:
            texts.append(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
        except Exception as error:  # a template raises what it likes
            raise InputError(
                f"The chat template must accept every row, refused {where(row)}: {reason(error)}."
            ) from error
    return _tokenize(texts, begin, tokenizer, where, add_special_tokens=False)  # the template has written them


def _tokenize(texts: list[str], begin: int, tokenizer: Tokenizer, where: _Where, **options) -> list[list[int]]:
    try:
        return tokenizer(texts, **options)["input_ids"]
    except TypeError:
        for row, text in enumerate(texts, begin):
            if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell half of a character
                raise InputError(f"Text must be valid Unicode, got {text!r:.80} in {where(row)}.") from None
        raise


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
