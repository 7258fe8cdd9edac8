"""Tests that `jaxpack generate` writes texts with and without the adapter, and refuses bad input in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers_for_tests import small_tokenizer

import torch_bridge
from jaxpack import LoraConfig, add_lora, generate_text
from jaxpack.errors import InputError
from jaxpack.model.lora import adapters

TOKENS = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Writes an adapter that changes the base model and names it."""
    model = add_lora(torch_bridge.from_pretrained(str(base))[0], LoraConfig(r=4))
    rng = np.random.default_rng(0)
    for factors in adapters(model).values():
        factors.lora_b.set_value(rng.normal(0, 0.5, factors.lora_b.shape).astype(np.float32))
    torch_bridge.save_adapter(model, str(base.parent / "adapter"))
    return base.parent / "adapter"


@pytest.fixture(scope="module")
def texts(base: Path, adapter: Path) -> tuple[str, str]:
    """Generates text for one prompt through the Python API, without the adapter and with it."""
    model, tokenizer = torch_bridge.from_pretrained(str(base))
    (without,) = generate_text(model, tokenizer, ["the cab"], max_new_tokens=6)
    torch_bridge.load_adapter(model, str(adapter))
    return without, generate_text(model, tokenizer, ["the cab"], max_new_tokens=6)[0]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_prompts_and_completions_are_shown(exit_status, base, capfd):
    assert exit_status("generate", "--model", base, "--prompt", "the cab", "--prompt", "a\x1b[2Jtab", *TOKENS) == 0
    out, _ = capfd.readouterr()
    assert "prompt 1 ─" in out
    assert "\nthe cab\n" in out
    assert "prompt 2 ─" in out
    assert out.count("completion ─") == 2
    assert "a␛[2Jtab" in out
    assert "\x1b" not in out


def test_a_file_has_what_python_gives_with_the_adapter_and_without(exit_status, adapter, texts, tmp_path, capfd):
    output = tmp_path / "texts.jsonl"
    given = ["--adapter", adapter, "--compare", "--prompt", "the cab", "--output", output]
    assert exit_status("generate", *given, *TOKENS) == 0  # the adapter names the base
    without, with_adapter = texts
    assert without != with_adapter
    assert lines(output) == [{"prompt": "the cab", "completion": with_adapter, "without_adapter": without}]
    out, err = capfd.readouterr()
    assert out == ""
    assert f"saved {output}" in err


