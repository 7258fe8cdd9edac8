"""Tests that a downloaded folder cannot make a run wait, fill the memory or say two things. Needs no torch."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from models import small_model
from tokenizers_for_tests import write_checkpoint

import jaxpack.cli
import torch_bridge
import torch_bridge.tensors
from jaxpack.errors import InputError
from jaxpack.settings import LoraConfig
from torch_bridge.io.untrusted import require_regular_files, require_sound_tokenizer
from torch_bridge.patterns import match_all, match_ends


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def refused(folder: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        torch_bridge.from_pretrained(str(folder))
    assert time.monotonic() - begin < 60
    assert len(str(error.value)) < 600
    return str(error.value)


# Files that are no regular files.


def make(kind: str, path: Path) -> None:
    if path.exists():
        path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(before)
    else:
        path.symlink_to({"a device": "/dev/zero", "a link to nothing": "nowhere"}[kind])


KINDS = ("a pipe", "a folder", "a socket", "a device", "a link to nothing")
READ_BY_OTHERS = ("special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
FILES += ("tokenizer.json", "tokenizer_config.json", "pytorch_model.bin", *READ_BY_OTHERS)


@pytest.mark.parametrize("name", FILES)
def test_cases_a_file_of_a_model_that_is_no_regular_file_is_refused(name: str, folder: Path):
    for kind in KINDS:
        make(kind, folder / name)
        assert refused(folder) == (
            f"{folder / name} must be a regular file, got {kind}. Copy or download the file again."
        )
        (folder / name).rmdir() if kind == "a folder" else (folder / name).unlink()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_cases_a_file_of_an_adapter_that_is_no_regular_file_is_refused(kind: str, name: str, tmp_path: Path):
    model = small_model("qwen3", lora=LoraConfig(r=2, target_modules="q_proj"))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    make(kind, tmp_path / "adapter" / name)
    with pytest.raises(InputError, match=f"{name} must be a regular file, got {kind}"):
        torch_bridge.load_adapter(small_model("qwen3"), str(tmp_path / "adapter"))


def test_cases_a_further_template_that_is_a_pipe_is_refused(folder: Path):
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "tools.jinja")
    assert "tools.jinja must be a regular file, got a pipe" in refused(folder)


def test_links_to_files_and_other_entries_are_read(folder: Path, tmp_path: Path):
    """The cache of the hub is a folder of links. Other programs leave folders and pipes of their own."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    (linked / "original").mkdir()
    os.mkfifo(linked / "events")
    model, tokenizer = torch_bridge.from_pretrained(str(linked))
    assert tokenizer is not None
    assert model.config.name_or_path == str(linked)


# Sizes and JSON.


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "x.jinja"])
def test_cases_a_file_of_gigabytes_is_not_read(name: str, folder: Path):
    with (folder / name).open("ab") as file:
        file.truncate(100 << 30)
    assert str(folder / name) in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
)
def test_cases_a_key_that_occurs_twice_is_refused(name: str, folder: Path):
    text = (folder / name).read_text() if (folder / name).exists() else '{"eos_token_id": 0}'
    key = json.dumps(next(iter(json.loads(text))))
    (folder / name).write_text(text.replace("{", f"{{{key}: null, ", 1))
    assert f"{folder / name} must be a JSON file" in (message := refused(folder))
    assert "occurs twice in one object" in message


