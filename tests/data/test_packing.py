"""Tests packing against TRL's golden rows and an item-by-item oracle, and the invariants of plans and batches."""

import itertools
import time

import numpy as np
import pytest

from jaxpack.data.packing import Rows, fill_batch, members, pack_rows
from jaxpack.errors import InputError

STRATEGIES = ["bfd", "bfd_split", "wrapped"]


def tokens_of(rows: Rows, documents: list[list[int]]) -> list[list[int]]:
    """Returns the tokens of each row of a plan."""
    pieces = [
        documents[d][start : start + length]
        for d, start, length in zip(rows.document, rows.start, rows.length, strict=True)
    ]
    return [list(itertools.chain(*pieces[a:b])) for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]


def piece_lengths(rows: Rows) -> list[list[int]]:
    return [rows.length[a:b].tolist() for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]


@pytest.mark.parametrize(
    ("strategy", "max_length", "documents", "expected", "lengths"),
    [
        ("wrapped", 3, [[1, 2, 3], [4, 5, 6, 7], [8]], [[1, 2, 3], [4, 5, 6], [7, 8]], [[3], [3], [1, 1]]),
        ("bfd", 4, [[1, 2, 3], [4, 5, 6, 7], [8]], [[4, 5, 6, 7], [1, 2, 3, 8]], [[4], [3, 1]]),
        (
            "bfd",
            4,
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 12]],
            [[4], [4], [2, 1]],
        ),
        (
            "bfd_split",
            4,
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]],
            [[4], [4], [2, 1, 1]],
        ),
        (
            "bfd_split",
            5,
            [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10], [11, 12, 13]],
            [[1, 2, 3, 4, 5], [7, 8, 9, 10, 6], [11, 12, 13]],
            [[5], [4, 1], [3]],
        ),
        ("bfd_split", 4, [[1, 2], [], [3, 4, 5], [], [6]], [[3, 4, 5, 6], [1, 2]], [[3, 1], [2]]),
    ],
)
def test_rows_are_those_of_trl(strategy, max_length, documents, expected, lengths):
    rows = pack_rows(np.array([len(document) for document in documents]), max_length, strategy)
    assert tokens_of(rows, documents) == expected
    assert piece_lengths(rows) == lengths


def test_split_lengths_are_those_of_trl():
    rows = pack_rows(np.array([6, 3, 3, 4]), 4, "bfd_split")
    assert piece_lengths(rows) == [[4], [4], [3], [3], [2]]


@pytest.mark.parametrize(
    ("draw", "max_length", "bins"),
    [
        (lambda rng: rng.integers(1, 513, 20_000), 1024, 5003),
        (lambda rng: rng.integers(1, 513, 20_000), 2048, 2502),
        (lambda rng: rng.gamma(5, 20, 20_000).clip(10, 500), 1024, 1951),
        (lambda rng: rng.gamma(5, 20, 20_000).clip(10, 500), 2048, 975),
        (lambda rng: rng.lognormal(5.2, 0.8, 20_000).clip(16, 4096), 1024, 4761),
        (lambda rng: rng.lognormal(5.2, 0.8, 20_000).clip(16, 4096), 2048, 2427),
    ],
)
def test_as_few_rows_as_best_fit_over_the_whole_dataset(draw, max_length, bins):
    lengths = draw(np.random.default_rng(0)).astype(int)
    assert len(pack_rows(lengths, max_length, "bfd")) == bins


