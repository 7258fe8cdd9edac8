"""Records to documents: what a user's rows say, as token ids and which of them are trained on."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpack.constants import IGNORE
from jaxpack.data.chat_template import (
    ChatTemplate,
    ChatTokenizer,
    Conversation,
    alpaca_prompt,
    common_prefix,
    instruction_message,
    read_conversation,
    read_instruction,
    without_none,
)
from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console, progress_bar

Record = Mapping[str, Any]
Dataset = str | os.PathLike | Iterable[Record]  # a JSONL or Parquet file, a list of dicts, a `datasets.Dataset`

TEXT_FIELD = "text"  # of rows of plain text, where no other is named

_CHUNK = 1024  # rows handed to the tokenizer at a time; it spreads them over the cores


class Tokenizer(ChatTokenizer, Protocol):
    """What is used of a Hugging Face fast tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, list]: ...
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
    dataset: Dataset | Documents,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    text_field: str = TEXT_FIELD,
    assistant_only_loss: bool = True,
) -> Documents:
    """Reads and tokenises a dataset, with a progress bar.

    Each row is in one of these formats; all rows are in the first row's:

    - `input_ids`, optionally `labels` (-100 where a token is not trained on): taken as they are, without padding.
    - `messages` (or `conversations`), of `role` and `content`, or of ShareGPT's `from` and `value`: through the
      tokenizer's chat template, trained on what the assistant writes and on the token that ends its turn. `tools`, a
      list or JSON of one, `system` and `chat_template_kwargs` of the row go with them.
    - `prompt` and `completion`, two strings, trained on the completion alone, or two lists of messages, trained on what
      the assistant writes in the completion.
    - `text` (or what `text_field` names): every token is trained on. Another name than this one is read whatever else
      the rows have.
    - `instruction`, optionally `input`, and `output`: a question and an answer through the chat template, as above,
      or, where the tokenizer has none, prompt and completion in Alpaca's words.

    Strings that do not end in the tokenizer's EOS token get one; a chat template sees to its own. A token with any
    character of what is trained on is trained on whole. Rows without a token to learn are left out and counted aloud.

    Args:
      dataset: the path of a JSONL (`.jsonl`, `.json`) or Parquet (`.parquet`) file, or any iterable of dicts; documents
        that were loaded before are returned as they are.
      tokenizer: a fast Hugging Face tokenizer; None will do for rows of `input_ids`.
      vocab_size: token ids from here on are refused.
      text_field: the key of plain text.
      assistant_only_loss: False trains on every token of `messages`, of `conversations`, of a completion of messages,
        and of questions and answers, where a chat template writes them.

    Raises:
      InputError: the dataset is empty or unreadable, or a row is, or no row has a token to learn, or a chat template
        does not show what the assistant writes; the message says which row, and what it needs.
    """
    if isinstance(dataset, Documents):
        return _within(vocab_size, dataset)
    records, where = _read(dataset)
    template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) is not None else None
    encode = _encoder(records[0], tokenizer, template, text_field, assistant_only_loss, where)
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
            f"in {where.diverging:,} rows the prompt's tokens change when the completion follows:"
            " they are trained on from where they do"
        )
    if template is not None and template.endless:
        console.print(
            f"in {template.endless:,} rows the assistant's last turn ends in no token of its own, so the model does not"
            " learn to stop: the chat template writes none, or writes it outside of its generation tags"
        )
    return _with_targets(documents, tokenizer, where)


def load_prompts(dataset: Dataset, *, chat: bool) -> list[str | Conversation]:
    """What is asked in each row of a dataset, in the formats of `load_documents` that ask something.

    These are `prompt`, a string or messages; `messages` or `conversations`, without the answer at their end; and
    `instruction`, with its `input`.

    Args:
      chat: a string is a user's message; if not, a text to go on from, and instructions are put in Alpaca's words.

    Raises:
      InputError: the dataset is empty or unreadable, or a row is; the message says which.
    """
    records, where = _read(dataset)
    records = without_none(list(records)) if where.of_arrow else records
    return [_asked(record, row, where, chat) for row, record in enumerate(records)]


def text_prompt(text: str, *, chat: bool) -> str | Conversation:
    """A text as a user's message with `chat`; if not, as it is."""
    return Conversation([{"role": "user", "content": text}]) if chat else text


