"""Lays documents end to end in rows: plans which piece of a document goes where, and fills the arrays of a batch.

Planning needs only lengths, so a whole dataset is planned, and every shape is known, before the first step.
"""

import bisect
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxpack.constants import IGNORE, PackingStrategy
from jaxpack.errors import InputError

BatchArray = Any  # int32: a NumPy array on the host, a JAX array within a step (this package imports no jax)


class PackedBatch(NamedTuple):
    """Holds rows of documents as four int32 arrays of one shape `[..., T]`: a pytree of NumPy or JAX arrays.

    `segment_ids` count 1, 2, ... within a row and never decrease; 0 is padding, at the tail only. `positions` restart
    at 0 with each segment. `targets[..., t]` is the token to predict at t, or -100 if there is none: at the last token
    of a document, before a token that is not trained on (such as a prompt), and at padding.

    Example:
      >>> from jaxpack import Batches, TrainConfig, load_documents
      >>> rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [3, 4]}]
      >>> config = TrainConfig(packing=True, max_length=128, per_device_train_batch_size=1)
      >>> batch = Batches(load_documents(rows, None, vocab_size=10), config)[0]
      >>> batch.segment_ids[0, 0, :8]
      array([1, 1, 1, 2, 2, 0, 0, 0], dtype=int32)
      >>> batch.targets[0, 0, :8]
      array([   8,    9, -100,    4, -100, -100, -100, -100], dtype=int32)
    """

    tokens: BatchArray
    segment_ids: BatchArray
    positions: BatchArray
    targets: BatchArray


class EmbeddedBatch(NamedTuple):
    """Holds a `PackedBatch` and the rows of the embedding for its tokens, `[..., T, D]`.

    If a model's embedding lies in the host's memory, NumPy takes its rows there before a step.
    """

    tokens: BatchArray
    segment_ids: BatchArray
    positions: BatchArray
    targets: BatchArray
    embedded: Any


AnyBatch = PackedBatch | EmbeddedBatch


class BatchLimits(NamedTuple):
    """Holds upper limits for all batches of a shape; its compiled program may rely on them. None means unknown.

    `max_segments` limits the documents in a row, `max_targets` the targets in a micro-batch `[B, T]`.
    """

    max_segments: int | None = None
    max_targets: int | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Holds a plan of rows: row `r` has the pieces `offsets[r]:offsets[r + 1]`, in order.

    A piece is `length` tokens of `document`, from its token `start` on. All arrays are int64: `document`, `start` and
    `length` have one entry for each piece, `offsets` has one more entry than there are rows.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def row_lengths(self) -> np.ndarray:
        """Returns the number of tokens in each row, int64 `[rows]`."""
        ends = np.concatenate([[0], np.cumsum(self.length)])
        return ends[self.offsets[1:]] - ends[self.offsets[:-1]]

    @classmethod
    def grouped(cls, groups: np.ndarray, lengths: np.ndarray) -> "Rows":
        """Plans rows of whole documents: row `r` holds `groups[r]`, int `[rows, documents]`; -1 is no document."""
        used = groups >= 0
        document = groups[used]
        offsets = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
        return cls(document, np.zeros_like(document), lengths[document], offsets)

    def of_members(self, size: int, lengths: np.ndarray) -> "Rows":
        """Replaces each group in a plan of whole groups by its `size` documents; `lengths` is int `[documents]`."""
        if size == 1:
            return self
        document = members(self.document, size)
        return Rows(document, np.zeros_like(document), lengths[document], self.offsets * size)


def members(groups: np.ndarray, size: int) -> np.ndarray:
    """Lists the documents of groups, int `[..., groups]` -> `[..., groups * size]`; -1 is no group and no document.

    Group i holds the documents `size * i` ... `size * i + size - 1`.

    Example:
      >>> members(np.array([[2, 0], [1, -1]]), 2).tolist()
      [[4, 5, 0, 1], [2, 3, -1, -1]]
    """
    if size == 1:
        return groups
    documents = np.maximum(groups[..., None] * size + np.arange(size), -1)
    return documents.reshape(*groups.shape[:-1], -1)


def packed_rows(count: int, lengths: np.ndarray, max_length: int) -> int:
    """Returns the number of packed rows, at least 1, with about as many tokens as `count` documents.

    `lengths`, int `[documents]`, gives the mean length of a document after truncation to `max_length`.
    """
    return max(1, round(count * np.minimum(lengths, max_length).mean() / max_length))


