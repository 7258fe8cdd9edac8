"""Tests that streams give the documents and the batches of whole datasets, in bounded memory, from any step on."""

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers_for_tests import small_tokenizer

from jaxpack.data.batching import Batches, StreamEnded
from jaxpack.data.encoding import RowEncoder
from jaxpack.data.reading import load_documents
from jaxpack.data.rows import LineNumbers
from jaxpack.data.stream import DocumentStream, StreamedBatches, is_stream
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig

VOCAB = 1000
CONFIG = TrainConfig(packing=True, max_length=128, per_device_train_batch_size=3, max_steps=40, seed=7)


def rows(count: int, seed: int = 0, longest: int = 90) -> list[dict]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCAB, rng.integers(3, longest)) for _ in range(count)]
    return [{"input_ids": list(map(int, row)), "labels": [-100, *map(int, row[1:])]} for row in ids]


def stream(dataset: Any, tokenizer: Any = None) -> DocumentStream:
    return DocumentStream(dataset, RowEncoder(tokenizer, VOCAB))


def documents_of(records: Iterator) -> list[tuple[list[int], list[int]]]:
    return [(record["input_ids"].tolist(), record["labels"].tolist()) for record in records]


class Generated:
    """Yields rows anew each time; counts how many were asked for."""

    def __init__(self, given: list[dict]):
        self.given, self.asked = given, 0

    def __iter__(self) -> Iterator[dict]:
        for row in self.given:
            self.asked += 1
            yield row


def write_lines(path: Path, given: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    return path


@pytest.mark.parametrize("skip", [0, 1, 5, 6, 9, 10, 17, 31, 100])
def test_a_stream_yields_the_documents_of_the_dataset_again_and_again(skip: int, tmp_path: Path) -> None:
    sources = [
        write_lines(tmp_path / "a.jsonl", [{"text": f"the cab {n}"} for n in range(6)]),
        write_lines(tmp_path / "b.jsonl", [{"prompt": "the", "completion": f" bad cab {n}"} for n in range(4)]),
        [{"input_ids": [5, 6, n]} for n in range(7)],
    ]
    tokenizer = small_tokenizer()
    whole = load_documents(sources, tokenizer, vocab_size=VOCAB)
    places = [slice(start, start + length) for start, length in zip(whole.starts, whole.lengths, strict=True)]
    wanted = [(whole.tokens[place].tolist(), whole.labels[place].tolist()) for place in places]
    assert len(wanted) == 17
    again = stream(sources, tokenizer=tokenizer)
    assert again.begins_again
    got = documents_of(itertools.islice(again.skip(skip), 40))
    assert got == [wanted[(skip + i) % 17] for i in range(40)]


def test_a_generator_ends_and_is_not_read_ahead_by_more_than_two_chunks() -> None:
    read = 0

    def endless() -> Iterator[dict]:
        nonlocal read
        while True:
            read += 1
            yield {"input_ids": [1, 2, 3]}

    once = stream(endless())
    assert not once.begins_again
    assert read == 0
    next(iter(once))
    assert read <= 2 * 1024 + 1
    assert len(documents_of(iter(stream(iter(rows(7)))))) == 7


def test_a_stream_without_anything_to_learn_is_refused_after_one_pass() -> None:
    nothing = [{"input_ids": [1, 2], "labels": [-100, -100]}] * 3
    with pytest.raises(InputError, match=r"a token to train on .* got 3 rows with none"):
        list(stream(Generated(nothing)))
    with pytest.raises(InputError, match="got no rows"):
        list(stream(iter([])))


def test_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"without weights .* got 0\.3"):
        stream([(rows(3), 0.3), (rows(3), 0.7)])


def test_rows_without_a_length_are_a_stream_if_the_run_has_an_end() -> None:
    packed = {"packing": True}
    assert is_stream(iter(rows(3)), TrainConfig(max_steps=5, **packed))
    assert is_stream(Generated(rows(3)), TrainConfig(max_steps=5, **packed))
    assert not is_stream(iter(rows(3)), TrainConfig(**packed))
    assert not is_stream(rows(3), TrainConfig(max_steps=5, **packed))
    assert not is_stream("rows.jsonl", TrainConfig(max_steps=5, **packed))
    assert is_stream("rows.jsonl", TrainConfig(max_steps=5, streaming=True, **packed))
    with pytest.raises(InputError, match=r"`packing` must be true for rows without a length"):
        is_stream(iter(rows(3)), TrainConfig(max_steps=5))


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_stream_within_the_window_gives_the_batches_of_the_whole_dataset(num_devices: int) -> None:
    given = rows(300)
    streamed = StreamedBatches(stream(iter(given)), CONFIG, num_devices=num_devices)
    whole = Batches(load_documents(given, None, vocab_size=VOCAB), CONFIG, num_devices=num_devices)
    for step in range(whole.steps_per_epoch):
        one, other = streamed[step], whole[step]
        if num_devices == 1:
            np.testing.assert_array_equal(np.stack(one), np.stack(other))
        else:  # Each device has about the same work: rows with as many tokens may be dealt in another order.
            assert sorted(map(bytes, np.stack(one, axis=2)[0])) == sorted(map(bytes, np.stack(other, axis=2)[0]))
    assert streamed.shapes == whole.shapes
    assert streamed.is_limited(whole.steps_per_epoch - 1)
    with pytest.raises(StreamEnded):
        streamed[whole.steps_per_epoch]
    assert streamed.tokens_per_step.sum() == sum(len(row["input_ids"]) for row in given)


