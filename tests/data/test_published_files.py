"""Tests four files as they are published: which documents they become, and which of their text is trained on."""

import json
from pathlib import Path

import pytest
from loaded_documents import CHAT, PLAIN, load, texts, write_jsonl, write_parquet

from jaxpack.errors import InputError

ALPACA = [
    {"instruction": "Give three tips for staying healthy.", "input": "", "output": "1. Eat.\n2. Move.\n3. Sleep."},
    {"instruction": "Identify the odd one out.", "input": "Twitter, Instagram, Telegram", "output": "Telegram"},
]
OF_ALPACA = [  # as the chat template of the tests writes them, and what is trained on
    (
        f"user\n{question}<|im_end|>\nassistant\n{row['output']}<|im_end|>\n",
        f"{row['output']}<|im_end|>",
    )
    for row, question in zip(
        ALPACA,
        (ALPACA[0]["instruction"], "Identify the odd one out.\n\nTwitter, Instagram, Telegram"),
        strict=True,
    )
]


def test_alpaca_data_json(tmp_path: Path) -> None:
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(ALPACA, indent=4))
    assert texts(load(path, CHAT)) == OF_ALPACA


def test_alpaca_data_json_without_a_chat_template_is_in_the_words_of_its_authors(tmp_path: Path) -> None:
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(ALPACA, indent=4))
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\nIdentify the odd one out.\n\n###"
        " Input:\nTwitter, Instagram, Telegram\n\n### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the"
        " request.\n\n### Instruction:\nGive three tips for staying healthy.\n\n### Response:\n"
    )
    outputs = [f"{row['output']}<eos>" for row in ALPACA]
    assert texts(load(path, PLAIN)) == [
        (before + output, output) for before, output in zip((without, with_input), outputs, strict=True)
    ]


def test_alpaca_of_the_hub_has_the_rendered_text_beside_and_is_not_trained_on_it(tmp_path: Path, capsys) -> None:
    rows = [row | {"text": f"Below is an instruction ... {row['output']}"} for row in ALPACA]
    assert texts(load(write_parquet(tmp_path / "train.parquet", rows), CHAT)) == OF_ALPACA
    assert "`text`" in capsys.readouterr().err  # it is named as not used


def test_a_sharegpt_dump(tmp_path: Path) -> None:
    def turn(who: str, value: str) -> dict:
        return {"from": who, "value": value}

    dump = [
        {"id": "QWJhYvA_0", "conversations": [turn("human", "Hi"), turn("gpt", "Hello!")]},
        {
            "id": "i6IyJda_0",
            "conversations": [
                turn("system", "Be brief."),
                turn("human", "2+2?"),
                turn("gpt", "4"),
                turn("human", "Thanks"),
            ],
        },
        {"id": "i6IyJda_1", "conversations": [turn("gpt", "And then?"), turn("human", "More"), turn("gpt", "End.")]},
    ]
    path = tmp_path / "ShareGPT_V3_unfiltered_cleaned_split.json"
    path.write_text(json.dumps(dump, indent=2))
    assert texts(load(path, CHAT)) == [
        ("user\nHi<|im_end|>\nassistant\nHello!<|im_end|>\n", "Hello!<|im_end|>"),
        (
            "system\nBe brief.<|im_end|>\nuser\n2+2?<|im_end|>\nassistant\n4<|im_end|>\nuser\nThanks<|im_end|>\n",
            "4<|im_end|>",
        ),
        (
            "assistant\nAnd then?<|im_end|>\nuser\nMore<|im_end|>\nassistant\nEnd.<|im_end|>\n",
            "And then?<|im_end|>End.<|im_end|>",
        ),
    ]


def test_conversations_of_a_dump_that_are_empty_are_left_out_aloud(tmp_path: Path, capsys) -> None:
    full = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    path = tmp_path / "dump.json"
    path.write_text(json.dumps([full, {"id": "b", "conversations": []}]))
    assert len(load(path, CHAT)) == 1
    assert "1 of 2 rows have nothing to learn" in capsys.readouterr().err


def test_openai_chat_jsonl(tmp_path: Path) -> None:
    def messages(*turns: dict) -> dict:
        return {"messages": list(turns)}

    system = {"role": "system", "content": "Marv is sarcastic."}
    rows = [
        messages(system, {"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "Paris, as if."}),
        messages(
            system,
            {"role": "user", "content": "Capital?"},
            {"role": "assistant", "content": "Paris", "weight": 0},
            {"role": "user", "content": "Be sarcastic."},
            {"role": "assistant", "content": "Paris, as if.", "weight": 1},
        ),
    ]
    begin = "system\nMarv is sarcastic.<|im_end|>\nuser\nCapital?<|im_end|>\nassistant\n"
    assert texts(load(write_jsonl(tmp_path / "chat.jsonl", rows), CHAT)) == [
        (f"{begin}Paris, as if.<|im_end|>\n", "Paris, as if.<|im_end|>"),
        (
            f"{begin}Paris<|im_end|>\nuser\nBe sarcastic.<|im_end|>\nassistant\nParis, as if.<|im_end|>\n",
            "Paris, as if.<|im_end|>",
        ),
    ]


def test_openai_chat_jsonl_with_calls_is_refused_where_the_template_cannot_write_them(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Oslo"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [call]},
        ],
        "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}],
    }
    with pytest.raises(InputError, match="call"):
        load(write_jsonl(tmp_path / "calls.jsonl", [row]), CHAT)