def test_cases_a_key_of_an_adapter_or_of_an_index_that_occurs_twice_is_refused(folder: Path, tmp_path: Path):
    model = small_model("qwen3", lora=LoraConfig(r=2, target_modules="q_proj"))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"r": 64, ', 1))
    with pytest.raises(InputError, match="the key 'r' occurs twice"):
        torch_bridge.load_adapter(small_model("qwen3"), str(tmp_path / "adapter"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = '{"weight_map": {"model.norm.weight": "a.safetensors", "model.norm.weight": "a.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    assert "the key 'model.norm.weight' occurs twice" in refused(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_cases_a_number_that_is_not_finite_is_refused(value: str, folder: Path):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", f'{{"unknown": {value}, ', 1))
    assert f"it has the number {value}, which is not finite" in refused(folder)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def replacing(count: int, content: str, pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": count * [{"type": "Replace", "pattern": pattern, "content": content}]}


@pytest.mark.parametrize(
    "normalizer",
    [
        replacing(5, "a" * 100, {"String": "a"}),
        replacing(1, "a" * 100_000, {"String": "a"}),
        replacing(20, "aa", {"Regex": "a?"}),
        {"type": "Sequence", "normalizers": [replacing(2, "a" * 100, {"String": "a"})] * 3},
    ],
    ids=["five times a hundred", "a hundred thousand", "at every place", "within one another"],
)
def test_cases_a_tokenizer_that_makes_texts_far_longer_is_refused(normalizer: dict[str, Any], folder: Path):
    changed(folder, lambda content: content.update(normalizer=normalizer))
    assert "tokenizer.json must not make texts more than 10,000 times longer" in refused(folder)


def test_cases_a_tokenizer_that_adds_many_tokens_is_refused(folder: Path):
    token = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [token] * 5000, "pair": [token], "special_tokens": {}}
    changed(folder, lambda content: content.update(post_processor=template))
    assert "must add at most 1,000 tokens to a text, got 5,000" in refused(folder)


def test_normalizers_in_use_are_read(folder: Path):
    parts = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
    ]
    changed(folder, lambda content: content.update(normalizer={"type": "Sequence", "normalizers": parts}))
    require_regular_files(folder)
    require_sound_tokenizer(folder)


def test_cases_code_of_a_tokenizer_is_neither_run_nor_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers would ask the user, and wait for 15 seconds."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('the code ran')")

    def asked(*_: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    try:
        torch_bridge.from_pretrained(str(folder))
    except InputError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017 (another version may read the tokenizer without its code)


# Regular expressions.

NAMES = [
    f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]
SLOW = {
    "nested repetitions": r"(a+)+$|(.*)*x",
    "alternatives that overlap": r"(\w|\w\w)*\.(\w|\w\w)*",
    "a repeated back reference": r"(.*)\1*(.*)(.*)*!",
    "many optional parts": "(.?)" * 30 + r"(\1\2)*!",
}


@pytest.mark.parametrize("name", SLOW)
def test_cases_a_pattern_that_takes_a_lifetime_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch_bridge.patterns._SECONDS", 2.0)
    begin = time.monotonic()
    with pytest.raises(InputError, match="`target_modules` must be regular expressions that can be matched quickly"):
        match_all([SLOW[name]], ["a" * 60 + ".b_c" * 20], "`target_modules`")
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("pattern", ["(", "*", "(?P<a", "[z-a]", "(" * 5000, "a{1,99999999999999}", "x" * 20_000])
def test_cases_what_is_no_pattern_is_refused(pattern: str):
    for match in (match_all, match_ends):
        if match is match_all or not pattern.isalnum():
            with pytest.raises(InputError, match="`rank_pattern`"):
                match([pattern], NAMES, "`rank_pattern`")


def test_patterns_match_as_in_this_process():
    patterns = [r".*\.[qk]_proj", r"model\.layers\.[01]\..*", "nothing", r".*_proj$"]
    assert match_all(patterns, NAMES, "") == [
        {name for name in NAMES if name.endswith(("q_proj", "k_proj"))},
        set(NAMES[:6]),
        set(),
        set(NAMES),
    ]
    assert match_all([], NAMES, "") == []
    ends = ["q_proj", "layers.1.mlp.up_proj", "up_pro", "mlp.[u]p_proj"]
    for keys in (ends[:3], ends):
        assert match_ends(keys, NAMES, "")[:3] == [{n for n in NAMES if "q_proj" in n}, {NAMES[5]}, set()]
    assert match_ends(ends, NAMES, "")[3] == {n for n in NAMES if "up_proj" in n}


# No room for the model.


def full(*_: object) -> None:
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\n[Allocations] ..."
    )


def no_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("where", ["zeros_at", "fill", "_place"])
@pytest.mark.parametrize("fails", [full, no_memory])
def test_cases_no_memory_for_a_model_is_a_sentence(
    fails: Callable, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_bridge.tensors, where, fails)
    message = refused(folder)
    assert message.startswith(
        f"`model` must fit into the memory of cpu: the weights of {folder} need 0.00 GiB in float32"
    )
    assert "`dtype` bfloat16 needs half of that" in message
    assert "Use a smaller model or a device with more memory" in message
    assert "\n" not in message


def test_cases_a_model_larger_than_the_memory_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_bridge.tensors, "available_host_bytes", lambda: 10_000)
    monkeypatch.setattr(torch_bridge.tensors, "zeros_at", lambda *_: pytest.fail("memory was taken"))
    assert "need 0.00 GiB in float32, got 0.00 GiB that are free" in refused(folder)


def test_other_errors_of_a_device_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(torch_bridge.tensors, "fill", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        torch_bridge.from_pretrained(str(folder))


@pytest.mark.parametrize("fails", [full, no_memory])
def test_cases_full_memory_ends_a_command_with_a_sentence(
    fails: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(jaxpack.cli, "make_output_visible", lambda: None)
    monkeypatch.setattr(jaxpack.cli, "app", fails)
    with pytest.raises(SystemExit) as ended:
        jaxpack.cli.main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: the memory of ")
    assert shown.count("\n") == 1
