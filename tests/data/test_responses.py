"""Rendered text is trained on after each response part up to the next question, however the tokenizer cuts it."""

import datetime
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from conversations import load, trained, turn, whole
from loaded_documents import labels_of, tokens_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_for_tests import BOS, EOS, small_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxpack.data.encoding import RowEncoder
from jaxpack.data.responses import Parts, response_spans
from jaxpack.data.stream import DocumentStream
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
CHATML = {"instruction_part": USER, "response_part": ASSISTANT}
ALPACA = {"instruction_part": "### Instruction:\n", "response_part": "### Response:\n"}


def rendered(*contents: str, system: str = "") -> str:
    parts = [f"{(USER, ASSISTANT)[i % 2]}{content}{END}" for i, content in enumerate(contents)]
    return system + "".join(parts)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a BPE without pre-tokenizer, whose merges go across the borders of the parts of `ALPACA`."""
    merges = [
        ("\n", "\n"),
        (":", "\n"),
        (":\n", "\n"),
        ("\n\n", "#"),
        ("\n", "#"),
        ("e", ":\n"),
        (":\n", "4"),
        ("#", "#"),
    ]
    words = [EOS, "<unk>", *map(chr, range(32, 127)), "\n", *("".join(pair) for pair in merges)]
    model = models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("never matched", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>")


CHAT = small_tokenizer(specials=("<|im_start|>",))
CASES = {
    "one_turn": (rendered("the", "cab"), ["cab<|im_end|>\n<eos>"]),
    "turns": (rendered("a", "b", "c", "d"), [f"b{END}", f"d{END}<eos>"]),
    "system": (rendered("a", "b", system="<|im_start|>system\nbe<|im_end|>\n"), [f"b{END}<eos>"]),
    "ends_in_a_question": (rendered("a", "b", "c"), [f"b{END}"]),
    "ends_in_eos": (f"{USER}a{END}{ASSISTANT}b<eos>", ["b<eos>"]),
    "answers_in_a_row": (f"{USER}a{END}{ASSISTANT}b{END}{ASSISTANT}c", [f"b{END}", "c<eos>"]),
    "begins_with_an_answer": (f"{ASSISTANT}b{END}{rendered('c', 'd')}", [f"b{END}", f"d{END}<eos>"]),
    "unicode": (rendered("é 😀", "日本 👩‍👧"), [f"日本 👩‍👧{END}<eos>"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_trained_on_with_the_ends_of_their_turns(name: str):
    text, expected = CASES[name]
    documents = load([{"text": text}], CHAT, **CHATML)
    assert trained(documents, CHAT) == expected
    plain = load([{"text": text}], CHAT)
    assert tokens_of(documents, 0) == tokens_of(plain, 0)  # the parts change no token


def of_tokens(ids: list[int], instruction: list[int], response: list[int]) -> list[bool]:
    """Marks answers by a search for the parts' tokens, as Unsloth does."""
    on, marks, i = False, [False] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(response)] == response:
            on, i = True, i + len(response)
        elif ids[i : i + len(instruction)] == instruction:
            on, i = False, i + len(instruction)
        else:
            marks[i] = on
            i += 1
    return marks


def test_where_parts_are_whole_tokens_a_search_for_tokens_finds_the_same():
    rng = random.Random(0)
    words = ["the", "cab ", "\n", "é", "a", END, USER, ASSISTANT, "<|im_start|>"]
    texts = ["".join([*rng.choices(words, k=rng.randrange(30)), "a"]) for _ in range(300)]
    documents = load([{"text": text} for text in [*texts, rendered("a", "b")]], CHAT, **CHATML)
    instruction, response = (CHAT(part).input_ids for part in (USER, ASSISTANT))
    kept = [ids for text in texts if any(of_tokens(ids := CHAT(text + EOS).input_ids, instruction, response)[1:])]
    assert 100 < len(kept) < 300
    for i, ids in enumerate(kept):
        begin = documents.starts[i]
        labels = documents.labels[begin : begin + documents.lengths[i]]
        assert (labels != -100).tolist() == of_tokens(ids, instruction, response)


@pytest.mark.parametrize("between", ["", "\n", "\n\n", "4"])
def test_a_token_across_a_border_is_trained_on(between: str):
    """Parts that are not whole tokens are found: a search for their tokens would miss them."""
    tokenizer = merging_tokenizer()
    text = f"### Instruction:\n2 + 2?\n\n### Response:\n{between}4\n\n### Instruction:\n2?\n\n### Response:\n{between}2"
    documents = load([{"text": text}], tokenizer, **ALPACA)
    spans = response_spans(text, Parts(*ALPACA.values()))
    assert [text[begin:end] for begin, end in spans] == [f"{between}4\n\n", f"{between}2"]
    inside = np.zeros(len(text), bool)
    for begin, end in spans:
        inside[begin:end] = True
    tokens = tokenizer.convert_ids_to_tokens(tokens_of(documents, 0)[:-1])
    assert "".join(tokens) == text
    ends = np.cumsum([len(token) for token in tokens])
    expected = [inside[end - len(token) : end].any() for token, end in zip(tokens, ends, strict=True)]
    labels = documents.labels[: documents.lengths[0]]
    assert (labels != -100).tolist() == [*expected, True]
    assert any(len({*inside[end - len(token) : end]}) > 1 for token, end in zip(tokens, ends, strict=True))


