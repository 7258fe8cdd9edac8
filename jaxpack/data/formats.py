"""Tells the format of a dataset's rows by their fields, and encodes rows into token ids and labels."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxpack.constants import IGNORE
from jaxpack.data.chat_template import ChatTemplate, common_prefix
from jaxpack.data.conversation import (
    SYSTEMS,
    TOOLS,
    TRAINING,
    Conversation,
    alpaca_prompt,
    check_row_is_trained,
    instruction_message,
    plain,
    read_conversation,
    read_history,
    read_instruction,
)
from jaxpack.data.responses import Parts, Span, parts_of, response_spans
from jaxpack.data.tokenizer import Tokenizer, begins_with_bos, tokenize, without_space_before_bos
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig
from jaxpack.utils.console import console

Record = Mapping[str, Any]
Rows = Sequence[Record]
Ids = np.ndarray | list[int]
Encoded = Iterator[tuple[Ids, Ids]]  # ids and labels of each row
# Takes rows, and the number of the first of them. It begins to tokenise them in another thread; the iterator waits for
# the result, so that the next rows can be prepared meanwhile.
Encoder = Callable[[Rows, int], Encoded]
Tokenized = Future[Mapping[str, list]]

TEXT_FIELD = "text"  # the field of plain text, unless the user names another


class Lines(Protocol):
    """Maps rows to the numbers of their lines."""

    def __getitem__(self, row: int) -> int: ...


class Where:
    """Names a row in errors as its user knows it, by line or index, and counts rows for a message at the end."""

    def __init__(self, source: str, lines: Lines | None = None, *, of_arrow: bool = False):
        self.source, self.lines = source, lines
        self.of_arrow = of_arrow  # in Arrow, every mapping has the keys of all mappings, some with the value None
        self.diverging = 0  # rows in which the tokens of the prompt change when the completion follows
        self.unasked = 0  # rows with a response part and without an instruction part
        self.written = 0  # rows whose text a chat template has written before: it begins with BOS, or ends a turn

    def __call__(self, row: int) -> str:
        """Returns the name of a row, such as "line 3 of train.jsonl"."""
        return f"row {row} of {self.source}" if self.lines is None else f"line {self.lines[row]} of {self.source}"


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Says how rows are read, and which of their tokens are trained on, see `load_documents`."""

    text_field: str = TEXT_FIELD
    assistant_only: bool = True
    completion_only: bool = True
    parts: Parts | None = None

    @classmethod
    def of_run(cls, config: TrainConfig) -> "RowSettings":
        """Returns the settings of a run."""
        return cls(
            config.dataset_text_field,
            config.assistant_only_loss,
            config.completion_only_loss,
            parts_of(config.instruction_part, config.response_part),
        )


class Format(NamedTuple):
    """Holds the format of a file's rows.

    Attributes:
      words: names it in what a run prints, such as "prompt and completion".
      encode: takes rows, and the number of the first of them, and encodes the rows into ids and labels.
    """

    words: str
    encode: Encoder


def format_of(
    first: Record,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    settings: RowSettings,
    where: Where,
    say: Callable[[str], object] = console.print,
) -> Format:
    """Chooses the format of all rows by the first.

    Args:
      say: is called with lines for the user: on a choice between formats, and on fields that are not used.
    """
    present = {field: value for field, value in first.items() if value is not None}
    if settings.text_field == TEXT_FIELD and formats_of(present):
        first = present  # tables of two formats have the fields of both in every row, some of them null
    words, encode = _format_of(first, tokenizer, template, settings, where, say)

    def check_and_encode(rows: Rows, begin: int) -> Encoded:
        for row, record in enumerate(rows, begin):
            if any(field in record for field in TRAINING):
                check_row_is_trained(record, where(row))
        return encode(rows, begin)

    return Format(words, check_and_encode)


