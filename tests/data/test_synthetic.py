"""Synthetic documents have the lengths of a histogram, and read back as they were written."""

import numpy as np
import pytest
from models import random_documents

from jaxpack.data.synthetic import drawn_documents, drawn_lengths, read_documents, save_documents
from jaxpack.errors import InputError

HEAD = "token_length_from,token_length_to,documents\n"


def test_lengths_follow_the_histogram(tmp_path):
    (tmp_path / "lengths.csv").write_text(f"{HEAD}10,20,3\n100,110,1\n")
    lengths = drawn_lengths(tmp_path / "lengths.csv", 20_000, np.random.default_rng(0))
    short, long = (lengths >= 10) & (lengths < 20), (lengths >= 100) & (lengths < 110)
    assert (short | long).all()
    assert short.mean() == pytest.approx(0.75, abs=0.015)  # five standard deviations
    assert lengths[short].mean() == pytest.approx(14.5, abs=0.15)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", f"{HEAD}1,x,3\n", HEAD, f"{HEAD}10,20,0\n", f"{HEAD}20,10,1\n", None])
def test_a_file_that_is_no_histogram_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / "lengths.csv").write_text(text)
    with pytest.raises(InputError, match=r"`lengths` must .*lengths\.csv"):
        drawn_lengths(tmp_path / "lengths.csv", 5, np.random.default_rng(0))


def test_documents_are_within_the_vocabulary_and_read_back_as_written(tmp_path):
    (tmp_path / "lengths.csv").write_text(f"{HEAD}2,30,1\n")
    documents = drawn_documents(tmp_path / "lengths.csv", 50, vocab_size=97)
    assert documents.tokens.min() >= 0
    assert documents.tokens.max() < 97
    assert len(documents) == 50
    for written in (documents, random_documents([5, 9])):
        save_documents(tmp_path / "documents.npz", written)
        read = read_documents(tmp_path / "documents.npz")
        for name in ("tokens", "labels", "starts", "lengths"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
            assert getattr(read, name).dtype == getattr(written, name).dtype
