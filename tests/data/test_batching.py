"""Batches hold every document once per epoch in few shapes, and each step has the same documents in every layout."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from models import random_documents

from jaxpack.data.batching import Batches, _splitmix64, choose_buckets, row_order
from jaxpack.data.documents import Documents
from jaxpack.data.packing import BatchLimits, PackedBatch
from jaxpack.errors import InputError, errors_name
from jaxpack.settings import TrainConfig
from jaxpack.train.trainer import describe

LAYOUTS = [
    pytest.param({"packing": True}, id="packed"),
    pytest.param({}, id="padding_free"),
    pytest.param({"padding_free": False}, id="padded"),
]
GOLDEN = [
    [3, 5, 8, 6, 0, 2, 4, 9, 7, 1],
    [9, 1, 5, 7, 2, 4, 8, 3, 6, 0],
    [0, 3, 5, 2, 6, 8, 7, 4, 9, 1],
]
LENGTHS = np.random.default_rng(0).integers(2, 200, 101).tolist()


def documents_in(batch: PackedBatch) -> list[tuple[int, ...]]:
    """Returns the tokens of every segment of a batch."""
    T = batch.tokens.shape[-1]
    found = []
    for tokens, segments in zip(batch.tokens.reshape(-1, T), batch.segment_ids.reshape(-1, T), strict=True):
        found += [tuple(tokens[segments == segment].tolist()) for segment in range(1, segments.max() + 1)]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_epoch_has_every_document_once_in_an_order_of_its_own(layout, accumulation):
    documents = random_documents(LENGTHS, masked=0)
    config = TrainConfig(
        max_length=256,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        **layout,
    )
    batches = Batches(documents, config)
    expected = sorted(
        tuple(documents.tokens[start : start + length].tolist())
        for start, length in zip(documents.starts, documents.lengths, strict=True)
    )
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        epochs.append([document for step in steps for document in documents_in(batches[step])])
        assert sorted(epochs[-1]) == expected
    assert epochs[0] != epochs[1]
    assert len(batches) == 2 * batches.steps_per_epoch


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_said_of_the_batches_is_what_they_are(layout, together):
    config = TrainConfig(max_length=256, gradient_accumulation_steps=2, per_device_train_batch_size=4, **layout)
    batches = Batches(random_documents(LENGTHS[: 101 - 101 % together]), config, together)
    made = [batches[step] for step in range(len(batches))]
    assert {batch.tokens.shape for batch in made} == set(batches.shapes)
    assert len(batches.shapes) <= 4
    assert all(T % 128 == 0 for *_, T in batches.shapes)
    np.testing.assert_array_equal(batches.tokens_per_step, [(batch.segment_ids > 0).sum() for batch in made])
    np.testing.assert_array_equal(batches.positions_per_step, [batch.tokens.size for batch in made])
    assert batches.padding_share == pytest.approx(np.mean(np.concatenate([b.segment_ids.ravel() for b in made]) == 0))


def test_padding_free_and_padded_steps_have_the_same_documents():
    free, padded = (
        Batches(random_documents(LENGTHS), TrainConfig(max_length=256, padding_free=choice)) for choice in (True, False)
    )
    assert len(free) == len(padded)
    for step in range(len(free)):
        assert documents_in(free[step]) == documents_in(padded[step])
    assert free.padding_share < padded.padding_share


@pytest.mark.parametrize("accumulation", [2, 5])
def test_padding_free_micro_batches_are_about_as_long_as_each_other(accumulation):
    config = TrainConfig(max_length=256, gradient_accumulation_steps=accumulation, per_device_train_batch_size=4)
    batches = Batches(random_documents(LENGTHS), config)
    for step in range(batches.steps_per_epoch):
        rows = (batches[step].segment_ids > 0).sum(axis=-1)
        assert rows.max() - rows.min() <= 200  # the longest document, which went to the shortest row


def test_packed_rows_are_shuffled():
    # Best-fit decreasing puts the longest documents in the first rows. Unshuffled, the first steps would hold only long
    # documents.
    batches = Batches(
        random_documents(LENGTHS), TrainConfig(max_length=256, packing=True, per_device_train_batch_size=4)
    )
    per_step = [batches[step].segment_ids.max(axis=-1).mean() for step in range(batches.steps_per_epoch - 1)]
    assert per_step != sorted(per_step)


def test_the_order_follows_from_the_seed():
    def first(seed: int) -> np.ndarray:
        return Batches(random_documents(LENGTHS), TrainConfig(seed=seed))[0].tokens

    np.testing.assert_array_equal(first(1), first(1))
    assert first(1).shape != first(2).shape or (first(1) != first(2)).any()


def test_the_order_is_one_for_all_versions_of_numpy():
    # These are the published test vector of SplitMix64 for the seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert _splitmix64(1234567, 5).tolist() == [*published, 16408922859458223821]
    assert [row_order(42, epoch, 10).tolist() for epoch in range(3)] == GOLDEN
    assert sorted(row_order(2**70 + 1, 5, 1000)) == list(range(1000))


def test_the_order_of_a_late_epoch_takes_no_longer():
    assert _splitmix64(7, 2, skip=3).tolist() == _splitmix64(7, 5).tolist()[3:]
    assert sorted(row_order(7, 2**40, 10)) == list(range(10))  # generating all earlier epochs would take terabytes


def test_rows_meet_others_in_every_epoch():
    """Places of a row in different epochs and for different seeds are not correlated beyond chance."""
    places = [np.argsort(row_order(seed, epoch, 4000)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    correlations = np.corrcoef([np.arange(4000), *places])[np.triu_indices(10, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


def test_truncation_is_counted_and_what_it_leaves_nothing_to_learn_is_dropped():
    documents = random_documents([10, 50, 60, 20], masked=0)
    documents.labels[10:50] = -100  # the second document is a long prompt
    batches = Batches(documents, TrainConfig(max_length=32, per_device_train_batch_size=1))
    assert (batches.truncation.documents, batches.truncation.tokens, batches.truncation.dropped) == (2, 18 + 28, 1)
    assert sorted(len(d) for step in range(batches.steps_per_epoch) for d in documents_in(batches[step])) == [
        10,
        20,
        32,
    ]


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_targets_that_come_first_in_a_piece_are_told_and_not_all_there_are(strategy):
    """Nothing predicts the first token of a piece: an evaluation would divide by zero, and a run learn nothing."""
    config = TrainConfig(max_length=32, packing=True, packing_strategy=strategy, max_steps=1)
    documents = random_documents([64, 64], masked=0)
    labels = np.full_like(documents.labels, -100)
    labels[[32, 96]] = documents.tokens[[32, 96]]  # the first token of the second piece
    lost = dataclasses.replace(documents, labels=labels)
    with pytest.raises(InputError, match="`max_length` must leave at least one document a token to train on, got 32"):
        Batches(lost, config)
    labels = labels.copy()
    labels[40] = documents.tokens[40]
    some = dataclasses.replace(documents, labels=labels)
    told = describe(some, Batches(some, config), config)
    assert (
        "2 tokens are each the first of a piece of a split document: no token predicts them, so they are not trained on"
        in told
    )
    whole = TrainConfig(max_length=64, packing=True, packing_strategy=strategy, max_steps=1)
    assert not any("come first" in line for line in describe(documents, Batches(documents, whole), whole))


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_strategies_that_split_cut_nothing(strategy):
    batches = Batches(
        random_documents([10, 50, 60]), TrainConfig(max_length=32, packing=True, packing_strategy=strategy)
    )
    assert batches.truncation.tokens == 0
    assert batches.tokens_per_step[: batches.steps_per_epoch].sum() == 120


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_no_max_length_is_that_of_the_longest_document(layout):
    documents = random_documents(LENGTHS)
    without, longest = (
        Batches(documents, TrainConfig(max_length=limit, per_device_train_batch_size=4, **layout))
        for limit in (None, max(LENGTHS))
    )
    assert without.config == longest.config
    assert without.truncation.tokens == without.truncation.documents == 0
    for step in range(without.steps_per_epoch):
        np.testing.assert_array_equal(without[step].tokens, longest[step].tokens)
    assert Batches(random_documents([1, 1, 2]), TrainConfig(max_length=None)).config.max_length == 2


def test_a_max_length_that_leaves_nothing_to_learn_is_refused():
    documents = random_documents([10, 10], masked=0)
    documents.labels[[*range(5), *range(10, 15)]] = -100
    with pytest.raises(InputError, match="`max_length` must leave at least one document a token to train on, got 4"):
        Batches(documents, TrainConfig(max_length=4))


def test_max_steps_overrides_epochs():
    assert len(Batches(random_documents(LENGTHS), TrainConfig(max_steps=7))) == 7
    assert len(Batches(random_documents(LENGTHS), TrainConfig(num_train_epochs=0.5))) == 7  # of 13 steps


@pytest.mark.parametrize(("name", "value"), [("max_steps", 10**12), ("num_train_epochs", 1e12)])
def test_more_steps_than_can_be_planned_are_refused(name, value):
    with pytest.raises(InputError, match=f"`{name}` must come to at most 10,000,000 steps, got 1,000,000,000,000"):
        Batches(random_documents(LENGTHS), TrainConfig(**{name: value}))


@pytest.mark.parametrize("seed", range(20))
def test_buckets_waste_the_fewest_tokens(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 1200, rng.integers(1, 40))
    buckets = choose_buckets(sizes, max_buckets=3)
    rounded = np.unique(-(-sizes // 128) * 128)

    def positions(buckets: np.ndarray) -> int:
        return int(np.asarray(buckets)[np.searchsorted(buckets, sizes)].sum())

    choices = [
        sorted({*choice, int(rounded[-1])})
        for count in range(3)
        for choice in itertools.combinations(rounded.tolist(), count)
    ]
    assert len(buckets) <= 3
    assert set(buckets.tolist()) <= set(rounded.tolist())
    assert positions(buckets) == min(map(positions, choices))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_limits_are_the_most_that_any_batch_has(layout, together):
    config = TrainConfig(per_device_train_batch_size=3, max_steps=7, max_length=256, **layout)
    batches = Batches(random_documents(LENGTHS[: 101 - 101 % together]), config, together)
    segments: dict[int, int] = {}
    targets: dict[int, int] = {}
    for batch in batches:
        T = batch.tokens.shape[-1]
        segments[T] = max(segments.get(T, 0), int(batch.segment_ids.max()))
        in_micro = (batch.targets != -100).sum(axis=(1, 2)).max()
        targets[T] = max(targets.get(T, 0), -(-int(in_micro) // 128) * 128)
    assert batches.limits == {T: BatchLimits(segments[T], targets[T]) for T in segments}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_that_share_their_shapes_run_the_same_few_programs(layout):
    config = TrainConfig(per_device_train_batch_size=3, num_train_epochs=1, max_length=1024, **layout)
    sets = [range(10, 90, 7), range(100, 400, 13), range(300, 1000, 17), [5, 1000]]
    several = [Batches(random_documents(list(lengths), seed=seed), config) for seed, lengths in enumerate(sets)]
    alone = [batches.limits for batches in several]
    Batches.share_shapes(several)
    programs = {(T, limits) for batches in several for T, limits in batches.limits.items()}
    assert len(programs) == len({T for T, _ in programs}) <= 4
    for batches, before in zip(several, alone, strict=True):
        assert {shape[-1] for shape in batches.shapes} == set(batches.limits)
        assert max(batches.limits) >= max(before)
        for batch in batches:
            limits = batches.limits[batch.tokens.shape[-1]]
            assert batch.segment_ids.max() <= limits.max_segments
            assert (batch.targets != -100).sum(axis=(1, 2)).max() <= limits.max_targets
        assert sum((batch.segment_ids > 0).sum() for batch in batches) == batches.documents.num_tokens


def numbered(lengths: list[int], prompts: dict[int, int] | None = None) -> Documents:
    """Makes documents whose tokens are all the document's number; the first `prompts[number]` are not trained on."""
    tokens = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = np.cumsum(lengths) - lengths
    labels = tokens.copy()
    for document, length in (prompts or {}).items():
        labels[starts[document] : starts[document] + length] = -100
    return Documents(tokens, labels, starts, np.asarray(lengths, np.int64))


