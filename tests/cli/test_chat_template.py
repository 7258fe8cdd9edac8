"""Tests that a chat template that a run gives its tokenizer is saved with the adapter, and found there again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import yaml
from flax import nnx
from models import small_config
from tokenizers_for_tests import EOS, TURN_ENDS, small_tokenizer
from transformers import AutoTokenizer

import torch_bridge
from jaxpack import cli
from jaxpack.data.named_templates import TEMPLATES
from jaxpack.model.transformer import Transformer

START = "<|im_start|>"
SETTINGS = ["--packing", "--max-length", 64, "--per-device-train-batch-size", 2, "--lora-r", 2]
SETTINGS += ["--max-steps", 2, "--save-steps", 1, "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a base model whose tokenizer has the tokens of ChatML, and no chat template."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = small_tokenizer(specials=(START,))
    model = Transformer(small_config("qwen3", vocab_size=len(tokenizer)), dtype=jnp.float32, rngs=nnx.Rngs(0))
    torch_bridge.save_pretrained(model, folder, tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return folder


@pytest.fixture(scope="module")
def data(chat_base: Path) -> Path:
    path = chat_base.parent / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": f"cab {n}"}]}
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(chat_base: Path, data: Path) -> Path:
    output = chat_base.parent / "run"
    words = ["train", "--model", chat_base, "--data", data, "--output", output, *SETTINGS, "--chat-template", "chatml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxpack", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return output


def test_the_adapter_has_the_template_and_its_end_as_eos(run: Path, chat_base: Path):
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATES["chatml"], TURN_ENDS)
    base = AutoTokenizer.from_pretrained(chat_base)
    assert (base.chat_template, base.eos_token) == (None, EOS)
    assert yaml.safe_load((run / "run.yaml").read_text())["chat_template"] == "chatml"


@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/latest"])
def test_generation_asks_and_stops_as_in_training(
    run: Path, adapter: str, exit_status: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from jaxpack.cli import generate as command

    found: dict[str, Any] = {}

    def remember(network: object, tokenizer: Any, asked: list, **options: Any) -> list[str]:
        found.update(tokenizer=tokenizer, asked=asked)
        return ["" for _ in asked]

    monkeypatch.setattr(command, "generate_text", remember)
    assert exit_status("generate", "--adapter", run / adapter, "--prompt", "the cab") == 0
    assert (found["tokenizer"].chat_template, found["tokenizer"].eos_token) == (TEMPLATES["chatml"], TURN_ENDS)
    (question,) = found["asked"]
    assert question.messages == [{"role": "user", "content": "the cab"}]


@pytest.mark.parametrize("form", ["name", "file"])
def test_a_model_is_asked_with_the_template_of_the_flag(
    form: str, chat_base: Path, exit_status: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """It takes the place of the tokenizer's own, and the end of an answer in it ends the generation."""
    from jaxpack.cli import generate as command

    found: dict[str, Any] = {}

    def remember(network: object, tokenizer: Any, asked: list, **options: Any) -> list[str]:
        found.update(tokenizer=tokenizer, asked=asked)
        return ["" for _ in asked]

    monkeypatch.setattr(command, "generate_text", remember)
    (tmp_path / "own.jinja").write_text(TEMPLATES["chatml"])
    flag = ["--chat-template", "chatml" if form == "name" else tmp_path / "own.jinja"]
    asked = ["generate", "--model", chat_base, "--prompt", "the cab"]
    assert exit_status(*asked, *flag) == 0
    assert found["tokenizer"].eos_token == TURN_ENDS
    assert found["tokenizer"].chat_template.endswith(TEMPLATES["chatml"])
    (question,) = found["asked"]
    assert question.messages == [{"role": "user", "content": "the cab"}]
    assert exit_status(*asked) == 0
    assert found["asked"] == ["the cab"]
    capsys.readouterr()
    assert exit_status(*asked, *flag, "--no-chat") == 2
    assert "`chat_template` must be left out with `--no-chat`" in " ".join(capsys.readouterr().err.split())
    assert exit_status(*asked, "--chat-template", "gemma") == 2
    assert "must write only special tokens that the tokenizer has" in " ".join(capsys.readouterr().err.split())


def test_an_evaluation_reads_rows_with_the_template_of_the_adapter(
    run: Path, chat_base: Path, data: Path, exit_status: Callable, tmp_path: Path, capsys: Any
):
    given = ["--data", data, "--packing", "--max-length", 64, "--output"]
    losses = []
    for name, flags in {
        "adapter": ["--adapter", run / "adapter"],
        "checkpoint": ["--adapter", run / "checkpoints" / "latest"],
        "flag": ["--adapter", run / "adapter", "--chat-template", "chatml"],
    }.items():
        assert exit_status("evaluate", *flags, *given, tmp_path / name) == 0
        losses.append(json.loads((tmp_path / name).read_text())["eval_loss"])
    assert losses == [losses[0]] * 3
    assert exit_status("evaluate", "--model", chat_base, *given, tmp_path / "none") == 2
    assert "`tokenizer` must have a chat template for rows of messages" in capsys.readouterr().err
    assert exit_status("evaluate", "--model", chat_base, "--chat-template", "chatml", *given, tmp_path / "base") == 0


def test_a_merged_model_stops_at_the_end_of_an_answer(
    run: Path, chat_base: Path, exit_status: Callable, tmp_path: Path
):
    assert exit_status("export", "--adapter", run / "adapter", "--merged", tmp_path / "merged") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.convert_tokens_to_ids(token) for token in (TURN_ENDS, EOS)]


def test_a_run_goes_on_with_the_template(run: Path, chat_base: Path, data: Path, exit_status: Callable, tmp_path: Path):
    flags = ["--model", chat_base, "--data", data, *SETTINGS]
    more = ["--max-steps", 2, "--chat-template", "chatml", "--resume-from-checkpoint", run / "checkpoints" / "1"]
    assert exit_status("train", *flags, *more, "--output", tmp_path / "resumed") == 0
    files = (folder / "adapter" / "adapter_model.safetensors" for folder in (run, tmp_path / "resumed"))
    assert len({file.read_bytes() for file in files}) == 1
    again = ["--model", chat_base, "--data", data, "--adapter", run / "adapter", "--output", tmp_path / "again"]
    assert exit_status("train", *again, "--packing", "--max-length", 64, "--max-steps", 1) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "again" / "adapter").chat_template == TEMPLATES["chatml"]


def test_an_inspection_shows_the_rows_with_the_template(
    chat_base: Path, data: Path, exit_status: Callable, capsys: Any
):
    flags = ["--model", chat_base, "--data", data, "--max-length", 64, "--chat-template", "chatml"]
    assert exit_status("inspect", *flags) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "<|im_start|>assistant[[cab" in shown


def test_trls_name_of_the_flag_is_read(what_is_trained: Callable, data: Path, tmp_path: Path):
    given = ["--model", "x", "--data", data, "--output", tmp_path / "run", "--chat_template_path", "own.jinja"]
    assert what_is_trained(*given)["config"].chat_template == "own.jinja"


def test_a_template_of_tokens_that_the_model_lacks_is_refused(
    chat_base: Path, data: Path, tmp_path: Path, assert_refused: Callable
):
    given = ["--model", chat_base, "--data", data, "--output", tmp_path / "run", "--chat-template", "llama3"]
    assert_refused(["train", *given], ["`chat_template` must write only special tokens", "<|start_header_id|>"])
