"""Writes a tokenizer beside a model: the files that it was read from, and in them only what the user has changed.

`save_pretrained` of transformers 5 writes less than it read: no `tokenizer.model`, `vocab.json` or `merges.txt`, which
other programs read, no `legacy` flag, which changes the ids, and special tokens in a form that transformers 4 refuses.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, reason
from jaxpack.utils.json_file import read_json

CONFIG, FAST = "tokenizer_config.json", "tokenizer.json"
_SPECIAL_TOKENS, _ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
# The vocabularies of slow tokenizers, of SentencePiece, and of Mistral's own library.
_VOCABULARIES = ("tokenizer.model*", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER_FILES = (FAST, CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS, *_VOCABULARIES, *_TEMPLATES)

# Attributes that `save_pretrained` writes only if the tokenizer was made with them.
_SETTINGS = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "add_bos_token", "add_eos_token")
# Fields that say how the tokenizer was read. `auto_map` names files with code, which are not copied.
_TOLD = ("auto_map", "backend", "is_local", "local_files_only", "name_or_path")
_LAST_CALL = ("padding", "truncation")  # fields of `tokenizer.json` that each call of the tokenizer sets anew
_EXTRA_4, _EXTRA_5 = "additional_special_tokens", "extra_special_tokens"
_ADDED_BY_ID = "added_tokens_decoder"


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer so that transformers 4 and 5 both read it.

    The files that the tokenizer was read from are copied byte for byte, without `auto_map`. A chat template, a setting
    or a token that the user has changed since then is written into these copies. If the tokenizer was not read from
    files, or if the files are gone, the files are those of the tokenizer's own `save_pretrained`.

    Raises:
      InputError: a file that the tokenizer was read from can no longer be read.
      OSError: the disk refused a write.
    """
    given, source = _state_of(tokenizer), _source_of(tokenizer)
    original = None if source is None else _state_at(source)
    if source is None or original is None:
        _write(folder, given.files | given.templates)
        _write_json(folder / CONFIG, _for_transformers_4(given.config))
        return
    _write(folder, {str(path.relative_to(source)): _bytes(path) for path in _files(source)})
    _change(folder / CONFIG, drops=["auto_map"])
    if given.templates != original.templates:
        _remove(folder, _TEMPLATES)
        _write(folder, given.templates)
        _change(folder / CONFIG, drops=["chat_template"])
    _write(folder, {name: data for name, data in given.files.items() if data != original.files.get(name)})
    names = sorted(given.config.keys() | original.config.keys())
    changed = {name: given.config.get(name) for name in names if given.config.get(name) != original.config.get(name)}
    changed = _for_transformers_4(changed)
    _change(folder / CONFIG, changed, adds=True)
    _change(folder / _SPECIAL_TOKENS, changed)
    if given.files.get(FAST) != original.files.get(FAST):
        _follow(folder, *(json.loads(state.files.get(FAST, b"{}")) for state in (given, original)))


class _State(NamedTuple):
    """Holds what `save_pretrained` writes. Two tokenizers with equal states are the same.

    Attributes:
      config: the settings and the special tokens.
      templates: the chat templates by the names of their files.
      files: the other files by name. `tokenizer.json` is without the padding and truncation of the last call.
    """

    config: dict[str, Any]
    templates: dict[str, bytes]
    files: dict[str, bytes]


def _state_of(tokenizer: Tokenizer) -> _State:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # a full disk is a plain `Exception` in tokenizers
            raise OSError(reason(error)) from error
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = json.loads(files.pop(CONFIG, b"{}"))
    config |= {name: getattr(tokenizer, name) for name in _SETTINGS if hasattr(tokenizer, name)}
    config = {name: value for name, value in config.items() if name not in _TOLD}
    fast = json.loads(files.get(FAST, b"{}"))
    if any(fast.get(name) is not None for name in _LAST_CALL):
        files[FAST] = json.dumps(fast | dict.fromkeys(_LAST_CALL), indent=2, ensure_ascii=False).encode()
    templates = {name: files.pop(name) for name in [*files] if name.endswith(".jinja")}
    return _State(config, templates, files)


def _state_at(source: Path) -> _State | None:
    """Returns the state of the tokenizer that transformers reads from a folder, or None if it cannot read one."""
    try:
        from transformers import AutoTokenizer

        # By default transformers asks the user whether to run the code that `auto_map` names, and waits.
        return _state_of(AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except Exception:  # transformers raises any class for files that are gone or damaged
        return None


def _source_of(tokenizer: Tokenizer) -> Path | None:
    """Returns the folder that a tokenizer was read from: a folder of the user, or one in the cache of the hub."""
    name = getattr(tokenizer, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not an id, or not in the cache
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())


def _for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `tokenizer_config.json` of transformers 5 in a form that version 4 reads, too."""
    config = dict(config)
    if isinstance(config.get(_EXTRA_5), list):  # in version 4 this field is an object
        config[_EXTRA_4] = config.pop(_EXTRA_5)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in version 4
    return config


def _follow(folder: Path, given: dict[str, Any], original: dict[str, Any]) -> None:
    """Lets the files beside `tokenizer.json` follow a change of it: they list added tokens, or are left out.

    Args:
      folder: the folder with copies of the original files, which already has the new `tokenizer.json`.
      given: the content of the new `tokenizer.json`.
      original: the content that `tokenizer.json` had before.
    """
    tokens = {token.pop("id"): token for token in given.pop("added_tokens", [])}
    before = {token["content"]: token["id"] for token in original.pop("added_tokens", [])}
    if given != original:  # these files hold another vocabulary, or would split texts in another way
        _remove(folder, [*_VOCABULARIES, _ADDED_TOKENS])
    now = {token["content"]: number for number, token in tokens.items()}
    new = {content: number for content, number in now.items() if before.get(content) != number}
    _change(folder / _ADDED_TOKENS, new, adds=True, drops=before.keys() - now.keys())
    decoder = {str(number): token for number, token in tokens.items()}
    _change(folder / CONFIG, {_ADDED_BY_ID: decoder})


def _change(path: Path, changes: Mapping[str, Any] = {}, *, adds: bool = False, drops: Iterable[str] = ()) -> None:
    """Changes fields of a JSON file, and keeps the file as it is if nothing changes.

    Args:
      adds: whether fields that the file does not have are added to it; otherwise these changes are passed over.
      drops: names of fields that the file must not have.
    """
    if not path.is_file():
        return
    content = read_json(path)
    changed = content | {name: value for name, value in changes.items() if adds or name in content}
    changed = {name: value for name, value in changed.items() if name not in drops}
    if changed != content:
        _write_json(path, changed)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _remove(folder: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got an error: {reason(error)}.") from error
