"""Reads rows as a run needs them: a stream, which may have no end, in bounded memory.

`load_documents` and `Batches` read and plan a whole dataset. Here, a `Packer` plans a window of rows at a time.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np

from jaxpack.constants import IGNORE, LANES
from jaxpack.data.batching import Batches, BatchSource, StreamEnded, dealt
from jaxpack.data.documents import Documents
from jaxpack.data.encoding import RowEncoder
from jaxpack.data.formats import Record
from jaxpack.data.packer import Packer
from jaxpack.data.packing import BatchLimits, PackedBatch
from jaxpack.data.rows import rows_of
from jaxpack.data.sources import HubDataset, Source, sources_of
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig
from jaxpack.utils.console import console
from jaxpack.utils.files import kind_of

_SAMPLE = 1000  # rows that are read before the first step; the limits of a run's batches follow from them
_WINDOW_STEPS = 8  # steps whose documents a window should hold, so that its rows are nearly full
_DEVIATIONS = 6  # standard deviations of a batch's targets, by the rows of the sample, within its limit
_KEPT = 8  # batches that a run can go back to: it makes at most four ahead of the step that it has finished

State = dict[str, np.ndarray]


def is_stream(dataset: Any, config: TrainConfig) -> bool:
    """Returns whether a run reads a dataset as a stream.

    It does with `streaming`. Otherwise it does for rows without a length, such as those of a generator, if `max_steps`
    says where the run ends.

    Raises:
      InputError: the run does not pack such rows.
    """
    if config.streaming:
        return True
    is_endless = isinstance(dataset, Iterable) and not isinstance(dataset, Sized | Documents) and config.max_steps > 0
    if is_endless and not config.packing:
        raise InputError(
            "`packing` must be true for rows without a length, which are read as a stream with `max_steps`, got false."
            " Pass a list to have them read whole."
        )
    return is_endless


class DocumentStream:
    """Yields the documents of datasets one after the other, as rows `{"input_ids", "labels"}` for a `Packer`.

    After the last row, the stream begins again, if the dataset can be read more than once. It then has no end.

    Args:
      dataset: as for `load_documents`.
      encoder: encodes the rows.

    Attributes:
      begins_again: whether the dataset can be read more than once. A generator and a pipe cannot.

    Raises:
      InputError: a dataset has a weight; or what `load_documents` raises, which may show while the rows are read.
    """

    def __init__(self, dataset: Any, encoder: RowEncoder):
        self._sources, self._encoder = [_streamed(source) for source in sources_of(dataset)], encoder
        self._is_known = False  # whether the user knows what was met in the rows
        self.begins_again = all(_can_be_read_again(source) for source in self._sources)

    def __iter__(self) -> Iterator[Record]:
        return self.skip(0)

    @property
    def why_masked(self) -> str:
        """Returns the reasons for which a row may have no token to train on, in words."""
        return self._encoder.why_masked

    def skip(self, count: int) -> Iterator[Record]:
        """Yields the documents after the first `count`, whose rows are read but not tokenised."""
        if count:
            console.print(f"passing over the {count:,} rows that the run has read")
        while True:
            num_rows, has_targets = 0, False
            for source in self._sources:
                for passed, documents in self._documents(source, count):
                    count -= passed
                    num_rows += passed + len(documents)
                    has_targets = has_targets or passed > 0
                    for tokens, labels in documents:
                        has_targets = has_targets or bool((labels[1:] != IGNORE).any())
                        yield {"input_ids": tokens, "labels": labels}
            if not self._is_known:
                self._encoder.say_what_was_met()
            self._is_known = True
            if not has_targets:
                got = f"{num_rows:,} rows with none ({self._encoder.why_masked})" if num_rows else "no rows"
                raise InputError(
                    f"`dataset` must have a row with a token to train on after its first token, got {got}."
                )
            if not self.begins_again:
                return

    def _documents(self, source: Source, skip: int) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
        """Yields how many rows were passed over, and documents, so that `skip` rows are passed over in all."""
        if isinstance(source.rows, Documents):
            documents = self._encoder.check(source.rows)
            for start, length in zip(documents.starts[skip:].tolist(), documents.lengths[skip:].tolist(), strict=True):
                here = slice(start, start + length)
                yield 0, [(documents.tokens[here], documents.labels[here])]
            return
        for rows in rows_of(source):
            if (form := self._encoder.begin(rows)) is None:
                continue
            self._encoder.say_once(f"{source.name}: a stream of {form.words}")
            passed = sum(1 for _ in itertools.islice(rows.records, skip))
            skip -= passed
            yield passed, []
            for encoded in self._encoder.encode(rows, form, passed):
                ends = np.cumsum(encoded.lengths)[:-1]
                tokens, labels = np.split(encoded.tokens, ends), np.split(encoded.labels, ends)
                yield 0, list(zip(tokens, labels, strict=True))


class StreamedBatches(BatchSource):
    """Gives the batches of a stream, which a `Packer` packs a window of documents at a time.

    The first rows are read at once, to see mistakes in them, and to know what to compile: `limits` have some room above
    what these rows need. If a later batch needs more, it and all after it are not `is_limited`.

    Args:
      stream: the documents.
      config: the settings of the run, with `packing` and `max_steps`.
      num_devices: the number of devices over which the rows are dealt.

    Attributes:
      documents: the documents of the first rows.
      sample: the batches that these alone would give.
      window: the number of documents that are packed at a time.

    Raises:
      InputError: what the stream raises; or `max_length` leaves none of the first rows a token to train on.
    """

    def __init__(self, stream: DocumentStream, config: TrainConfig, *, num_devices: int = 1):
        self._stream, self.config, self.num_devices = stream, config, num_devices
        rest = iter(stream)
        first = list(itertools.islice(rest, _SAMPLE))
        self.documents = Documents.joined([(record["input_ids"], record["labels"]) for record in first])
        if not self.documents.num_targets.any():
            raise InputError(
                f"`dataset` must have a token to train on in one of its first {len(first):,} rows, got none"
                f" ({stream.why_masked}). Leave such rows out, or shuffle the rows."
            )
        self.sample = Batches(
            self.documents,
            dataclasses.replace(config, streaming=False, max_steps=-1, num_train_epochs=1),
            num_devices=num_devices,
        )
        T = -(-config.length_limit // LANES) * LANES
        self.num_steps = config.max_steps
        self.row_lengths = np.full(self.num_steps, T)
        self.tokens_per_step = np.zeros(self.num_steps, np.int64)
        self.limits = {T: self._limits_by_sample(T)}
        self._unlimited_from = self.num_steps  # the first step that exceeds the limits
        documents_per_step = self.rows_per_step * len(first) / self.sample.num_rows
        self.window = max(_SAMPLE, round(_WINDOW_STEPS * documents_per_step))
        self._origin: tuple[int, State | None] = 0, None  # where the stream can be packed again, at worst
        # The last batches by step, and the states of the packer before these steps and before the next one.
        self._made: dict[int, PackedBatch]
        self._states: dict[int, State]
        self._pack(itertools.chain(first, rest))

    def __getitem__(self, step: int) -> PackedBatch:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        if step not in self._made:
            self._go_to(step)
            self._make()
        return self._made[step]

    def epochs(self, steps: int) -> None:  # noqa: D102 # of `BatchSource`
        return None

    def is_limited(self, step: int) -> bool:
        """Returns whether the batches up to that of a step, which must have been made, are within `limits`."""
        return step < self._unlimited_from

    def state_at(self, step: int) -> State:
        """Returns the arrays from which a run goes on after `step` steps."""
        if step not in self._states:
            self._go_to(step)
        return {**self._states[step], "is_limited": np.array(self.is_limited(step - 1))}

    def resume(self, step: int, state: State) -> None:
        """Goes to the batch of a step, with what `state_at` returned for that step."""
        state = dict(state)
        self._unlimited_from = self.num_steps if state.pop("is_limited") else step
        self._origin = step, state
        self._go_back()

    @property
    def begins_again(self) -> bool:
        """Returns whether the stream begins again after its last row."""
        return self._stream.begins_again

    def _go_to(self, step: int) -> None:
        """Makes the batches before a step, so that its batch is the next one."""
        if step < self._next:
            self._go_back()
        while self._next < step:
            self._make()

    def _go_back(self) -> None:
        """Packs the stream again from the last place at which that is possible."""
        if self.begins_again:
            self._pack(self._stream)
        elif self._next:
            raise InputError(
                f"`dataset` must be one that can be read again to repeat step {self._origin[0] + 1}, got a generator or"
                " a pipe. Pass a file, a `datasets.IterableDataset`, or an object whose `__iter__` begins anew."
            )
        step, state = self._origin
        if state is not None:
            self._packer.set_state(state)
        self._begin(step)

    def _pack(self, documents: Iterable[Record]) -> None:
        config = self.config
        self._packer = Packer(
            documents,
            max_length=config.length_limit,
            rows_per_batch=self.rows_per_step,
            micro_batches=config.gradient_accumulation_steps,
            window=self.window,
            strategy=config.packing_strategy,
            seed=config.seed,
        )
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._next, self._made, self._states = step, {}, {step: self._packer.get_state()}

    def _make(self) -> None:
        """Makes the next batch, and forgets the oldest."""
        step = self._next
        batch = next(self._packer, None)
        if batch is None:
            raise StreamEnded(f"the stream ended after step {step}")
        if self.num_devices > 1:
            batch = self._dealt(batch)
        self._made[step] = batch
        self._next = step + 1
        self._states[self._next] = self._packer.get_state()
        for kept in (self._made, self._states):
            kept.pop(step - _KEPT, None)
        self.tokens_per_step[step] = (batch.segment_ids > 0).sum()
        segments, targets = self.limits[batch.tokens.shape[-1]]
        assert segments is not None
        assert targets is not None
        if batch.segment_ids.max() > segments or self._most_targets(batch) > targets:
            self._unlimited_from = min(self._unlimited_from, step)

    def _dealt(self, batch: PackedBatch) -> PackedBatch:
        """Orders the rows of each micro-batch so that all devices have about the same work in attention."""
        work = (batch.positions.astype(np.float64) * (batch.segment_ids > 0)).sum(axis=-1)
        order = np.stack([dealt(np.arange(len(rows)), rows, self.num_devices) for rows in work])
        return PackedBatch(*(np.take_along_axis(array, order[..., None], axis=1) for array in batch))

    def _most_targets(self, batch: PackedBatch) -> int:
        """Returns the most targets of a micro-batch on one device."""
        targets = (batch.targets != IGNORE).sum(axis=-1)
        return int(targets.reshape(len(targets), self.num_devices, -1).sum(axis=-1).max())

    def _limits_by_sample(self, T: int) -> BatchLimits:
        """Returns limits that batches will rarely exceed if their rows are like those of the sample."""
        batches = [self.sample[step] for step in range(self.sample.num_steps)]
        of_rows = np.concatenate([(batch.targets != IGNORE).sum(axis=-1).reshape(-1) for batch in batches])
        of_rows = of_rows[: self.sample.num_rows]  # The rows behind them are padding.
        count = self.config.per_device_train_batch_size
        targets = count * of_rows.mean() + _DEVIATIONS * math.sqrt(count) * of_rows.std()
        segments = max(int(batch.segment_ids.max()) for batch in batches)
        rounded = -(-math.ceil(targets) // LANES) * LANES
        return BatchLimits(2 * segments, min(count * T, max(LANES, rounded)))


def _streamed(source: Source) -> Source:
    """Returns a source whose rows are read as a stream."""
    if source.weight is not None:
        raise InputError(
            f"`dataset` must be without weights if it is read as a stream, got {source.weight:g} for"
            f" {source.name!r:.200}. Mix the rows with `datasets.interleave_datasets`, or read them whole."
        )
    if isinstance(source.rows, HubDataset):
        return source._replace(rows=source.rows._replace(is_streamed=True))
    return source


def _can_be_read_again(source: Source) -> bool:
    if source.files:
        return not any(kind_of(path) == "a pipe" for path in source.files)
    return not isinstance(source.rows, Iterator)
