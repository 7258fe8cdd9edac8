"""Writes the model card of an adapter's folder, which the Hugging Face hub shows as its page."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxpack import __version__
from jaxpack.errors import one_line
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer

CARD = "README.md"

_DATA = re.compile(r"([A-Za-z0-9_-]+=)?(.*?)(=[0-9.e+-]+)?", re.DOTALL)  # a name, a path and a weight

_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
{resize}model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
```
"""


def model_card(model: Transformer, settings: Mapping[str, Any], *, has_tokenizer: bool) -> str:
    """Returns the text of an adapter's model card: what it belongs to, how it is used, and how it was trained.

    The card names no folder of the machine that trained the adapter: of a path, it has the last part.

    Args:
      settings: names and values of the training, which the card lists in their order.
      has_tokenizer: whether the tokenizer lies beside the adapter.
    """
    base, lora = without_folders(model.config.name_or_path) or "the base model", model.lora_config
    assert lora is not None
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["jaxpack", "lora"]}
    if base == model.config.name_or_path:  # The hub refuses a card whose base is no id.
        head = {"base_model": base} | head
    projections = ", ".join(sorted(adapters(model)))
    described = {"rank": lora.r, "alpha": lora.lora_alpha, "projections": projections, **settings}
    rows = [f"| {name} | {_cell(value)} |" for name, value in described.items() if value is not None]
    resize = ""
    if model.rows_of_base is not None:  # The adapter holds all rows, so their first values do not matter.
        resize = f"base.resize_token_embeddings({model.config.vocab_size}, mean_resizing=False)\n"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# LoRA adapter of {one_line(base)}\n",
        f"Trained with jaxpack {__version__}.\n",
        "## Use\n",
        _USE.format(base=base, resize=resize, tokenizer="path/to/this/folder" if has_tokenizer else base),
        "## Training\n",
        "\n".join(["| setting | value |", "|---|---|", *rows]) + "\n",
    ]
    return "\n".join(parts)


def without_folders(value: str) -> str:
    """Returns the last part of a path on this machine, and everything else, such as the id of a model, as it is."""
    is_path = os.path.isabs(value) or value.startswith((".", "~")) or os.path.lexists(value)
    return Path(value).name if is_path else value


def _without_folders_of_data(value: str) -> str:
    """Does the same with a dataset that has a name or a weight, as "math=rows/math.jsonl=0.7" has."""
    if (shown := without_folders(value)) != value or (parts := _DATA.fullmatch(value)) is None:
        return shown
    before, path, after = parts.groups(default="")
    return before + without_folders(path) + after


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "-"
    text = _without_folders_of_data(str(value)) if isinstance(value, str | Path) else str(value)
    return one_line(text).replace("|", "\\|") or "-"
