"""Tests which names evaluation sets have, in texts and in mappings, and which names are refused."""

from collections import UserDict
from pathlib import Path

import pytest

from jaxpack.data.evaluation_sets import by_name, check_public_names, public_metrics, read_names
from jaxpack.data.sources import split_name
from jaxpack.errors import InputError

ROWS = [{"input_ids": [1, 2]}]


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("math=math.jsonl", "math", "math.jsonl"),
        ("math=math.jsonl=0.7", "math", "math.jsonl=0.7"),  # the last number is a weight within the set
        ("m_1-b=org/name:train[:5%]", "m_1-b", "org/name:train[:5%]"),
        ("math=data/*.jsonl", "math", "data/*.jsonl"),
        ("math=a=b.jsonl", "math", "a=b.jsonl"),
        ("rows=0.7", "", "rows=0.7"),
        ("rows=-1", "", "rows=-1"),
        ("rows.jsonl=0.7", "", "rows.jsonl=0.7"),
        ("rows.jsonl=many", "", "rows.jsonl=many"),
        ("rows.jsonl", "", "rows.jsonl"),
        ("data/day=1/rows.jsonl", "", "data/day=1/rows.jsonl"),
        ("math=", "", "math="),
        ("=math.jsonl", "", "=math.jsonl"),
    ],
)
def test_a_word_before_a_path_is_a_name(given: str, name: str, path: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_name(given) == (name, path)


@pytest.mark.parametrize(
    "given", ["day=1/rows.jsonl", "day=1/rows.jsonl=0.5", "day=1", "day=1/*.jsonl", "day=*/*.jsonl"]
)
def test_a_path_that_is_there_is_no_name(given: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "rows.jsonl").touch()
    assert split_name(given) == ("", given)


def test_texts_of_one_name_are_one_set(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    texts = ["math=a.jsonl=0.7", "chat=~/c.jsonl", "math=b.jsonl=0.3"]
    assert read_names(texts) == {"math": ["a.jsonl=0.7", "b.jsonl=0.3"], "chat": ["/home/somebody/c.jsonl"]}
    assert read_names(["a.jsonl", "b.jsonl"]) == ["a.jsonl", "b.jsonl"]


def test_either_all_texts_have_a_name_or_none() -> None:
    with pytest.raises(
        InputError, match=r"a name before each path, or before none, got 'b.jsonl' without one beside the"
    ):
        read_names(["math=a.jsonl", "b.jsonl"])


def test_any_mapping_has_sets() -> None:
    assert by_name(UserDict(math=ROWS, chat="chat.jsonl")) == {"math": ROWS, "chat": "chat.jsonl"}
    assert by_name(ROWS) == {"": ROWS}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "`dataset` must name at least one set, got an empty mapping"),
        ({"": ROWS}, "names of letters, digits, `_` and `-`, got ''"),
        ({"a b": ROWS}, "names of letters, digits, `_` and `-`, got 'a b'"),
        ({3: ROWS}, "names of letters, digits, `_` and `-`, got 3"),
    ],
)
def test_bad_names_are_refused(sets: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        by_name(sets)


def test_public_names_are_those_of_transformers() -> None:
    metrics = {"": {"loss": 1.5}, "math": {"loss": 1.0, "accuracy": 0.5}}
    assert public_metrics(metrics) == {"eval_loss": 1.5, "eval_math_loss": 1.0, "eval_math_accuracy": 0.5}


@pytest.mark.parametrize(("names", "metrics"), [(["math"], ["loss", "math_loss"]), (["a", "a_b"], ["loss", "b_loss"])])
def test_a_name_that_makes_two_metrics_one_is_refused(names: list[str], metrics: list[str]) -> None:
    with pytest.raises(
        InputError, match=r"`eval_dataset` must have names that no metric begins with, got '(math|a_b)'"
    ):
        check_public_names(dict.fromkeys(names), metrics)
    check_public_names({"chat": None}, metrics)