def _asked(record: Record, row: int, where: "_Where", chat: bool) -> str | Conversation:
    key = next((key for key in ("messages", "conversations", "prompt") if key in record), None)
    if key is not None:
        kinds = (str, list) if key == "prompt" else (list,)
        (asked,) = _column([record], row, key, kinds, where)
        if isinstance(asked, str):
            return text_prompt(asked, chat=chat)
        conversation = read_conversation(record, asked, where(row))
        messages = list(conversation.messages)
        while key != "prompt" and messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if not messages:
            raise InputError(f"`{key}` must have a message to answer, got none in {where(row)}.")
        return dataclasses.replace(conversation, messages=messages)
    if "instruction" in record:
        instruction, given, _ = read_instruction({"output": "", **record}, where(row))
        if not chat:
            return alpaca_prompt(instruction, given)
        return read_conversation(record, [instruction_message(instruction, given)], where(row))
    formats = "`prompt`, `messages`, `conversations` or `instruction`"
    raise InputError(f"A row must have {formats}, got {sorted(record)} in {where(row)}.")


def _within(vocab_size: int, documents: Documents) -> Documents:
    if not len(documents):
        raise InputError("`dataset` must have at least one document, got none.")
    for name, ids in (("tokens", documents.tokens), ("labels", documents.labels)):
        if len(wrong := _outside(ids, vocab_size, labels=name == "labels")):
            raise InputError(
                f"Documents must have {name} in [0, {vocab_size}), the model's vocabulary, got {wrong[0]}."
            )
    return documents


def _ids(values: Sequence[int], vocab_size: int, where: "_Where", row: int, *, labels: bool = False) -> np.ndarray:
    array = np.asarray(values, np.int64)
    if len(wrong := _outside(array, vocab_size, labels=labels)):
        name = "Labels other than -100" if labels else "Token ids"
        raise InputError(
            f"{name} must be in [0, {vocab_size}), the model's vocabulary, got {wrong[0]} in {where(row)}."
        )
    return array.astype(np.int32)


def _outside(ids: np.ndarray, vocab_size: int, *, labels: bool) -> np.ndarray:
    """Those that are not in the vocabulary, -100 aside where they are labels."""
    wrong = (ids < 0) | (ids >= vocab_size)
    return ids[wrong & (ids != IGNORE) if labels else wrong]


def _with_targets(documents: Documents, tokenizer: Tokenizer | None, where: "_Where") -> Documents:
    """The documents with a token to learn; says how many have none, and shows the first."""
    keep = documents.num_targets > 0
    if keep.all():
        return documents
    row = int(np.argmin(keep))
    tokens = documents.tokens[documents.starts[row] :][: documents.lengths[row]].tolist()
    shown = repr(tokenizer.decode(tokens[:64])) if tokenizer is not None else str(tokens[:64])
    masked = "every label masked, no turn of the assistant's, or fewer than two tokens"
    if not keep.any():
        raise InputError(
            f"At least one row must have a token to learn after its first, got {len(keep)} rows with none ({masked});"
            f" the first is {where(row)}: {shown}."
        )
    console.print(
        f"{int((~keep).sum()):,} of {len(keep):,} rows have nothing to learn ({masked}) and are left out;"
        f" the first is {where(row)}: {shown}",
        style="yellow",
    )
    return documents[keep]


class _Where:
    """Names a row as its user knows it: a line of a file, or an index. Counts what is told at the end."""

    def __init__(self, source: str, lines: Sequence[int] | None = None, *, of_arrow: bool = False):
        self.source, self.lines = source, lines
        self.of_arrow = of_arrow  # every mapping has the keys of all, some with None
        self.diverging = 0  # rows whose prompt is no prefix of prompt and completion

    def __call__(self, row: int) -> str:
        return f"row {row} of {self.source}" if self.lines is None else f"line {self.lines[row]} of {self.source}"


def _read(dataset: Dataset) -> tuple[Sequence[Record], _Where]:
    records, where = _read_file(Path(dataset)) if isinstance(dataset, str | os.PathLike) else _read_rows(dataset)
    if not records:
        raise InputError(f"`dataset` must have at least one row, got none in {where.source}.")
    return records, where


def _read_rows(dataset: Iterable[Record]) -> tuple[Sequence[Record], _Where]:
    if isinstance(dataset, Mapping):  # a `datasets.DatasetDict`, most likely
        raise InputError(f"`dataset` must be rows, such as one split, got a mapping of {sorted(dataset)}.")
    if not isinstance(dataset, Iterable):
        raise InputError(f"`dataset` must be a file or an iterable of rows, got {dataset!r:.80}.")
    records = list(dataset)
    for row, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise InputError(f"Every row must be a mapping, got {record!r:.80} in row {row} of the dataset.")
    return records, _Where("the dataset", of_arrow=hasattr(dataset, "features"))  # a `datasets.Dataset`


