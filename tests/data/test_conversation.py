"""Rows of every supported format become the same conversation; other rows are refused by an error that names them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from chat_templates import STYLES
from conversations import TOOLS, call, chat, load, refusal, trained, turn, whole
from tokenizers_for_tests import small_tokenizer


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]])
def test_a_rows_tools_reach_the_template(tools: Any) -> None:
    tokenizer = STYLES["chatml"].tokenizer()
    rows = [{"messages": chat("a", "b"), "tools": tools}, {"messages": chat("a", "b"), "tools": None}]
    documents = load(rows, tokenizer)
    assert json.dumps(TOOLS[0]) in whole(documents, tokenizer)
    assert "<tools>" not in whole(documents, tokenizer, 1)
    assert trained(documents, tokenizer) == trained(documents, tokenizer, 1) == ["b<|im_end|>"]


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "be"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "tool", "value": "c"},
        {"from": "gpt", "value": "d"},
    ]
}
AS_MESSAGES = [
    turn("system", "be"),
    turn("user", "a"),
    turn("assistant", "b"),
    turn("tool", "c"),
    turn("assistant", "d"),
]


@pytest.mark.parametrize(
    "row",
    [
        SHAREGPT,
        {"messages": SHAREGPT["conversations"]},
        {"conversations": AS_MESSAGES},
        {"conversations": SHAREGPT["conversations"][1:], "system": "be"},
        {"messages": AS_MESSAGES, "system": AS_MESSAGES[0]["content"]},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in AS_MESSAGES]},
    ],
    ids=["sharegpt", "from_in_messages", "role_in_conversations", "system", "own_system", "parts"],
)
def test_conversations_in_other_words_are_the_same(row: dict) -> None:
    tokenizer = STYLES["chatml"].tokenizer()
    documents = load([row], tokenizer)
    assert whole(documents, tokenizer) == tokenizer.apply_chat_template(AS_MESSAGES, tokenize=False)
    assert trained(documents, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("given", ["", None, "the cab"])
def test_alpaca_is_a_chat_where_the_tokenizer_has_a_template(given: str | None, capsys: pytest.CaptureFixture) -> None:
    tokenizer = STYLES["llama3"].tokenizer()
    documents = load([{"instruction": "a?", "input": given, "output": "b"}], tokenizer)
    question = "a?\n\nthe cab" if given else "a?"
    assert whole(documents, tokenizer) == tokenizer.apply_chat_template(chat(question, "b"), tokenize=False)
    assert trained(documents, tokenizer) == ["b<|eot_id|>"]
    assert "asked as in a chat" in capsys.readouterr().err


def test_alpaca_has_its_own_words_where_the_tokenizer_has_no_template(capsys: pytest.CaptureFixture) -> None:
    tokenizer = small_tokenizer()
    rows = [{"instruction": "a?", "input": "the cab", "output": "b"}, {"instruction": "a?", "output": "b"}]
    documents = load(rows, tokenizer)
    assert whole(documents, tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\na?\n\n### Input:\nthe cab\n\n"
        "### Response:\nb<eos>"
    )
    assert "### Input" not in whole(documents, tokenizer, 1)
    assert trained(documents, tokenizer) == trained(documents, tokenizer, 1) == ["b<eos>"]
    assert "Alpaca's words" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["jsonl", "parquet", "dataset"])
def test_values_that_arrow_adds_do_not_reach_the_template(source: str, tmp_path: Path) -> None:
    calls = [call("cabs", city="Köln"), call("cabs", n=2)]  # Arrow gives both calls `city` and `n`
    rows = [
        {
            "messages": [
                turn("user", "a"),
                {"role": "assistant", "tool_calls": [one]},
                turn("tool", "1", tool_call_id="x"),
            ]
        }
        for one in calls
    ]
    if source == "jsonl":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif source == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    dataset = datasets_of(rows) if source == "dataset" else tmp_path / f"rows.{source}"
    tokenizer = STYLES["llama3"].tokenizer()
    documents = load(dataset, tokenizer)
    for which, arguments in enumerate(('{"city": "Köln"}', '{"n": 2}')):
        assert trained(documents, tokenizer, which) == [f'{{"name": "cabs", "parameters": {arguments}}}<|eot_id|>']


def datasets_of(rows: list[dict]) -> Any:
    import datasets  # a GPU machine may not have it

    return datasets.Dataset.from_list(rows)


BAD_ROWS = {
    "message_is_text": ({"messages": ["hi"]}, ["A message must have `role` and `content`", "got 'hi'"]),
    "message_without_role": ({"messages": [{"content": "hi"}]}, ["`from` and `value`", "got {'content': 'hi'}"]),
    "speaker_is_a_list": (
        {"messages": [{"from": ["gpt"], "value": "hi"}]},
        ["`from` and `value`", "got {'from': ['gpt']"],
    ),
    "role_is_a_list": ({"messages": [turn(["user"], "hi")]}, ["A message must have `role`", "got {'role': ['user']"]),
    "calls_are_text": (
        {"messages": [*chat("a"), turn("assistant", "b", tool_calls="cabs()")]},
        ["`tool_calls` must be a list of mappings", "got 'cabs()'"],
    ),
    "half_a_character": ({"messages": chat("a", "half an emoji: \ud83d")}, ["valid Unicode", "half an emoji"]),
    "unknown_speaker": (
        {"messages": [{"from": "bob", "value": "hi"}]},
        ["`from` must be one of", "'gpt'", "got 'bob'"],
    ),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ["must be text", "'image'"]),
    "tools_are_no_json": ({"messages": chat("a", "b"), "tools": "[{"}, ["`tools` must be", "got '[{'"]),
    "tools_are_a_number": ({"messages": chat("a", "b"), "tools": 5}, ["`tools` must be", "got 5"]),
    "tools_are_words": ({"messages": chat("a", "b"), "tools": ["x"]}, ["`tools` must be", "got ['x']"]),
    "system_is_a_list": ({"messages": chat("a", "b"), "system": ["x"]}, ["`system` must be a str", "got ['x']"]),
    "options_are_text": (
        {"messages": chat("a", "b"), "chat_template_kwargs": "x"},
        ["`chat_template_kwargs`", "got 'x'"],
    ),
    "refused": ({"messages": chat("a", "b") + chat("c") * 2}, ["must accept every row, but it refuses", "alternate"]),
}


@pytest.mark.parametrize("tags", [False, True], ids=["compared", "tags"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_conversation_is_named_with_its_rule_and_its_value(name: str, tags: bool) -> None:
    row, fragments = BAD_ROWS[name]
    message = refusal([{"messages": chat("a", "b")}, row], STYLES["gemma"].tokenizer(tags=tags))
    for fragment in ("row 1 of the dataset", *fragments):
        assert fragment in message


def test_alpacas_fields_must_be_text() -> None:
    for key in ("instruction", "output"):
        rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", key: 5}]
        for tokenizer in (small_tokenizer(), STYLES["phi3"].tokenizer()):
            message = refusal(rows, tokenizer)
            assert f"`{key}` must be a str, got 5 in row 1" in message