def _format_of(
    first: Record,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    settings: RowSettings,
    where: Where,
    say: Callable[[str], object],
) -> Format:
    text_field, completion_only = settings.text_field, settings.completion_only
    parts = settings.parts
    # Rows of Unsloth's users have the messages beside the rendered text, and the parts are for the text.
    is_chosen = text_field != TEXT_FIELD or (parts is not None and TEXT_FIELD in first)
    if is_chosen and text_field not in first:
        raise InputError(
            f"`text_field` must be a field of the rows, got {text_field!r}, but {where(0)} has the fields"
            f" {sorted(first)}."
        )
    _say_what_is_used(first, text_field if is_chosen else None, say)
    if parts is not None and not is_chosen and (others := formats_of(first)):
        raise InputError(
            f"`response_part` must be left out for rows that are not plain text, got {parts.response!r:.80} and rows of"
            f" {' and '.join(f'`{field}`' for field in others[0])} in {where(0)}. In messages and in completions, the"
            " answers are found without it; tokens need `labels`."
        )
    if "input_ids" in first and not is_chosen:
        every = [field for field in ("labels", *_MASKS) if field in first]
        return Format(" and ".join(["input_ids", *every]), lambda rows, begin: _encode_ids(rows, begin, every, where))
    if tokenizer is None:
        raise InputError(
            f"`tokenizer` must come with the model for rows without `input_ids`, got None, and {where(0)} has the"
            f" fields {sorted(first)}. Use a model that has a tokenizer, or rows of `input_ids`."
        )
    if is_chosen:
        words = "plain text" if text_field == TEXT_FIELD else f"plain text in {text_field}"
        if parts is not None:
            words += ", trained on after each response part"
        return Format(
            words, lambda rows, begin: _encode_text(rows, begin, tokenizer, template, text_field, parts, where)
        )

    def chats(words: str, read: Callable[[Rows, int], list[Conversation]]) -> Format:
        def encode(rows: Rows, begin: int) -> Encoded:
            rows = [plain(row, drop_none=where.of_arrow) for row in rows]
            conversations = read(rows, begin)
            if template is None:
                raise InputError(
                    "`tokenizer` must have a chat template for rows of messages, got one without. Set"
                    " `chat_template` to 'chatml', or to 'alpaca' for a model without special tokens of chats; or use"
                    f" rows of `prompt` and `completion` texts, or of `{TEXT_FIELD}`."
                )
            return _encode_chats(conversations, begin, tokenizer, template, settings.assistant_only, where)

        return Format(words, encode)

    key = "messages" if "messages" in first else "conversations"
    if key in first:
        return chats(key, lambda rows, begin: _read_messages(rows, begin, key, where))
    if "prompt" in first and "completion" in first:
        kind, words = type(first["prompt"]), "prompt and completion"
        if isinstance(first["prompt"], _LISTS):
            return chats(
                f"{words}, which are messages", lambda rows, begin: _read_prompts(rows, begin, completion_only, where)
            )
        return Format(
            words,
            lambda rows, begin: _encode_prompts(rows, begin, kind, tokenizer, template, completion_only, where),
        )
    if "instruction" in first and "output" in first:
        words = "instruction and output, asked "
        if template is None:
            words += "in Alpaca's words, because the tokenizer has no chat template"
            return Format(
                words, lambda rows, begin: _encode_instructions(rows, begin, tokenizer, completion_only, where)
            )
        words += "as in a chat, with the tokenizer's chat template"
        return chats(words, lambda rows, begin: _read_instructions(rows, begin, where))
    if TEXT_FIELD in first:
        return Format(
            "plain text", lambda rows, begin: _encode_text(rows, begin, tokenizer, template, text_field, None, where)
        )
    formats = (
        f"`input_ids`, `messages`, `conversations`, `prompt` and `completion`, `{TEXT_FIELD}`, or `instruction` and"
        " `output`"
    )
    raise InputError(f"A row must have {formats}, got {sorted(first)} in {where(0)}.")


# Fields that say which tokens of a row of tokens are trained on: TRL's, transformers', and others' names for the same.
_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "assistant_tokens_mask", "loss_mask")
_OF_CHATS = (*SYSTEMS, *TOOLS, "chat_template_kwargs")
# The fields of each format, in the order in which formats are looked for, and the fields that rows may have besides.
_FORMATS = {
    ("input_ids",): ("labels", "attention_mask", "position_ids", "seq_lengths", *_MASKS),
    ("messages",): _OF_CHATS,
    ("conversations",): _OF_CHATS,
    ("prompt", "completion"): _OF_CHATS,
    ("instruction", "output"): (*_OF_CHATS, "input", "history"),
    (TEXT_FIELD,): (),
}


