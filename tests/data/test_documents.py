"""Documents count the tokens that are trained on, and are truncated and selected without a copy."""

import itertools

import numpy as np
import pytest
from loaded_documents import labels_of, tokens_of

from jaxpack.data import documents as module
from jaxpack.data.documents import Documents


def documents_of(labels: list[list[int]]) -> Documents:
    """Makes documents with these labels, whose tokens count up from 1."""
    lengths = np.array([len(one) for one in labels], np.int64)
    tokens = np.arange(1, lengths.sum() + 1, dtype=np.int32)
    return Documents(tokens, np.array([*itertools.chain(*labels)], np.int32), np.cumsum(lengths) - lengths, lengths)


LABELS = [[1, 2, 3], [-100, -100, 6], [7, -100], [8], [], [9, 10, -100, 12]]


def test_num_targets_counts_the_trained_tokens_but_for_the_first() -> None:
    expected = [sum(label != -100 for label in one[1:]) for one in LABELS]
    np.testing.assert_array_equal(documents_of(LABELS).num_targets, expected)


@pytest.mark.parametrize("max_length", [1, 2, 3, 100])
def test_truncate_keeps_the_first_tokens_of_each_document(max_length: int) -> None:
    documents = documents_of(LABELS)
    cut = documents.truncate(max_length)
    for which in range(len(documents)):
        assert tokens_of(cut, which) == tokens_of(documents, which)[:max_length]
        assert labels_of(cut, which) == LABELS[which][:max_length]
    np.testing.assert_array_equal(cut.num_targets, [sum(x != -100 for x in one[1:max_length]) for one in LABELS])
    assert cut.num_tokens == sum(min(len(one), max_length) for one in LABELS)
    assert documents.num_tokens == 13  # the original is not cut


@pytest.mark.parametrize("as_mask", [False, True])
def test_indexing_selects_documents(as_mask: bool) -> None:
    documents = documents_of(LABELS)
    chosen = [1, 3, 5]
    selected = documents[np.isin(np.arange(6), chosen) if as_mask else np.array(chosen)]
    assert [labels_of(selected, which) for which in range(len(selected))] == [LABELS[which] for which in chosen]
    assert [tokens_of(selected, which) for which in range(3)] == [tokens_of(documents, which) for which in chosen]
    assert selected.num_tokens == 8
    assert selected.num_targets.tolist() == [1, 0, 2]


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_targets_are_counted_across_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(block)
    labels = np.where(rng.random(40) < 0.5, -100, 7).astype(np.int32)
    starts = rng.integers(0, 40, 30)
    lengths = np.minimum(rng.integers(0, 12, 30), 40 - starts)
    counts = Documents(labels, labels, starts, lengths).num_targets
    ends = starts + lengths
    expected = [(labels[start + 1 : end] != -100).sum() for start, end in zip(starts, ends, strict=True)]
    assert counts.tolist() == expected