def places_for_groups(batch: PackedBatch, padded: bool) -> list[list[int]]:
    """Returns the document numbers in each place that a group may not straddle: a row, or a padded micro-batch."""
    _, B, T = batch.tokens.shape
    assert not padded or batch.segment_ids.max() == 1
    places = zip(*(array.reshape(-1, B if padded else 1, T) for array in batch), strict=True)
    return [[document[0] for document in documents_in(PackedBatch(*place))] for place in places]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("together", [2, 3])
def test_groups_are_whole_and_in_order_once_an_epoch(layout, accumulation, together):
    config = TrainConfig(
        max_length=200 * together,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        per_device_train_batch_size=6,
        **layout,
    )
    count = 101 - 101 % together
    batches = Batches(numbered(LENGTHS[:count]), config, together)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        places = [place for step in steps for place in places_for_groups(batches[step], padded=not config.padding_free)]
        for place in places:
            assert len(place) % together == 0
            for first in place[::together]:
                assert first % together == 0
            assert place == [first + n for first in place[::together] for n in range(together)]
        epochs.append(list(itertools.chain(*places)))
        assert sorted(epochs[-1]) == list(range(count))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_batch_size_counts_documents_with_groups_too(layout):
    config = TrainConfig(max_length=256, gradient_accumulation_steps=3, per_device_train_batch_size=4, **layout)
    batches = Batches(numbered(LENGTHS[:100]), config, 2)
    assert (batches.num_rows, batches.rows_per_step, batches.steps_per_epoch) == (100, 12, 9)
    assert [len(documents_in(batches[step])) for step in range(9)] == [12] * 8 + [4]


