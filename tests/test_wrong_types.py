"""Tests that a value of the wrong type is refused with the argument's name."""

import jaxtyping
import pytest
from models import small_model
from tokenizers_for_tests import small_tokenizer

import jaxpack
import torch_bridge
from jaxpack import InputError, LoraConfig, TrainConfig

ROWS = [{"input_ids": [1, 2, 3]}]
CONFIG = TrainConfig(max_length=16, max_steps=1)


class Llama:
    """Stands in for a model of another library."""


def documents() -> jaxpack.Documents:
    return jaxpack.load_documents(ROWS, None, vocab_size=97)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: jaxpack.Trainer(Llama(), None, ROWS, CONFIG), "`model` must be a jaxpack.Transformer, got Llama."),
        (lambda model: jaxpack.Trainer(model, None, ROWS, 5), "`config` must be a jaxpack.TrainConfig, got int."),
        (lambda _: jaxpack.add_lora(Llama(), LoraConfig()), "`model` must be a jaxpack.Transformer, got Llama."),
        (lambda model: jaxpack.add_lora(model, CONFIG), "`config` must be a jaxpack.LoraConfig, got TrainConfig."),
        (lambda _: jaxpack.generate(Llama(), [[1]]), "`model` must be a jaxpack.Transformer, got Llama."),
        (
            lambda _: jaxpack.generate_text(Llama(), small_tokenizer(), ["the"]),
            "`model` must be a jaxpack.Transformer, got Llama.",
        ),
        (
            lambda model: jaxpack.generate_text(model, None, ["the"]),
            "`tokenizer` must come with the model for texts, got None; `generate` takes token ids.",
        ),
        (
            lambda model: jaxpack.generate(model, [[1]], stop_tokens=0),
            "`stop_tokens` must be a list of token ids, got 0.",
        ),
        (
            lambda model: jaxpack.generate(model, [[1]], stop_tokens=[None]),
            "`stop_tokens` must be a list of token ids, got [None].",
        ),
        (
            lambda model: jaxpack.generate(model, [[1]], stop_tokens=["x"]),
            "`stop_tokens` must be a list of token ids, got ['x'].",
        ),
        (
            lambda model: jaxpack.generate_text(model, small_tokenizer(), ["the \ud800"]),
            "Text must be valid Unicode, got 'the \\ud800' in prompt 1.",
        ),
        (
            lambda _: LoraConfig(target_modules=None),
            "`target_modules` must be a list of names, or text with commas between the names, got None.",
        ),
        (
            lambda _: LoraConfig(modules_to_save=5),
            "`modules_to_save` must be a list of names, or text with commas between the names, got 5.",
        ),
        (lambda model: jaxpack.generate(model, 5), "`prompts` must be a list of lists of token ids, got 5."),
        (lambda _: jaxpack.inspect("train.jsonl"), "`documents` must be a jaxpack.Documents, got str."),
        (lambda _: jaxpack.inspect(documents(), {}), "`config` must be a jaxpack.TrainConfig, got dict."),
        (lambda _: jaxpack.inspect(documents(), CONFIG, model=5), "`model` must be a jaxpack.Transformer, got int."),
        (lambda _: torch_bridge.save_adapter(Llama(), "out"), "`model` must be a jaxpack.Transformer, got Llama."),
        (lambda _: torch_bridge.load_adapter(Llama(), "out"), "`model` must be a jaxpack.Transformer, got Llama."),
        (lambda _: torch_bridge.save_merged(Llama(), "out"), "`model` must be a jaxpack.Transformer, got Llama."),
        (lambda _: torch_bridge.save_pretrained(Llama(), "out"), "`model` must be a jaxpack.Transformer, got Llama."),
    ],
)
def test_it_is_named(call, message, monkeypatch, tmp_path):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users do not have the tests' shape checks
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        call(small_model("qwen3"))
    assert str(refused.value) == message
    assert not list(tmp_path.iterdir())
