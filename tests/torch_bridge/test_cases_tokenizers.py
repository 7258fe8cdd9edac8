"""Tests that a tokenizer is written as the files that it was read from, and that the user's changes are in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import small_model
from tokenizers_for_tests import EOS, small_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import torch_bridge
from jaxpack import InputError, LoraConfig
from tests.torch_bridge.hub_tokenizers import CHANGES, KINDS, TEMPLATE, TEXTS, same, write_hub_tokenizer
from torch_bridge.tokenizer_files import write_tokenizer

CONFIG = "tokenizer_config.json"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(tokenizer: Any, folder: Path) -> Any:
    """Writes a tokenizer to a new folder and reads it again."""
    folder.mkdir()
    write_tokenizer(folder, tokenizer)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_tokenizer_is_copied_byte_for_byte(kind: str, tmp_path: Path):
    base = write_hub_tokenizer(tmp_path / "base", kind)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(TEXTS, truncation=True, max_length=4)  # the tokenizer remembers this until the next call
    again = written(tokenizer, tmp_path / "written")
    expected, got = files(base), files(tmp_path / "written")
    if b"auto_map" in expected[CONFIG]:
        settings = json.loads(expected.pop(CONFIG))
        del settings["auto_map"]  # it names code that is not in the folder
        assert json.loads(got.pop(CONFIG)) == settings
    assert got == expected
    assert same(again, AutoTokenizer.from_pretrained(base))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_user_changed_is_written_and_the_rest_is_copied(kind: str, change: str, tmp_path: Path):
    base = write_hub_tokenizer(tmp_path / "base", kind)
    tokenizer = CHANGES[change](AutoTokenizer.from_pretrained(base))
    assert not same(tokenizer, AutoTokenizer.from_pretrained(base)), "nothing was changed"
    assert same(written(tokenizer, tmp_path / "written"), tokenizer)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (base, tmp_path / "written"))
    assert after.get("legacy") == before.get("legacy")
    assert "auto_map" not in after
    vocabularies = {"tokenizer.model", "vocab.json", "merges.txt"}
    expected = {name: data for name, data in files(base).items() if name in vocabularies and change != "retrained"}
    assert {name: data for name, data in files(tmp_path / "written").items() if name in vocabularies} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_files_follow_the_changes_of_other_files(kind: str, tmp_path: Path):
    """Older files that say the same as a changed one say the new thing: some programs read these."""
    tokenizer = AutoTokenizer.from_pretrained(write_hub_tokenizer(tmp_path / "base", kind))
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    written(tokenizer, tmp_path / "written")
    read = {name: json.loads(data) for name, data in files(tmp_path / "written").items() if name.endswith(".json")}
    number = tokenizer.convert_tokens_to_ids("<new>")
    assert read["special_tokens_map.json"]["eos_token"] == read[CONFIG]["eos_token"] == "<new>"
    assert read["added_tokens.json"]["<new>"] == number
    if kind != "mistral_auto_map":
        assert read[CONFIG]["added_tokens_decoder"][str(number)]["content"] == "<new>"


def test_a_template_of_the_base_does_not_stay_beside_the_user_s(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(write_hub_tokenizer(tmp_path / "base", "qwen2_templates"))
    tokenizer.chat_template = "one"
    written(tokenizer, tmp_path / "written")
    assert {name: data for name, data in files(tmp_path / "written").items() if name.endswith(".jinja")} == {
        "chat_template.jinja": b"one"
    }
    tokenizer = AutoTokenizer.from_pretrained(write_hub_tokenizer(tmp_path / "qwen2", "qwen2"))
    tokenizer.chat_template = None
    written(tokenizer, tmp_path / "none")
    assert TEMPLATE[:20].encode() not in b"".join(files(tmp_path / "none").values())


@pytest.mark.parametrize("kind", ["llama2_legacy", "qwen2_slow"])
def test_saved_and_merged_models_have_the_files_of_the_base(kind: str, tmp_path: Path):
    base = write_hub_tokenizer(tmp_path / "base", kind)
    expected = files(base)
    torch_bridge.save_pretrained(small_model("llama", vocab_size=320), tmp_path / "model")
    shutil.copytree(tmp_path / "model", base, dirs_exist_ok=True)
    model, tokenizer = torch_bridge.from_pretrained(str(base))
    torch_bridge.save_pretrained(model, tmp_path / "saved", tokenizer)
    adapted = small_model("llama", vocab_size=320, lora=LoraConfig(r=2))
    torch_bridge.save_merged(adapted, tmp_path / "merged", tokenizer)
    for name in ("saved", "merged"):
        got = files(tmp_path / name)
        assert {file: got[file] for file in expected} == expected
        assert same(torch_bridge.from_pretrained(str(tmp_path / name))[1], tokenizer)


@pytest.mark.parametrize(
    "lose",
    [
        lambda base: None,
        lambda base: shutil.rmtree(base),
        lambda base: (base / "tokenizer.json").write_text("{"),
    ],
    ids=["never there", "gone", "damaged"],
)
def test_a_tokenizer_without_its_files_is_written_in_a_form_that_transformers_4_reads(
    lose: Callable[[Path], object], tmp_path: Path
):
    small_tokenizer(chat=True, specials=("<a>",)).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    if lose(tmp_path / "base") is None and (tmp_path / "base").exists():
        tokenizer = small_tokenizer(chat=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<b>"]})
    assert same(written(tokenizer, tmp_path / "written"), tokenizer)
    settings = json.loads((tmp_path / "written" / CONFIG).read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4 has no `TokenizersBackend`
    assert settings["additional_special_tokens"] == ["<b>"]  # 4 requires `extra_special_tokens` to be an object
    assert "extra_special_tokens" not in settings


def test_a_tokenizer_of_the_hub_is_copied_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = write_hub_tokenizer(tmp_path / "base", "llama2_legacy")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.name_or_path = "owner/name"
    asked: list[tuple[str, dict]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    written(tokenizer, tmp_path / "written")
    assert asked == [("owner/name", {"local_files_only": True})]
    assert files(tmp_path / "written") == files(base)


def test_a_file_that_can_no_longer_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = write_hub_tokenizer(tmp_path / "base", "llama2")
    tokenizer, read = AutoTokenizer.from_pretrained(base), Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == base / "tokenizer.model":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(InputError, match=r"base/tokenizer.model must be a file that can be read, got .*denied"):
        torch_bridge.save_pretrained(small_model("llama"), tmp_path / "written", tokenizer)
    assert not (tmp_path / "written").exists()


def test_the_class_that_read_a_tokenizer_is_written(tmp_path: Path):
    """A general class reads the file as it is, where that of Llama follows the `legacy` flag: their ids differ."""
    base = write_hub_tokenizer(tmp_path / "base", "llama2_not_legacy")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    assert not same(tokenizer, AutoTokenizer.from_pretrained(base))
    assert same(written(tokenizer, tmp_path / "written"), tokenizer)
    assert tokenizer.eos_token != EOS
