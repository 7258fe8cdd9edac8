"""Reads the model and the dataset that the flags of a command name."""

import os
from pathlib import Path
from typing import Annotated

import typer

import torch_bridge
from jaxpack.data.documents import Documents
from jaxpack.data.evaluation_sets import errors_name_set, read_names
from jaxpack.data.named_templates import use_chat_template
from jaxpack.data.reading import load_for_run
from jaxpack.data.sources import sources_of
from jaxpack.data.synthetic import drawn_documents
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, errors_name
from jaxpack.model.config import ModelConfig
from jaxpack.model.presets import SHAPES
from jaxpack.model.transformer import Transformer
from jaxpack.settings import TrainConfig
from jaxpack.train.trained import is_checkpoint, template_of_checkpoint
from jaxpack.utils.console import console
from jaxpack.utils.files import require_data_file, require_folder
from torch_bridge.pretrained import tokenizer_in

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

BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face model: a folder, or the id of a model on the hub.",
        show_default="the one that the adapter names",
    ),
]
ADAPTER_HELP = (
    "Folder of a PEFT adapter for the model, such as the adapter/ that train writes. Or a checkpoint of a run:"
    " checkpoints/500, checkpoints/best or checkpoints/latest in its folder."
)
AdapterOption = Annotated[Path | None, typer.Option(help=ADAPTER_HELP)]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Dtype of the weights and of the computation: bfloat16, float16 or float32.",
        show_default="bfloat16 on a GPU, float32 on a CPU",
    ),
]
LOAD_IN_4BIT_HELP = (
    "Hold the frozen projections of a 16-bit model in 4 bits (NF4), which takes less than a third of the memory. A"
    " model that bitsandbytes quantised to NF4 is in 4 bits without this flag."
)


def require_adapter(adapter: Path) -> None:
    """Refuses a path that is neither a folder nor a checkpoint of a run."""
    if not (os.path.isdir(adapter) or is_checkpoint(adapter)):
        raise InputError(f"`adapter` must be an existing folder, got {str(adapter)!r:.200}.")


def require_model_or_adapter(model: str | None, adapter: Path | None) -> None:
    """Refuses neither of the two, and an adapter that is not there."""
    if model is None and adapter is None:
        raise InputError("`model` or `adapter` must be given, got none.")
    if adapter is not None:
        require_adapter(adapter)


def require_new_output(output: Path | None) -> None:
    """Refuses a file that exists, or whose folder does not, before a command takes its time."""
    if output is not None:
        folder = output.absolute().parent
        if os.path.lexists(output) or not folder.is_dir():
            raise InputError(f"`output` must be a new file in an existing folder, got {str(output)!r}.")
        require_folder(folder, "output")


def check_sources(given: list[str], name: str) -> None:
    """Refuses data that are not there, or have weights that cannot be used. `name` is the argument that errors name."""
    with errors_name(dataset=name):
        sources_of(given)


def read_sets(given: list[str], name: str) -> str | list[str] | dict[str, list[str]]:
    """Reads evaluation sets, perhaps with names, as `Trainer` takes them; refuses data as `check_sources` does."""
    with errors_name(dataset=name):
        sets = read_names(given)
    if not isinstance(sets, dict):
        check_sources(sets, name)
        return alone(sets)
    for of_set, paths in sets.items():
        with errors_name_set(of_set):
            check_sources(paths, name)
    return sets


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

    In the second case an error names the config's field `base_model_name_or_path`. The tokenizer is that beside the
    adapter, if there is one: it has the chat template with which the adapter was trained.
    """
    base = torch_bridge.base_of(str(adapter)) if model is None else model
    with errors_name(model="base_model_name_or_path" if model is None else "model"):
        network, tokenizer = torch_bridge.from_pretrained(base, dtype=dtype, load_in_4bit=load_in_4bit)
    return network, tokenizer if adapter is None else tokenizer_of(adapter, tokenizer)


def tokenizer_of(adapter: Path, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """Returns the tokenizer with which an adapter, or a checkpoint, was trained.

    Args:
      tokenizer: the tokenizer of the base model, which it is if nothing else lies beside the adapter.
    """
    if is_checkpoint(adapter):
        template = template_of_checkpoint(adapter)
        if tokenizer is not None and template and template != tokenizer.chat_template:
            use_chat_template(tokenizer, template, f"that of {adapter}")
        return tokenizer
    found = tokenizer_in(adapter)
    if found is None:
        return tokenizer
    if tokenizer is not None and found.chat_template != tokenizer.chat_template:
        console.print(f"the chat template is the one in {adapter}, not the base model's")
    return found


def read_documents(
    model: str,
    data: list[str] | None,
    lengths: Path | None,
    *,
    drawn: int | None = None,
    run: TrainConfig | None = None,
) -> tuple[ModelConfig, Tokenizer | None, Documents]:
    """Reads the model's config and tokenizer, and the documents, from `data` or drawn from `lengths`.

    Args:
      drawn: the number of documents to draw; None draws as many as `lengths` counts.
      run: the settings of a run, which say how to read `data`; None takes the defaults.
    """
    config, tokenizer = (SHAPES[model], None) if model in SHAPES else torch_bridge.read_config(model)
    if lengths is not None:
        return config, tokenizer, drawn_documents(lengths, drawn, vocab_size=config.vocab_size)
    assert data  # `require_one`
    with errors_name(dataset="data"):
        documents = load_for_run(run or TrainConfig(), alone(data), tokenizer, vocab_size=config.vocab_size)
    return config, tokenizer, documents
