"""Tests that a dataset may be files, a folder, a pattern, a dataset of the hub or several, and fills no memory."""

import csv
import gzip
import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaded_documents import CHAT, PLAIN, VOCABULARY, load, refusal, texts, turn, write_jsonl, write_parquet

from jaxpack.data import reading_progress, rows
from jaxpack.data.documents import Documents
from jaxpack.data.encoding import RowEncoder
from jaxpack.data.mixing import hold_out
from jaxpack.data.stream import DocumentStream
from jaxpack.errors import InputError

ROWS = [{"prompt": f"{row}, the\n", "completion": f'a "cab" of {row}'} for row in range(7)]
OTHERS = [{"text": f"the cab {row}"} for row in range(3)]


def numbered(count: int, first: int = 0) -> list[dict]:
    return [{"text": f"{row}"} for row in range(first, first + count)]


def written(documents: Documents) -> list[str]:
    return [whole.removesuffix("<eos>") for whole, _ in texts(documents)]


def write_csv(path: Path, rows: list[dict], **options: Any) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows(rows)
    return path


def compress(path: Path) -> Path:
    compressed = path.with_name(f"{path.name}.gz")
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return compressed


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


# --- Files ------------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: write_jsonl(folder / "rows.jsonl", ROWS),
    "jsonl.gz": lambda folder: compress(write_jsonl(folder / "rows.jsonl", ROWS)),
    "json.gz": lambda folder: compress(write_json(folder / "rows.json", ROWS)),
    "csv": lambda folder: write_csv(folder / "rows.csv", ROWS),
    "csv of Excel": lambda folder: write_csv(folder / "ROWS.CSV", ROWS, encoding="utf-8-sig", quoting=csv.QUOTE_ALL),
    "csv.gz": lambda folder: compress(write_csv(folder / "rows.csv", ROWS, lineterminator="\n")),
    "parquet": lambda folder: write_parquet(folder / "rows.parquet", ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_kind_of_file(name: str, tmp_path: Path) -> None:
    assert texts(load(FILES[name](tmp_path))) == texts(load(ROWS))


BAD_FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "gzip that is cut off": (
        "rows.jsonl.gz",
        gzip.compress(json.dumps(ROWS).encode())[:-20],
        ["whole file", "gzip", "Download or compress it again"],
    ),
    "gzip that is none": ("rows.csv.gz", b"text\nab\n", ["whole file", "gzip", "Not a gzipped file"]),
    "gzip that is damaged": ("rows.json.gz", gzip.compress(b"[]" * 99)[:12] + b"\xff" * 30, ["whole file", "gzip"]),
    "row with more fields": ("rows.csv", b"text,id\n\nab,1\nc,d,2\n", ["line 4 of", "2 fields", "got 3", "quotes"]),
    "row with fewer fields": ("rows.csv", b'text,id\n"a\nb",1\nc\n', ["line 4 of", "2 fields", "got 1"]),
    "quote that is not closed": ("rows.csv", b'text\nab\n"c\nd\n', ["begins on line 3", "unexpected end of data"]),
    "quote within a text": ("rows.csv", b'text,id\n"a" b,1\n', ["begins on line 2", "each quote within it twice"]),
    "field without a name": ("rows.csv", b"text,,\nab,c,d\n", ["first row of", "an empty name"]),
    "field with two columns": ("rows.csv", b"text,text\nab,c\n", ["first row of", "'text' twice"]),
    "CSV in Latin-1": ("rows.csv", "text\nab\né\n".encode("latin-1"), ["Line 3 of", "UTF-8"]),
    "CSV of no format": ("rows.csv", b"question;answer\nab;c\n", ["line 2 of", "['question;answer']"]),
    "CSV without rows": ("rows.csv", b"text\n", ["`dataset` must have at least one row"]),
    "CSV without anything": ("rows.csv", b"", ["`dataset` must have at least one row"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    file, content, fragments = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    message = refusal(tmp_path / file)
    for fragment in (str(tmp_path / file), *fragments):
        assert fragment in message


def test_a_long_field_of_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"text\n{'ab' * 200_000}\n")
    assert load(tmp_path / "rows.csv").lengths.tolist() == [200_001]


# --- Folders and patterns ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Makes a folder with three files of rows in two formats, and other things."""
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", numbered(3, 3))
    compress(write_jsonl(folder / "a.jsonl", numbered(3)))
    write_csv(folder / "c.csv", ROWS)
    write_jsonl(folder / "more" / "d.jsonl", numbered(1, 100))
    write_jsonl(folder / ".hidden.jsonl", numbered(1, 200))
    (folder / "README.md").write_text("about the rows")
    return folder


def test_a_folder_is_its_data_files_in_order(folder: Path, capsys: pytest.CaptureFixture) -> None:
    documents = load(folder)
    assert written(documents)[:6] == list("012345")
    assert texts(documents)[6:] == texts(load(ROWS))
    said = capsys.readouterr().err
    assert f"{folder} (3 files): 6 rows of plain text; 7 rows of prompt and completion\n" in said


def test_a_pattern_is_the_files_that_it_matches_in_order(folder: Path) -> None:
    assert written(load(str(folder / "[ab].*"))) == list("012345")
    assert written(load(str(folder / "**" / "*.jsonl"))) == ["3", "4", "5", "100"]
    (folder / "[a].jsonl").write_text('{"text": "itself"}\n')
    assert written(load(str(folder / "[a].jsonl"))) == ["itself"]  # a file that exists is no pattern


def test_a_bad_row_is_named_by_its_file(folder: Path) -> None:
    with (folder / "b.jsonl").open("a") as file:
        file.write('{"text": 5}\n')
    assert f"line 4 of {folder / 'b.jsonl'}" in refusal(folder)


def test_a_file_without_rows_in_a_folder_does_no_harm(folder: Path) -> None:
    (folder / "aa.jsonl").touch()
    (folder / "zz.jsonl").touch()
    assert len(load(folder)) == 13


NOT_THERE = {
    "missing": ("missing.jsonl", "must be an existing file, got '{}'."),
    "empty folder": ("more", "which is a folder without one: their names end in .jsonl"),
    "no match": ("x*.jsonl", "must match at least one file, got the pattern '{}', which matches none. Check the path"),
    "weight": ("rows.jsonl=many", "must have a positive number as its weight, or 0 to leave it out, got '{}'"),
    "negative weight": ("rows.jsonl=-1", "must have a positive number as its weight, or 0 to leave it out, got '{}'"),
    "infinite weight": ("rows.jsonl=inf", "must have a positive number as its weight, or 0 to leave it out, got '{}'"),
    "no weight": ("rows.jsonl=", "must have a positive number as its weight, or 0 to leave it out, got '{}'"),
    "weight of 0": ("rows.jsonl=0", "must have weights with a sum above 0, got 0. Give at least one source"),
}


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_is_not_there_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "rows.jsonl", OTHERS)
    path, said = NOT_THERE[name]
    message = refusal(str(tmp_path / path))
    assert message.startswith("`dataset` must ")
    assert said.format(tmp_path / path) in message


def test_a_name_with_a_sign_for_weights_is_a_name_if_it_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a=0.5", OTHERS).rename(tmp_path / "x=1.jsonl")
    assert len(load(str(tmp_path / "x=1.jsonl"))) == 3
    assert len(load(str(tmp_path / "x=1.jsonl=0.5"))) == 3
    assert "must be an existing file" in refusal(str(tmp_path / "date=5" / "rows.jsonl"))


# --- Several sources --------------------------------------------------------------------------------------------------


def test_several_sources_are_read_in_order_and_their_formats_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    loaded = load(numbered(2, 50))
    chats = [{"messages": [turn("user", "hi"), turn("assistant", "yes")]}]
    capsys.readouterr()
    documents = load([path, OTHERS, loaded[np.array([1, 0])], str(path), chats], CHAT)
    alone = [texts(load(part, CHAT)) for part in (path, OTHERS, numbered(2, 50), chats)]
    assert texts(documents) == [*alone[0], *alone[1], *reversed(alone[2]), *alone[0], *alone[3]]
    said = capsys.readouterr().err
    assert f"{path}: 7 rows of prompt and completion\ndataset 2 of 5: 3 rows of plain text\n" in said
    assert "dataset 3 of 5: 2 documents\n" in said
    assert "dataset 5 of 5: 1 row of messages\n" in said


@pytest.mark.parametrize("mark", [lambda path, weight: f"{path}={weight}", lambda path, weight: (path, weight)])
def test_a_mix_has_the_shares_of_its_weights_and_no_row_twice(
    mark: Callable[[Path, float], Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    many, few = (write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in PARTS.items())
    given = [mark(many, 7), mark(few, 3)]
    drawn = written(load(given))
    assert len(set(drawn)) == len(drawn) == 100
    assert sum(int(row) < 1000 for row in drawn) == 70
    assert drawn[70:] == [row["text"] for row in PARTS["few"]]  # it runs out first
    assert f"70 of 100 rows of {many} (70.0%), 30 of 30 rows of {few} (30.0%); {few} runs out first" in said(capsys)
    assert written(load(given)) == drawn
    assert written(load(given, seed=1)) != drawn
    assert written(load([mark(few, 0), mark(many, 2)])) == [row["text"] for row in PARTS["many"]]


PARTS = {"many": numbered(100), "few": numbered(30, 1000)}


def said(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_source_with_a_small_weight_gives_a_row() -> None:
    drawn = written(load([(numbered(20), 1.0), (numbered(5, 1000), 1e-6)]))
    assert (len(drawn), sum(int(row) >= 1000 for row in drawn)) == (21, 1)


def test_rows_without_a_token_to_learn_do_not_count_in_a_mix() -> None:
    idle = [{"input_ids": [3, 4], "labels": [-100, -100]}] * 50
    drawn = load([([*idle, {"input_ids": [5, 6], "labels": [5, 6]}] * 2, 0.5), (numbered(100), 0.5)])
    assert len(drawn) == 4
    assert "got 50 rows with none" in refusal([numbered(3), idle])
    assert "row 0 of dataset 2 of 2" in refusal([numbered(3), idle])


def test_documents_that_belong_together_are_drawn_together() -> None:
    drawn = [int(row) for row in written(load([(numbered(90), 1), (numbered(30, 900), 1)], documents_together=3))]
    assert len(drawn) == 60
    groups = np.reshape(drawn, (-1, 3))
    assert not (groups[:, 0] % 3).any()
    assert (np.diff(groups, axis=1) == 1).all()
    assert "multiple of 4 documents" in refusal([(numbered(90), 1), (numbered(40, 900), 1)], documents_together=4)


def test_weights_are_for_all_sources_or_for_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", OTHERS)
    message = refusal([f"{path}=0.5", str(path)])
    assert f"must have a weight for each of its 2 sources, or for none, got '{path}' without one" in message
    assert "must have weights with a sum above 0, got 0, 0" in refusal([f"{path}=0", f"{path}=0"])


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list:
    """Puts a module in the place of `datasets`, which notes what is asked for."""
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> list[dict]:
        asked.append((path, name, split, *(["streaming"] if streaming else [])))
        if path == "org/broken":
            raise ValueError("Config name is missing.\nPlease pick one.")
        return OTHERS

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_stream_of_the_hub_is_not_downloaded_first(hub: list) -> None:
    stream = DocumentStream("org/name:train", RowEncoder(PLAIN, VOCABULARY))
    assert len(list(itertools.islice(stream, 2 * len(OTHERS)))) == 2 * len(OTHERS)
    assert hub == [("org/name", None, "train", "streaming")] * 2


def test_a_dataset_of_the_hub_is_loaded_by_its_split(hub: list, capsys: pytest.CaptureFixture) -> None:
    for given in ("org/name-1.0:train", "org/name:main:train[:5%]", "org/name:test=2"):
        assert texts(load(given)) == texts(load(OTHERS))
    assert hub == [("org/name-1.0", None, "train"), ("org/name", "main", "train[:5%]"), ("org/name", None, "test")]
    assert "org/name-1.0:train: 3 rows of plain text\n" in capsys.readouterr().err
    message = refusal("org/broken:train")
    assert "got 'org/broken:train': Config name is missing. Please pick one." in message
    assert "'org/name:configuration:train'" in message
    assert "If it is on the hub, write 'org/name:train'." in refusal("org/name")


def test_a_dataset_of_the_hub_needs_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal("org/name:train")
    assert "`dataset` 'org/name:train' needs the Python package datasets, which is not installed" in message
    assert "jaxpack[datasets]" in message


# --- Rows that are held out -------------------------------------------------------------------------------------------


def test_held_out_rows_are_a_share_and_are_not_trained_on() -> None:
    documents = load(numbered(100))
    trained, held = hold_out(documents, 0.13, seed=3)
    assert (len(trained), len(held)) == (87, 13)
    assert sorted([*written(trained), *written(held)], key=int) == written(documents)
    assert written(hold_out(documents, 0.13, seed=3)[1]) == written(held)
    assert written(hold_out(documents, 0.13, seed=4)[1]) != written(held)
    for share, count in ((1e-9, 1), (1 - 1e-9, 99)):
        assert len(hold_out(documents, share, seed=3)[1]) == count
    groups = np.reshape(
        [int(row) for row in written(hold_out(documents, 0.1, documents_together=5, seed=3)[1])], (2, 5)
    )
    assert not (groups[:, 0] % 5).any()
    with pytest.raises(InputError, match=r"`eval_split` must leave a row to train on and one .* got 0.5 of 1\."):
        hold_out(load(OTHERS[:1]), 0.5, seed=3)


# --- Progress, memory and batches -------------------------------------------------------------------------------------


def test_a_log_has_lines_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(4000))
    load(path)
    assert "so far" not in capsys.readouterr().err  # it was read within ten seconds
    monkeypatch.setattr(reading_progress, "_EVERY", 0)
    load(path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "so far" in line]
    assert len(lines) == 4
    assert lines[1].startswith(f"reading {path}: 2,048 rows of plain text so far, ")
    assert lines[1].endswith(" rows/s")
    shares = [int(line.split("so far, ")[1].split("%")[0]) for line in lines]
    assert shares == sorted(shares)
    assert 20 < shares[0] < shares[-1] == 100


class Row(dict):
    """Counts the rows that are alive."""

    alive = most = 0

    def __init__(self, *given: Any):
        super().__init__(*given)
        Row.alive += 1
        Row.most = max(Row.most, Row.alive)

    def __del__(self):
        Row.alive -= 1


def test_rows_are_not_held_in_memory() -> None:
    documents = load(Row(row) for row in numbered(10_000))
    assert len(documents) == 10_000
    assert Row.most <= 2 * 1024 + 1


def test_long_rows_come_in_smaller_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{row} " + "ab " * 1000} for row in range(20)])
    calls = type(PLAIN).__call__

    def count(self: Any, batch: Any, **options: Any) -> Any:
        sizes.append(sum(map(len, batch)))
        return calls(self, batch, **options)

    monkeypatch.setattr(type(PLAIN), "__call__", count)
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 10_000)
    assert len(load(path)) == 20
    assert max(sizes) < 10_000 + 3010  # the last row may go beyond


def test_rows_are_tokenised_in_batches_as_they_are_alone() -> None:
    given = [{"text": " the cab" * (row % 7) + f" {row} ab é"} for row in range(1500)]
    documents = load(given)
    assert [tokens for row in given for tokens in [*PLAIN(row["text"]).input_ids, PLAIN.eos_token_id]] == (
        documents.tokens.tolist()
    )
    chats = [
        {"messages": [turn("user", f"the {row}"), turn("assistant", "ab " * (row % 5 + 1))]} for row in range(1100)
    ]
    together = load(chats, CHAT)
    for row in range(0, 1100, 275):
        alone = load(chats[row : row + 1], CHAT)
        span = slice(together.starts[row], together.starts[row] + together.lengths[row])
        np.testing.assert_array_equal(together.tokens[span], alone.tokens)
        np.testing.assert_array_equal(together.labels[span], alone.labels)
