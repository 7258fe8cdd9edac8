"""Checks a downloaded folder before other libraries read it: they trust its files, and would wait, or fill the memory.

transformers and tokenizers open whatever has the right name, read it whole, and do what it says. So each file must be a
regular file of a bounded size, each JSON file must be read in the same way by everybody, and a tokenizer must not make
texts thousands of times longer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpack.errors import InputError, reason
from jaxpack.utils.files import is_regular_file, kind_of
from jaxpack.utils.json_file import read_json

_MAX_TOKENIZER_BYTES = 96 << 20  # three times the largest vocabulary in use, of 260,000 tokens
_MAX_TEMPLATE_BYTES = 1 << 20  # forty times the longest chat template in use
_MAX_GROWTH = 10_000  # times that a normalizer may make a text longer; those in use make it twice as long
_MAX_ADDED = 1000  # tokens that a tokenizer adds to each text; those in use add two
_TEMPLATES = "additional_chat_templates"
_READ = {".json", ".jinja", ".txt", ".model", ".safetensors", ".bin"}  # endings of names that other libraries look for
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_JSON += ("vocab.json", "chat_template.json", "processor_config.json", "preprocessor_config.json")
_LIMITS = {".jinja": _MAX_TEMPLATE_BYTES, ".txt": _MAX_TOKENIZER_BYTES, ".model": _MAX_TOKENIZER_BYTES}


def require_regular_files(folder: Path) -> None:
    """Refuses a folder in which something with the name of a model's file is no regular file, or is far too large.

    Links to regular files, of which the hub's cache consists, are regular files. Nothing is opened.

    Raises:
      InputError: names the file.
    """
    for path in _entries(folder):
        if path.suffix in _READ and is_regular_file(path):
            size, limit = path.stat().st_size, _LIMITS.get(path.suffix)
            if limit is not None and size > limit:
                raise InputError(f"{path} must have at most {limit:,} bytes, got {size:,}. Download the file again.")


def require_sound_tokenizer(folder: Path) -> None:
    """Refuses a folder whose tokenizer files cannot be read in bounded time and memory, or in only one way.

    Raises:
      InputError: names the file, and what is wrong with it.
    """
    for name in _TOKENIZER_JSON:
        if is_regular_file(folder / name):
            content = read_json(folder / name, max_bytes=_MAX_TOKENIZER_BYTES)
            if name == "tokenizer.json":
                _require_bounded_texts(folder / name, content)


def _entries(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / _TEMPLATES):
        if kind_of(place) == "a folder":
            try:
                yield from sorted(place.iterdir())
            except OSError as error:
                raise InputError(f"{place} must be a folder that can be read: {reason(error)}.") from error


def _require_bounded_texts(path: Path, content: dict[str, Any]) -> None:
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for step in _steps(content.get(part)):
            added = step.get("content") if step.get("type") == "Replace" else step.get("prepend")
            if isinstance(added, str):
                # A pattern may match the empty text, before every character.
                growth *= max(1, len(added) + (not isinstance(step.get("pattern"), dict) or "Regex" in step["pattern"]))
        if growth > _MAX_GROWTH:
            raise InputError(
                f"`{part}` of {path} must not make texts more than {_MAX_GROWTH:,} times longer, got replacements that"
                f" can make them {growth:.3g} times longer. Use the tokenizer of the model's authors."
            )
    for step in _steps(content.get("post_processor")):
        for part in ("single", "pair"):
            if isinstance(step.get(part), list) and len(step[part]) > _MAX_ADDED:
                raise InputError(
                    f"`post_processor` of {path} must add at most {_MAX_ADDED:,} tokens to a text, got"
                    f" {len(step[part]):,}. Use the tokenizer of the model's authors."
                )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yields a part of a tokenizer, or the parts of a sequence of parts, in any depth."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
            waiting += [item for items in step.values() if isinstance(items, list) for item in items]
