"""Implements `jaxpack evaluate`, which computes the loss of a model on a dataset."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

import torch_bridge
from jaxpack.cli.options import from_flags, with_flags
from jaxpack.cli.reading import (
    LOAD_IN_4BIT_HELP,
    AdapterOption,
    BaseOption,
    DtypeOption,
    read_base,
    read_sets,
    require_model_or_adapter,
    require_new_output,
)
from jaxpack.data.evaluation_sets import prefix_of, public_metrics
from jaxpack.errors import errors_name
from jaxpack.settings import TrainConfig
from jaxpack.train.evaluation import evaluate_sets
from jaxpack.utils.console import console
from jaxpack.utils.files import write_new_file

# The settings that matter without steps: those of the data, the batches and the programs.
_SETTINGS = {"max_length", "packing", "packing_strategy", "padding_free", "per_device_train_batch_size"}
_SETTINGS |= {"dataset_text_field", "assistant_only_loss", "completion_only_loss", "allow_lost_thoughts"}
_SETTINGS |= {"instruction_part", "response_part", "chat_template", "chat_template_date"}
_SETTINGS |= {"mesh", "implementation", "compilation_cache_dir"}
_OTHERS = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.name not in _SETTINGS)


@with_flags(TrainConfig, leave_out=_OTHERS)
def evaluate(
    data: Annotated[
        list[str],
        typer.Option(
            help="Data to evaluate on, written like those of jaxpack train. Several sets with losses of their own have"
            " names: math=math.jsonl and chat=chat.jsonl."
        ),
    ],
    model: BaseOption = None,
    adapter: AdapterOption = None,
    output: Annotated[Path | None, typer.Option(help="New JSON file for the metrics, beside showing them.")] = None,
    dtype: DtypeOption = None,
    load_in_4bit: Annotated[bool, typer.Option(help=LOAD_IN_4BIT_HELP)] = False,
    **flags: object,
) -> None:
    """Compute the loss and the perplexity of a model on a dataset, with or without an adapter."""
    config = from_flags(TrainConfig, flags)
    require_model_or_adapter(model, adapter)
    require_new_output(output)
    dataset = read_sets(data, "data")
    network, tokenizer = read_base(model, adapter, dtype, load_in_4bit=load_in_4bit)
    if adapter is not None:
        torch_bridge.load_adapter(network, str(adapter))
    with errors_name(dataset="data", eval_dataset="data"):
        metrics = evaluate_sets(network, tokenizer, dataset, config)
    for name, of_set in metrics.items():
        console.print(prefix_of(name) + "  ".join(f"{metric} {value:.4f}" for metric, value in of_set.items()))
    if output is not None:  # After they are shown, since the disk may be full.
        write_new_file(output, json.dumps(public_metrics(metrics)).encode() + b"\n", "output")
