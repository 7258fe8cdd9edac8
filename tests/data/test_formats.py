"""Rows become documents as their format says; a row that cannot is refused by an error that names the row."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from loaded_documents import (
    CHAT,
    EOS_ID,
    PLAIN,
    as_arrow,
    labels_of,
    load,
    pieces,
    refusal,
    texts,
    tokens_of,
    turn,
    write_jsonl,
    write_parquet,
)
from tokenizers import normalizers, processors
from tokenizers_for_tests import BOS, EOS, TURN_ENDS, small_tokenizer

from jaxpack.data.batching import Batches
from jaxpack.settings import TrainConfig

# --- Formats ----------------------------------------------------------------------------------------------------------

# Two rows of each format and, for each row, the whole document and the text that is trained on.
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
        [("the cab", "the cab"), ("ab.", "ab.")],  # taken as given: no EOS
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
    return write_parquet(folder / "rows.parquet", rows)


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
    assert len(documents) == 2
    assert documents.num_tokens == len(documents.tokens) == documents.lengths.sum()


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
    assert tokens[-1] == EOS_ID
    assert tokens.count(EOS_ID) == 1


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
        ("the ca", "b the", "ab the<eos>"),  # "ab" is one token and is trained on
        ("c ", "the", " the<eos>"),
        ("the c", "ab", "ab<eos>"),  # a token ends at the border
        ("", "the", "the<eos>"),
        ("the", "", "<eos>"),
    ],
)
def test_a_token_that_straddles_prompt_and_completion_is_trained_on(prompt: str, completion: str, trained: str) -> None:
    assert texts(load([{"prompt": prompt, "completion": completion}])) == [(f"{prompt}{completion}<eos>", trained)]


# --- What is refused --------------------------------------------------------------------------------------------------


# Each case: (rows, the index of the first bad row, parts of the error message).
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
    "labels_missing_later": (  # else the prompt would be trained on, too
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
    "padding_between_tokens": (
        [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [1, 0, 2], "attention_mask": [1, 0, 1]}],
        1,
        ["`attention_mask`", "at the ends"],
    ),
    "a_mask_of_another_length": (
        [{"input_ids": [1, 2, 3], "completion_mask": [0, 1]}],
        0,
        ["`completion_mask`", "for each of 3 `input_ids`", "got [0, 1]"],
    ),
    "a_mask_of_other_numbers": (
        [{"input_ids": [1, 2, 3], "assistant_masks": [0, 1, 7]}],
        0,
        ["`assistant_masks`", "a 0 or a 1"],
    ),
    "labels_where_the_mask_is_0": (
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "completion_mask": [0, 0, 1]}],
        0,
        ["`labels` must be -100 where `completion_mask` is 0", "got 2"],
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
        # The reader skips the blank line after each row, but counts it.
        path = write_jsonl(tmp_path / "rows.jsonl", rows, between="\n\n")
        message, where = refusal(path), f"line {2 * bad + 1} of {path}"
    assert where in message
    for fragment in fragments:
        assert fragment in message


def test_a_text_field_of_ones_own_comes_before_other_formats() -> None:
    conversation = [turn("user", "hi"), turn("assistant", "yes")]
    rows = [{"messages": conversation, "input_ids": [3, 4], "body": "ab", "text": "the"}]
    assert [whole for whole, _ in texts(load(rows, text_field="body"))] == ["ab<eos>"]
    assert tokens_of(load(rows), 0) == [3, 4]
    said = refusal([{"messages": conversation}], CHAT, text_field="body")
    rule = "`text_field` must be a field of the rows, got 'body'"
    assert said == f"{rule}, but row 0 of the dataset has the fields ['messages']."


def test_text_needs_a_tokenizer() -> None:
    message = refusal([{"text": "ab"}], None)
    assert "`tokenizer` must come with the model" in message
    assert "got None" in message
    assert "row 0 of the dataset has the fields ['text']. Use a model that has a tokenizer" in message


@pytest.mark.parametrize("name", ["messages", "prompt_completion_messages"])
def test_messages_need_a_chat_template(name: str) -> None:
    message = refusal(FORMATS[name][0], PLAIN)
    assert (
        "`tokenizer` must have a chat template for rows of messages, got one without. Set `chat_template` to" in message
    )


@pytest.mark.parametrize("conversation", [[{"role": "user"}], ["hi"], [None]], ids=["no_content", "string", "null"])
def test_a_conversation_that_the_chat_template_refuses_is_named(conversation: list) -> None:
    message = refusal([{"messages": [turn("user", "hi")]}, {"messages": conversation}], CHAT)
    assert "row 1 of the dataset" in message


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
    assert (
        "in 2 rows, the prompt's tokens change when the completion follows: training begins" in capsys.readouterr().err
    )
