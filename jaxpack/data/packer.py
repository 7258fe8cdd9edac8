"""Packs a stream of documents into batches, holding only a window of the stream in memory.

`Batches` plans a whole dataset before the first step. A stream has no end to wait for, so `Packer` plans one window of
documents at a time, with the same `pack_rows`, and packs the emptiest rows again with the next window.
"""

import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, get_args

import numpy as np

from jaxpack.constants import IGNORE, LANES, PackingStrategy
from jaxpack.data.batching import Truncation, row_order
from jaxpack.data.documents import Documents
from jaxpack.data.formats import Record, RowSettings, Where, format_of
from jaxpack.data.packing import PackedBatch, Rows, fill_batch, pack_rows
from jaxpack.errors import InputError
from jaxpack.utils.console import console

_MAX_ID = 2**31 - 1  # batches are int32
_Pieces = list[tuple[np.ndarray, np.ndarray]]  # token ids and labels of documents, or of pieces of documents


class Packer:
    """Packs a stream of documents: an iterator that yields each `PackedBatch` of `[A, B, T]` when it is asked for.

    The packer reads `window` documents, plans rows for them with `pack_rows`, and puts the rows in a random order. It
    holds back the emptiest rows, up to `rows_per_batch` of them, and packs their documents again together with the next
    `window` documents. A document is held back at most once, so it is in a finished row as soon as the window after its
    own is packed. With "wrapped", only the last row is held back, until it is full.

    The packer holds one window of documents, and fewer rows than there are in two batches. It reads the next window
    only when it has too few finished rows for a batch.

    If the stream ends within the first window, the batches equal those of the first epoch of `Batches` with `packing`.
    The last batch of a stream is filled up with rows of padding.

    A packer can be iterated once; for another pass over the data, make another packer. The packer does not keep
    successive documents in the same row, so an objective with `documents_together` above 1 needs `Batches`.

    `get_state` says where the packer is. A new packer of the same stream with the same settings goes on from there
    after `set_state`, and gives the same batches. It reads the rows before that place and leaves them, or calls
    `documents.skip(rows)`, if there is such a method, as a `datasets.IterableDataset` has.

    Args:
      documents: `Documents`, or any iterable of rows `{"input_ids": [...], "labels": [...]}`, such as a generator. It
        may be endless. The label of a position is the token at that position (labels are not shifted), or -100 if the
        token is not trained on. Without `labels`, every token is trained on. The packer copies the token ids.
      max_length: the number of tokens in a row. T is `max_length`, rounded up to a multiple of 128.
      rows_per_batch: A * B, the number of rows in a batch (an optimizer step).
      micro_batches: A, the number of micro-batches that a batch is divided into; it must divide `rows_per_batch`.
      window: the number of documents that are read and packed at a time. It should hold the documents of several
        batches, because a larger window leaves less padding: for Alpaca's document lengths in batches of 16 rows of
        1,024 tokens, a window of 100 documents leaves 2.9 % padding, one of 1,000 leaves 1.0 %, and a plan of the whole
        dataset 0.7 %.
      strategy: as in `pack_rows`. "bfd" cuts documents at `max_length`, and leaves out documents without a token to
        train on. A message reports the first document that is cut and the first that is left out; `truncation` counts
        all of them. "bfd_split" and "wrapped" lose nothing.
      seed: sets the random order of the rows. The same stream and the same settings give the same batches.

    Attributes:
      truncation: the `Truncation` up to now: documents shortened, tokens lost, documents dropped.

    Raises:
      InputError: an argument is invalid; or, during the iteration, a row of the stream is invalid. The message then
        names the row by its place in the stream, counted from 0.

    Example:
      >>> from jaxpack import Packer
      >>> def endless():
      ...     while True:
      ...         yield {"input_ids": [5, 6, 7]}
      ...         yield {"input_ids": [8, 9], "labels": [-100, 9]}
      >>> packer = Packer(endless(), max_length=128, rows_per_batch=2, window=200)
      >>> batch = next(packer)
      >>> batch.tokens.shape
      (1, 2, 128)
      >>> print(batch.segment_ids[0, 0, :7], batch.targets[0, 0, :7])
      [1 1 1 2 2 2 3] [   6    7 -100    6    7 -100    6]
    """

    def __init__(
        self,
        documents: Documents | Iterable[Record],
        *,
        max_length: int = 1024,
        rows_per_batch: int = 8,
        micro_batches: int = 1,
        window: int = 1000,
        strategy: PackingStrategy = "bfd",
        seed: int = 42,
    ):
        least = {"max_length": 2, "rows_per_batch": 1, "micro_batches": 1, "window": 1, "seed": 0}
        given = (max_length, rows_per_batch, micro_batches, window, seed)
        for (name, low), value in zip(least.items(), given, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
                raise InputError(f"`{name}` must be a whole number of at least {low}, got {value!r}.")
        if rows_per_batch % micro_batches:
            raise InputError(
                f"`rows_per_batch` must be a multiple of `micro_batches` ({micro_batches}), got {rows_per_batch}. Use "
                f"{-(-rows_per_batch // micro_batches) * micro_batches} rows, or another number of micro-batches."
            )
        if strategy not in get_args(PackingStrategy):
            raise InputError(f"`strategy` must be one of {get_args(PackingStrategy)}, got {strategy!r}.")
        is_rows = isinstance(documents, Iterable) and not isinstance(documents, str | bytes | Mapping)
        if not is_rows and not isinstance(documents, Documents):
            raise InputError(
                "`documents` must be an iterable of rows such as {'input_ids': [1, 2]}, or `Documents`, got "
                f"{documents!r:.80}. Read a file with `load_documents` first."
            )
        self._max_length, self._row_length = int(max_length), -(-int(max_length) // LANES) * LANES
        self._rows_per_batch, self._micro_batches = int(rows_per_batch), int(micro_batches)
        self._window, self._seed = int(window), int(seed)
        self._strategy: PackingStrategy = strategy
        self._documents = documents
        self._go_to(_Window(0, 0, [], self._no_rows(), Truncation(0, 0, 0), 0, 0))
        self._was_asked = False

    def __iter__(self) -> Iterator[PackedBatch]:
        """Returns the packer itself."""
        return self

    def __next__(self) -> PackedBatch:
        """Returns the next batch, of int32 NumPy arrays `[A, B, T]`; reads documents if it needs more rows."""
        self._was_asked = True
        batch = next(self._batches)
        self._given += 1
        self._tokens += int((batch.segment_ids > 0).sum())
        self._positions += batch.segment_ids.size
        return batch

    @property
    def padding_share(self) -> float:
        """Returns the share of positions that hold no token, in the batches up to now; 0 before the first batch."""
        return 1 - self._tokens / self._positions if self._positions else 0.0

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns the place of the packer in its stream, as arrays that a checkpoint can hold.

        They have the tokens of fewer rows than there are in two batches: int32 `tokens` and `labels` `[tokens]` of the
        documents that were held back, int64 `lengths` `[documents]`, and int32 `rows` `[4, rows, T]`, finished rows.
        int64 `counts` has the number of documents that were read, and other numbers.
        """
        window = self._at
        numbers = (*dataclasses.astuple(window.truncation), window.tokens, window.positions)
        return {"counts": np.array((window.read, window.number, self._given, *numbers), np.int64), **window.arrays}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes to the place in the stream at which another packer was when its `get_state` returned `state`.

        Raises:
          InputError: `state` is no state of a packer with these settings, a batch was taken from this packer before, or
            the stream ends before that place.
        """
        if self._was_asked:
            raise InputError("`set_state` must come before the first batch is taken. Make another packer.")
        shapes = {name: np.shape(array) for name, array in state.items()}
        lengths = np.asarray(state.get("lengths", ()))
        of_tokens, of_rows = (int(lengths.sum()),), (4, *shapes.get("rows", ())[1:2], self._row_length)
        fitting = {"tokens": of_tokens, "labels": of_tokens, "lengths": lengths.shape, "rows": of_rows}
        if shapes != {"counts": (_COUNTS,)} | fitting:
            raise InputError(
                "`state` must be what `get_state` of a packer with the same settings returned, got the arrays"
                f" {shapes} for rows of {self._row_length} tokens."
            )
        read, number, taken, *numbers = state["counts"].tolist()
        ends = np.cumsum(lengths)
        waiting = _pieces_between(state["tokens"], state["labels"], ends - lengths, ends)
        window = _Window(read, number, waiting, PackedBatch(*state["rows"]), Truncation(*numbers[:3]), *numbers[3:])
        self._go_to(window)
        for _ in range(taken):
            if next(self, None) is None:
                raise _too_short(read)

    def _go_to(self, window: "_Window") -> None:
        self.truncation = window.truncation
        self._tokens, self._positions = window.tokens, window.positions
        self._at, self._given = window, 0  # the window that is being packed, and the batches of it up to now
        self._read = window.read
        self._batches = self._pack(window)

    def _no_rows(self) -> PackedBatch:
        return PackedBatch(*4 * [np.empty((0, self._row_length), np.int32)])

    def _pack(self, window: "_Window") -> Iterator[PackedBatch]:
        source = self._documents_from(window.read)
        while True:
            waiting, ready = window.waiting, window.ready
            new = list(itertools.islice(source, self._window))
            is_last = len(new) < self._window
            documents = Documents.joined(waiting + new)
            rows = pack_rows(documents.lengths, self._max_length, self._strategy)
            held = np.empty(0, np.int64) if is_last else self._held_back(rows, len(waiting))
            waiting = [piece for row in held.tolist() for piece in _pieces(documents, rows, row)]
            order = row_order(self._seed, window.number, len(rows))
            finished = order[~np.isin(order, held)]
            if is_last:  # -1 is a row of padding
                missing = -(len(ready.tokens) + len(finished)) % self._rows_per_batch
                finished = np.append(finished, np.full(missing, -1))
            ready = yield from self._cut(ready, documents, rows, finished)
            if is_last:
                return
            del new, documents  # so that they are not in memory while the next window is read
            number = window.number + 1
            window = _Window(self._read, number, waiting, ready, self.truncation, self._tokens, self._positions)
            self._at, self._given = window, 0

    def _cut(
        self, ready: PackedBatch, documents: Documents, rows: Rows, finished: np.ndarray
    ) -> Generator[PackedBatch, None, PackedBatch]:
        """Yields batches of the rows `ready` and then of the rows `finished` of a plan; returns the rows left over."""

        def with_ready(which: np.ndarray) -> PackedBatch:
            filled = fill_batch(documents.tokens, documents.labels, documents.starts, rows, which, self._row_length)
            return PackedBatch(*map(np.concatenate, zip(ready, filled, strict=True)))

        while len(ready.tokens) + len(finished) >= self._rows_per_batch:
            count = self._rows_per_batch - len(ready.tokens)
            batch = with_ready(finished[:count])
            ready, finished = PackedBatch(*(array[:0] for array in batch)), finished[count:]
            yield PackedBatch(*(array.reshape(self._micro_batches, -1, self._row_length) for array in batch))
        return with_ready(finished)

    def _held_back(self, rows: Rows, num_waiting: int) -> np.ndarray:
        """Returns the rows to hold back for the next window; the first `num_waiting` documents waited already."""
        lengths = rows.row_lengths
        if self._strategy == "wrapped":  # all rows but the last are full
            return np.flatnonzero(lengths < self._max_length)
        begins = rows.offsets[:-1]
        has_waited = np.minimum.reduceat(rows.document, begins) < num_waiting if len(rows) else np.empty(0, bool)
        emptiest = np.argsort(lengths, kind="stable")
        return emptiest[~has_waited[emptiest]][: self._rows_per_batch]

    def _documents_from(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Reads, checks and truncates the documents one by one; leaves out documents without a token to train on.

        `first` is the number of the first document that is read.
        """
        where = Where("`documents`")
        for number, record in enumerate(_records(self._documents, first), first):
            tokens, labels = _checked(record, number, where)
            self._read = number + 1
            if self._strategy == "bfd":
                lost = max(0, len(tokens) - self._max_length)
                tokens, labels = tokens[: self._max_length], labels[: self._max_length]
                is_dropped = not (labels[1:] != IGNORE).any()
                self._count(lost, is_dropped, where(number))
                if is_dropped:
                    continue
            yield tokens.astype(np.int32), labels.astype(np.int32)

    def _count(self, lost: int, is_dropped: bool, where: str) -> None:
        before = self.truncation
        now = Truncation(before.documents + (lost > 0), before.tokens + lost, before.dropped + is_dropped)
        self.truncation = now
        if now.documents == 1 and before.documents == 0:
            console.print(
                f"{where} is cut at {self._max_length:,} tokens (`max_length`) and loses {lost:,}; further documents "
                "are cut without a message. `strategy='bfd_split'` splits documents instead",
                style="yellow",
            )
        if now.dropped == 1 and before.dropped == 0:
            console.print(
                f"{where} is left out, because it has no token to train on after its first token; further documents "
                "are left out without a message",
                style="yellow",
            )


@dataclasses.dataclass(frozen=True)
class _Window:
    """Holds what a packer knows before it reads a window.

    Attributes:
      read: the number of documents that it has read.
      number: the number of the window.
      waiting: the documents of rows that are held back.
      ready: finished rows, fewer than a batch.
      truncation, tokens, positions: what was counted up to now; `tokens` and `positions` are those of the batches.
    """

    read: int
    number: int
    waiting: _Pieces
    ready: PackedBatch
    truncation: Truncation
    tokens: int
    positions: int

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of a packer's state, which all batches of the window share."""
        waiting = Documents.joined(self.waiting)
        documents = {"tokens": waiting.tokens, "labels": waiting.labels, "lengths": waiting.lengths}
        return {**documents, "rows": np.stack(self.ready)}


_COUNTS = 8  # the numbers of a window, and the number of its batches


def _records(documents: Documents | Iterable[Record], first: int) -> Iterator[Record]:
    """Yields the documents from number `first` on."""
    if isinstance(documents, Documents):
        for start, length in zip(documents.starts[first:].tolist(), documents.lengths[first:].tolist(), strict=True):
            here = slice(start, start + length)
            yield {"input_ids": documents.tokens[here], "labels": documents.labels[here]}
        return
    if first and hasattr(documents, "skip"):
        stream: Any = documents  # Iterables need not have this method.
        yield from stream.skip(first)
        return
    records = iter(documents)
    if sum(1 for _ in itertools.islice(records, first)) < first:
        raise _too_short(first)
    yield from records


def _too_short(rows: int) -> InputError:
    return InputError(
        f"`documents` must be the stream to which `state` belongs, of which {rows:,} documents were read, got a shorter"
        " one."
    )


def _checked(record: Any, number: int, where: Where) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row's token ids and labels, after those checks of `load_documents` that need no vocabulary."""
    if not isinstance(record, Mapping) or "input_ids" not in record:
        shown = sorted(record) if isinstance(record, Mapping) else f"{record!r:.80}"
        raise InputError(
            f"Each row must be a mapping with `input_ids`, got {shown} in {where(number)}. Tokenise texts first, for "
            "example {'input_ids': tokenizer(text)['input_ids']}."
        )
    encoded: Any = format_of(record, None, None, RowSettings(), where).encode([record], number)  # NumPy arrays
    ((tokens, labels),) = encoded
    for name, ids, least in (("input_ids", tokens, 0), ("labels", labels, IGNORE)):
        is_wrong = ((ids < 0) & (ids != least)) | (ids > _MAX_ID)
        if is_wrong.any():
            also = ", or -100" if least == IGNORE else ""
            raise InputError(
                f"`{name}` must be token ids in [0, 2**31){also}, got {ids[is_wrong][0]} in {where(number)}."
            )
    return np.asarray(tokens), np.asarray(labels)


def _pieces(documents: Documents, rows: Rows, row: int) -> _Pieces:
    """Copies the pieces of one row of a plan."""
    pieces = slice(rows.offsets[row], rows.offsets[row + 1])
    starts = documents.starts[rows.document[pieces]] + rows.start[pieces]
    return _pieces_between(documents.tokens, documents.labels, starts, starts + rows.length[pieces])


def _pieces_between(tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> _Pieces:
    here = [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return [(tokens[place].copy(), labels[place].copy()) for place in here]
