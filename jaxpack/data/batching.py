"""Arranges documents into the batches of a run: chooses their order, and the few shapes that are compiled.

The order depends only on the seed, so the size of every batch is known before the first step.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxpack.constants import LANES
from jaxpack.data.documents import Documents
from jaxpack.data.packing import BatchLimits, PackedBatch, Rows, fill_batch, members, pack_rows
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig

MAX_SHAPES = 4
MAX_STEPS = 10_000_000  # in a run: the plan holds a few numbers in memory for each step
_MAX_SIZES = 1024  # maximum number of distinct row lengths to choose from; if there are more, they are first rounded up


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Counts the effects of `max_length`: documents shortened, tokens lost, and documents dropped.

    A document that keeps no token to train on is dropped, together with all documents of its group.
    """

    documents: int
    tokens: int
    dropped: int


class StreamEnded(Exception):
    """Says that a stream has no documents for a step."""


class BatchSource:
    """Gives the batches of a run in the order of its optimizer steps. Steps differ only in T, the length of a row.

    Attributes:
      config: the settings of the run.
      num_devices: the number of devices over which the rows are dealt.
      documents: the documents that are trained on, or the first of a stream.
      num_steps: the optimizer steps of the run, at most.
      row_lengths: T of each step, int64 `[num_steps]`.
      tokens_per_step: tokens in each step without padding, int64 `[num_steps]`. Those of a stream's steps are known
        once their batches are made.
      limits: maps each T to the `BatchLimits` of the batches with that T that are `is_limited`; targets are counted on
        each device.
    """

    config: TrainConfig
    num_devices: int
    documents: Documents
    num_steps: int
    row_lengths: np.ndarray
    tokens_per_step: np.ndarray
    limits: dict[int, BatchLimits]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> PackedBatch:
        """Returns the batch of a step, counted from 0; int32 NumPy arrays `[A, B, T]`.

        Raises:
          IndexError: the run has no such step.
          StreamEnded: the documents of a stream ended before this step.
        """
        raise NotImplementedError

    def epochs(self, steps: int) -> float | None:
        """Returns how many epochs a number of steps is; None if that is not known."""
        raise NotImplementedError

    def is_limited(self, step: int) -> bool:
        """Returns whether a step's batch is within `limits`."""
        return True

    def state_at(self, step: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a run's place in its data after `step` steps; none are needed where `step` says it."""
        return {}

    def resume(self, step: int, state: dict[str, np.ndarray]) -> None:
        """Goes to the batch of a step, with what `state_at` returned for that step."""

    @property
    def rows_per_step(self) -> int:
        """Returns the rows in a step; without packing, each document counts as a row."""
        config = self.config
        return config.per_device_train_batch_size * self.num_devices * config.gradient_accumulation_steps

    @property
    def _rows_of_device(self) -> int:
        """Returns the number of rows in a micro-batch on one device."""
        return self.config.per_device_train_batch_size

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Returns the shapes `(A, B, T)` that the run compiles, by ascending T."""
        accumulation, rows = self.config.gradient_accumulation_steps, self.num_devices * self._rows_of_device
        return [(accumulation, rows, int(T)) for T in np.unique(self.row_lengths)]

    @property
    def shapes_per_device(self) -> list[tuple[int, int, int]]:
        """Returns the shapes that one device computes with, its share of the B rows, by ascending T."""
        return [(A, B // self.num_devices, T) for A, B, T in self.shapes]

    @property
    def positions_per_step(self) -> np.ndarray:
        """Returns the positions computed in each step, A * B * T, int64 `[num_steps]`."""
        A, B, _ = self.shapes[0]
        return A * B * self.row_lengths

    @property
    def padding_share(self) -> float:
        """Returns the share of the run's positions that hold no token, in the steps whose tokens are known."""
        return self.padding_share_of(slice(None))

    def padding_share_of(self, steps: slice) -> float:
        """Returns the share of the positions of some steps that hold no token, where their tokens are known."""
        tokens, positions = self.tokens_per_step[steps], self.positions_per_step[steps]
        return float(1 - tokens.sum() / max(1, positions[tokens > 0].sum()))

    def is_first_of_its_shape(self, start: int = 0) -> np.ndarray:
        """Returns, for each step, whether it is the first that runs the program of its shape, bool `[num_steps]`.

        `start` is the step at which the process begins; steps before it do not count.
        """
        _, first = np.unique(self.row_lengths[start:], return_index=True)
        return np.isin(np.arange(self.num_steps), start + first)


class Batches(BatchSource):
    """Holds the batches of a whole run, by optimizer step: `batches[step]` is a `PackedBatch` of `[A, B, T]`.

    A is the number of micro-batches, `gradient_accumulation_steps`; B the number of rows in a micro-batch; T the length
    of a row. With `packing`, B is `per_device_train_batch_size`. Without it, a step takes
    `per_device_train_batch_size` * A documents. In padded batches, B is `per_device_train_batch_size`, and each row
    holds one document. In padding-free batches, B is 1, and the documents lie end to end in A rows of about the same
    length. Each epoch has an order of its own. Steps differ only in T, which takes at most 4 values, chosen so that the
    fewest positions are padding.

    With `documents_together=n` the documents n * i ... n * i + n - 1 are group i: for example a chosen and a rejected
    answer. A group is trained on whole or not at all. It lies in one row, in its order and with no other document
    between: segments 1 ... n of a row are a group, and n + 1 ... 2 * n are the next group. In padded batches, the n
    rows of a group follow each other within one micro-batch. With `packing` each document is cut at `max_length // n`,
    so that any group fits a row.

    On several devices, B is larger by their number, and so is the number of documents in a step. Device i computes with
    the i-th share of the B rows. Packed and padded rows are dealt so that all devices have about the same work in
    attention, and padding-free documents so that all have about as many tokens.

    Args:
      documents: the documents to train on; with `documents_together=n`, their number is a multiple of n.
      config: the settings of the run.
      documents_together: n, the number of documents in a group.
      num_devices: the number of devices over which the rows are dealt.

    Attributes:
      config: the settings of the run. If its `max_length` was None, it is now the length of the longest document.
      num_devices: the number of devices over which the rows are dealt.
      documents: the documents that are trained on, after truncation.
      truncation: counts of the documents that are shortened or dropped, and of the tokens that are lost.
      num_rows: rows in an epoch; without packing, each document counts as a row.
      steps_per_epoch, num_steps: optimizer steps in an epoch, and in the run.
      targets_per_epoch: tokens that an epoch trains on.
      row_lengths: T of each step, int64 `[num_steps]`.
      tokens_per_step: tokens in each step without padding, int64 `[num_steps]`.
      limits: maps each T to the `BatchLimits` of all batches with that T; targets are counted on each device.
      imbalance: how much more attention work the busiest device has than the mean one, as a share, over all steps.

    Raises:
      InputError: `documents_together` does not fit the number of documents, the batch size or the packing strategy; no
        document keeps a token to train on; or the run has more than 10,000,000 steps.

    Example:
      >>> from jaxpack import Batches, TrainConfig, load_documents
      >>> documents = load_documents([{"input_ids": list(range(30))}, {"input_ids": [5, 6, 7]}], None, vocab_size=100)
      >>> config = TrainConfig(packing=True, max_length=128, per_device_train_batch_size=1, max_steps=2)
      >>> batches = Batches(documents, config)
      >>> len(batches), batches[0].tokens.shape
      (2, (1, 1, 128))
    """

    def __init__(self, documents: Documents, config: TrainConfig, documents_together: int = 1, *, num_devices: int = 1):
        _check_groups(documents, config, documents_together)
        config = config.cut_at(int(documents.lengths.max()))
        self.config, self.num_devices = config, num_devices
        self.documents, self.truncation = _fit(documents, config, documents_together)
        self._group_lengths = self.documents.lengths.reshape(-1, documents_together).sum(axis=1)
        # Shuffling keeps this many rows together. A packed row holds whole groups, any other row holds one document.
        self._rows_together = 1 if config.packing else documents_together
        if config.packing:
            groups = pack_rows(self._group_lengths, config.length_limit, config.packing_strategy)
            self._rows = groups.of_members(documents_together, self.documents.lengths)
        else:
            self._rows = Rows.grouped(np.arange(len(self.documents))[:, None], self.documents.lengths)
        self.num_rows = len(self._rows)
        self.steps_per_epoch = -(-self.num_rows // self.rows_per_step)
        name = "max_steps" if config.max_steps > 0 else "num_train_epochs"
        steps = config.max_steps if config.max_steps > 0 else config.num_train_epochs * self.steps_per_epoch
        if steps > MAX_STEPS:
            raise InputError(f"`{name}` must come to at most {MAX_STEPS:,} steps, got {getattr(config, name):,}.")
        self.num_steps = math.ceil(steps)

        lengths = self._rows.row_lengths
        row_targets, row_segments = self._row_targets(), np.diff(self._rows.offsets)
        row_work = _sums(self._rows.length.astype(np.float64) ** 2, self._rows.offsets)
        self._work_together = row_work.reshape(-1, self._rows_together).sum(axis=1)
        self.targets_per_epoch = int(row_targets.sum())
        if not self.targets_per_epoch:
            who, cut = "at least one document", f"all {len(documents):,} documents are cut"
            if documents_together > 1:
                who = f"all {documents_together} documents of at least one group"
                cut = f"each group has one that is cut at {_max_document(config, documents_together):,} tokens,"
            raise InputError(
                f"`max_length` must leave {who} a token to train on, got {config.max_length}: {cut} before their first "
                "token to train on. Use a larger value."
            )
        # For each step: its tokens, its longest row, the most documents in a row, the most targets in a micro-batch.
        self.tokens_per_step, needed, segments, targets = np.empty((4, self.num_steps), np.int64)
        self._needed, self._segments, self._targets = needed, segments, targets
        busiest, mean = np.zeros((2, self.num_steps))
        for step in range(self.num_steps):
            which = self._which(step)
            real = which >= 0
            used = np.where(real, lengths[which], 0)
            self.tokens_per_step[step] = used.sum()
            needed[step] = used.sum(axis=1).max() if self._end_to_end else used.max()
            segments[step] = real.sum(axis=1).max() if self._end_to_end else row_segments[which[real]].max()
            targets[step] = self._of_devices(np.where(real, row_targets[which], 0)).max()
            if num_devices > 1:
                work = self._of_devices(np.where(real, row_work[which], 0))
                busiest[step], mean[step] = work.max(axis=1).sum(), work.mean(axis=1).sum()
        self.imbalance = float(busiest.sum() / mean.sum() - 1) if num_devices > 1 else 0.0
        if config.packing:
            needed[:] = needed.max()  # packed rows are full: one shape
        self._take_row_lengths(choose_buckets(needed))

    def _take_row_lengths(self, buckets: np.ndarray) -> None:
        """Gives each step the smallest of the row lengths that it fits into, and finds the limits of each length."""
        self.row_lengths = buckets[np.searchsorted(buckets, self._needed)]
        self.limits = {}
        for T in np.unique(self.row_lengths):
            with_it = self.row_lengths == T
            most_segments, most_targets = (int(x[with_it].max()) for x in (self._segments, self._targets))
            self.limits[int(T)] = BatchLimits(most_segments, max(1, -(-most_targets // LANES)) * LANES)

    @staticmethod
    def share_shapes(several: Sequence["Batches"]) -> None:
        """Gives several `Batches` the same few row lengths and, for each, the same limits.

        They then run the same programs, at most 4, however many `Batches` there are. Their settings must be the same.
        """
        buckets = choose_buckets(np.concatenate([batches._needed for batches in several]))
        for batches in several:
            batches._take_row_lengths(buckets)
        for T in buckets.tolist():
            with_it = [batches for batches in several if T in batches.limits]
            largest = BatchLimits(*np.array([batches.limits[T] for batches in with_it]).max(axis=0).tolist())
            for batches in with_it:
                batches.limits[T] = largest

    def epochs(self, steps: int) -> float:  # noqa: D102 # of `BatchSource`
        return steps / self.steps_per_epoch

    @property
    def _end_to_end(self) -> bool:
        return self.config.padding_free and not self.config.packing

    def __getitem__(self, step: int) -> PackedBatch:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        which, row_length = self._which(step), int(self.row_lengths[step])
        rows = self._rows
        if self._end_to_end:
            rows = Rows.grouped(which, self.documents.lengths)
            which = np.arange(len(rows)).reshape(-1, self.num_devices)
        documents = self.documents
        return fill_batch(documents.tokens, documents.labels, documents.starts, rows, which, row_length)

    @property
    def _rows_of_device(self) -> int:
        return 1 if self._end_to_end else self.config.per_device_train_batch_size

    @property
    def packing_efficiency(self) -> float:
        """Returns the share of positions in an epoch's rows that hold a token.

        With packing, a row has `max_length` positions. Without packing, a row has as many positions as the longest
        document has tokens.
        """
        lengths = self._rows.row_lengths
        return float(
            lengths.sum() / (len(lengths) * (self.config.length_limit if self.config.packing else lengths.max()))
        )

    def _row_targets(self) -> np.ndarray:
        """Counts the targets in each row of the plan, int64 `[num_rows]`."""
        rows, documents = self._rows, self.documents
        of_piece = documents.targets_within(documents.starts[rows.document] + rows.start, rows.length)
        return _sums(of_piece, rows.offsets)

    def _of_devices(self, of_rows: np.ndarray) -> np.ndarray:
        """Sums a figure of the rows of `_which` for each micro-batch and device, `[A, num_devices]`."""
        A = self.config.gradient_accumulation_steps
        return of_rows.reshape(A, self.num_devices, -1).sum(axis=2)

    def _which(self, step: int) -> np.ndarray:
        """Returns the rows of a step; -1 is a missing row, which an epoch's last step may have.

        They are int64 `[A, B]`, or `[A * B, ...]` documents where they lie end to end in B rows.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        together, accumulation = self._rows_together, self.config.gradient_accumulation_steps
        per_step = self.rows_per_step // together
        order = row_order(self.config.seed, epoch, self.num_rows // together)[place * per_step :][:per_step]
        if self._end_to_end:
            return members(_balanced(order, self._group_lengths, accumulation * self.num_devices), together)
        which = np.full(per_step, -1)
        which[: len(order)] = order
        which = which.reshape(accumulation, -1)
        if self.num_devices > 1:
            which = np.stack([dealt(rows, self._work_together, self.num_devices) for rows in which])
        return members(which, together)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums `values` between neighbouring offsets."""
    before = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return before[offsets[1:]] - before[offsets[:-1]]


def dealt(rows: np.ndarray, work: np.ndarray, num_devices: int) -> np.ndarray:
    """Orders rows so that each device, with an equal share of them in sequence, has about the same work.

    A missing row, -1, has no work.
    """
    of_rows = np.where(rows >= 0, work[rows], 0)
    return rows[np.concatenate(_spread(of_rows, num_devices, room=len(rows) // num_devices))]


def _balanced(groups: np.ndarray, lengths: np.ndarray, num_rows: int) -> np.ndarray:
    """Distributes groups over rows of about the same length.

    The loss of a step is the same however its groups are distributed.
    """
    if num_rows == 1:
        return groups[None]
    rows = [groups[places].tolist() for places in _spread(lengths[groups], num_rows, room=len(groups))]
    return np.array([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows])


def _spread(sizes: np.ndarray, count: int, room: int) -> list[list[int]]:
    """Deals things of these sizes to `count` places, so that all get about the same sum; returns the indices of each.

    Each thing, the largest first, goes to the place with the least so far that holds fewer than `room` things.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in np.argsort(-sizes, kind="stable").tolist():
        place = min((place for place in range(count) if len(dealt[place]) < room), key=filled.__getitem__)
        dealt[place].append(index)
        filled[place] += sizes[index].item()
    return dealt


@functools.lru_cache(maxsize=2)
def row_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Returns an epoch's order of the rows, int64 `[num_rows]`, which is the same with every version of every library.

    Rows are sorted by random 64-bit keys: the key of row `i` is output number `i` of a SplitMix64 generator. The seed
    of this generator is output number `epoch` of another one, which is seeded with `seed`. Equal keys are very
    unlikely; if they occur, the lower row comes first. NumPy does not promise to keep its own permutations, and a
    resumed run must find the order that it began with.
    """
    start = int(_splitmix64(seed, 1, skip=epoch)[0])
    return np.argsort(_splitmix64(start, num_rows), kind="stable")


def _splitmix64(seed: int, count: int, *, skip: int = 0) -> np.ndarray:
    """Returns `count` uint64 outputs of SplitMix64 (https://doi.org/10.1145/2714064.2660195) after the first `skip`."""
    places = np.arange(skip + 1, skip + count + 1, dtype=np.uint64)
    z = np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15) * places
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check_groups(documents: Documents, config: TrainConfig, together: int) -> None:
    """Refuses documents and settings that do not allow groups of `together` documents."""
    if len(documents) % together:
        raise InputError(
            f"`documents` must hold a multiple of {together} documents, as each group has {together} that belong "
            f"together, got {len(documents):,}. Complete the group that lacks some, or leave it out."
        )
    if config.packing and config.packing_strategy != "bfd" and together > 1:
        raise InputError(
            f"`packing_strategy` must be 'bfd' to keep {together} documents together, got "
            f"{config.packing_strategy!r}, which splits documents. Use 'bfd', or no `packing`."
        )
    size = config.per_device_train_batch_size
    if not config.packing and size % together:
        raise InputError(
            f"`per_device_train_batch_size` must be a multiple of {together}, as each group has {together} documents "
            f"that belong together, got {size}. Use {-(-size // together) * together} instead."
        )


def _max_document(config: TrainConfig, together: int) -> int:
    """Returns the maximum length of a document in tokens: with packing, `together` documents must fit a row."""
    return config.length_limit // together if config.packing else config.length_limit


def _fit(documents: Documents, config: TrainConfig, together: int) -> tuple[Documents, Truncation]:
    """Cuts documents to the allowed length and drops groups with a document that has no target left.

    Packing strategies that split documents lose nothing, so for them all documents stay as they are.
    """
    if config.packing and config.packing_strategy != "bfd":
        return documents, Truncation(0, 0, 0)
    cut = documents.truncate(_max_document(config, together))
    keep = (cut.num_targets > 0).reshape(-1, together).all(axis=1).repeat(together)
    lost = documents.lengths - cut.lengths
    return cut[keep], Truncation(int((lost > 0).sum()), int(lost.sum()), int((~keep).sum()))


def choose_buckets(sizes: np.ndarray, max_buckets: int = MAX_SHAPES, multiple: int = LANES) -> np.ndarray:
    """Chooses at most `max_buckets` multiples of `multiple` that hold all `sizes` and waste the fewest tokens.

    The choice is exact, by dynamic programming over the distinct sizes. More than 1,024 distinct sizes are first
    rounded up to larger multiples. `sizes` is int `[steps]`, each 1 or more. The result is ascending.
    """
    while len(np.unique(sizes // multiple)) > _MAX_SIZES:
        multiple *= 2
    sizes, counts = np.unique(-(-np.asarray(sizes) // multiple) * multiple, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: positions computed if sizes i..j share the bucket sizes[j]. The number of real tokens is the same for
    # every choice, so the choice with the fewest positions has the least padding.
    cost = (total[None, 1:] - total[:-1, None]) * sizes[None, :].astype(np.float64)
    cost[np.tril_indices(len(sizes), -1)] = np.inf
    best, splits = cost[0], []
    for _ in range(min(max_buckets, len(sizes)) - 1):
        # Add one bucket: the last bucket begins at size i, the buckets before it end at size i - 1.
        candidates = np.concatenate([cost[:1], best[:-1, None] + cost[1:]])
        splits.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    last, buckets = len(sizes) - 1, []
    for split in reversed(splits):
        buckets.append(sizes[last])
        last = split[last] - 1
        if last < 0:
            break
    else:
        buckets.append(sizes[last])
    return np.array(buckets[::-1])
