"""Reads the model and the dataset that the flags of a command name."""

import datetime
from pathlib import Path
from typing import Any

import torch_bridge
from jaxpack.data.documents import Documents
from jaxpack.data.reading import load_documents
from jaxpack.data.sources import sources_of
from jaxpack.data.synthetic import drawn_documents
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, errors_name
from jaxpack.model.config import ModelConfig
from jaxpack.model.presets import SHAPES
from jaxpack.model.transformer import Transformer
from jaxpack.utils.files import require_data_file

MODEL_HELP = (
    "Hugging Face model: a folder, or the id of a model on the hub. Or a shape that gets random weights:"
    f" {', '.join(SHAPES)}."
)
DATA_HELP = (
    "Dataset: a file, a folder, a pattern, or a dataset of the hub, in any format that jaxpack train reads. May be"
    " given several times, also with weights (a.jsonl=0.7)."
)
LENGTHS_HELP = (
    "Lengths of documents, instead of --data: a CSV file with the columns token_length_from, token_length_to and"
    " documents. Random documents are drawn with these lengths."
)

LOAD_IN_4BIT_HELP = (
    "Hold the frozen projections of a 16-bit model in 4 bits (NF4), which takes less than a third of the memory. A"
    " model that bitsandbytes quantised to NF4 is in 4 bits without this flag."
)


def check_sources(given: list[str], name: str) -> None:
    """Refuses data that are not there, or have weights that cannot be used. `name` is the argument that errors name."""
    with errors_name(dataset=name):
        sources_of(given)


def alone(given: list[str]) -> str | list[str]:
    """Returns the value of a flag that was given once, and the list of values of one that was given several times."""
    return given[0] if len(given) == 1 else given


def require_one(data: list[str] | None, lengths: Path | None) -> None:
    """Raises InputError unless either `data` or `lengths` is given, and is there."""
    if bool(data) == (lengths is not None):
        given = "both" if data else "none"
        raise InputError(f"`data` or `lengths` must be given, and not both, got {given}.")
    if data:
        check_sources(data, "data")
    if lengths is not None:
        require_data_file(lengths, "lengths")


def read_base(
    model: str | None, adapter: Path | None, dtype: str | None, *, load_in_4bit: bool = False
) -> tuple[Transformer, Tokenizer | None]:
    """Reads a model and its tokenizer: `model`, or else the base model that the adapter's config names.

    In the second case an error names the config's field `base_model_name_or_path`.
    """
    base = torch_bridge.base_of(str(adapter)) if model is None else model
    with errors_name(model="base_model_name_or_path" if model is None else "model"):
        return torch_bridge.from_pretrained(base, dtype=dtype, load_in_4bit=load_in_4bit)


def read_documents(
    model: str,
    data: list[str] | None,
    lengths: Path | None,
    *,
    drawn: int | None = None,
    text_field: str = "text",
    assistant_only_loss: bool = True,
    allow_lost_thoughts: bool = False,
    date: datetime.date | None = None,
    seed: int = 42,
) -> tuple[ModelConfig, Tokenizer | None, Documents]:
    """Reads the model's config and tokenizer, and the documents, from `data` or drawn from `lengths`.

    `drawn` is the number of documents to draw; None draws as many as `lengths` counts.
    """
    config, tokenizer = (SHAPES[model], None) if model in SHAPES else torch_bridge.read_config(model)
    if lengths is not None:
        return config, tokenizer, drawn_documents(lengths, drawn, vocab_size=config.vocab_size)
    assert data  # `require_one`
    options: dict[str, Any] = {"text_field": text_field, "assistant_only_loss": assistant_only_loss}
    options |= {"allow_lost_thoughts": allow_lost_thoughts, "date": date, "seed": seed}
    with errors_name(dataset="data", text_field="dataset_text_field"):
        documents = load_documents(alone(data), tokenizer, vocab_size=config.vocab_size, **options)
    return config, tokenizer, documents