@pytest.mark.parametrize("text", [BOS, f"  {BOS}", f"{BOS}{BOS}"])
@pytest.mark.parametrize("bos", [False, True])
def test_offsets_count_from_where_the_tokenizer_begins(text: str, bos: bool):
    tokenizer = small_tokenizer(bos=bos, specials=("<|im_start|>",))
    documents = load([{"text": text + rendered("the", "cab")}], tokenizer, **CHATML)
    assert trained(documents, tokenizer) == [f"cab{END}<eos>"]
    plain = load([{"text": text + rendered("the", "cab")}], tokenizer)
    assert whole(documents, tokenizer) == whole(plain, tokenizer)


def test_the_longer_of_two_parts_counts_where_both_begin():
    parts = Parts("Q", "Q: A")
    assert response_spans("Q 1 Q: A 2 Q 3", parts) == [(8, 11)]
    assert response_spans("Q: A 2Q: A", parts) == [(4, 6)]
    assert response_spans("", parts) == response_spans("Q", parts) == []


def test_rows_without_an_answer_are_counted_and_left_out(capsys: pytest.CaptureFixture):
    rows = [{"text": text} for text in (rendered("a", "b"), "the cab", rendered("a"), rendered("c", "d"))]
    assert len(load(rows, CHAT, **CHATML)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 4 rows have nothing to learn (there is no `response_part`, '<|im_start|>assistant\\n', or" in said
    assert "left out; the first is row 1 of the dataset: 'the cab<eos>'" in said
    with pytest.raises(InputError, match="At least one row must have a token to train on") as refused:
        load(rows[1:3], CHAT, **CHATML)
    assert "there is no `response_part`, '<|im_start|>assistant\\n', or nothing after it" in str(refused.value)


def test_a_stream_reads_the_same_documents() -> None:
    rows = [{"text": text} for text in (rendered("a", "b"), "the cab", rendered("c", "d"))]
    config = TrainConfig(streaming=True, packing=True, max_steps=1, **CHATML)
    date = datetime.date(2031, 2, 3)
    stream = DocumentStream(rows, RowEncoder.of_run(config, CHAT, len(CHAT), date=date, formatting_func=None))
    labels = [row["labels"] for row in itertools.islice(stream, 3)]
    assert (labels.pop(1) == -100).all()  # the packer counts it
    documents = load(rows, CHAT, **CHATML)
    assert [row.tolist() for row in labels] == [labels_of(documents, 0), labels_of(documents, 1)]
    stream = DocumentStream(rows[1:2], RowEncoder.of_run(config, CHAT, len(CHAT), date=date, formatting_func=None))
    with pytest.raises(InputError, match=r"got 1 rows with none \(there is no `response_part`, '<\|im_start"):
        list(stream)


def test_rows_with_answers_and_without_a_question_are_counted(capsys: pytest.CaptureFixture):
    rows = [{"text": rendered("a", "b", "c", "d")}, {"text": f"{ASSISTANT}b"}]
    load(rows, CHAT, instruction_part="### Instruction:", response_part=ASSISTANT)
    said = " ".join(capsys.readouterr().err.split())
    assert "in 2 rows, there is no `instruction_part`, '### Instruction:': all that follows the first" in said
    load(rows[:1], CHAT, **CHATML)
    assert "instruction_part" not in capsys.readouterr().err


def test_text_is_read_where_rows_have_messages_beside_it(capsys: pytest.CaptureFixture):
    rows = [{"conversations": [{"from": "human", "value": "x"}], "text": rendered("a", "b")}]
    assert trained(load(rows, CHAT, **CHATML), CHAT) == [f"b{END}<eos>"]
    said = " ".join(capsys.readouterr().err.split())
    assert "`text` is read, and `conversations` is ignored" in said
    assert "1 row of plain text, trained on after each response part" in said
    rows = [{"body": rendered("a", "b"), "text": "no"}]
    assert trained(load(rows, CHAT, text_field="body", **CHATML), CHAT) == [f"b{END}<eos>"]


OTHERS = {
    "`messages`": {"messages": [turn("user", "a"), turn("assistant", "b")]},
    "`prompt` and `completion`": {"prompt": "a", "completion": "b"},
    "`instruction` and `output`": {"instruction": "a", "output": "b"},
    "`input_ids`": {"input_ids": [1, 2, 3]},
}


@pytest.mark.parametrize("fields", OTHERS)
def test_rows_that_are_not_text_are_refused(fields: str):
    with pytest.raises(InputError) as refused:
        load([OTHERS[fields]], CHAT, **CHATML)
    assert str(refused.value).startswith("`response_part` must be left out for rows that are not plain text, got ")
    assert f"rows of {fields} in row 0 of the dataset." in str(refused.value)


@pytest.mark.parametrize(("instruction", "response", "named"), [
    ("Q", None, "`response_part` must be text with `instruction_part`, and not empty, got None."),
    (None, "A", "`instruction_part` must be text with `response_part`, and not empty, got None."),
    ("", "A", "`instruction_part` must be text with `response_part`, and not empty, got ''."),
    ("Q", 3, "`response_part` must be text with `instruction_part`, and not empty, got 3."),
    ("Q", "Q", "`response_part` must differ from `instruction_part`, got 'Q'."),
])  # fmt: skip
def test_both_parts_are_needed(instruction: object, response: object, named: str):
    given = {"instruction_part": instruction, "response_part": response}
    with pytest.raises(InputError) as refused:
        load([{"text": "a"}], CHAT, **given)
    assert str(refused.value) == named
    if response != 3:  # a config checks types first
        with pytest.raises(InputError) as refused:
            TrainConfig(**given)
        assert str(refused.value) == named


def test_a_slow_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(InputError, match="`tokenizer` must be a fast one with a `response_part`, since others do not"):
        load([{"text": rendered("a", "b")}], CHAT, **CHATML)