def formats_of(record: Record) -> list[tuple[str, ...]]:
    """Returns the formats, by their fields, that a row could be read in."""
    return [fields for fields in _FORMATS if all(field in record for field in fields)]


def _say_what_is_used(first: Record, chosen: str | None, say: Callable[[str], object]) -> None:
    """Says which format is read if the first row has the fields of several, and which fields no format has."""
    formats = [fields for fields in formats_of(first) if fields != (chosen,)]
    used = (chosen,) if chosen is not None else formats.pop(0) if formats else ()
    if formats:
        names = [" and ".join(f"`{field}`" for field in fields) for fields in (used, *formats)]
        say(
            f"the rows have the fields of several formats: {names[0]} is read, and {', '.join(names[1:])} is ignored"
            " (`dataset_text_field` chooses a field of plain text)"
        )
    is_of_texts = used == ("prompt", "completion") and isinstance(first["prompt"], str)
    besides = () if is_of_texts else _FORMATS.get(used, ())
    known = {*TRAINING, *besides, *used, *itertools.chain.from_iterable(formats)}
    if used and (others := [f"`{field}`" for field in first if field not in known]):
        say(f"these fields of the rows are not used: {', '.join(others)}")


def text_prompt(text: str, *, chat: bool) -> str | Conversation:
    """Returns `text` as a user's message if `chat` is true, and unchanged if not."""
    return Conversation([{"role": "user", "content": text}]) if chat else text


def question_of(record: Record, row: int, where: Where, chat: bool) -> str | Conversation:
    """Reads the question of a row: a text to continue, or a conversation that waits for an answer."""
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
        messages = [*read_history(record, where(row)), instruction_message(instruction, given)]
        return read_conversation(record, messages, where(row))
    formats = "`prompt`, `messages`, `conversations` or `instruction`"
    raise InputError(f"A row must have {formats}, got {sorted(record)} in {where(row)}.")


def _column(rows: Rows, begin: int, key: str, kinds: tuple[type, ...], where: Where) -> list:
    """Returns the values under `key`; each row must have the key, with a value of one of the types `kinds`."""
    for row, record in enumerate(rows, begin):
        if key not in record:
            raise InputError(
                f"Every row must have the field `{key}`, as the first has, got {sorted(record)} in {where(row)}."
            )
        if not isinstance(record[key], kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"`{key}` must be a {expected}, got {record[key]!r:.80} in {where(row)}.")
    return [record[key] for record in rows]


def _encode_ids(rows: Rows, begin: int, every: list[str], where: Where) -> Encoded:
    """Encodes rows of tokens, each of which must have the fields `every`: without them, it would train on more."""
    rows = [_without_tensors(record) for record in rows]
    for field in every:
        _column(rows, begin, field, _LISTS, where)
    ids = _integers(_column(rows, begin, "input_ids", _LISTS, where), begin, "input_ids", where)
    labelled = rows
    if "labels" not in every:  # later rows may still have labels; without labels, every token is trained on
        labelled = [row if row.get("labels") is not None else {"labels": row["input_ids"]} for row in rows]
    labels = _integers(_column(labelled, begin, "labels", _LISTS, where), begin, "labels", where)
    for row, (record, document, trained) in enumerate(zip(rows, ids, labels, strict=True), begin):
        if len(trained) != len(document):
            raise InputError(
                f"`labels` must be as long as `input_ids` ({len(document)}), got {len(trained)} in {where(row)}."
            )
        for name in _MASKS:
            mask = _mask(record, name, len(document), where(row))
            if mask is None:
                continue
            if record.get("labels") is None:
                trained = np.where(mask, trained, IGNORE)
            elif (trained[~mask] != IGNORE).any():
                raise InputError(
                    f"`labels` must be -100 where `{name}` is 0, got {trained[~mask][trained[~mask] != IGNORE][0]} in"
                    f" {where(row)}."
                )
        real = _mask(record, "attention_mask", len(document), where(row))
        _check_is_one_document(record, real, row, where)
        if real is not None and not real.all():
            document, trained = (_unpadded(values, real, where(row)) for values in (document, trained))
        yield document, trained


_LISTS = (list, tuple, np.ndarray)


