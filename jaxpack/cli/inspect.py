"""Implements `jaxpack inspect`, which shows what a run would do with a dataset before the run."""

import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from jaxpack.bench.models import abstract_model
from jaxpack.cli.options import asks_for_adapter, from_flags, with_flags
from jaxpack.cli.reading import DATA_HELP, LENGTHS_HELP, LOAD_IN_4BIT_HELP, MODEL_HELP, read_documents, require_one
from jaxpack.data.batching import Batches
from jaxpack.data.preview import show_row as shown
from jaxpack.errors import InputError, errors_name
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.presets import SHAPES
from jaxpack.model.weights import store_dense
from jaxpack.planning.cards import card_named
from jaxpack.planning.inspect import inspect as inspect_documents
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.utils.console import TextConsole, console
from jaxpack.utils.figures import require_matplotlib
from jaxpack.utils.files import write_new_file
from torch_bridge.pretrained import described_store

# The settings that determine padding, times and the order of rows; other settings do not matter here.
_USED = {
    "max_length",
    "packing",
    "packing_strategy",
    "padding_free",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "dataset_text_field",
    "assistant_only_loss",
    "completion_only_loss",
    "instruction_part",
    "response_part",
    "allow_lost_thoughts",
    "chat_template",
    "chat_template_date",
    "optim",
    "optim_args",
    "remat",
    "memory_limit",
    "offload_weights",
    "offload_embedding",
    "mesh",
    "r",
    "target_modules",
    "target_parameters",
}
_UNUSED = tuple({field.name for config in (TrainConfig, LoraConfig) for field in dataclasses.fields(config)} - _USED)
_OF_TEXT = ("show_row", "dataset_text_field", "assistant_only_loss", "completion_only_loss", "allow_lost_thoughts")
_OF_TEXT += ("instruction_part", "response_part", "chat_template", "chat_template_date")
_PICTURES = (".png", ".svg", ".pdf")


@with_flags(TrainConfig, LoraConfig, leave_out=_UNUSED)
def inspect(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Annotated[list[str] | None, typer.Option(help=DATA_HELP)] = None,
    lengths: Annotated[Path | None, typer.Option(help=LENGTHS_HELP)] = None,
    per_device_train_batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "--per-device-train-batch-size",
            help="Rows (with packing) or documents (without) in a micro-batch.",
            show_default="8",
        ),
    ] = None,
    full_finetuning: Annotated[
        bool, typer.Option(help="Predict times for training all weights, instead of an adapter.")
    ] = False,
    load_in_4bit: Annotated[bool, typer.Option(help=LOAD_IN_4BIT_HELP)] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Card to predict for, by its name, such as 'RTX 4090': says whether the run fits, and how fast it is.",
            show_default="this one",
        ),
    ] = None,
    show_row: Annotated[
        int | None,
        typer.Option(help="Packed row to show decoded, by its number in the run, from 0.", show_default="0"),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="New file for a picture of lengths and padding (.png, .svg or .pdf).")
    ] = None,
    **flags: object,
) -> None:
    """Show what padding costs on a dataset, what packing gains, and which tokens are trained on. Reads no weights."""
    flags |= {"per_device_train_batch_size": per_device_train_batch_size, "show_row": show_row}
    with errors_name(per_device_train_batch_size="batch_size"):
        config = from_flags(TrainConfig, flags)
    if full_finetuning and asks_for_adapter(flags):
        raise InputError("`full_finetuning` must be without flags of adapters, got both. Leave one of them out.")
    if full_finetuning and load_in_4bit:
        raise InputError("`load_in_4bit` must be without `full_finetuning`, got both. Leave one of them out.")
    lora = None if full_finetuning else from_flags(LoraConfig, flags)
    require_one(data, lengths)
    for name in _OF_TEXT:
        if lengths is not None and flags[name] is not None:
            raise InputError(
                f"`{name}` must be without `lengths`, got both: documents drawn from lengths have no text. Use `data`."
            )
    if gpu is not None:
        card_named(gpu)  # refuses one that is not known before the dataset is read
    if picture is not None:
        require_matplotlib()
        if picture.suffix not in _PICTURES or os.path.lexists(picture):
            raise InputError(f"`picture` must end in {', '.join(_PICTURES)} and not exist yet, got {str(picture)!r}.")
    model_config, tokenizer, documents = read_documents(model, data, lengths, run=config)
    described = store_dense if model in SHAPES else described_store(model)
    store = nf4_store() if load_in_4bit and described is store_dense else described
    shapes = abstract_model(model_config, lora, store=store)
    found = inspect_documents(documents, config, model=shapes, gpu=gpu)
    parts: list[object] = [found]
    if data:
        packed = Batches(documents, found.layouts["packed"].config)
        verdict = Group(Text(found.verdict, style="bold"), "")
        parts = [verdict, shown(packed, show_row or 0, tokenizer), "", found.details]
    if picture is not None:
        image = io.BytesIO()
        found.figure().savefig(image, format=picture.suffix.removeprefix("."), dpi=130)
        write_new_file(picture, image.getvalue(), "picture")
        console.print(f"drew {picture}")
    TextConsole(width=None if sys.stdout.isatty() else 120).print(*parts)
