"""A decoded row shows the text of each document and marks the part that is trained on."""

import functools
import itertools

import numpy as np
import pytest
from rich.console import Console
from tokenizers_for_tests import EOS, small_tokenizer

from jaxpack import Batches, InputError, TrainConfig, load_documents, show_row
from jaxpack.data.preview import ShownRow

TOKENIZER = small_tokenizer()
ROWS = [{"prompt": f"the {row}é ", "completion": "ab 🙂 " * (1 + row % 4)} for row in range(13)]


@functools.cache
def batches(packing: bool = True, accumulation: int = 1) -> Batches:
    documents = load_documents(ROWS, TOKENIZER, vocab_size=len(TOKENIZER))
    config = TrainConfig(
        max_length=96,
        packing=packing,
        padding_free=packing,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
    )
    return Batches(documents, config)


def all_rows(found: Batches) -> list[ShownRow]:
    A, B, _ = found.shapes[0]
    return [show_row(found, number, TOKENIZER) for number in range(len(found) * A * B)]


@pytest.mark.parametrize(("packing", "accumulation"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_every_document_is_shown_once_with_its_completion_as_what_is_trained_on(packing, accumulation):
    rows = all_rows(batches(packing, accumulation))
    documents = [document for row in rows for document in row.documents]
    shown = sorted("|".join(span.text for span in document) for document in documents)
    assert shown == sorted(f"{row['prompt']}|{row['completion']}{EOS}" for row in ROWS)
    assert {tuple(span.trained for span in document) for document in documents} == {(False, True)}
    lengths = [sum(span.num_tokens for document in row.documents for span in document) for row in rows]
    assert sum(lengths) == batches().documents.num_tokens
    positions = batches(packing, accumulation).positions_per_step.sum()
    assert sum(row.padding for row in rows) == positions - sum(lengths)


def test_rows_come_as_the_trainer_takes_them():
    found = batches()
    first = [show_row(found, number, None) for number in range(2)]
    for row, tokens in zip(first, found[0].tokens[0], strict=True):
        ids = [int(token) for document in row.documents for span in document for token in span.text.split()]
        assert ids == tokens[: len(ids)].tolist()
    assert show_row(found, 2, TOKENIZER) != show_row(found, 0, TOKENIZER)


@pytest.mark.parametrize("trained", list(itertools.product([0, 1], repeat=5)), ids=str)
def test_no_cut_within_a_character_loses_or_doubles_it(trained):
    ids = TOKENIZER("aé🙂b")["input_ids"]
    assert len(ids) == 8  # a, two bytes, four bytes, b
    labels = [token if keep else -100 for token, keep in zip(ids, [1, *trained, 1, 1], strict=True)]
    documents = load_documents([{"input_ids": ids, "labels": labels}], None, vocab_size=len(TOKENIZER))
    row = show_row(Batches(documents, TrainConfig(max_length=16, packing=True)), 0, TOKENIZER)
    (spans,) = row.documents
    ends = {1: "a", 3: "é", 7: "🙂", 8: "b"}  # the number of tokens after which each character is whole
    begin = 0
    for span in spans:
        end = begin + span.num_tokens
        assert span.text == "".join(ends.get(place, "") for place in range(begin + 1, end + 1))
        begin = end
    counted = np.concatenate([np.full(span.num_tokens, span.trained) for span in spans])
    np.testing.assert_array_equal(counted, [False, *trained, True, True])


@pytest.mark.parametrize("number", [-1, 1000])
def test_a_row_that_is_not_there_is_refused(number):
    with pytest.raises(InputError, match=rf"`show_row` must be in \[0, \d+\), the run's rows, got {number}"):
        show_row(batches(), number, TOKENIZER)


def printed(row: ShownRow, **options) -> str:
    console = Console(width=200, **options)
    with console.capture() as capture:
        console.print(row)
    return capture.get()


def test_what_is_trained_on_is_green_and_marked_where_there_is_no_color():
    row = show_row(batches(), 0, TOKENIZER)
    completion = row.documents[0][1].text
    assert f"[[{completion}]]" in printed(row)
    colored = printed(row, force_terminal=True, color_system="standard")
    assert f"\x1b[32m{completion}" in colored
    assert "[[" not in colored
    assert f"padding: {row.padding} position" in printed(row)


def test_text_does_not_steer_the_terminal():
    rows = [{"text": "a\x1b[31m\rb\n\x9b2J\x7f\u202e"}]
    documents = load_documents(rows, TOKENIZER, vocab_size=len(TOKENIZER))
    text = printed(show_row(Batches(documents, TrainConfig(packing=True)), 0, TOKENIZER))
    assert not set(text) & set("\x1b\r\x9b\x7f\u202e")
    assert "␛[31m␍b" in text


def test_a_notebook_shows_a_row_as_rich_prints_it():
    shown = show_row(batches(), 0, TOKENIZER)._repr_mimebundle_([], [])
    assert "document 1" in shown["text/plain"]
    assert "color: #008000" in shown["text/html"]
