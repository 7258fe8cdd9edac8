"""Rows become the tokens and labels that TRL's trainer makes of them, with the same settings."""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from chat_templates import STYLES
from conversations import load, turn
from tokenizers_for_tests import small_tokenizer
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

TEXTS = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "the ", "completion": "cab"},
    {"prompt": "a", "completion": "b"},  # one token of both
    {"prompt": "", "completion": "the cab<eos>"},
]
MESSAGES = [
    {"prompt": [turn("user", "hi")], "completion": [turn("assistant", "yes")]},
    {
        "prompt": [turn("system", "be"), turn("user", "?"), turn("assistant", "no"), turn("user", "a\nb")],
        "completion": [turn("assistant", "the cab"), turn("user", "!"), turn("assistant", "ab")],
    },
]


@functools.cache
def tagged() -> PreTrainedTokenizerFast:
    return STYLES["llama3"].tokenizer(tags=True)


def theirs(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    formatting_func: Callable | None = None,
    **settings: Any,
) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens and labels of rows, by the method with which TRL's trainer prepares a dataset."""
    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns of TRL's own defaults
        config = SFTConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none", max_length=None, **settings)
    completion_only = "prompt" in rows[0] if config.completion_only_loss is None else config.completion_only_loss
    trainer: Any = types.SimpleNamespace(
        _tokenizer=tokenizer, completion_only_loss=completion_only, chat_template=tokenizer.chat_template
    )
    dataset = datasets.Dataset.from_list(rows)
    prepared = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, config, False, formatting_func, "train")
    return [(row["input_ids"], row["labels"]) for row in prepared]


def ours(rows: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[tuple[list[int], list[int]]]:
    documents = load(rows, tokenizer, **options)
    ends = documents.starts + documents.lengths
    return [
        (documents.tokens[begin:end].tolist(), documents.labels[begin:end].tolist())
        for begin, end in zip(documents.starts, ends, strict=True)
    ]


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_texts_are_trained_on_with_or_without_their_prompts(bos: bool, completion_only: bool):
    tokenizer = small_tokenizer(bos=bos)
    found = ours(TEXTS, tokenizer, completion_only_loss=completion_only)
    assert found == theirs(TEXTS, tokenizer, completion_only_loss=completion_only)


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("completion_only", [False, True])
def test_messages_are_trained_on_with_or_without_their_prompts(completion_only: bool, assistant_only: bool):
    settings = {"completion_only_loss": completion_only, "assistant_only_loss": assistant_only}
    found = ours(MESSAGES, tagged(), **settings)
    assert found == theirs(MESSAGES, tagged(), **settings)
    shares = [np.mean(np.array(labels) != -100) for _, labels in found]
    assert (min(shares) == 1) == (not completion_only and not assistant_only)


ASKED = [{"q": "2 + 2?", "a": "4", "n": 1}, {"q": "the", "a": "cab<eos>", "n": 2}]


def test_a_function_makes_the_same_texts_of_rows():
    def question(row: dict) -> str:
        return f"Q: {row['q']}\nA: {row['a']}"

    tokenizer = small_tokenizer(bos=True)
    assert ours(ASKED, tokenizer, formatting_func=question) == theirs(ASKED, tokenizer, question)
