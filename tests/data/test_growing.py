"""Tests that tokens beyond a size lie on the disk, unchanged, and leave no file behind."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from short_runs import SHORT

from jaxpack.data import growing
from jaxpack.data.batching import Batches
from jaxpack.data.growing import GrowingArray
from jaxpack.data.reading import load_documents
from jaxpack.errors import InputError


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lets arrays have 1 MiB in memory, and returns the cache home."""
    monkeypatch.setattr(growing, "_IN_MEMORY", 2**20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("sizes", [[], [0], [5], [0, 3, 0, 4], [2**18], [2**18 + 1], [2**17] * 5, [3, 2**19, 7]])
def test_an_array_is_what_was_appended(sizes: list[int], small_memory: Path) -> None:
    array, parts = GrowingArray(np.int32, "tokens"), []
    for number, size in enumerate(sizes):
        parts.append(np.arange(number, number + size, dtype=np.int64))
        array.extend(parts[-1])
    want = np.concatenate([np.empty(0, np.int64), *parts])
    copy = array.copy()
    copy.extend(np.array([-100]))
    np.testing.assert_array_equal(array.in_numpy(), want)
    np.testing.assert_array_equal(copy.in_numpy(), [*want, -100])
    assert len(array) == len(want)
    assert array.in_numpy().dtype == np.int32
    assert not array.in_numpy().flags.writeable


def test_a_large_dataset_takes_little_memory_and_gives_the_same_batches(
    small_memory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def rows() -> object:
        rng = np.random.default_rng(0)
        for _ in range(8_000):
            ids = rng.integers(0, 97, rng.integers(2, 512)).astype(np.int32)
            yield {"input_ids": ids, "labels": np.where(rng.random(len(ids)) < 0.3, -100, ids)}

    tracemalloc.start()
    documents = load_documents(rows(), None, vocab_size=97)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    size = documents.tokens.nbytes + documents.labels.nbytes
    assert size > 9 * 2**20
    assert held < size / 4
    assert capsys.readouterr().err.count("the tokens take more than") == 2  # tokens and labels
    assert list(small_memory.rglob("*")) == [small_memory / "jaxpack"]
    monkeypatch.setattr(growing, "_IN_MEMORY", 2**30)
    whole = load_documents(rows(), None, vocab_size=97)
    on_disk, in_memory = Batches(documents, SHORT), Batches(whole, SHORT)
    for step in range(len(in_memory)):
        np.testing.assert_array_equal(np.stack(on_disk[step]), np.stack(in_memory[step]))


def test_a_full_disk_is_told(small_memory: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    rows = ({"input_ids": np.zeros(2**17, np.int32)} for _ in range(100))
    with pytest.raises(InputError, match=r"must have a disk .* of tokens so far, .*: No space left on device"):
        load_documents(rows, None, vocab_size=97)
    assert os.listdir(small_disk) == ["jaxpack"]
