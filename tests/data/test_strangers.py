"""Tests that a dataset of somebody else is read in bounded time and memory, and that data may come from a pipe."""

import gzip
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxpack.data import bounded
from jaxpack.data.reading import load_documents, load_prompts
from jaxpack.data.synthetic import drawn_lengths
from jaxpack.errors import InputError

ROWS = [{"input_ids": [7, 8, 9]}, {"input_ids": [3, 4]}]


def read(path: Path | str) -> list[int]:
    return load_documents(path, None, vocab_size=10).lengths.tolist()


def refusal(path: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(InputError) as refused:
        read(path)
    assert time.monotonic() - begin < 60
    assert len(str(refused.value)) < 500
    return str(refused.value)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pretends that so many bytes are free; each look at them takes 100 MiB, down to none."""
    free = [1000 << 20]

    def look() -> int:
        free[0] = max(0, free[0] - (100 << 20))
        return free[0]

    monkeypatch.setattr(bounded, "available_host_bytes", look)
    return free


# Pipes, devices and folders.


def through_pipe(path: Path, content: bytes) -> threading.Thread:
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.write_bytes(content))
    thread.start()
    return thread


JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.mark.parametrize(
    "content", [JSONL, b"\xef\xbb\xbf" + JSONL, b"\n \n" + JSONL, json.dumps(ROWS, indent=1).encode()]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "63"])
def test_cases_rows_come_through_a_pipe(name: str, content: bytes, tmp_path: Path):
    thread = through_pipe(tmp_path / name, content)
    assert read(tmp_path / name) == [3, 2]
    thread.join()
    if name != "63":  # a file without an ending is refused; the shell's own pipes have none
        (tmp_path / "file").mkdir()
        (tmp_path / "file" / name).write_bytes(content)
        assert read(tmp_path / "file" / name) == [3, 2]


def test_cases_prompts_come_through_a_pipe(tmp_path: Path):
    thread = through_pipe(tmp_path / "prompts.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n')
    assert load_prompts(tmp_path / "prompts.jsonl", chat=False) == ["a", "b"]
    thread.join()


def test_cases_what_is_no_file_and_no_pipe_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    assert "which is a device" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "which is a folder" in refusal(tmp_path / "folder.jsonl")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    assert "which is a link to nothing" in refusal(tmp_path / "link.jsonl")
    os.mkfifo(tmp_path / "rows.parquet")
    assert "which is a pipe" in refusal(tmp_path / "rows.parquet")


# Sizes.


@pytest.mark.parametrize("place", [1, 3])
def test_cases_a_line_without_an_end_is_refused(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounded, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(bounded, "_CHUNK_BYTES", 1 << 18)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL * (place // 2) + b'"input_ids": [' + b"7, " * 500_000)
    assert f"Line {place} of {path} must be a JSON object of at most 1 MiB" in refusal(path)
    path.write_bytes(JSONL + b'{"input_ids": [' + b"7, " * 300_000 + b"7]}\n" + JSONL)
    assert read(path) == [3, 2, 300_001, 3, 2]


@pytest.mark.usefixtures("little_memory")
def test_cases_a_first_line_without_an_end_is_refused_when_memory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounded, "MAX_LINE_BYTES", 1 << 18)
    monkeypatch.setattr(bounded, "_CHUNK_BYTES", 1 << 18)
    (tmp_path / "rows.jsonl").write_bytes(b'[{"input_ids": [' + b"7, " * 1_500_000)
    assert "in line 1, which has more than 2 MiB, 0 MiB of memory are left" in refusal(tmp_path / "rows.jsonl")


def test_cases_a_sparse_file_of_a_hundred_gigabytes_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").touch()
    os.truncate(tmp_path / "rows.jsonl", 100 << 30)
    assert "Line 1 of" in refusal(tmp_path / "rows.jsonl")


def test_cases_an_array_on_one_long_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounded, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(bounded, "_CHUNK_BYTES", 100)
    for start in (b"", b"\n", b"\xef\xbb\xbf"):
        (tmp_path / "rows.json").write_bytes(start + json.dumps(ROWS * 50).encode())
        assert read(tmp_path / "rows.json") == [3, 2] * 50


DEEP = {"lists": "[" * 100_000, "objects": '{"a":' * 100_000, "ids": '{"input_ids": ' + "[" * 100_000}


@pytest.mark.parametrize("text", [*DEEP.values(), "9" * 10_000, "NaN"], ids=[*DEEP, "digits", "NaN"])
def test_cases_deep_or_strange_json_is_refused(text: str, tmp_path: Path):
    for content in (text, f'{{"input_ids": [1, 2]}}\n{text}', f"[{text}"):
        (tmp_path / "rows.jsonl").write_text(content)
        assert str(tmp_path / "rows.jsonl") in refusal(tmp_path / "rows.jsonl")


def test_cases_compressed_rows_are_refused_by_their_name_or_content(tmp_path: Path):
    for name in ("rows.gz", "rows.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(JSONL))
        refusal(tmp_path / name)


def test_cases_rows_that_expand_without_an_end_are_refused(tmp_path: Path, little_memory: list[int]):
    little_memory[0] = 500 << 20
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(JSONL * 500_000, 1))
    assert (tmp_path / "rows.jsonl.gz").stat().st_size < 500_000
    assert "must fit into the memory of this machine" in refusal(tmp_path / "rows.jsonl.gz")


@pytest.mark.usefixtures("little_memory")
def test_cases_rows_that_do_not_fit_into_memory_are_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(JSONL * 10_000)
    message = refusal(tmp_path / "rows.jsonl")
    assert "`dataset` must fit into the memory of this machine" in message
    assert "lines, 100 MiB of memory are left" in message
    table = pa.table({"input_ids": pa.array([[1, 2]] * 20_000, pa.list_(pa.int64()))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "must fit into the memory of this machine" in refusal(tmp_path / "rows.parquet")


def test_cases_full_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(json, "loads", full)
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    assert "the memory is full" in refusal(tmp_path / "rows.jsonl")


# Parquet files that are far larger than they look.


def test_cases_a_long_text_repeated_in_many_rows_is_not_decoded_at_once(tmp_path: Path, little_memory: list[int]):
    """A dictionary holds the text once: the file is small, and the rows would take 20 GB."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 1_000_000]))
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"text": column}), path)
    assert path.stat().st_size < 2_000_000
    count, rows = bounded.parquet_rows(path)
    assert count == 20_000
    held = []
    with pytest.raises(InputError, match=r"must fit into the memory of this machine, .* after [\d,]+ rows"):
        held.extend(row for row, _ in rows)
    assert len(held) < 1000