def _read_file(path: Path) -> tuple[Sequence[Record], _Where]:
    if not path.is_file():
        raise InputError(f"`dataset` must be an existing file, got {str(path)!r}.")
    if path.suffix in (".jsonl", ".json"):
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist(), _Where(str(path), of_arrow=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} must be a readable Parquet file: {reason(error)}.") from error
    raise InputError(f"`dataset` must end in .jsonl, .json or .parquet, got {str(path)!r}.")


def _read_jsonl(path: Path) -> tuple[list[Record], _Where]:
    records, lines = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if not records and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                raise InputError(f"`dataset` must be JSON Lines, an object a line, got {str(path)!r} with an array.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                why = (
                    f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
                )
                raise InputError(f"Line {number} of {path} must be a JSON object, one row a line: {why}.") from error
            if not isinstance(record, dict):
                raise InputError(f"Line {number} of {path} must be a JSON object, one row a line, got {text[:80]!r}.")
            records.append(record)
            lines.append(number)
    return records, _Where(str(path), lines)


Rows = Sequence[Record]
Encoded = Iterator[tuple[Sequence[int], Sequence[int]]]  # ids and labels of each row
Encoder = Callable[[Rows, int], Encoded]  # from rows, and the number of the first of them


def _encoder(
    first: Record,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    text_field: str,
    assistant_only: bool,
    where: _Where,
) -> Encoder:
    """Chooses the format by the first row: a function from rows, and the number of the first, to ids and labels."""
    is_chosen = text_field != TEXT_FIELD
    if is_chosen and text_field not in first:
        raise InputError(
            f"`text_field` must be a field of the rows, got {text_field!r}, and {sorted(first)} in {where(0)}."
        )
    if "input_ids" in first and not is_chosen:
        return lambda rows, begin: _encode_ids(rows, begin, first.get("labels") is not None, where)
    if tokenizer is None:
        raise InputError(
            f"`tokenizer` must come with the model for rows without `input_ids`, got None, and {sorted(first)} in"
            f" {where(0)}."
        )
    if is_chosen:
        return lambda rows, begin: _encode_text(rows, begin, tokenizer, text_field, where)

    def chats(read: Callable[[Rows, int], list[Conversation]]) -> Encoder:
        def encode(rows: Rows, begin: int) -> Encoded:
            if where.of_arrow:
                rows = without_none(list(rows))
            conversations = read(rows, begin)
            if template is None:
                raise InputError("`tokenizer` must have a chat template for rows of messages, got one without.")
            return _encode_chats(conversations, begin, tokenizer, template, assistant_only, where)

        return encode

    key = "messages" if "messages" in first else "conversations"
    if key in first:
        return chats(lambda rows, begin: _read_messages(rows, begin, key, where))
    if "prompt" in first and "completion" in first:
        kind = type(first["prompt"])
        if kind is list:
            return chats(lambda rows, begin: _read_prompts(rows, begin, where))
        return lambda rows, begin: _encode_prompts(rows, begin, kind, tokenizer, where)
    if TEXT_FIELD in first:
        return lambda rows, begin: _encode_text(rows, begin, tokenizer, text_field, where)
    if "instruction" in first and "output" in first:
        asked = "in Alpaca's words, for the tokenizer has no chat template" if template is None else "as in a chat"
        console.print(f"rows of instruction and output are asked {asked}")
        if template is None:
            return lambda rows, begin: _encode_instructions(rows, begin, tokenizer, where)
        return chats(lambda rows, begin: _read_instructions(rows, begin, where))
    formats = (
        f"`input_ids`, `messages`, `conversations`, `prompt` and `completion`, `{TEXT_FIELD}`, or `instruction` and"
        " `output`"
    )
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
    for row, record in enumerate(rows, begin):
        _check_masks(record, where(row))
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


def _check_masks(record: Record, where: str) -> None:
    """What other libraries say by a mask, and would be read over here: padding, or what is not trained on."""
    masks = ["attention_mask"]
    if record.get("labels") is None:
        masks += ["completion_mask", "assistant_masks"]
    for name in masks:
        mask = record.get(name)
        if mask is not None and not np.all(mask):
            rule = "without padding" if name == "attention_mask" else "with `labels`, -100 where nothing is trained on"
            raise InputError(f"Rows of `input_ids` must be {rule}, got `{name}` with zeros in {where}.")


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
    for ids in _tokenize(_column(rows, begin, text_field, (str,), where), begin, tokenizer, where)["input_ids"]:
        ids = _with_eos(ids, tokenizer)
        yield ids, ids


def _encode_prompts(rows: Rows, begin: int, kind: type, tokenizer: Tokenizer, where: _Where) -> Encoded:
    prompts = _column(rows, begin, "prompt", (str,) if kind is str else (str, list), where)
    return _encode_completions(prompts, _column(rows, begin, "completion", (kind,), where), begin, tokenizer, where)


