"""A dataset is read from a file or from rows; a line or row that cannot be read is named in the error."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from loaded_documents import CHAT, PLAIN, as_arrow, load, refusal, texts, tokens_of, turn, write_parquet
from models import random_documents

from jaxpack.data.batching import Batches
from jaxpack.data.packing import Rows, fill_batch
from jaxpack.data.reading import load_documents
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig


def test_rows_beyond_one_chunk_of_the_tokenizer_keep_their_order() -> None:
    rows = [{"text": f"{row}"} for row in range(2500)]
    assert [whole for whole, _ in texts(load(rows))] == [f"{row}<eos>" for row in range(2500)]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_bad_row_of_a_parquet_file_is_named_by_its_index(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [{"text": "ab"}, {"text": None}])
    assert f"row 1 of {path}" in refusal(path)


def test_a_bad_row_beyond_the_first_chunk_is_named_by_its_index() -> None:
    assert "row 2001 of" in refusal([{"text": "ab"}] * 2001 + [{"text": 1}])


@pytest.mark.parametrize("rows", [[[5]], [5], [None], ({"text": "ab"}, "the cab")], ids=["list", "int", "none", "str"])
def test_a_row_that_is_no_mapping_is_named(rows: list) -> None:
    message = refusal(rows)
    assert f"row {len(rows) - 1} of " in message
    assert repr(rows[-1]).strip("[]") in message


def test_a_mapping_of_columns_or_of_splits_is_no_dataset() -> None:
    for dataset in ({"text": ["ab"]}, {"train": as_arrow([{"text": "ab"}])}):
        message = refusal(dataset)
        assert "dataset" in message
        assert "'t'" not in message


@pytest.mark.parametrize("what", ["list", "generator", "jsonl", "blank_jsonl", "parquet"])
def test_an_empty_dataset_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n\n")
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    empty = {
        "list": [],
        "generator": iter(()),
        "jsonl": tmp_path / "empty.jsonl",
        "blank_jsonl": tmp_path / "blank.jsonl",
        "parquet": tmp_path / "empty.parquet",
    }[what]
    message = refusal(empty)
    assert "at least one row" in message
    assert (str(empty) if isinstance(empty, Path) else "the dataset") in message


BAD_LINES = {
    "cut_off": (b'{"text": ', "JSON object"),
    "no_json": (b"the cab", "JSON object"),
    "two_objects": (b'{"text": "ab"} {"text": "ab"}', "JSON object"),
    "latin_1": ('{"text": "é"}'.encode("latin-1"), "0xe9"),
    "surrogate": (b'{"text": "\xed\xa0\xbd"}', "JSON object"),  # not UTF-8
    "surrogate_alone": (b'"\xed\xa0\xbd"', "JSON object"),
    "list": (b"[1, 2]", "got '[1, 2]'"),
    "string": (b'"text"', "got '\"text\"'"),
    "null": (b"null", "got 'null'"),
    "deep": (b"[" * 100_000, "JSON object"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_json_object_is_named(name: str, tmp_path: Path) -> None:
    line, shown = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ab"}\n\n\n' + line + b'\n{"text": "ab"}\n')
    message = refusal(path)
    assert f"ine 4 of {path}" in message
    assert shown in message
    assert len(message) < 400 + len(str(path))


def test_a_bad_line_is_given_one_line_number(tmp_path: Path) -> None:
    # The JSON parser sees only one line and always calls it line 1.
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ab"}\n\n{"text": ab}\n')
    message = refusal(path)
    assert "Line 3" in message
    assert "line 1 " not in message


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte_order_mark"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n"], ids=["lf", "crlf", "blank_lines"])
def test_line_endings_and_a_byte_order_mark_do_not_matter(begin: bytes, ending: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(begin + b'{"text": "ab"}' + ending + '{"text": "é"}'.encode())  # the last line need not end
    assert [whole for whole, _ in texts(load(path))] == ["ab<eos>", "é<eos>"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.jsonl", "must be an existing file"),
        (".", "which is a folder without one"),
        ("rows.txt", "must end in .jsonl, .json, .csv or .parquet"),
    ],
    ids=["missing", "folder", "unknown_suffix"],
)
def test_a_path_that_is_no_data_file_is_named(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text('{"text": "ab"}\n')
    message = refusal(tmp_path / name)
    assert said in message
    assert repr(str(tmp_path / name)) in message


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut_off", "footer", "page"])
def test_a_broken_parquet_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": f"row {row}"} for row in range(2000)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "garbage": b"the cab " * 100,
            "cut_off": whole[: len(whole) // 2],
            "footer": whole[:-60] + b"\xff" * 40 + whole[-20:],
            "page": whole[:100] + b"\xff" * 500 + whole[600:],
        }[damage]
    )
    message = refusal(path)
    assert str(path) in message
    assert "Parquet" in message


@pytest.mark.parametrize("begin", ["[", "\n [", "\ufeff["], ids=["array", "indented", "byte_order_mark"])
def test_a_json_array_is_told_from_json_lines(begin: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(begin + '\n  {"text": "ab"},\n {"text": "c"}\n]\n')
    assert len(load(path)) == 2
    path.write_text(begin + '\n  {"text": "ab"}, 5]')
    assert refusal(path) == f"Each item of the array in {path} must be an object, got 5 as item 1."
    path.write_text(begin + '\n  {"text": "ab"}\n')
    assert f"{path} must be JSON Lines, or one JSON array of objects" in refusal(path)
    path.write_text(begin + "]")
    assert "must have at least one row" in refusal(path)


def test_what_has_no_rows_is_refused() -> None:
    assert refusal(5) == "`dataset` must be a file or an iterable of rows, got 5."
    assert (
        refusal(load([{"input_ids": [3, 4]}])[np.arange(0)]) == "`dataset` must have at least one document, got none."
    )


def test_text_past_the_models_vocabulary_is_named() -> None:
    message = refusal([{"text": "a"}, {"text": "the"}], vocab_size=260)
    assert "row 1 of the dataset" in message
    assert "[0, 260)" in message
    assert "got 261" in message


# A row with nothing to learn, and the text by which the message shows it.
NOTHING_TO_LEARN = {
    "labels_masked": ([{"input_ids": PLAIN("the cab").input_ids, "labels": [-100] * 4}], "'the cab'"),
    "only_the_first_token": ([{"input_ids": [3, 4, 5], "labels": [3, -100, -100]}], "'!\"#'"),
    "no_tokens": ([{"input_ids": [], "labels": []}], "''"),
    "empty_text": ([{"text": ""}], "'<eos>'"),
    "no_answer": ([{"messages": [turn("user", "hi")]}], "'user\\nhi"),
}


@pytest.mark.parametrize("name", NOTHING_TO_LEARN)
def test_rows_with_nothing_to_learn_are_left_out_and_counted_aloud(name: str, capsys: pytest.CaptureFixture) -> None:
    empty, shown = NOTHING_TO_LEARN[name]
    good = {
        "text": {"text": "ab."},
        "messages": {"messages": [turn("user", "hi"), turn("assistant", "yes")]},
    }.get(next(iter(empty[0])), {"input_ids": [3, 4, 5], "labels": [3, 4, 5]})
    documents = load([good, *empty, good, *empty], CHAT)
    assert texts(documents) == texts(load([good, good], CHAT))
    said = capsys.readouterr().err
    assert "2 of 4 rows have nothing to learn" in said
    assert "row 1 of the dataset" in said
    assert shown in said
    assert Batches(documents, TrainConfig()).documents.num_targets.all()
    message = refusal(2 * empty, CHAT)
    assert "got 2 rows with none" in message
    assert "row 0 of the dataset" in message
    assert shown in message


def test_documents_that_were_loaded_are_taken_as_they_are():
    documents = random_documents([3, 5])
    assert load_documents(documents, None, vocab_size=1000) is documents
    largest = int(documents.tokens.max())
    with pytest.raises(InputError, match=re.escape(f"tokens in [0, {largest}), the model's vocabulary, got {largest}")):
        load_documents(documents, None, vocab_size=largest)


@pytest.mark.parametrize(("name", "wrong"), [("tokens", -100), ("tokens", -1), ("labels", -1), ("labels", 1000)])
def test_documents_that_were_loaded_have_no_id_outside_of_the_vocabulary(name: str, wrong: int):
    """With an id outside of the vocabulary, a model would read another token, or its loss would be NaN."""
    documents = random_documents([3, 5])
    ids = getattr(documents, name).copy()
    ids[4] = wrong
    with pytest.raises(InputError, match=re.escape(f"{name} in [0, 1000), the model's vocabulary, got {wrong}")):
        load_documents(dataclasses.replace(documents, **{name: ids}), None, vocab_size=1000)


# --- Batches as TRL's collator makes them -----------------------------------------------------------------------------

# Golden cases from TRL's tests (tests/test_sft_trainer.py). TRL's labels are not shifted, and are -100 at the first
# token of each document; our `targets` are these labels shifted by one.
COLLATOR_CASES = {
    "padded": {
        "input_ids": [[1, 2, 3], [4, 5]],
        "rows": [[0, -1], [1, -1]],
        "tokens": [[1, 2, 3], [4, 5, 0]],
        "positions": [[0, 1, 2], [0, 1, 0]],
        "labels": [[1, 2, 3], [4, 5, -100]],
    },
    "padding_free": {
        "input_ids": [[1, 2, 3], [4, 5]],
        "rows": [[0, 1]],
        "tokens": [[1, 2, 3, 4, 5]],
        "positions": [[0, 1, 2, 0, 1]],
        "labels": [[-100, 2, 3, -100, 5]],
    },
    "two_packed_rows": {
        "input_ids": [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12]],
        "rows": [[0, 1], [2, 3]],
        "tokens": [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]],
        "positions": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]],
        "labels": [[-100, 2, 3, -100, 5, 6], [-100, 8, 9, 10, -100, 12]],
    },
    "padding_free_to_a_multiple": {
        "input_ids": [[1, 2, 3], [4, 5]],
        "rows": [[0, 1]],
        "tokens": [[1, 2, 3, 4, 5, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 1, 0, 0, 0]],
        "labels": [[-100, 2, 3, -100, 5, -100, -100, -100]],
    },
    "completion_only": {
        "input_ids": [[1, 2, 3, 4]],
        "given_labels": [[-100, -100, 3, 4]],
        "rows": [[0]],
        "tokens": [[1, 2, 3, 4]],
        "positions": [[0, 1, 2, 3]],
        "labels": [[-100, -100, 3, 4]],
    },
}


def shifted(labels: list[list[int]]) -> list[list[int]]:
    return [[*row[1:], -100] for row in labels]


@pytest.mark.parametrize("name", COLLATOR_CASES)
def test_batches_hold_what_trls_collator_makes(name: str) -> None:
    case = COLLATOR_CASES[name]
    labels = case.get("given_labels", case["input_ids"])
    rows = [{"input_ids": ids, "labels": of} for ids, of in zip(case["input_ids"], labels, strict=True)]
    documents = load(rows, None)
    plan = Rows.grouped(np.array(case["rows"]), documents.lengths)
    row_length = len(case["tokens"][0])
    batch = fill_batch(
        documents.tokens, documents.labels, documents.starts, plan, np.arange(len(case["rows"])), row_length
    )
    np.testing.assert_array_equal(batch.tokens, case["tokens"])
    np.testing.assert_array_equal(batch.positions, case["positions"])
    np.testing.assert_array_equal(batch.targets, shifted(case["labels"]))


@pytest.mark.parametrize(
    "settings",
    [{"packing": True}, {"padding_free": True}, {"padding_free": False}],
    ids=["packed", "padding_free", "padded"],
)
def test_a_batch_holds_each_document_once_with_targets_shifted_by_one(settings: dict) -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [6, 7, 8, 9], "labels": [-100, -100, 8, 9]}]
    batch = Batches(load(rows, None), TrainConfig(num_train_epochs=1, **settings))[0]
    found = set()
    flat = [array.reshape(-1, array.shape[-1]) for array in batch]
    for tokens, segments, positions, targets in zip(*flat, strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            at = segments == segment
            np.testing.assert_array_equal(positions[at], np.arange(at.sum()))
            found.add((*tokens[at].tolist(), "->", *targets[at].tolist()))
        assert set(targets[segments == 0].tolist()) <= {-100}
    assert found == {
        (1, 2, 3, "->", 2, 3, -100),
        (4, 5, "->", 5, -100),
        (6, 7, 8, 9, "->", -100, 8, 9, -100),
    }


def test_a_row_that_truncation_leaves_without_targets_is_dropped_and_counted() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
        {"input_ids": [6, 7, 8], "labels": [6, 7, 8]},
    ]
    batches = Batches(load(rows, None), TrainConfig(max_length=3, num_train_epochs=1))
    assert [tokens_of(batches.documents, which) for which in range(len(batches.documents))] == [[6, 7, 8]]
    assert (batches.truncation.documents, batches.truncation.tokens, batches.truncation.dropped) == (1, 2, 1)


def test_all_documents_cut_before_their_first_target_are_refused() -> None:
    documents = load([{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}], None)
    with pytest.raises(InputError, match=r"`max_length`.*got 3"):
        Batches(documents, TrainConfig(max_length=3))