def _without_tensors(record: Record) -> Record:
    """Returns a row with NumPy arrays in the place of torch's and jax's, such as those of a dataset in torch format."""
    return {
        key: np.asarray(value) if hasattr(value, "__array__") and not isinstance(value, np.ndarray) else value
        for key, value in record.items()
    }


def _mask(record: Record, name: str, length: int, where: str) -> np.ndarray | None:
    """Returns a mask of a row's tokens as booleans, or None if the row has none."""
    values = record.get(name)
    if values is None:
        return None
    mask = np.asarray(values)
    if mask.shape != (length,) or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"`{name}` must have a 0 or a 1 for each of {length} `input_ids`, got {values!r:.80} in {where}."
        )
    return mask.astype(bool)


def _check_is_one_document(record: Record, real: np.ndarray | None, row: int, where: Where) -> None:
    """Refuses a row of several documents, as TRL packs them: their tokens would attend to each other."""
    lengths, positions = (
        _integers([[] if record.get(name) is None else record[name]], row, name, where)[0]
        for name in ("seq_lengths", "position_ids")
    )
    if real is not None and positions.shape == real.shape:
        positions = positions[real]  # padding may have any position
    if len(lengths) > 1 or (np.diff(positions) != 1).any():
        raise InputError(
            "A row of `input_ids` must be one document, got several by its `position_ids` or `seq_lengths` in"
            f" {where(row)}. Give each document a row of its own; jaxpack packs them into rows."
        )


def _unpadded(values: np.ndarray, real: np.ndarray, where: str) -> np.ndarray:
    """Cuts padding off both ends of a row."""
    places = np.flatnonzero(real)
    begin, end = (places[0], places[-1] + 1) if len(places) else (0, 0)
    if not real[begin:end].all():
        raise InputError(
            f"`attention_mask` must have its zeros at the ends, as padding, got zeros between ones in {where}. Give"
            " each document a row of its own."
        )
    return values[begin:end]


def _integers(column: list, begin: int, name: str, where: Where) -> list[np.ndarray]:
    arrays = []
    for row, values in enumerate(column, begin):
        try:
            array = np.asarray(values, dtype=None if len(values) else np.int64)
        except (ValueError, OverflowError):  # the list is ragged, or a number exceeds 64 bits
            array = np.empty(0)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(f"`{name}` must be a flat list of integers, got {values!r:.80} in {where(row)}.")
        arrays.append(array)
    return arrays


def _encode_text(
    rows: Rows,
    begin: int,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    text_field: str,
    parts: Parts | None,
    where: Where,
) -> Encoded:
    texts = _column(rows, begin, text_field, (str,), where)
    end = None if template is None else template.answer_end()
    if parts is not None:
        return _encode_responses(texts, begin, tokenizer, end, parts, where)
    tokenized = _tokenize(texts, begin, tokenizer, where)

    def finish() -> Encoded:
        for text, ids in zip(texts, tokenized.result()["input_ids"], strict=True):
            ids = np.array(_with_end(text, ids, tokenizer, end, where), np.int64)
            yield ids, ids

    return finish()


def _encode_responses(
    texts: list[str], begin: int, tokenizer: Tokenizer, end: str | None, parts: Parts, where: Where
) -> Encoded:
    """Encodes texts that are trained on after each response part. EOS at the end belongs to the last answer."""
    _require_offsets(tokenizer, "with a `response_part`")
    texts = without_space_before_bos(texts, tokenizer)  # offsets count from there
    added = list(tokenizer.get_added_vocab().values())
    tokenized = _tokenize(texts, begin, tokenizer, where, return_offsets_mapping=True)

    def finish() -> Encoded:
        encoded = tokenized.result()
        for text, ids, pairs in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            spans = response_spans(text, parts)
            where.unasked += bool(spans) and parts.instruction not in text
            inside, after = _trained_within(ids, pairs, spans, added)
            tokens = np.array(_with_end(text, ids, tokenizer, end, where), np.int64)
            trained = np.full(len(tokens), bool(spans) and spans[-1][1] == len(text))
            trained[:after] = inside[:after]
            yield tokens, np.where(trained, tokens, IGNORE)

    return finish()