def test_padding_free_micro_batches_of_groups_are_about_as_long_as_each_other():
    config = TrainConfig(max_length=256, gradient_accumulation_steps=3, per_device_train_batch_size=4)
    batches = Batches(numbered(LENGTHS[:100]), config, 2)
    longest = np.add(LENGTHS[:100:2], LENGTHS[1:100:2]).max()
    for step in range(batches.steps_per_epoch):
        rows = (batches[step].segment_ids > 0).sum(axis=-1)
        assert rows.max() - rows.min() <= longest  # the longest group went to the shortest row


@pytest.mark.parametrize(
    ("layout", "longest"),
    [
        pytest.param({"packing": True}, 33, id="packed"),  # 100 // 3: any three fit into a row
        pytest.param({}, 100, id="padding_free"),
        pytest.param({"padding_free": False}, 100, id="padded"),
    ],
)
def test_a_group_is_cut_document_by_document_and_trained_on_whole_or_not_at_all(layout, longest):
    lengths = np.array([250, 20, 250, 20, 250, 20, 20, 20, 30, 250, 250, 250])
    # Document 4 keeps only its prompt, and document 7 has nothing to learn from the start.
    documents = numbered(lengths.tolist(), prompts={4: 101, 7: 20})
    config = TrainConfig(max_length=100, per_device_train_batch_size=3, num_train_epochs=1, **layout)
    batches = Batches(documents, config, 3)
    cut = batches.truncation
    assert (cut.documents, cut.tokens, cut.dropped) == (6, 6 * (250 - longest), 6)
    found = [document for batch in batches for document in documents_in(batch)]
    assert {document[0]: len(document) for document in found} == {
        document: min(lengths[document], longest) for document in (0, 1, 2, 9, 10, 11)
    }
    assert len(found) == 6


