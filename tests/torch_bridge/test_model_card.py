"""Tests the model card of an adapter, and that the tokenizer lies beside the adapter."""

import dataclasses

import pytest
import yaml
from models import small_model
from tokenizers_for_tests import small_tokenizer

import torch_bridge
from jaxpack.settings import LoraConfig
from torch_bridge.model_card import model_card


def adapted(name: str):
    model = small_model("qwen3", lora=LoraConfig(r=4, lora_alpha=8, target_modules="q_proj"))
    model.config = dataclasses.replace(model.config, name_or_path=name)
    return model


def head_of(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_folder_of_an_adapter_holds_its_tokenizer_and_its_card(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    torch_bridge.save_adapter(adapted("org/base"), tmp_path / "adapter", tokenizer, settings={"learning_rate": 1e-4})
    read = type(tokenizer).from_pretrained(tmp_path / "adapter")
    assert read.chat_template == tokenizer.chat_template
    assert read("the cab").input_ids == tokenizer("the cab").input_ids
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert head_of(card)["base_model"] == "org/base"
    for line in ("| rank | 4 |", "| alpha | 8 |", "| projections | q_proj |", "| learning_rate | 0.0001 |"):
        assert line in card.splitlines()


@pytest.mark.parametrize("base", ["/home/somebody/models/base", "./models/base", "~/models/base"])
def test_a_card_names_no_folder_of_the_machine(base):
    data = ["/home/somebody/secret/rows.jsonl", "/home/somebody/more.jsonl=0.5"]
    eval_data = ["math=/home/somebody/math.jsonl", "chat=~/somebody/chat.jsonl=2"]
    card = model_card(adapted(base), {"data": data, "eval_data": eval_data}, has_tokenizer=False)
    assert "base_model" not in head_of(card)
    assert "# LoRA adapter of base" in card.splitlines()
    assert "| data | rows.jsonl, more.jsonl=0.5 |" in card.splitlines()
    assert "| eval_data | math=math.jsonl, chat=chat.jsonl=2 |" in card.splitlines()
    assert "somebody" not in card
    assert "models" not in card.replace("language models", "")


def test_a_value_does_not_break_the_table():
    card = model_card(adapted("org/base"), {"data": "a|b\nc"}, has_tokenizer=False)
    assert "| data | a\\|b␊c |" in card.splitlines()