def _encode_instructions(rows: Rows, begin: int, tokenizer: Tokenizer, where: _Where) -> Encoded:
    texts = [read_instruction(record, where(row)) for row, record in enumerate(rows, begin)]
    prompts = [alpaca_prompt(instruction, given) for instruction, given, _ in texts]
    return _encode_completions(prompts, [output for _, _, output in texts], begin, tokenizer, where)


def _encode_completions(
    prompts: list[str], completions: list[str], begin: int, tokenizer: Tokenizer, where: _Where
) -> Encoded:
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    prompt_ids = _tokenize(prompts, begin, tokenizer, where)["input_ids"]
    whole_ids = [_with_eos(ids, tokenizer) for ids in _tokenize(whole, begin, tokenizer, where)["input_ids"]]
    return _after_prompts(prompt_ids, whole_ids, where)


def _after_prompts(prompt_ids: list[list[int]], whole_ids: list[list[int]], where: _Where) -> Encoded:
    for prompt, ids in zip(prompt_ids, whole_ids, strict=True):
        # A token may straddle the border: then it is trained on, with the completion.
        prefix = common_prefix(prompt, ids)
        where.diverging += prefix + 1 < len(prompt)
        yield ids, [IGNORE] * prefix + list(ids[prefix:])


def _read_messages(rows: Rows, begin: int, key: str, where: _Where) -> list[Conversation]:
    columns = enumerate(zip(rows, _column(rows, begin, key, (list,), where), strict=True), begin)
    return [read_conversation(record, messages, where(row)) for row, (record, messages) in columns]


def _read_prompts(rows: Rows, begin: int, where: _Where) -> list[Conversation]:
    columns = [_column(rows, begin, key, (list,), where) for key in ("prompt", "completion")]
    return [
        read_conversation(record, prompt + completion, where(row), prompt=len(prompt))
        for row, (record, prompt, completion) in enumerate(zip(rows, *columns, strict=True), begin)
    ]


def _read_instructions(rows: Rows, begin: int, where: _Where) -> list[Conversation]:
    conversations = []
    for row, record in enumerate(rows, begin):
        instruction, given, output = read_instruction(record, where(row))
        messages = [instruction_message(instruction, given), {"role": "assistant", "content": output}]
        conversations.append(read_conversation(record, messages, where(row)))
    return conversations


def _encode_chats(
    conversations: list[Conversation],
    begin: int,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    assistant_only: bool,
    where: _Where,
) -> Encoded:
    options = {"add_special_tokens": False}  # the template has written them
    if not assistant_only:
        prompts, texts = [], []
        for row, conversation in enumerate(conversations, begin):
            asked = dataclasses.replace(conversation, messages=conversation.messages[: conversation.prompt])
            prompts.append(template.write_question(asked, where(row)) if asked.messages else "")
            texts.append(template.write(conversation, where(row)))
        ids = [_tokenize(some, begin, tokenizer, where, **options)["input_ids"] for some in (prompts, texts)]
        yield from _after_prompts(*ids, where)
        return
    if not getattr(tokenizer, "is_fast", True):
        raise InputError(
            "`tokenizer` must be a fast one for rows of messages, since others do not say which characters a token is"
            f" made of, got a {type(tokenizer).__name__}."
        )
    written = [
        template.write_with_spans(conversation, where(row)) for row, conversation in enumerate(conversations, begin)
    ]
    added = np.array(list(tokenizer.get_added_vocab().values()), np.int64)
    encoded = _tokenize([text for text, _ in written], begin, tokenizer, where, return_offsets_mapping=True, **options)
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True):
        tokens, offsets = np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)
        trained = np.zeros(len(tokens), bool)
        for start, end in spans:
            trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
            # The template's last token before that may take spaces that follow it (Phi-3's), the answer's own, too.
            trained &= ~((offsets[:, 0] < start) & (offsets[:, 1] > start) & np.isin(tokens, added))
        yield tokens, np.where(trained, tokens, IGNORE)


def _tokenize(texts: list[str], begin: int, tokenizer: Tokenizer, where: _Where, **options: bool) -> Mapping[str, list]:
    return tokenize(texts, tokenizer, lambda index: where(begin + index), **options)


def tokenize(
    texts: list[str], tokenizer: Tokenizer, where: Callable[[int], str], **options: bool
) -> Mapping[str, list]:
    """What a tokenizer makes of texts, which `where` names by their index.

    Raises:
      InputError: one of them is not Unicode.
    """
    try:
        return tokenizer(texts, **options)
    except TypeError:
        for index, text in enumerate(texts):
            if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell half of a character
                raise InputError(f"Text must be valid Unicode, got {text!r:.80} in {where(index)}.") from None
        raise


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