def test_the_longest_groups_fill_a_packed_row_each():
    config = TrainConfig(max_length=100, packing=True, per_device_train_batch_size=2)
    batches = Batches(numbered([300] * 8), config, 2)
    assert batches.num_rows == 4
    assert batches.packing_efficiency == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_max_length_that_leaves_no_group_whole_is_refused(layout):
    config = TrainConfig(max_length=8, per_device_train_batch_size=2, **layout)
    documents = numbered([10, 3, 3, 10], prompts={0: 8, 3: 8})
    limit = 4 if config.packing else 8
    expected = (
        f"`max_length` must leave all 2 documents of at least one group a token .* one that is cut at {limit} tokens"
        r", .* Use a larger value\."
    )
    with pytest.raises(InputError, match=expected):
        Batches(documents, config, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_number_of_documents_that_makes_no_groups_is_refused(layout):
    config = TrainConfig(per_device_train_batch_size=3, **layout)
    with (
        pytest.raises(InputError, match=r"`train_dataset` must hold a multiple of 3 documents, .* got 101\."),
        errors_name(documents="train_dataset"),
    ):
        Batches(numbered(LENGTHS), config, 3)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_batch_size_that_splits_groups_is_refused_but_with_packing(layout):
    expected = "`per_device_train_batch_size` must be a multiple of 2, .* got 5. Use 6 instead"
    with pytest.raises(InputError, match=expected):
        Batches(numbered(LENGTHS[:100]), TrainConfig(per_device_train_batch_size=5, **layout), 2)
    Batches(numbered(LENGTHS[:100]), TrainConfig(per_device_train_batch_size=5, packing=True), 2)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_strategies_that_split_are_refused_with_groups(strategy):
    config = TrainConfig(packing=True, packing_strategy=strategy)
    with pytest.raises(InputError, match=f"`packing_strategy` must be 'bfd' .* got '{strategy}'"):
        Batches(numbered(LENGTHS[:100]), config, 2)
    Batches(numbered(LENGTHS[:100]), config)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        pytest.param({"packing": True}, "bf13c61d4c8a0aa9", id="packed"),
        pytest.param({"packing": True, "packing_strategy": "bfd_split"}, "465c00e33d00054b", id="split"),
        pytest.param({"packing": True, "packing_strategy": "wrapped"}, "fa9db9bd6e32afcc", id="wrapped"),
        pytest.param({}, "d8a45b8f574b3234", id="padding_free"),
        pytest.param({"padding_free": False}, "12cc3549c01c3654", id="padded"),
    ],
)
def test_batches_of_documents_alone_are_those_before_there_were_groups(layout, expected):
    """A resumed run must find its batches again bit for bit, so the digests are those from before groups were added."""
    lengths = (_splitmix64(1, 103) % np.uint64(200)).astype(np.int64) + 1
    tokens = (_splitmix64(2, lengths.sum()) % np.uint64(97)).astype(np.int32)
    labels = np.where(_splitmix64(3, lengths.sum()) % np.uint64(10) < 3, -100, tokens).astype(np.int32)
    documents = Documents(tokens, labels, np.cumsum(lengths) - lengths, lengths)
    config = TrainConfig(
        max_length=150, gradient_accumulation_steps=2, num_train_epochs=2.5, per_device_train_batch_size=3, **layout
    )
    digest = hashlib.sha256()
    for batch in Batches(documents, config):
        for array in batch:
            digest.update(repr(array.shape).encode() + array.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == expected


def attention_work(batch: PackedBatch, num_devices: int) -> np.ndarray:
    """Returns the sum of squared document lengths of each micro-batch on each device, `[A, num_devices]`."""
    A, B, T = batch.tokens.shape
    ids = batch.segment_ids.reshape(A, num_devices, B // num_devices, T)
    work = [
        sum(np.sum(np.unique(row[row > 0], return_counts=True)[1] ** 2) for row in rows)
        for rows in ids.reshape(-1, B // num_devices, T)
    ]
    return np.reshape(work, (A, num_devices))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("together", [1, 2])
def test_a_step_has_the_same_documents_on_any_number_of_devices(layout, together):
    documents = random_documents([*LENGTHS, 30, 50, 70], masked=0)
    settings = {"max_length": 256, "gradient_accumulation_steps": 2} | layout
    alone = Batches(documents, TrainConfig(per_device_train_batch_size=8, **settings), together)
    dealt = Batches(documents, TrainConfig(per_device_train_batch_size=2, **settings), together, num_devices=4)
    assert len(alone) == len(dealt)
    assert alone.imbalance == 0
    for step in range(len(alone)):
        assert sorted(documents_in(alone[step])) == sorted(documents_in(dealt[step]))
        assert dealt[step].tokens.shape in dealt.shapes
    assert [(A, 4 * B, T) for A, B, T in dealt.shapes_per_device] == dealt.shapes
    work = [attention_work(dealt[step], 4) for step in range(len(dealt))]
    busiest, mean = (sum(figures.sum() for figures in (f(w, axis=1) for w in work)) for f in (np.max, np.mean))
    assert dealt.imbalance == pytest.approx(busiest / mean - 1)
    last = describe(documents, dealt, dealt.config)[-1]
    assert "a step takes 16 " in last
    assert ": 2 on each of 4 devices, times 2 micro-batches; the busiest device has " in last
    assert f"has {dealt.imbalance:.1%} more work" in last


def test_rows_are_dealt_so_that_devices_have_about_the_same_work_in_attention():
    lengths = np.random.default_rng(1).lognormal(4, 1, 4000).clip(2, 1024).astype(int).tolist()
    config = TrainConfig(packing=True, max_length=1024, per_device_train_batch_size=16)
    batches = Batches(random_documents(lengths, masked=0), config, num_devices=4)
    whole = range(batches.steps_per_epoch - 1)  # the last step lacks rows
    for step in whole:
        work = attention_work(batches[step], 4)
        assert work.max() < 1.03 * work.mean()
        in_sequence = np.sort(attention_work(batches[step], 64).ravel()).reshape(4, 16).sum(axis=1)
        assert in_sequence.max() > 1.2 * in_sequence.mean()  # rows differ much


def test_targets_are_limited_on_each_device():
    documents = random_documents(LENGTHS)
    config = TrainConfig(packing=True, max_length=256, per_device_train_batch_size=2)
    batches = Batches(documents, config, num_devices=4)
    most = max((batches[step].targets.reshape(1, 4, -1) != -100).sum(axis=2).max() for step in range(len(batches)))
    (limits,) = batches.limits.values()
    assert limits.max_targets == -(-most // 128) * 128
