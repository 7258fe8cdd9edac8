"""Tests that a stream is packed exactly once, in bounded memory, and as well as a plan of the whole dataset."""

import gc
import itertools
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from models import random_documents
from shared_data import beside

from jaxpack import Batches, Documents, InputError, PackedBatch, Packer, TrainConfig
from jaxpack.data.batching import Truncation
from jaxpack.data.synthetic import drawn_documents

STRATEGIES = ["bfd", "bfd_split", "wrapped"]
CASES = [(1, 1, 1), (3, 2, 1), (7, 5, 1), (20, 4, 2), (64, 6, 3), (1000, 2, 1)]  # window, rows_per_batch, micro_batches


class Stream:
    """Yields documents whose tokens say where they come from, and counts how many were read.

    Token t of document d is `100 * d + t`, so each token occurs once.
    """

    def __init__(self, lengths: list[int], masked: float = 0.0):
        rng = np.random.default_rng(0)
        self.lengths, self.read = lengths, 0
        self.rows = []
        for d, length in enumerate(lengths):
            ids = 100 * d + np.arange(length)
            self.rows.append({"input_ids": ids, "labels": np.where(rng.random(length) < masked, -100, ids)})

    def __iter__(self) -> Iterator[dict]:
        for row in self.rows:
            self.read += 1
            yield row


def lengths_of(count: int, longest: int = 90, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest, count).tolist()