def pack_rows(lengths: np.ndarray, max_length: int, strategy: PackingStrategy = "bfd") -> Rows:
    """Plans rows of at most `max_length` tokens for documents of the given lengths, int `[documents]`.

    "bfd" is best-fit decreasing over all documents; tokens of a document beyond `max_length` are left out. "bfd_split"
    first splits longer documents into pieces of `max_length`. "wrapped" fills the rows with the documents in their
    order, and splits a document wherever a row is full. The model sees each piece as a document of its own. Empty
    documents are dropped.

    TRL has strategies of the same names, but here best fit works on the whole dataset, not within chunks of 1,000.
    Rows of "bfd" and "bfd_split" are ordered by their longest document, longest first: shuffle them before training.

    Example:
      >>> import numpy as np
      >>> from jaxpack import pack_rows
      >>> rows = pack_rows(np.array([90, 50, 70, 30]), max_length=128)
      >>> len(rows)
      2
    """
    if max_length < 1:
        raise InputError(f"`max_length` must be at least 1, got {max_length}.")
    lengths = np.asarray(lengths, np.int64)
    if strategy == "bfd":
        document = np.flatnonzero(lengths)
        return _best_fit_decreasing(
            document, np.zeros_like(document), np.minimum(lengths[document], max_length), max_length
        )
    if strategy == "bfd_split":
        pieces = -(-lengths // max_length)
        document = np.repeat(np.arange(len(lengths)), pieces)
        start = _count_up(pieces) * max_length
        return _best_fit_decreasing(document, start, np.minimum(lengths[document] - start, max_length), max_length)
    if strategy == "wrapped":
        return _wrapped(lengths, max_length)
    raise InputError(f"`strategy` must be 'bfd', 'bfd_split' or 'wrapped', got {strategy!r}.")


def _best_fit_decreasing(document: np.ndarray, start: np.ndarray, length: np.ndarray, capacity: int) -> Rows:
    # Documents of one length are placed together. Best fit fills the fullest row that has room until the row has none.
    # So these documents fill many rows with equal free space at once, and those rows move together to another key of
    # `free`. The work grows with the number of distinct lengths, not with the number of documents.
    order = np.argsort(-length, kind="stable")
    row_of = np.empty(len(order), np.int64)  # by place in `order`
    free: dict[int, list[int]] = {}  # free space -> rows with that free space, oldest first
    spaces: list[int] = []  # the keys of `free`, ascending
    num_rows = 0

    def put_back(rows: list[int], space: int) -> None:
        if space not in free:
            free[space] = []
            bisect.insort(spaces, space)
        free[space].extend(rows)

    sizes, counts = np.unique(length, return_counts=True)
    begin = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = begin + count
        while begin < end:
            fit = bisect.bisect_left(spaces, size)
            space = spaces[fit] if fit < len(spaces) else capacity
            per_row = space // size
            wanted = -(-(end - begin) // per_row)
            if fit < len(spaces):
                rows = free[space][:wanted]
                del free[space][:wanted]
                if not free[space]:
                    del free[space], spaces[fit]
            else:
                rows = list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            placed = min(len(rows) * per_row, end - begin)
            row_of[begin : begin + placed] = np.repeat(rows, per_row)[:placed]
            begin += placed
            in_last = placed - (len(rows) - 1) * per_row
            put_back(rows[:-1], space - per_row * size)
            put_back(rows[-1:], space - in_last * size)

    pieces = order[np.argsort(row_of, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Rows(document[pieces], start[pieces], length[pieces], offsets)


def _wrapped(lengths: np.ndarray, max_length: int) -> Rows:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    begins = ends - lengths
    cuts = np.concatenate([begins, np.arange(0, total, max_length), [total]]).astype(np.int64)
    cuts.sort(kind="stable")  # fast, as both parts are sorted: the stable sort merges them
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    at = cuts[:-1]
    document = np.searchsorted(ends, at, side="right")
    num_rows = -(-total // max_length)
    offsets = np.searchsorted(at, np.arange(num_rows + 1) * max_length)
    return Rows(document, at - begins[document], np.diff(cuts), offsets)


def fill_batch(
    tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray, rows: Rows, which: np.ndarray, row_length: int
) -> PackedBatch:
    """Writes the rows `which` of a plan into arrays of `row_length` tokens.

    Args:
      tokens, labels: all documents end to end, int32 `[total]`; a label is the token itself, or -100 if the token is
        not trained on.
      starts: the index in `tokens` at which each document begins, int `[documents]`.
      rows: the plan.
      which: the rows to write, int `[...]`; -1 writes a row of padding.
      row_length: T; no row may be longer.

    Returns:
      A batch of int32 arrays `[..., T]`.
    """
    flat = which.reshape(-1)
    real = np.flatnonzero(flat >= 0)
    first, count = rows.offsets[flat[real]], np.diff(rows.offsets)[flat[real]]
    segment = _count_up(count)  # number of each piece within its row, from 0
    piece = np.repeat(first, count) + segment
    row, length = np.repeat(real, count), rows.length[piece]

    row_tokens = np.bincount(row, weights=length, minlength=len(flat)).astype(np.int64)
    assert row_tokens.max(initial=0) <= row_length, f"a row of {row_tokens.max()} tokens does not fit {row_length}"
    skipped = row * row_length - (np.cumsum(row_tokens) - row_tokens)[row]  # padding before each piece
    position = _count_up(length)
    slot = np.arange(len(position)) + np.repeat(skipped, length)
    source = np.repeat(starts[rows.document[piece]] + rows.start[piece], length) + position
    has_next = position + 1 < np.repeat(length, length)

    zeros = np.zeros(flat.size * row_length, np.int32)
    batch = PackedBatch(zeros, zeros.copy(), zeros.copy(), np.full_like(zeros, IGNORE))
    batch.tokens[slot] = tokens[source]
    batch.segment_ids[slot] = np.repeat(segment + 1, length)
    batch.positions[slot] = position
    batch.targets[slot[has_next]] = labels[source[has_next] + 1]
    return PackedBatch(*(array.reshape(*which.shape, row_length) for array in batch))


def _count_up(counts: np.ndarray) -> np.ndarray:
    """Counts up from 0 for each entry: `[2, 3]` -> `[0, 1, 0, 1, 2]`."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
