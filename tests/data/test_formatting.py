"""A user's function turns rows of any source into rows of a known format; anything else it returns is refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import load, trained, turn, whole
from loaded_documents import as_arrow, write_jsonl, write_parquet
from models import small_model
from tokenizers_for_tests import EOS, small_tokenizer

from jaxpack import InputError, TrainConfig, Trainer, evaluate
from jaxpack.data.encoding import RowEncoder
from jaxpack.data.stream import DocumentStream

TOKENIZER = small_tokenizer(chat=True)
ROWS = [{"q": f"the {n}", "a": f"cab {n}", "more": [1]} for n in range(3)]


def text_of(row: dict) -> str:
    return f"Q {row['q']} A {row['a']}"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: ROWS,
    "generator": lambda _: (row for row in ROWS),
    "dataset": lambda _: as_arrow(ROWS),
    "jsonl": lambda folder: write_jsonl(folder / "rows.jsonl", ROWS),
    "parquet": lambda folder: str(write_parquet(folder / "rows.parquet", ROWS)),
    "several": lambda folder: [str(write_jsonl(folder / "first.jsonl", ROWS[:1])), ROWS[1:]],
    "weighted": lambda folder: [(ROWS, 1.0)],
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_rows_of_every_source_are_formatted(source: str, tmp_path: Path):
    documents = load(SOURCES[source](tmp_path), TOKENIZER, formatting_func=text_of)
    found = [whole(documents, TOKENIZER, i) for i in range(len(documents))]
    assert sorted(found) == [text_of(row) + EOS for row in ROWS]


MADE = {
    "text": (text_of, ["Q the 0 A cab 0<eos>"]),
    "messages": (lambda row: [turn("user", row["q"]), turn("assistant", row["a"])], ["cab 0<|im_end|>"]),
    "completion": (lambda row: {"prompt": row["q"], "completion": row["a"]}, ["cab 0<eos>"]),
    "ids": (lambda row: {"input_ids": TOKENIZER(row["q"]).input_ids}, ["the 0"]),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_returned_decides_what_is_trained_on(name: str):
    function, expected = MADE[name]
    assert trained(load(ROWS, TOKENIZER, formatting_func=function), TOKENIZER) == expected


def test_a_text_takes_the_place_of_the_users_field():
    documents = load(ROWS, TOKENIZER, formatting_func=text_of, text_field="body")
    assert whole(documents, TOKENIZER) == text_of(ROWS[0]) + EOS


def test_a_function_may_change_its_row():
    rows = [dict(row) for row in ROWS]
    load(rows, TOKENIZER, formatting_func=lambda row: row.pop("q"))
    assert rows == ROWS


REFUSED = {
    "a_batch": (lambda row: [text_of(row)] * 3, "must return the text of one row, got a list of 3 texts for row 0 of"),
    "a_column": (lambda row: {"text": [text_of(row)]}, "got a list of 1 texts for row 0 of the dataset"),
    "none": (lambda row: None, "or a mapping with the fields of a row, got None for row 0 of the dataset"),
    "mixed": (lambda row: [turn("user", "a"), "b"], "must return a text, a list of messages, or a mapping"),
    "no_function": ("text", "must be a function from a row to its text, or None, got 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_with_its_row(name: str):
    function, fragment = REFUSED[name]
    with pytest.raises(InputError, match="`formatting_func` must ") as refused:
        load(ROWS, TOKENIZER, formatting_func=function)
    assert fragment in str(refused.value)
    assert str(refused.value).endswith(".")


def test_the_rows_of_a_stream_are_formatted(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    stream = DocumentStream(str(path), RowEncoder(TOKENIZER, len(TOKENIZER), formatting_func=text_of))
    for records in (stream, stream.skip(1)):
        found = [TOKENIZER.decode(row["input_ids"].tolist()) for row in itertools.islice(records, 4)]
        begin = 0 if records is stream else 1
        assert found == [text_of(ROWS[(begin + i) % len(ROWS)]) + EOS for i in range(4)]
    documents = load(ROWS, TOKENIZER, formatting_func=text_of)
    with pytest.raises(InputError, match="`formatting_func` must be None for `Documents`"):
        next(iter(DocumentStream(documents, RowEncoder(TOKENIZER, len(TOKENIZER), formatting_func=text_of))))


def test_an_error_of_the_function_names_the_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n\n{"q": "c"}\n')
    with pytest.raises(KeyError) as raised:
        load(path, TOKENIZER, formatting_func=text_of)
    assert raised.value.__notes__ == [f"`formatting_func` raised this for line 3 of {path}."]


def test_documents_are_not_formatted_again():
    documents = load(ROWS, TOKENIZER, formatting_func=text_of)
    for dataset in (documents, [ROWS, documents]):
        with pytest.raises(InputError, match="`formatting_func` must be None for `Documents`"):
            load(dataset, TOKENIZER, formatting_func=text_of)


def test_a_trainer_formats_the_rows_of_both_datasets():
    model, config = small_model("qwen3", vocab_size=len(TOKENIZER)), TrainConfig(max_length=64)
    trainer = Trainer(model, TOKENIZER, ROWS, config, ROWS[:2], formatting_func=text_of)
    texts = [{"text": text_of(row)} for row in ROWS]
    plain = Trainer(model, TOKENIZER, texts, config, texts[:2])
    of_both = ((one.documents, one.eval_documents[""]) for one in (trainer, plain))
    for found, expected in zip(*of_both, strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.labels.tolist() == expected.labels.tolist()
    losses = [trainer.evaluate(), trainer.evaluate(ROWS[:2]), plain.evaluate()]
    losses.append(evaluate(model, TOKENIZER, ROWS[:2], config, formatting_func=text_of))
    assert losses == [losses[0]] * 4
