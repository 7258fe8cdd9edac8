"""Reads datasets (files, folders, datasets of the hub, rows in memory, or a mix of them) into documents."""

import bisect
import datetime
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np

from jaxpack.data.conversation import Conversation, plain
from jaxpack.data.documents import Documents
from jaxpack.data.encoding import RowEncoder
from jaxpack.data.formats import TEXT_FIELD, Record, RowSettings, Where, question_of
from jaxpack.data.formatting import FormattingFunc
from jaxpack.data.growing import GrowingArray
from jaxpack.data.mixing import mix
from jaxpack.data.reading_progress import ReadingProgress
from jaxpack.data.responses import parts_of
from jaxpack.data.rows import rows_of
from jaxpack.data.sources import Source, sources_of
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, errors_name
from jaxpack.settings import TrainConfig
from jaxpack.utils.console import console

# The path of a file or a folder, a pattern, a dataset of the hub, a list of dicts, a `datasets.Dataset`, or several.
Dataset = str | os.PathLike | Iterable[Record] | Sequence["Dataset | Documents | tuple[Dataset | Documents, float]"]


def load_documents(
    dataset: Dataset | Documents,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    text_field: str = TEXT_FIELD,
    assistant_only_loss: bool = True,
    completion_only_loss: bool = True,
    instruction_part: str | None = None,
    response_part: str | None = None,
    formatting_func: FormattingFunc | None = None,
    allow_lost_thoughts: bool = False,
    date: datetime.date | None = None,
    documents_together: int = 1,
    seed: int = 42,
) -> Documents:
    """Reads and tokenises a dataset, and shows the progress: with a bar, or with a line every ten seconds.

    Each row has one of these formats. The first row of a file decides the format of all its rows:

    - `input_ids`, optionally with `labels` (-100 for a token that is not trained on), `completion_mask` or
      `assistant_masks` (0 for such a token) and `attention_mask` (0 for padding, which is cut off).
    - `messages` (or `conversations`), with `role` and `content`, or with ShareGPT's `from` and `value`: written by the
      tokenizer's chat template, and trained on the assistant's text and on the token that ends its turn. The
      template also gets the row's `tools` (a list, or JSON of one), `system` and `chat_template_kwargs`.
    - `prompt` and `completion`: two strings, trained on the completion alone, or two lists of messages, trained on the
      assistant's text in the completion. With `completion_only_loss=False`, the prompt counts as the completion does.
    - `text` (or the field that `text_field` names): every token is trained on. A `text_field` other than `text` is used
      whatever other fields the rows have.
    - `instruction`, optionally `input`, and `output`: a question and an answer, written and trained on in the same way
      as `messages`. If the tokenizer has no chat template, they are a prompt and a completion in Alpaca's wording.

    A text or completion that does not end in the tokenizer's EOS token gets one; a chat template writes its own. A
    token is trained on if at least one of its characters belongs to the text to train on. Rows without a token to train
    on are left out, and their number is printed.

    Args:
      dataset: the path of a file (`.jsonl`, `.json`, `.csv`, each perhaps with `.gz` behind it, or `.parquet`), of a
        folder with such files, or a pattern such as "data/*.jsonl"; a dataset of the hub and its split, such as
        "org/name:train", with the `datasets` library; or any iterable of dicts. A list of these is read in its order.
        With a weight for each, as in "rows.jsonl=0.7" or `(rows, 0.7)`, rows are drawn so that each has that share, as
        many as the one allows that runs out first, and none twice. `Documents` that were loaded before are checked and
        returned as they are.
      tokenizer: a fast Hugging Face tokenizer; may be None for rows of `input_ids`.
      vocab_size: the model's vocabulary size; token ids from this number on are refused.
      text_field: the key of plain text.
      assistant_only_loss: False trains on every token that a chat template writes: in `messages` and `conversations`,
        in a completion of messages, and in the question and the answer of rows with `instruction`.
      completion_only_loss: False also trains on the prompt of rows with a `completion`: on every token if they are
        strings, and on the assistant's turns if they are messages (on every token without `assistant_only_loss`).
      instruction_part: the text that begins each question in rows of plain text that a chat template has rendered
        before, such as "### Instruction:". None trains on all of a text.
      response_part: the text that begins each answer in such rows, such as "### Response:". They are trained on after
        each response part, up to the next part or to the end, the end of the turn included.
      formatting_func: a function that is called with each row (a dict), in every kind of source, and returns what is
        read in its place: a text, a list of messages, or a mapping in one of the formats above.
      allow_lost_thoughts: True trains on a last answer whose thoughts the chat template leaves out. Thoughts that the
        template leaves out of earlier answers are counted, and the count is printed.
      date: the date for chat templates that write one; None is today.
      documents_together: the number of documents that belong together, which weights draw together.
      seed: decides which rows weights draw.

    Raises:
      InputError: the dataset is empty or unreadable, a row is unreadable, no row has a token to train on, or a
        chat template does not show what the assistant writes. The message says which row, and what it needs.

    Example:
      >>> from jaxpack import load_documents
      >>> documents = load_documents([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}], None, vocab_size=10)
      >>> documents.num_tokens, documents.num_targets
      (3, array([2]))
    """
    parts = parts_of(instruction_part, response_part)
    encoder = RowEncoder(
        tokenizer,
        vocab_size,
        RowSettings(text_field, assistant_only_loss, completion_only_loss, parts),
        formatting_func=formatting_func,
        allow_lost_thoughts=allow_lost_thoughts,
        date=date,
    )
    return _load(dataset, encoder, tokenizer, documents_together, seed)