@pytest.mark.parametrize("is_once", [False, True])
@pytest.mark.parametrize("step", [0, 1, 7, 25])
def test_a_run_resumes_at_any_step(step: int, is_once: bool) -> None:
    given = rows(2500, longest=40)
    config = dataclasses.replace(CONFIG, per_device_train_batch_size=8)

    def begin() -> StreamedBatches:
        return StreamedBatches(stream(iter(given) if is_once else Generated(given)), config)

    first = begin()
    batches = [first[i] for i in range(33)]
    documents = sum(int(batch.segment_ids.max(axis=-1).sum()) for batch in batches)
    assert documents > 1.5 * first.window  # the steps reach into a second window
    again = begin()
    for i in range(step):
        again[i]
    state = {name: array.copy() for name, array in again.state_at(step).items()}
    other = begin()
    other.resume(step, state)
    for i in range(step, 33):
        np.testing.assert_array_equal(np.stack(other[i]), np.stack(batches[i]))


def test_a_run_can_go_back() -> None:
    streamed = StreamedBatches(stream(Generated(rows(2000))), CONFIG)
    batches = [streamed[i] for i in range(30)]
    for step in (29, 25, 3, 0, 12):
        np.testing.assert_array_equal(np.stack(streamed[step]), np.stack(batches[step]))
    once = StreamedBatches(stream(iter(rows(2000))), CONFIG)
    batches = [once[i] for i in range(30)]
    np.testing.assert_array_equal(np.stack(once[25]), np.stack(batches[25]))  # one of the last
    with pytest.raises(InputError, match=r"can be read again to repeat step 1, got a generator or a pipe"):
        once[3]


def test_batches_that_exceed_what_the_first_rows_need_are_told_and_stay_told_after_a_resume() -> None:
    few = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}] * 1000
    many = [{"input_ids": [*range(60)], "labels": [*range(60)]}] * 600
    streamed = StreamedBatches(stream(Generated([*few, *many])), CONFIG)
    (limits,) = streamed.limits.values()
    assert limits.max_targets < 3 * 128
    beyond = []
    for step in range(40):
        batch = streamed[step]
        beyond.append(not streamed.is_limited(step))
        if not beyond[-1]:
            assert (batch.targets >= 0).sum() <= limits.max_targets
            assert batch.segment_ids.max() <= limits.max_segments
    first = beyond.index(True)
    assert first > 0
    assert all(beyond[first:])
    for step, is_limited in ((first - 1, True), (first + 3, False)):
        other = StreamedBatches(stream(Generated([*few, *many])), CONFIG)
        for i in range(step + 1):
            other[i]
        resumed = StreamedBatches(stream(Generated([*few, *many])), CONFIG)
        resumed.resume(step, other.state_at(step))
        resumed[step]
        assert resumed.is_limited(step) == is_limited


def test_memory_does_not_grow_with_the_stream() -> None:
    def endless() -> Iterator[dict]:
        for number in itertools.count():
            yield {"input_ids": [number % VOCAB, *range(50)]}

    streamed = StreamedBatches(stream(endless()), CONFIG)
    held = []
    tracemalloc.start()
    for step in range(40):
        streamed[step]
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(held[20:]) < 1.5 * max(held[:20])


def test_memory_does_not_grow_with_the_passes_over_a_file(tmp_path: Path) -> None:
    given = [{"input_ids": list(range(5))} for _ in range(3)]
    records = iter(stream(write_lines(tmp_path / "rows.jsonl", given)))
    held = []
    tracemalloc.start()
    for _ in range(3):
        for _ in itertools.islice(records, 900):
            pass
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[2] - held[1] < 20_000  # 300 files, each of which had a name and the numbers of its lines


@pytest.mark.parametrize("lines", [[1], [1, 2, 3], [3, 4, 9, 10, 11, 30], [2, 5, 7]])
def test_rows_are_named_by_their_lines(lines: list[int]) -> None:
    numbers = LineNumbers()
    for line in lines:
        numbers.append(line)
    assert [numbers[row] for row in range(len(lines))] == lines


def test_first_rows_without_anything_to_learn_are_refused() -> None:
    masked = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 1000
    with pytest.raises(InputError, match=r"a token to train on in one of its first 1,000 rows, got none"):
        StreamedBatches(stream(Generated([*masked, {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])), CONFIG)