def segments(batch: PackedBatch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens and targets of each piece of a batch; checks the contract of a `PackedBatch` by the way."""
    for array in batch:
        assert array.dtype == np.int32
        assert array.ndim == 3
        assert array.shape == batch.tokens.shape
        assert array.shape[-1] % 128 == 0
    rows = (array.reshape(-1, batch.tokens.shape[-1]) for array in batch)
    for tokens, segment_ids, positions, targets in zip(*rows, strict=True):
        used = int((segment_ids > 0).sum())
        assert (segment_ids[used:] == 0).all()
        assert (targets[used:] == -100).all()
        changes = np.diff(segment_ids[:used], prepend=0)
        assert set(changes.tolist()) <= {0, 1}
        begins = np.flatnonzero(changes)
        for begin, end in itertools.pairwise([*begins, used]):
            np.testing.assert_array_equal(positions[begin:end], np.arange(end - begin))
            yield tokens[begin:end], targets[begin:end]


def documents_in(batch: PackedBatch) -> set[int]:
    return {int(tokens[0]) // 100 for tokens, _ in segments(batch)}


def rows_of(batch: PackedBatch) -> list[bytes]:
    """Returns each row of a batch, all four arrays in one, in a form that sorts and compares."""
    stacked = np.stack([array.reshape(-1, array.shape[-1]) for array in batch], axis=1)
    return [row.tobytes() for row in stacked]


@pytest.mark.parametrize(("window", "rows", "micro"), CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_token_and_target_is_written_exactly_once_or_cut(strategy, window, rows, micro):
    stream = Stream(lengths_of(150), masked=0.3)
    packer = Packer(stream, max_length=60, rows_per_batch=rows, micro_batches=micro, window=window, strategy=strategy)
    written = []
    for batch in packer:
        assert batch.tokens.shape == (micro, rows // micro, 128)
        assert (batch.segment_ids > 0).sum(axis=-1).max() <= 60
        for tokens, targets in segments(batch):
            document, start = divmod(int(tokens[0]), 100)
            np.testing.assert_array_equal(tokens, stream.rows[document]["input_ids"][start:][: len(tokens)])
            labels = stream.rows[document]["labels"][start:][: len(tokens)]
            np.testing.assert_array_equal(targets, [*labels[1:], -100])
            written += tokens.tolist()
    kept = [row["input_ids"] for row in stream.rows]
    if strategy == "bfd":
        kept = [row["input_ids"][:60] for row in stream.rows if (row["labels"][1:60] != -100).any()]
    assert sorted(written) == np.concatenate(kept).tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("rows", "micro"), [(4, 1), (6, 3)])
def test_a_window_that_holds_the_stream_gives_the_batches_of_the_whole_dataset(strategy, rows, micro):
    documents = random_documents(lengths_of(120, 300), masked=0.9)
    config = TrainConfig(
        packing=True,
        packing_strategy=strategy,
        max_length=200,
        per_device_train_batch_size=rows // micro,
        gradient_accumulation_steps=micro,
        num_train_epochs=1,
        seed=5,
    )
    whole = Batches(documents, config)
    settings = {"max_length": 200, "rows_per_batch": rows, "micro_batches": micro, "strategy": strategy, "seed": 5}
    packer = Packer(documents, window=121, **settings)
    batches = list(packer)
    assert len(batches) == len(whole) > 1
    for mine, theirs in zip(batches, (whole[step] for step in range(len(whole))), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert packer.truncation == whole.truncation
    assert packer.padding_share == pytest.approx(whole.padding_share, abs=1e-12)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_wrapped_rows_do_not_depend_on_the_window(window):
    stream = lengths_of(100)
    settings = {"max_length": 128, "rows_per_batch": 1, "strategy": "wrapped"}
    rows = [
        sorted(row for batch in Packer(Stream(stream), window=w, **settings) for row in rows_of(batch))
        for w in (window, 101)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("window", "rows", "micro"), CASES)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_no_document_waits_beyond_the_window_after_its_own(strategy, window, rows, micro):
    stream = Stream(lengths_of(300))
    packer = Packer(stream, max_length=64, rows_per_batch=rows, micro_batches=micro, window=window, strategy=strategy)
    longest = 64 if strategy == "bfd" else 90
    missing = {100 * d + t for d, length in enumerate(stream.lengths) for t in range(min(length, longest))}
    after = {}  # the tokens that are missing, by documents read, before more are read
    for batch in packer:
        missing -= set(batch.tokens[batch.segment_ids > 0].tolist())
        after[stream.read] = set(missing)
    assert not missing
    for read, waiting in after.items():
        windows = -(-read // window)
        overdue = sum(token < 100 * window * (windows - 1) for token in waiting)
        assert overdue <= (rows - 1) * 64  # in finished rows, fewer than a batch


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_read_before_it_is_needed(strategy):
    stream = Stream(lengths_of(400))
    packer = Packer(stream, max_length=128, rows_per_batch=4, window=50, strategy=strategy)
    assert iter(packer) is packer
    assert stream.read == 0
    made = []  # documents read when each batch came
    for _ in packer:
        made.append(stream.read)
    assert made[0] == 50
    assert set(made) == {*range(50, 401, 50)}
    assert all(later - sooner in (0, 50) for sooner, later in itertools.pairwise(made))
    assert made.count(50) >= 3  # the rows of a window are used up before the next window is read


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_an_endless_stream_one_window_and_the_rows_of_two_batches_are_held(strategy):
    read = written = most = 0

    def endless():
        nonlocal read, most
        while True:
            read += 1
            most = max(most, read - written)
            yield {"input_ids": np.full(32 + read % 90, read)}

    packer = Packer(endless(), max_length=128, rows_per_batch=4, window=100, strategy=strategy)
    for batch in itertools.islice(packer, 200):
        written += len({int(tokens[0]) for tokens, _ in segments(batch)})
    assert 100 <= most <= 100 + 7 * 4  # a row has at most 128 / 32 documents


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_window_is_held_while_the_next_is_read(strategy):
    held = []  # bytes, as each window begins to be read

    def endless():
        ids = np.arange(64)
        for number in itertools.count():
            if number % 512 == 0:
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
            yield {"input_ids": ids}

    tracemalloc.start()
    for _ in itertools.islice(Packer(endless(), max_length=256, rows_per_batch=4, window=512, strategy=strategy), 200):
        pass
    tracemalloc.stop()
    assert len(held) > 5
    # A window is 512 documents of 64 tokens and labels, int32: 256 KiB. The rows of two batches and the batch in the
    # user's hands, of four int32 arrays, are 48 KiB.
    assert max(held) < 2**17


@pytest.mark.parametrize(
    ("window", "share"),
    [
        pytest.param(100, 0.029, marks=pytest.mark.slow),
        pytest.param(1000, 0.010, marks=pytest.mark.slow),
        pytest.param(100_000, 0.007, marks=pytest.mark.slow),
    ],
)
def test_padding_on_alpacas_lengths_is_what_the_docstring_says(window, share):
    documents = drawn_documents(beside("alpaca_lengths.csv"), None)
    packer = Packer(documents, rows_per_batch=16, window=window)
    for _ in packer:
        pass
    assert packer.padding_share == pytest.approx(share, abs=0.0006)
    assert f"{100 * share:.1f} %" in Packer.__doc__


def test_packing_the_emptiest_rows_again_saves_padding():
    documents = drawn_documents(beside("alpaca_lengths.csv"), 5000)
    windows = [documents[np.arange(i, i + 50)] for i in range(0, 5000, 50)]
    alone = sum(len(list(Packer(part, rows_per_batch=1, window=51))) for part in windows)
    again = len(list(Packer(documents, rows_per_batch=1, window=50)))
    assert again < 0.98 * alone


def test_the_same_stream_gives_the_same_batches_and_another_seed_another_order():
    def batches(**changes):
        settings = {"max_length": 128, "rows_per_batch": 4, "window": 30} | changes
        return [rows_of(batch) for batch in Packer(Stream(lengths_of(200)), **settings)]

    assert batches() == batches()
    first, other = batches(window=1000), batches(window=1000, seed=1)
    assert first != other
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*other))


def test_a_reused_buffer_may_change_after_it_was_read():
    buffer = np.empty(10, np.int32)

    def reusing():
        for i in range(5):
            buffer[:] = i
            yield {"input_ids": buffer}

    (batch,) = Packer(reusing(), max_length=128, rows_per_batch=1)
    assert sorted(batch.tokens[batch.segment_ids > 0].tolist()) == sorted(5 * [0] + list(range(5)) * 10)[5:]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("documents", [[], iter(()), random_documents([])], ids=["list", "iterator", "Documents"])
def test_an_empty_stream_gives_no_batch(strategy, documents):
    packer = Packer(documents, strategy=strategy)
    assert list(packer) == []
    assert packer.padding_share == 0
    assert packer.truncation == Truncation(0, 0, 0)


def test_a_stream_that_ends_with_its_window_loses_nothing():
    packer = Packer(Stream([100] * 5), max_length=128, rows_per_batch=3, window=5)
    assert set.union(*map(documents_in, packer)) == {0, 1, 2, 3, 4}


def test_the_last_batch_is_filled_up_with_padding():
    (batch,) = Packer(Stream([5]), max_length=128, rows_per_batch=4, micro_batches=2)
    assert batch.tokens.shape == (2, 2, 128)
    assert (batch.segment_ids > 0).sum() == 5
    assert (batch.targets != -100).sum() == 4


def test_cut_and_dropped_documents_are_counted_and_said_once(capsys):
    rows = [{"input_ids": [*range(length)]} for length in (3, 200, 131, 1, 4)]
    rows.append({"input_ids": [*range(140)], "labels": [-100] * 130 + [5] * 10})  # its targets are cut
    packer = Packer(rows, max_length=128, rows_per_batch=1)
    assert sum(len(list(segments(batch))) for batch in packer) == 4
    assert packer.truncation == Truncation(3, 72 + 3 + 12, 2)
    said = capsys.readouterr().err
    assert said.count("is cut at 128 tokens (`max_length`) and loses") == 1
    assert "row 1 of `documents` is cut at 128 tokens (`max_length`) and loses 72; further documents are cut" in said
    assert said.count("is left out, because it has no token to train on after its first token") == 1
    assert "row 3 of `documents` is left out, because it has no token to train on after its first token" in said
    assert "`strategy='bfd_split'` splits documents instead" in said


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_nothing_is_cut_or_said_where_documents_are_split(strategy, capsys):
    packer = Packer(Stream([99] * 20), max_length=32, rows_per_batch=1, window=3, strategy=strategy)
    assert sum(len(tokens) for batch in packer for tokens, _ in segments(batch)) == 20 * 99
    assert packer.truncation == Truncation(0, 0, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "`max_length` must be a whole number of at least 2, got 1."),
        ({"max_length": 128.0}, "`max_length` must be a whole number of at least 2, got 128.0."),
        ({"rows_per_batch": 0}, "`rows_per_batch` must be a whole number of at least 1, got 0."),
        ({"micro_batches": True}, "`micro_batches` must be a whole number of at least 1, got True."),
        ({"window": None}, "`window` must be a whole number of at least 1, got None."),
        ({"seed": -1}, "`seed` must be a whole number of at least 0, got -1."),
        (
            {"rows_per_batch": 7, "micro_batches": 4},
            "`rows_per_batch` must be a multiple of `micro_batches` (4), got 7. Use 8 rows, or another number of "
            "micro-batches.",
        ),
        ({"strategy": "best"}, "`strategy` must be one of ('bfd', 'bfd_split', 'wrapped'), got 'best'."),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(InputError) as error:
        Packer([], **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("documents", ["train.jsonl", {"input_ids": [1, 2]}, 5])
def test_what_is_no_stream_is_refused_at_once(documents):
    with pytest.raises(InputError) as error:
        Packer(documents)
    assert str(error.value) == (
        "`documents` must be an iterable of rows such as {'input_ids': [1, 2]}, or `Documents`, got "
        f"{documents!r}. Read a file with `load_documents` first."
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a"},
            "Each row must be a mapping with `input_ids`, got ['text'] in row 1 of `documents`. Tokenise texts first, "
            "for example {'input_ids': tokenizer(text)['input_ids']}.",
        ),
        (
            [1, 2],
            "Each row must be a mapping with `input_ids`, got [1, 2] in row 1 of `documents`. Tokenise texts first, "
            "for example {'input_ids': tokenizer(text)['input_ids']}.",
        ),
        ({"input_ids": 5}, "`input_ids` must be a list or tuple or ndarray, got 5 in row 1 of `documents`."),
        ({"input_ids": [[1]]}, "`input_ids` must be a flat list of integers, got [[1]] in row 1 of `documents`."),
        ({"input_ids": [0.5]}, "`input_ids` must be a flat list of integers, got [0.5] in row 1 of `documents`."),
        ({"input_ids": [1, -3]}, "`input_ids` must be token ids in [0, 2**31), got -3 in row 1 of `documents`."),
        (
            {"input_ids": [2**31]},
            "`input_ids` must be token ids in [0, 2**31), got 2147483648 in row 1 of `documents`.",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, -1]},
            "`labels` must be token ids in [0, 2**31), or -100, got -1 in row 1 of `documents`.",
        ),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "`labels` must be as long as `input_ids` (2), got 1 in row 1 of `documents`.",
        ),
    ],
)
def test_a_bad_row_is_named_when_it_is_read(row, message):
    packer = Packer([{"input_ids": [1, 2]}, row], rows_per_batch=1)
    with pytest.raises(InputError) as error:
        next(packer)
    assert str(error.value) == message


def test_padding_in_a_row_is_cut():
    batch = next(Packer([{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}]))
    assert int((batch.segment_ids > 0).sum()) == 2


def test_errors_of_the_source_reach_the_user():
    def broken():
        yield {"input_ids": [1, 2]}
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(Packer(broken()))


def test_documents_are_read_where_they_lie():
    documents = random_documents([3, 9, 4])
    picked = Documents(documents.tokens, documents.labels, documents.starts[[2, 0]], documents.lengths[[2, 0]])
    (batch,) = Packer(picked, max_length=128, rows_per_batch=1, strategy="wrapped")
    expected = np.concatenate([documents.tokens[12:16], documents.tokens[:3]])
    np.testing.assert_array_equal(batch.tokens[0, 0, :8], [*expected, 0])


@pytest.mark.parametrize(("window", "rows", "micro"), CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_packer_goes_on_from_the_state_of_another(strategy, window, rows, micro, tmp_path):
    def packer() -> Packer:
        stream = Stream(lengths_of(150), masked=0.3)
        return Packer(stream, max_length=60, rows_per_batch=rows, micro_batches=micro, window=window, strategy=strategy)

    whole = list(packer())
    for taken in {0, 1, len(whole) // 2, len(whole)}:
        first = packer()
        for _ in range(taken):
            next(first)
        np.savez(tmp_path / "state.npz", **first.get_state())
        second = packer()
        second.set_state(np.load(tmp_path / "state.npz"))
        assert second.truncation == first.truncation
        assert second.padding_share == first.padding_share
        left = list(second)
        assert len(left) == len(whole) - taken
        for mine, theirs in zip(left, whole[taken:], strict=True):
            np.testing.assert_array_equal(np.stack(mine), np.stack(theirs))


def test_the_documents_before_a_state_are_left_by_skip_where_there_is_one():
    class Skipping(Stream):
        skipped = 0

        def skip(self, count: int) -> list[dict]:
            self.skipped = count
            return self.rows[count:]

    first = Packer(Skipping(lengths_of(90)), max_length=64, rows_per_batch=2, window=20)
    batches = [next(first) for _ in range(15)]
    stream = Skipping(lengths_of(90))
    second = Packer(stream, max_length=64, rows_per_batch=2, window=20)
    second.set_state(first.get_state())
    assert stream.skipped == first.get_state()["counts"][0] >= 20
    assert stream.read == 0
    assert rows_of(next(second)) == rows_of(next(first)) != rows_of(batches[-1])


def test_a_state_that_does_not_fit_is_refused():
    def packer(count: int = 50, **changes: int) -> Packer:
        settings = {"max_length": 100, "rows_per_batch": 2, "window": 10}
        return Packer(Stream(lengths_of(count)), **settings | changes)

    first = packer()
    for _ in range(10):
        next(first)
    state = first.get_state()
    with pytest.raises(InputError, match="for rows of 256 tokens"):
        packer(max_length=200).set_state(state)
    for name in state:
        with pytest.raises(InputError, match=r"`state` must be what `get_state`.*returned"):
            packer().set_state({key: array for key, array in state.items() if key != name})
    with pytest.raises(InputError, match=r"`documents` must be the stream.*got a shorter one"):
        packer(15).set_state(state)
    with pytest.raises(InputError, match="before the first batch"):
        first.set_state(state)