def load_for_run(
    config: TrainConfig,
    dataset: Dataset | Documents,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    date: datetime.date | None = None,
    documents_together: int = 1,
    formatting_func: FormattingFunc | None = None,
) -> Documents:
    """Reads a dataset as `load_documents` does, with the settings of a run.

    The tokenizer gets the run's chat template, see `set_chat_template`.

    Args:
      date: the date for chat templates that write one; None is that of the settings, or today.
    """
    encoder = RowEncoder.of_run(config, tokenizer, vocab_size, date=date, formatting_func=formatting_func)
    with errors_name(text_field="dataset_text_field"):
        return _load(dataset, encoder, tokenizer, documents_together, config.seed)


def _load(
    dataset: Dataset | Documents, encoder: RowEncoder, tokenizer: Tokenizer | None, documents_together: int, seed: int
) -> Documents:
    if isinstance(dataset, Documents):
        return encoder.check(dataset)
    sources = [source for source in sources_of(dataset) if source.weight != 0]
    reader = _Reader(encoder, tokenizer)
    ends = [reader.read(source) for source in sources]
    documents = reader.documents()
    encoder.say_what_was_met()
    spans = [np.arange(begin, end) for begin, end in itertools.pairwise([0, *ends])]
    spans = [reader.with_targets(documents, span) for span in spans]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        spans = mix(spans, weights, [source.name for source in sources], documents_together, seed)
    chosen = np.concatenate(spans)
    return documents if len(chosen) == len(documents) else documents[chosen]


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
    asked = []
    for source in sources_of(dataset):
        before = len(asked)
        for rows in rows_of(source):
            records = enumerate(plain(record, drop_none=rows.where.of_arrow) for record in rows.records)
            asked += [question_of(record, row, rows.where, chat) for row, record in records]
        if len(asked) == before:
            raise InputError(f"`dataset` must have at least one row, got none in {source.name}.")
    return asked


class _Reader:
    """Reads sources into flat arrays of tokens and labels, which grow in place."""

    def __init__(self, encoder: RowEncoder, tokenizer: Tokenizer | None):
        self._encoder, self._tokenizer = encoder, tokenizer
        self._tokens, self._lengths = GrowingArray(np.int32, "tokens"), GrowingArray(np.int64, "lengths of documents")
        self._labels: GrowingArray | None = None  # None as long as all labels equal their tokens
        self._begins: list[int] = []  # the number of the first document of each file
        self._wheres: list[Where] = []  # of each file

    def read(self, source: Source) -> int:
        """Reads the rows of a source, says in which formats they are, and returns the number of documents so far."""
        if isinstance(source.rows, Documents):
            self._copy(self._encoder.check(source.rows), source.name)
            return len(self._lengths)
        counts: dict[str, int] = {}
        with ReadingProgress(source) as progress:
            for rows in rows_of(source):
                self._begins.append(len(self._lengths))
                self._wheres.append(rows.where)
                if (form := self._encoder.begin(rows)) is not None:
                    for encoded in self._encoder.encode(rows, form):
                        self._append(*encoded)
                        number = len(encoded.lengths)
                        counts[form.words] = counts.get(form.words, 0) + number
                        progress.advance(number, rows.share(), form.words)
                progress.finish_file()
        if not counts:
            raise InputError(f"`dataset` must have at least one row, got none in {source.name}.")
        self._tell_formats(source, counts)
        return len(self._lengths)

    def documents(self) -> Documents:
        """Returns what has been read. The arrays are not copied."""
        lengths, tokens = self._lengths.in_numpy(), self._tokens.in_numpy()
        labels = tokens if self._labels is None else self._labels.in_numpy()
        return Documents(tokens, labels, np.cumsum(lengths) - lengths, lengths)

    def with_targets(self, documents: Documents, span: np.ndarray) -> np.ndarray:
        """Returns those documents of a source that have a token to train on.

        Prints how many have none, and shows the first of these.
        """
        keep = documents.num_targets[span] > 0
        if keep.all():
            return span
        first = int(span[np.argmin(keep)])
        tokens = documents.tokens[documents.starts[first] :][: documents.lengths[first]].tolist()
        shown = repr(self._tokenizer.decode(tokens[:64])) if self._tokenizer is not None else str(tokens[:64])
        masked = self._encoder.why_masked
        if not keep.any():
            raise InputError(
                f"At least one row must have a token to train on after its first token, got {len(keep):,} rows with"
                f" none ({masked}); the first is {self._name(first)}: {shown}."
            )
        console.print(
            f"{int((~keep).sum()):,} of {len(keep):,} rows have nothing to learn ({masked}) and are left out;"
            f" the first is {self._name(first)}: {shown}",
            style="yellow",
        )
        return span[keep]

    def _tell_formats(self, source: Source, counts: dict[str, int]) -> None:
        name = source.name
        if len(source.files) > 1:
            name += f" ({len(source.files):,} files)"
        parts = (f"{count:,} row{'' if count == 1 else 's'} of {words}" for words, count in counts.items())
        console.print(f"{name}: {'; '.join(parts)}")

    def _name(self, document: int) -> str:
        file = bisect.bisect_right(self._begins, document) - 1
        return self._wheres[file](document - self._begins[file])

    def _copy(self, documents: Documents, name: str) -> None:
        self._begins.append(len(self._lengths))
        self._wheres.append(Where(name))
        which = zip(documents.starts.tolist(), (documents.starts + documents.lengths).tolist(), strict=True)
        index = np.concatenate([np.arange(begin, end) for begin, end in which])
        self._append(documents.tokens[index], documents.labels[index], documents.lengths)
        console.print(f"{name}: {len(documents):,} documents")

    def _append(self, tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
        if self._labels is None and not np.array_equal(tokens, labels):
            self._labels = self._tokens.copy()
        self._tokens.extend(tokens)
        if self._labels is not None:
            self._labels.extend(labels)
        self._lengths.extend(lengths)