def best_fit_decreasing_one_by_one(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Packs the longest document first, each into the fullest row with room; of equal rows, the first to get there."""
    rows: list[list[int]] = []
    free: list[int] = []
    since: list[int] = []
    for now, document in enumerate(np.argsort(-lengths, kind="stable")):
        fitting = [(free[row], since[row], row) for row in range(len(rows)) if free[row] >= lengths[document]]
        if fitting:
            row = min(fitting)[2]
        else:
            row = len(rows)
            rows.append([])
            free.append(max_length)
            since.append(now)
        rows[row].append(int(document))
        free[row] -= lengths[document]
        since[row] = now
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_placing_equal_lengths_together_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(2, 40), rng.integers(1, 120))
    max_length = int(rng.integers(lengths.max(), 80))
    rows = pack_rows(lengths, max_length, "bfd")
    packed = [rows.document[a:b].tolist() for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    assert packed == best_fit_decreasing_one_by_one(lengths, max_length)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_in_exactly_one_row_or_cut(strategy, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 90, 200)
    max_length = 40
    rows = pack_rows(lengths, max_length, strategy)
    assert rows.row_lengths.max() <= max_length
    assert rows.length.min() >= 1
    seen = sorted(
        (d, t)
        for d, start, length in zip(rows.document, rows.start, rows.length, strict=True)
        for t in range(start, start + length)
    )
    kept = np.minimum(lengths, max_length) if strategy == "bfd" else lengths
    assert seen == [(d, t) for d, length in enumerate(kept) for t in range(length)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack_gives_no_rows(strategy, lengths):
    assert len(pack_rows(np.array(lengths, int), 8, strategy)) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_million_documents_a_second(strategy):
    lengths = np.random.default_rng(0).lognormal(5.2, 0.8, 1_000_000).clip(16, 4096).astype(int)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        pack_rows(lengths, 2048, strategy)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="`max_length` must be at least 1, got 0"):
        pack_rows(np.array([1]), 0)
    with pytest.raises(InputError, match=r"`strategy` must be .*, got 'best'"):
        pack_rows(np.array([1]), 4, "best")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(5))
def test_a_batch_holds_the_pieces_of_its_rows_and_nothing_else(strategy, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, 50)
    starts = np.cumsum(lengths) - lengths
    tokens = rng.integers(1, 1000, lengths.sum()).astype(np.int32)
    labels = np.where(rng.random(len(tokens)) < 0.3, -100, tokens).astype(np.int32)
    rows = pack_rows(lengths, 32, strategy)
    which = rng.permutation(np.concatenate([np.arange(len(rows)), [-1, -1]]))
    batch = fill_batch(tokens, labels, starts, rows, which, row_length=128)
    assert all(array.shape == (len(which), 128) and array.dtype == np.int32 for array in batch)

    for b, row in enumerate(which):
        at = 0
        pieces = range(rows.offsets[row], rows.offsets[row + 1]) if row >= 0 else range(0)
        for segment, piece in enumerate(pieces, 1):
            length = rows.length[piece]
            source = starts[rows.document[piece]] + rows.start[piece]
            here = slice(at, at + length)
            np.testing.assert_array_equal(batch.tokens[b, here], tokens[source : source + length])
            np.testing.assert_array_equal(batch.segment_ids[b, here], segment)
            np.testing.assert_array_equal(batch.positions[b, here], np.arange(length))
            np.testing.assert_array_equal(batch.targets[b, here], [*labels[source + 1 : source + length], -100])
            at += length
        for array, padding in zip(batch, (0, 0, 0, -100), strict=True):
            np.testing.assert_array_equal(array[b, at:], padding)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_plan_of_groups_becomes_one_of_their_documents(size):
    lengths = np.random.default_rng(0).integers(1, 13, 30 * size)
    groups = pack_rows(lengths.reshape(-1, size).sum(axis=1), 40)
    rows = groups.of_members(size, lengths)
    np.testing.assert_array_equal(rows.row_lengths, groups.row_lengths)
    np.testing.assert_array_equal(rows.length, lengths[rows.document])
    in_groups = [
        [group * size + member for group in groups.document[a:b] for member in range(size)]
        for a, b in itertools.pairwise(groups.offsets)
    ]
    assert [rows.document[a:b].tolist() for a, b in itertools.pairwise(rows.offsets)] == in_groups
    assert not rows.start.any()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 0)])
def test_groups_that_are_missing_have_no_documents(shape):
    groups = np.full(shape, -1)
    assert (members(groups, 2) == -1).all()
    assert members(groups, 2).shape == (*shape[:-1], 2 * shape[-1])