def _encode_prompts(
    rows: Rows,
    begin: int,
    kind: type,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    completion_only: bool,
    where: Where,
) -> Encoded:
    prompts = _column(rows, begin, "prompt", (str,) if kind is str else (str, list), where)
    completions = _column(rows, begin, "completion", (kind,), where)
    end = None if template is None else template.answer_end()
    return _encode_completions(prompts, completions, begin, tokenizer, end, completion_only, where)


def _encode_instructions(rows: Rows, begin: int, tokenizer: Tokenizer, completion_only: bool, where: Where) -> Encoded:
    texts = [read_instruction(record, where(row)) for row, record in enumerate(rows, begin)]
    for row, record in enumerate(rows, begin):
        for field in (*SYSTEMS, "history"):
            if record.get(field):
                raise InputError(
                    f"`{field}` must be empty where the tokenizer has no chat template, since Alpaca's words have no"
                    f" place for it, got {record[field]!r:.80} in {where(row)}. Set `chat_template`, such as 'alpaca'."
                )
    prompts = [alpaca_prompt(instruction, given) for instruction, given, _ in texts]
    outputs = [output for _, _, output in texts]
    return _encode_completions(prompts, outputs, begin, tokenizer, None, completion_only, where)


def _encode_completions(
    prompts: list[str],
    completions: list[str],
    begin: int,
    tokenizer: Tokenizer,
    end: str | None,
    completion_only: bool,
    where: Where,
) -> Encoded:
    bos = getattr(tokenizer, "bos_token", None) or ""
    whole = [
        prompt + (completion.removeprefix(bos) if prompt else completion)  # each may have been written with a BOS
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    prompt_ids = _tokenize(prompts, begin, tokenizer, where) if completion_only else None
    whole_ids = _tokenize(whole, begin, tokenizer, where)
    return _after_prompts(
        prompt_ids, whole_ids, where, lambda row, ids: _with_end(whole[row], ids, tokenizer, end, where)
    )


def _after_prompts(
    prompt_ids: Tokenized | None, whole_ids: Tokenized, where: Where, finish: Callable[[int, list[int]], list[int]]
) -> Encoded:
    """Yields whole texts, trained on after their prompts; without prompts, every token is trained on."""
    prompts = itertools.repeat([]) if prompt_ids is None else prompt_ids.result()["input_ids"]
    for row, (prompt, ids) in enumerate(zip(prompts, whole_ids.result()["input_ids"], strict=prompt_ids is not None)):
        ids = finish(row, ids)
        # A token that straddles the border between prompt and completion is trained on, with the completion.
        prefix = common_prefix(prompt, ids)
        where.diverging += prefix + 1 < len(prompt)
        tokens = np.array(ids, np.int64)
        labels = tokens.copy()
        labels[:prefix] = IGNORE
        yield tokens, labels


def _read_messages(rows: Rows, begin: int, key: str, where: Where) -> list[Conversation]:
    columns = enumerate(zip(rows, _column(rows, begin, key, (list,), where), strict=True), begin)
    return [read_conversation(record, messages, where(row)) for row, (record, messages) in columns]


def _read_prompts(rows: Rows, begin: int, completion_only: bool, where: Where) -> list[Conversation]:
    columns = [_column(rows, begin, key, (list,), where) for key in ("prompt", "completion")]
    return [
        read_conversation(record, prompt + completion, where(row), prompt=len(prompt) if completion_only else 0)
        for row, (record, prompt, completion) in enumerate(zip(rows, *columns, strict=True), begin)
    ]


def _read_instructions(rows: Rows, begin: int, where: Where) -> list[Conversation]:
    conversations = []
    for row, record in enumerate(rows, begin):
        instruction, given, output = read_instruction(record, where(row))
        answered = [instruction_message(instruction, given), {"role": "assistant", "content": output}]
        messages = [*read_history(record, where(row)), *answered]
        conversations.append(read_conversation(record, messages, where(row)))
    return conversations


def _encode_chats(
    conversations: list[Conversation],
    begin: int,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    assistant_only: bool,
    where: Where,
) -> Encoded:
    options = {"add_special_tokens": False}  # the template has written the special tokens
    if not assistant_only:
        for row, conversation in enumerate(conversations, begin):
            if conversation.untrained:
                raise InputError(
                    f"`assistant_only_loss` must be on for turns that are not trained on (`weight: 0`), got it off and"
                    f" such a turn, message {min(conversation.untrained)} in {where(row)}."
                )
        prompts, texts = [], []
        for row, conversation in enumerate(conversations, begin):
            asked = dataclasses.replace(conversation, messages=conversation.messages[: conversation.prompt])
            prompts.append(template.write_question(asked, where(row)) if asked.messages else "")
            texts.append(template.write(conversation, where(row)) if conversation.messages else "")
        prompt_ids, whole_ids = (_tokenize(some, begin, tokenizer, where, **options) for some in (prompts, texts))
        return _after_prompts(prompt_ids, whole_ids, where, lambda _, ids: ids)
    _require_offsets(tokenizer, "for rows of messages", " Or turn `assistant_only_loss` off to train on every token.")
    written = [
        template.write_with_spans(conversation, where(row)) if conversation.messages else ("", [])
        for row, conversation in enumerate(conversations, begin)
    ]
    added = list(tokenizer.get_added_vocab().values())
    texts = [text for text, _ in written]
    tokenized = _tokenize(texts, begin, tokenizer, where, return_offsets_mapping=True, **options)

    def finish() -> Encoded:
        encoded = tokenized.result()
        for ids, pairs, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True):
            trained, _ = _trained_within(ids, pairs, spans, added)
            yield np.array(ids, np.int64), np.where(trained, ids, IGNORE)

    return finish()