def test_cases_more_empty_rows_than_memory_are_refused(tmp_path: Path, little_memory: list[int]):
    little_memory[0] = 110 << 20
    path = tmp_path / "rows.parquet"
    with pyarrow.parquet.ParquetWriter(path, pa.schema([("text", pa.null())])) as writer:
        writer.write_table(pa.table({"text": pa.nulls(1_000_000)}))
    assert path.stat().st_size < 10_000
    assert "for the 1,000,000 rows that the file promises, 10 MiB of memory are left" in refusal(path)


@pytest.mark.parametrize("damage", ["cut", "no end", "a huge end", "flips"])
def test_cases_a_damaged_parquet_file_is_a_sentence(damage: str, tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS * 1000), path, compression="snappy")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "no end":
        content[-4:] = b"XXXX"
    elif damage == "a huge end":
        content[-8:-4] = (2**31 - 1).to_bytes(4, "little")
    else:
        content[-200:-8] = bytes(192)
    path.write_bytes(content)
    assert f"{path} must be a readable Parquet file" in refusal(path)


# Lengths.


@pytest.mark.parametrize(
    "line", ["1,2,1e300", "1,2,inf", "nan,2,1", "1,inf,5", "1,2,1e9", f"1,2,{'1' * 200_000}", "1,2,-1"]
)
def test_cases_lengths_that_make_no_documents_are_refused(line: str, tmp_path: Path):
    path = tmp_path / "lengths.csv"
    path.write_text(f"token_length_from,token_length_to,documents\n{line}\n")
    with pytest.raises(InputError, match="`lengths` must"):
        drawn_lengths(path, None, np.random.default_rng(0))