def test_texts_that_cannot_be_saved_are_shown(exit_status, base, tmp_path, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise InputError("`output` must be writable, got 'texts.jsonl': No space left on device.")

    given = ["--model", base, "--prompt", "the cab", "--output", tmp_path / "texts.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr("jaxpack.cli.generate.write_new_file", full)
        assert exit_status("generate", *given, *TOKENS) == 2
    out, err = capfd.readouterr()
    assert "completion ─" in out
    assert "No space left on device" in err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert exit_status("generate", *given, *TOKENS) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "`output` must be writable" in err


def test_texts_with_and_without_the_adapter_are_side_by_side(exit_status, base, adapter, capfd):
    given = ["--model", base, "--adapter", adapter, "--compare", "--prompt", "the cab"]
    assert exit_status("generate", *given, *TOKENS) == 0
    out, _ = capfd.readouterr()
    (heads,) = [line for line in out.splitlines() if "without the adapter" in line]
    assert "with the adapter" in heads.replace("without the adapter", "")


def test_sampling_goes_by_the_flags(exit_status, base, tmp_path):
    flags = ["--temperature", "2", "--top-k", "40", "--top-p", "0.9", "--prompt", "the cab", *TOKENS]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = ["--output", tmp_path / name, "--seed", seed]
        assert exit_status("generate", "--model", base, *flags, *output) == 0
    a, b, c = (lines(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.fixture
def chat_base(base: Path, tmp_path: Path) -> Path:
    """Copies the base model and gives its tokenizer a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    small_tokenizer(chat=True).save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def test_rows_of_all_formats_are_asked(exit_status, chat_base, tmp_path, capfd):
    question = {"role": "user", "content": "the tab"}
    rows = [
        {"prompt": "the cab", "completion": "not read"},
        {"prompt": [question]},
        {"messages": [question, {"role": "assistant", "content": "left out"}]},
        {"conversations": [{"from": "human", "value": "the tab"}], "system": "the bat"},
        {"instruction": "the cab", "input": "a"},
        {"instruction": "the cab", "system": "the bat"},  # the form that training takes
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", chat_base, "--prompts", tmp_path / "rows.jsonl", *TOKENS]
    assert exit_status("generate", *given, "--output", tmp_path / "chat.jsonl") == 0
    assert "each text is asked as in a chat" in capfd.readouterr().err
    system = {"role": "system", "content": "the bat"}
    asked = [line["prompt"] for line in lines(tmp_path / "chat.jsonl")]
    assert asked == [
        [{"role": "user", "content": "the cab"}],
        [question],
        [question],
        [system, question],
        [{"role": "user", "content": "the cab\n\na"}],
        [system, {"role": "user", "content": "the cab"}],
    ]
    assert exit_status("generate", *given, "--no-chat", "--output", tmp_path / "plain.jsonl") == 0
    asked = [line["prompt"] for line in lines(tmp_path / "plain.jsonl")]
    assert asked[:2] == ["the cab", [question]]
    assert asked[4].startswith("Below is an instruction")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "`prompt` or `prompts` must be given, and not both, got none."),
        (["--prompt", "a", "--prompts", "{rows}"], "`prompt` or `prompts` must be given, and not both, got both."),
        (["--prompt", ""], "`prompt` must have text, got ''."),
        (["--prompts", "/proc/version"], "`prompts` must end in .jsonl, .json, .csv or .parquet"),
        (["--prompts", "nowhere.jsonl"], "`prompts` must be an existing file, got 'nowhere.jsonl'."),
        (["--prompts", "{empty}"], "`prompts` must have at least one row, got none in {empty}."),
        (
            ["--prompts", "{rows}"],
            "A row must have `prompt`, `messages`, `conversations` or `instruction`, got ['text']",
        ),
        (
            ["--prompt", "a", "--chat"],
            "`tokenizer` must have a chat template for messages, got one without for prompt 1.",
        ),
        (["--prompt", "a", "--temperature", "-1"], "`temperature` must be 0 or a positive number, got -1.0."),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], "`top_p` must be in (0, 1], got 1.5."),
        (["--prompt", "a", "--top-k", "0"], "`top_k` must be a whole number of at least 1, got 0."),
        (["--prompt", "a", "--top-k", "5"], "`top_k` must be None unless `temperature` is above 0, got 5."),
        (["--prompt", "a", "--max-new-tokens", "0"], "`max_new_tokens` must be at least 1, got 0."),
        (["--prompt", "a", "--max-new-tokens", str(10**11)], "`max_new_tokens` must leave room for the keys"),
        (["--prompt", "a", "--seed", str(10**30)], f"`seed` must be in [0, 2**32), got {10**30}."),
        (["--prompt", "a", "--adapter", "nowhere"], "`adapter` must be an existing folder, got 'nowhere'."),
        (["--prompt", "a", "--compare"], "`compare` must be given with an `adapter`, got none."),
        (["--prompt", "a", "--model", "nowhere"], "`model` must be an existing folder"),
        (["--prompt", "a", "--dtype", "int8"], "`dtype` must be"),
        (["--prompt", "a", "--output", "{rows}"], "`output` must be a new file in an existing folder, got '{rows}'."),
        (["--prompt", "a", "--output", "no/x"], "`output` must be a new file in an existing folder, got 'no/x'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(exit_status: Callable[..., int], flags, sentence, base, tmp_path, capfd):
    empty, rows = tmp_path / "empty.jsonl", tmp_path / "rows.jsonl"
    empty.touch()
    rows.write_text('{"text": "the cab"}\n')
    given = [flag.format(empty=empty, rows=rows) for flag in flags]
    assert exit_status("generate", "--model", base, *given) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"error: {sentence.format(empty=empty, rows=rows)}")
    assert line.endswith(".")
    assert out == ""
    assert set(tmp_path.iterdir()) == {empty, rows}


def test_a_prompt_beyond_what_the_model_is_made_for(exit_status, base, tmp_path, capfd):
    folder = tmp_path / "short"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10}))
    assert exit_status("generate", "--model", folder, "--prompt", "x" * 11, "--max-new-tokens", "1") == 2
    sentence = "`prompts` and `max_new_tokens` must come to at most 10 tokens, the model's `max_position_embeddings`"
    assert sentence in capfd.readouterr().err


def test_a_base_that_the_adapter_names_and_nobody_has(exit_status, adapter, tmp_path, capfd):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert exit_status("generate", "--adapter", tmp_path, "--prompt", "a") == 2
    assert "error: `base_model_name_or_path` must be an existing folder" in capfd.readouterr().err


def test_neither_model_nor_adapter(exit_status, capfd):
    assert exit_status("generate", "--prompt", "a") == 2
    assert capfd.readouterr().err == "error: `model` or `adapter` must be given, got none.\n"
