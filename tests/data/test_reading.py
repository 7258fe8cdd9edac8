"""Records become the documents that their format says, and records that cannot are refused with the row named."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from models import random_documents
from tokenizers import normalizers, processors
from tokenizers_for_tests import BOS, EOS, TURN_ENDS, small_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxpack.data.batching import Batches
from jaxpack.data.packing import Rows, fill_batch
from jaxpack.data.reading import Documents, load_documents
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig

PLAIN, CHAT = small_tokenizer(), small_tokenizer(chat=True)
VOCABULARY = len(PLAIN)
EOS_ID = PLAIN.eos_token_id


def load(dataset: Any, tokenizer: PreTrainedTokenizerFast | None = PLAIN, **options: Any) -> Documents:
    return load_documents(dataset, tokenizer, **({"vocab_size": VOCABULARY} | options))


def as_arrow(rows: list[dict]) -> Any:
    """The rows as a `datasets.Dataset`; imported here, since a GPU machine may not have it."""
    import datasets

    return datasets.Dataset.from_list(rows)


def tokens_of(documents: Documents, which: int) -> list[int]:
    return documents.tokens[documents.starts[which] :][: documents.lengths[which]].tolist()


def labels_of(documents: Documents, which: int) -> list[int]:
    return documents.labels[documents.starts[which] :][: documents.lengths[which]].tolist()


def texts(documents: Documents) -> list[tuple[str, str]]:
    """Of each document: all of it, and what is trained on, both decoded."""
    return [
        (
            PLAIN.decode(tokens_of(documents, which)),
            PLAIN.decode([label for label in labels_of(documents, which) if label != -100]),
        )
        for which in range(len(documents))
    ]


def pieces(documents: Documents, which: int = 0) -> list[str]:
    return PLAIN.convert_ids_to_tokens(tokens_of(documents, which))


def write_jsonl(path: Path, rows: Iterable[Any], between: str = "\n") -> Path:
    path.write_text(between.join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- Formats ----------------------------------------------------------------------------------------------------------

# Two rows of each format, and of each row: the whole document, and what is trained on.
FORMATS: dict[str, tuple[list[dict], list[tuple[str, str]]]] = {
    "text": (
        [{"text": "the cab"}, {"text": "é 😀"}],
        [("the cab<eos>", "the cab<eos>"), ("é 😀<eos>", "é 😀<eos>")],
    ),
    "custom_text_field": (
        [{"body": "the cab", "text_id": 1}, {"body": "ab", "text_id": 2}],
        [("the cab<eos>", "the cab<eos>"), ("ab<eos>", "ab<eos>")],
    ),
    "prompt_completion": (
        [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "the", "completion": " cab"}],
        [("2 + 2 = 4<eos>", " 4<eos>"), ("the cab<eos>", " cab<eos>")],
    ),
    "prompt_completion_messages": (
        [
            {"prompt": [turn("user", "hi")], "completion": [turn("assistant", "yes")]},
            {"prompt": [turn("system", "be"), turn("user", "?")], "completion": [turn("assistant", "no")]},
        ],
        [
            ("user\nhi<|im_end|>\nassistant\nyes<|im_end|>\n", "yes<|im_end|>"),
            ("system\nbe<|im_end|>\nuser\n?<|im_end|>\nassistant\nno<|im_end|>\n", "no<|im_end|>"),
        ],
    ),
    "messages": (
        [
            {"messages": [turn("user", "hi"), turn("assistant", "yes")]},
            {"messages": [turn("user", "?"), turn("assistant", "no"), turn("user", "!")]},
        ],
        [
            ("user\nhi<|im_end|>\nassistant\nyes<|im_end|>\n", "yes<|im_end|>"),
            ("user\n?<|im_end|>\nassistant\nno<|im_end|>\nuser\n!<|im_end|>\n", "no<|im_end|>"),
        ],
    ),
    "input_ids": (
        [{"input_ids": PLAIN("the cab").input_ids}, {"input_ids": PLAIN("ab.").input_ids}],
        [("the cab", "the cab"), ("ab.", "ab.")],  # taken as they are: no EOS
    ),
    "input_ids_labels": (
        [
            {"input_ids": PLAIN("the cab").input_ids, "labels": [-100, -100, *PLAIN("the cab").input_ids[2:]]},
            {"input_ids": PLAIN("x y").input_ids, "labels": [-100, *PLAIN("x y").input_ids[1:]]},
        ],
        [("the cab", "cab"), ("x y", " y")],
    ),
}


def _jsonl(rows: list[dict], folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", rows)


def _parquet(rows: list[dict], folder: Path) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def _generator(rows: list[dict], _: Path) -> Iterator[dict]:
    return (row for row in rows)


SOURCES = {
    "jsonl": _jsonl,
    "jsonl_str": lambda rows, folder: str(_jsonl(rows, folder)),
    "parquet": _parquet,
    "list": lambda rows, _: rows,
    "dataset": lambda rows, _: as_arrow(rows),
    "generator": _generator,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_every_source(name: str, source: str, tmp_path: Path) -> None:
    rows, expected = FORMATS[name]
    options = {"text_field": "body"} if name == "custom_text_field" else {}
    documents = load(SOURCES[source](rows, tmp_path), CHAT, **options)
    assert texts(documents) == expected
    assert documents.tokens.dtype == documents.labels.dtype == np.int32
    assert documents.starts.dtype == documents.lengths.dtype == np.int64
    assert len(documents) == 2 and documents.num_tokens == len(documents.tokens) == documents.lengths.sum()


def test_input_ids_need_no_tokenizer() -> None:
    documents = load([{"input_ids": np.array([5, 6, 7])}, {"input_ids": (8, 9)}], None)
    np.testing.assert_array_equal(documents.tokens, [5, 6, 7, 8, 9])
    np.testing.assert_array_equal(documents.starts, [0, 3])


def test_labels_that_differ_from_the_tokens_are_kept_and_become_the_targets() -> None:
    documents = load([{"input_ids": [5, 6, 7, 8], "labels": [-100, 60, -100, 80]}], None)
    assert labels_of(documents, 0) == [-100, 60, -100, 80]
    np.testing.assert_array_equal(Batches(documents, TrainConfig())[0].targets[0, 0, :4], [60, -100, 80, -100])


@pytest.mark.parametrize("labels", [None, "left out"])
def test_input_ids_without_labels_train_on_every_token(labels: str | None) -> None:
    row = {"input_ids": [5, 6, 7]} | ({"labels": None} if labels is None else {})
    assert labels_of(load([row], None), 0) == [5, 6, 7]


def test_rows_beyond_one_chunk_of_the_tokenizer_keep_their_order() -> None:
    rows = [{"text": f"{row}"} for row in range(2500)]
    assert [whole for whole, _ in texts(load(rows))] == [f"{row}<eos>" for row in range(2500)]


# --- Tokens and masks -------------------------------------------------------------------------------------------------


def test_golden_tokens() -> None:
    assert pieces(load([{"text": "ab the cab"}])) == ["ab", "Ġthe", "Ġ", "c", "ab", EOS]


@pytest.mark.parametrize(
    "row",
    [{"text": "the cab"}, {"text": f"the cab{EOS}"}, {"prompt": "the", "completion": f" cab{EOS}"}],
    ids=["text", "text_that_has_it", "completion_that_has_it"],
)
def test_eos_ends_a_document_exactly_once(row: dict) -> None:
    tokens = tokens_of(load([row]), 0)
    assert tokens[-1] == EOS_ID and tokens.count(EOS_ID) == 1


def test_no_eos_is_appended_where_the_tokenizer_has_none() -> None:
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    assert pieces(load([{"text": "ab."}], tokenizer)) == ["ab", "."]


def test_eos_of_the_post_processor_is_neither_doubled_nor_taken_for_a_part_of_the_prompt() -> None:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, EOS_ID)]
    )
    assert texts(load([{"prompt": "the", "completion": " cab"}], tokenizer)) == [("the cab<eos>", " cab<eos>")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "the cab"}, ("<bos>the cab<eos>", "<bos>the cab<eos>")),
        ({"prompt": "the", "completion": " cab"}, ("<bos>the cab<eos>", " cab<eos>")),
    ],
    ids=["text", "prompt_completion"],
)
def test_bos_begins_a_document_exactly_once(row: dict, expected: tuple[str, str]) -> None:
    assert texts(load([row], small_tokenizer(bos=True))) == [expected]


@pytest.mark.parametrize("name", ["messages", "prompt_completion_messages"])
def test_a_chat_templates_own_bos_is_not_doubled(name: str) -> None:
    rows, expected = FORMATS[name]
    tokenizer = small_tokenizer(bos=True, chat=True)
    documents = load(rows, tokenizer)
    assert [whole for whole, _ in texts(documents)] == [BOS + whole for whole, _ in expected]
    for which in range(len(rows)):
        assert pieces(documents, which).count(BOS) == 1


def test_special_tokens_of_a_chat_template_are_single_tokens() -> None:
    assert pieces(load([{"messages": [turn("user", "ab"), turn("assistant", "")]}], CHAT)).count(TURN_ENDS) == 2


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("the ca", "b the", "ab the<eos>"),  # "a" and "b" are one token, which is trained on
        ("c ", "the", " the<eos>"),
        ("the c", "ab", "ab<eos>"),  # a border between tokens
        ("", "the", "the<eos>"),
        ("the", "", "<eos>"),
    ],
)
def test_a_token_that_straddles_prompt_and_completion_is_trained_on(prompt: str, completion: str, trained: str) -> None:
    assert texts(load([{"prompt": prompt, "completion": completion}])) == [(f"{prompt}{completion}<eos>", trained)]


# --- Documents --------------------------------------------------------------------------------------------------------


def documents_of(labels: list[list[int]]) -> Documents:
    """Documents with these labels, whose tokens count up from 1."""
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
    assert documents.num_tokens == 13  # it is a copy that was cut


@pytest.mark.parametrize("as_mask", [False, True])
def test_indexing_selects_documents(as_mask: bool) -> None:
    documents = documents_of(LABELS)
    chosen = [1, 3, 5]
    selected = documents[np.isin(np.arange(6), chosen) if as_mask else np.array(chosen)]
    assert [labels_of(selected, which) for which in range(len(selected))] == [LABELS[which] for which in chosen]
    assert [tokens_of(selected, which) for which in range(3)] == [tokens_of(documents, which) for which in chosen]
    assert selected.num_tokens == 8 and selected.num_targets.tolist() == [1, 0, 2]


# --- Batches as TRL's collator makes them -----------------------------------------------------------------------------

# Golden cases of TRL's tests (tests/test_sft_trainer.py): labels there are unshifted, and -100 at each document's first
# token. `targets` here are those labels, shifted by one.
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


# --- What is refused --------------------------------------------------------------------------------------------------


def refusal(dataset: Any, tokenizer: PreTrainedTokenizerFast | None = PLAIN, **options: Any) -> str:
    """The message that a dataset is refused with: one sentence."""
    with pytest.raises(InputError) as caught:
        load(dataset, tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and not message.endswith(".."), message
    return message


# (rows, the first bad one, what the message says)
BAD_ROWS = {
    "unknown_fields": ([{"question": "a", "answer": "b"}], 0, ["`prompt` and `completion`", "['answer', 'question']"]),
    "prompt_alone": ([{"prompt": "a"}], 0, ["`prompt` and `completion`", "['prompt']"]),
    "field_missing_later": ([{"text": "ab"}, {"txt": "ab"}], 1, ["`text`", "['txt']"]),
    "completion_missing_later": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
        1,
        ["`completion`", "['prompt']"],
    ),
    "text_is_a_number": ([{"text": "ab"}, {"text": 5}], 1, ["`text` must be a str", "got 5"]),
    "text_is_null": ([{"text": "ab"}, {"text": None}], 1, ["`text` must be a str", "got None"]),
    "completion_is_null": ([{"prompt": "a", "completion": None}], 0, ["`completion` must be a str", "got None"]),
    "prompt_is_a_number": ([{"prompt": 1, "completion": "b"}], 0, ["`prompt` must be a str or list", "got 1"]),
    "completion_of_the_other_kind": (
        [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}],
        0,
        ["`completion` must be a str", "got [{'role'"],
    ),
    "messages_are_text": ([{"messages": "hi"}], 0, ["`messages` must be a list", "got 'hi'"]),
    "ids_are_text": ([{"input_ids": [1, 2]}, {"input_ids": "1 2"}], 1, ["`input_ids` must be a list", "got '1 2'"]),
    "ids_are_floats": ([{"input_ids": [1.0, 2.0]}], 0, ["`input_ids`", "integers", "got [1.0, 2.0]"]),
    "ids_are_strings": ([{"input_ids": ["1", "2"]}], 0, ["`input_ids`", "integers", "got ['1', '2']"]),
    "ids_are_booleans": ([{"input_ids": [True, False]}], 0, ["`input_ids`", "integers", "got [True, False]"]),
    "ids_hold_a_null": ([{"input_ids": [1, 2]}, {"input_ids": [1, None]}], 1, ["`input_ids`", "got [1, None]"]),
    "ids_are_nested": ([{"input_ids": [[1, 2], [3, 4]]}], 0, ["`input_ids`", "flat", "got [[1, 2], [3, 4]]"]),
    "ids_are_ragged": ([{"input_ids": [[1, 2], [3]]}], 0, ["`input_ids`", "flat", "got [[1, 2], [3]]"]),
    "ids_exceed_64_bits": ([{"input_ids": [1, 2**64]}], 0, ["`input_ids`", "18446744073709551616"]),
    "labels_of_other_length": (
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2, 3], "labels": [1, 2]}],
        1,
        ["`labels`", "(3)", "got 2"],
    ),
    "labels_missing_later": (  # it would be trained on whole, prompt and all
        [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2]}],
        1,
        ["`labels`", "['input_ids']"],
    ),
    "labels_are_floats": ([{"input_ids": [1, 2], "labels": [1.0, 2.0]}], 0, ["`labels`", "integers", "[1.0, 2.0]"]),
    "labels_are_text": ([{"input_ids": [1, 2], "labels": "ab"}], 0, ["`labels` must be a list", "got 'ab'"]),
    "id_past_the_vocabulary": (
        [{"input_ids": [1, 2]}, {"input_ids": []}, {"input_ids": [5, 263, 999]}],
        2,
        ["Token ids", "[0, 263)", "got 263"],
    ),
    "id_past_32_bits": ([{"input_ids": [1, 2**32 + 1]}], 0, ["Token ids", "[0, 263)", "got 4294967297"]),
    "negative_id": ([{"input_ids": [1, 2]}, {"input_ids": [1, -2]}], 1, ["Token ids", "[0, 263)", "got -2"]),
    "minus_100_as_an_id": ([{"input_ids": [1, -100]}], 0, ["Token ids", "[0, 263)", "got -100"]),
    "label_past_the_vocabulary": (
        [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 263]}],
        1,
        ["Labels", "[0, 263)", "got 263"],
    ),
    "negative_label": ([{"input_ids": [1, 2, 3], "labels": [-100, -1, 3]}], 0, ["Labels", "-100", "got -1"]),
    "padding_that_is_masked": (
        [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [1, 0], "attention_mask": [1, 0]}],
        1,
        ["without padding", "got `attention_mask` with zeros"],
    ),
    "a_prompt_that_is_masked": (
        [{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}],
        0,
        ["with `labels`, -100 where", "got `completion_mask` with zeros"],
    ),
    "a_user_who_is_masked": (
        [{"input_ids": [1, 2, 3], "assistant_masks": [0, 1, 1]}],
        0,
        ["with `labels`, -100 where", "got `assistant_masks` with zeros"],
    ),
    "text_that_is_no_unicode": ([{"text": "ab"}, {"text": "half an emoji: \ud83d"}], 1, ["half an emoji"]),
}


@pytest.mark.parametrize("source", ["list", "jsonl"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_rule_and_its_value(name: str, source: str, tmp_path: Path) -> None:
    rows, bad, fragments = BAD_ROWS[name]
    if source == "list":
        message, where = refusal(rows), f"row {bad} of the dataset"
    else:
        # A blank line after each row is skipped, and yet counted.
        path = write_jsonl(tmp_path / "rows.jsonl", rows, between="\n\n")
        message, where = refusal(path), f"line {2 * bad + 1} of {path}"
    assert where in message
    for fragment in fragments:
        assert fragment in message


def test_a_bad_row_of_a_parquet_file_is_named_by_its_index(tmp_path: Path) -> None:
    path = _parquet([{"text": "ab"}, {"text": None}], tmp_path)
    assert f"row 1 of {path}" in refusal(path)


def test_a_bad_row_beyond_the_first_chunk_is_named_by_its_index() -> None:
    assert "row 2001 of" in refusal([{"text": "ab"}] * 2001 + [{"text": 1}])


@pytest.mark.parametrize("rows", [["the cab"], [["the cab"]], [5], [None]], ids=["str", "list", "int", "none"])
def test_a_row_that_is_no_mapping_is_named(rows: list) -> None:
    message = refusal(rows)
    assert "row 0 of the dataset" in message and repr(rows[0]) in message


def test_a_mapping_of_columns_or_of_splits_is_no_dataset() -> None:
    for dataset in ({"text": ["ab"]}, {"train": as_arrow([{"text": "ab"}])}):
        message = refusal(dataset)
        assert "dataset" in message and "'t'" not in message  # the key, not its letters


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
    "surrogate": (b'{"text": "\xed\xa0\xbd"}', "JSON object"),  # which UTF-8 has not
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
    assert f"ine 4 of {path}" in message and shown in message
    assert len(message) < 400 + len(str(path))


def test_a_bad_line_is_given_one_line_number(tmp_path: Path) -> None:
    # The JSON parser sees one line, and always calls it line 1.
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ab"}\n\n{"text": ab}\n')
    message = refusal(path)
    assert "Line 3" in message and "line 1 " not in message


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
        (".", "must be an existing file"),
        ("rows.txt", "must end in .jsonl, .json or .parquet"),
    ],
    ids=["missing", "folder", "unknown_suffix"],
)
def test_a_path_that_is_no_data_file_is_named(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text('{"text": "ab"}\n')
    message = refusal(tmp_path / name)
    assert said in message and repr(str(tmp_path / name)) in message


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
    assert str(path) in message and "Parquet" in message


def test_a_text_field_of_ones_own_comes_before_other_formats() -> None:
    conversation = [turn("user", "hi"), turn("assistant", "yes")]
    rows = [{"messages": conversation, "input_ids": [3, 4], "body": "ab", "text": "the"}]
    assert [whole for whole, _ in texts(load(rows, text_field="body"))] == ["ab<eos>"]
    assert tokens_of(load(rows), 0) == [3, 4]
    said = refusal([{"messages": conversation}], CHAT, text_field="body")
    assert said == "`text_field` must be a field of the rows, got 'body', and ['messages'] in row 0 of the dataset."


@pytest.mark.parametrize("begin", ["[", "\n [", "\ufeff["], ids=["array", "indented", "byte_order_mark"])
def test_a_json_array_is_told_from_json_lines(begin: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(begin + '\n  {"text": "ab"}\n]\n')
    assert refusal(path) == f"`dataset` must be JSON Lines, an object a line, got '{path}' with an array."


def test_what_has_no_rows_is_refused() -> None:
    assert refusal(5) == "`dataset` must be a file or an iterable of rows, got 5."
    assert (
        refusal(load([{"input_ids": [3, 4]}])[np.arange(0)]) == "`dataset` must have at least one document, got none."
    )


def test_text_needs_a_tokenizer() -> None:
    message = refusal([{"text": "ab"}], None)
    assert "`tokenizer` must come with the model" in message and "None" in message and "['text'] in row 0" in message


@pytest.mark.parametrize("name", ["messages", "prompt_completion_messages"])
def test_messages_need_a_chat_template(name: str) -> None:
    message = refusal(FORMATS[name][0], PLAIN)
    assert "`tokenizer`" in message and "chat template" in message


@pytest.mark.parametrize(
    "conversation", [[{"role": "user"}], ["hi"], [], [None]], ids=["no_content", "strings", "empty", "null"]
)
def test_a_conversation_that_the_chat_template_refuses_is_named(conversation: list) -> None:
    message = refusal([{"messages": [turn("user", "hi")]}, {"messages": conversation}], CHAT)
    assert "row 1 of the dataset" in message


def test_text_past_the_models_vocabulary_is_named() -> None:
    message = refusal([{"text": "a"}, {"text": "the"}], vocab_size=260)
    assert "row 1 of the dataset" in message and "[0, 260)" in message and "got 261" in message


def test_all_documents_cut_before_their_first_target_are_refused() -> None:
    documents = load([{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}], None)
    with pytest.raises(InputError, match=r"`max_length`.*got 3"):
        Batches(documents, TrainConfig(max_length=3))


def test_a_long_value_is_not_printed_whole() -> None:
    for rows in (
        [{"text": ["x" * 10_000]}],
        [{"input_ids": [1.5] * 10_000}],
        [{"input_ids": [1] * 10_000, "labels": 5}],
    ):
        assert len(refusal(rows)) < 300
    masked = [{"input_ids": [3] * 10_000, "labels": [-100] * 10_000}]
    assert len(refusal(masked)) < 600


def test_prompts_whose_tokens_change_are_counted_aloud(capsys: pytest.CaptureFixture) -> None:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("xyzthe", "the")
    documents = load(2 * [{"prompt": "ab xyz", "completion": "the"}], tokenizer)
    assert (documents.labels[:3] != -100).any()
    assert "in 2 rows the prompt's tokens change when the completion follows" in capsys.readouterr().err


# Rows of which one has nothing to learn, and how that one is shown.
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
    assert "2 of 4 rows have nothing to learn" in said and "row 1 of the dataset" in said and shown in said
    assert Batches(documents, TrainConfig()).documents.num_targets.all()
    message = refusal(2 * empty, CHAT)
    assert "got 2 rows with none" in message and "row 0 of the dataset" in message and shown in message


def test_documents_that_were_loaded_are_taken_as_they_are():
    documents = random_documents([3, 5])
    assert load_documents(documents, None, vocab_size=1000) is documents
    largest = int(documents.tokens.max())
    with pytest.raises(InputError, match=re.escape(f"tokens in [0, {largest}), the model's vocabulary, got {largest}")):
        load_documents(documents, None, vocab_size=largest)


@pytest.mark.parametrize(("name", "wrong"), [("tokens", -100), ("tokens", -1), ("labels", -1), ("labels", 1000)])
def test_documents_that_were_loaded_have_no_id_outside_of_the_vocabulary(name: str, wrong: int):
    """A model would read another token, or its loss would be NaN."""
    documents = random_documents([3, 5])
    ids = getattr(documents, name).copy()
    ids[4] = wrong
    with pytest.raises(InputError, match=re.escape(f"{name} in [0, 1000), the model's vocabulary, got {wrong}")):
        load_documents(dataclasses.replace(documents, **{name: ids}), None, vocab_size=1000)