def _require_offsets(tokenizer: Tokenizer, when: str, otherwise: str = "") -> None:
    if not getattr(tokenizer, "is_fast", True):
        raise InputError(
            f"`tokenizer` must be a fast one {when}, since others do not say which characters a token is made of, got a"
            f" {type(tokenizer).__name__}.{otherwise}"
        )


def _trained_within(
    ids: list[int], pairs: list[tuple[int, int]], spans: list[Span], added: list[int]
) -> tuple[np.ndarray, int]:
    """Returns which tokens have a character in one of the spans, bool `[tokens]`, and the number of tokens up to the
    last that has any character: a tokenizer may add tokens that have none before and after a text.

    Args:
      pairs: for each token, its first character and the one after its last.
      added: the ids of added tokens. One that begins before a span is not trained on: the template's last token before
        an answer may absorb spaces after it (as in Phi-3), even those of the answer.
    """
    offsets = np.fromiter(itertools.chain.from_iterable(pairs), np.int64, 2 * len(pairs))
    begins, ends = offsets[::2], offsets[1::2]
    trained = np.zeros(len(ids), bool)
    for start, end in spans:
        trained |= (begins < end) & (ends > start)
        across = (begins < start) & (ends > start)
        if across.any():
            trained &= ~(across & np.isin(ids, added))
    with_text = np.flatnonzero(begins < ends)
    return trained, int(with_text[-1]) + 1 if len(with_text) else 0


@functools.cache
def _thread(process: int) -> ThreadPoolExecutor:
    """Returns the one thread of a process that tokenises; the tokenizer itself uses all cores.

    A process that is forked has none of the threads of the first one, so it needs its own.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxpack-tokenizer")


def _tokenize(texts: list[str], begin: int, tokenizer: Tokenizer, where: Where, **options: bool) -> Tokenized:
    return _thread(os.getpid()).submit(tokenize, texts, tokenizer, lambda index: where(begin + index), **options)


def _with_end(text: str, ids: list[int], tokenizer: Tokenizer, end: str | None, where: Where) -> list[int]:
    """Returns ids with EOS at the end, but without it if the text ends in it or in `end`, which ends a template's turn.

    Some tokenizers append EOS themselves.
    """
    eos, name = tokenizer.eos_token_id, getattr(tokenizer, "eos_token", None)
    ends = tuple(token for token in (end, name) if token)
    is_ended = bool(ends) and text.rstrip().endswith(ends)
    is_appended = ids[-1:] == [eos] and (ids[-2:] == [eos, eos] or not (name and text.endswith(name)))
    if is_ended and is_appended:
        ids = ids[:-1]
    where.written += begins_with_bos(text, tokenizer) or (is_ended and ids[-1:] != [eos])
    return ids if eos is None or ids[-1:] == [eos] or is_ended else [*ids, eos]
