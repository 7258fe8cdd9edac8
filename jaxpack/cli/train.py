"""Implements `jaxpack train`, which fine-tunes a Hugging Face model and writes an adapter or a model."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import typer

import torch_bridge
from jaxpack.cli.config_file import RUN_SETTINGS, overridden, read_settings, write_settings
from jaxpack.cli.hub import HubIdOption, HubPrivateOption, PushOption, check_upload, upload
from jaxpack.cli.options import LORA_FLAGS, asks_for_adapter, from_flags, to_flags, with_flags
from jaxpack.cli.reading import LOAD_IN_4BIT_HELP, alone, check_sources, read_sets, tokenizer_of
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, errors_name
from jaxpack.model.lora import add_lora
from jaxpack.model.transformer import Transformer
from jaxpack.model.vocab import resize_vocab as add_rows
from jaxpack.model.vocab import rows_for
from jaxpack.model.weights import is_trained, split_trained
from jaxpack.parallel.processes import end_together, initialize_distributed, is_first_process
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.metrics import METRICS, read_records, require_libraries
from jaxpack.train.trainer import Trainer
from jaxpack.utils.console import console
from jaxpack.utils.files import (
    remove_leftovers,
    replace_folder,
    require_folder,
    require_free_folder,
    require_room,
)

_FLAG_OF = {"train_dataset": "data", "eval_dataset": "eval_data", "output_dir": "output"}  # by trainer arguments


def _read_settings(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = read_settings(path, train)
    return path


@with_flags(TrainConfig, LoraConfig, leave_out=("output_dir",))
def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Hugging Face model: a folder, or the id of a model on the hub.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Training data: a file (.jsonl, .json, .csv, also with .gz, or .parquet), a folder of files, a pattern"
            " such as 'data/*.jsonl', or a dataset of the hub and its split (org/name:train). Each row has text; prompt"
            " and completion; messages; conversations; instruction and output; or input_ids. May be given several"
            " times, also with weights: a.jsonl=0.7 and b.jsonl=0.3 draw rows in these shares, none twice."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="New folder for adapter/ (or model/), run.yaml, metrics, report and checkpoints/. With"
            " --resume-from-checkpoint latest, the folder of the run to continue."
        ),
    ],
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            is_eager=True,
            callback=_read_settings,
            help="YAML or TOML file with values of flags by their names, such as max_length: 4096. Flags on the"
            " command line override the file. Every run writes such a file, run.yaml, from which it can be repeated.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation data, written like that of --data. Its loss is computed, but it is not trained on. Several"
            " sets with losses of their own have names: math=math.jsonl and chat=chat.jsonl."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the model's frozen weights and of the computation: bfloat16, float16 or float32.",
            show_default="bfloat16 on a GPU, float32 on a CPU",
        ),
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option(help=LOAD_IN_4BIT_HELP)] = False,
    resize_vocab: Annotated[
        bool,
        typer.Option(
            help="If the model's tokenizer has more tokens than the embedding has rows, add rows, up to a multiple of"
            " 64, to the embedding and the head. To train them, use --modules-to-save embed_tokens,lm_head or"
            " --full-finetuning."
        ),
    ] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a PEFT adapter to train further, instead of a new adapter.")
    ] = None,
    full_finetuning: Annotated[bool, typer.Option(help="Train all weights, instead of an adapter.")] = False,
    push_to_hub: PushOption = False,
    hub_model_id: HubIdOption = None,
    hub_private_repo: HubPrivateOption = None,
    **flags: object,
) -> None:
    """Fine-tune a model on a dataset, and write the adapter or the trained model."""
    initialize_distributed()
    given_up = overridden(context, [["full_finetuning"], ["adapter"], LORA_FLAGS])
    given_up |= overridden(context, [["num_train_epochs"], ["max_steps"]]) & {"max_steps"}  # max_steps wins over epochs
    full_finetuning = full_finetuning and "full_finetuning" not in given_up
    adapter = None if "adapter" in given_up else adapter
    flags = {name: None if name in given_up else value for name, value in flags.items()}
    config = from_flags(TrainConfig, flags, output_dir=str(output))
    require_libraries(config)
    repo_id = check_upload(push_to_hub, hub_model_id, hub_private_repo, output)
    lora = from_flags(LoraConfig, flags)
    if full_finetuning and (adapter is not None or asks_for_adapter(flags)):
        raise InputError("`full_finetuning` must be without flags of adapters, got both. Leave one of them out.")
    if adapter is not None and asks_for_adapter(flags):
        raise InputError("`adapter` must be without flags of a new adapter, got both. Leave one of them out.")
    if full_finetuning and load_in_4bit:
        raise InputError(
            "`load_in_4bit` must be without `full_finetuning`, because weights in 4 bits are not trained, got both."
            " Leave one of them out: without `full_finetuning`, an adapter is trained."
        )
    trained = output / ("model" if full_finetuning else "adapter")
    if config.resume_from_checkpoint is None:
        require_free_folder(output, "output")
    else:
        require_folder(output, "output")
        if is_first_process():
            remove_leftovers(trained)
    check_sources(data, "data")
    eval_dataset = read_sets(eval_data, "eval_data") if eval_data else None
    # The weights are read after the first programs are compiled.
    network, tokenizer = torch_bridge.from_pretrained(
        model, dtype=dtype, load_in_4bit=load_in_4bit, lazy=not full_finetuning
    )
    if adapter is not None:
        torch_bridge.load_adapter(network, str(adapter))
        tokenizer = tokenizer_of(adapter, tokenizer)
    if resize_vocab:
        _resize(network, tokenizer)
    if adapter is None and not full_finetuning:
        add_lora(network, lora)
    if resize_vocab and network.rows_of_base is not None and not is_trained(network.embedding):
        console.print(
            "the new rows of the embedding are not trained: `--modules-to-save embed_tokens,lm_head` trains them",
            style="yellow",
        )
    _, trainable, _ = split_trained(network)
    require_room(output, "output", sum(leaf.nbytes for leaf in jax.tree.leaves(trainable)))
    with errors_name(**_FLAG_OF):
        trainer = Trainer(network, tokenizer, alone(data), config, eval_dataset)
    if trainer.checkpoint is None or not trainer.in_place:
        if trainer.in_place and trained.exists() and (output / METRICS).exists():
            _refuse_finished(output, trained, trainer.batches.num_steps)
        require_free_folder(trained, "output")

    settings = {
        "model": model,
        "data": alone(data),
        "output": str(output),
        "eval_data": alone(eval_data) if eval_data else None,
        "dtype": network.dtype.name,
        "load_in_4bit": load_in_4bit,
        "resize_vocab": resize_vocab,
        "adapter": None if adapter is None else str(adapter),
        "full_finetuning": full_finetuning,
        "push_to_hub": push_to_hub,
        "hub_model_id": hub_model_id,
        "hub_private_repo": hub_private_repo,
        **to_flags(config),
        **({} if full_finetuning or adapter is not None else to_flags(lora)),
    }
    del settings["output_dir"]
    if trainer.in_place:  # a rerun of this file starts from the beginning
        settings["resume_from_checkpoint"] = None

    is_told = {"output", "output_dir", "resume_from_checkpoint", "compilation_cache_dir", "adapter", *LORA_FLAGS}
    is_told |= {"push_to_hub", "hub_model_id", "hub_private_repo"}
    card = {name: value for name, value in settings.items() if name not in is_told}

    def write(path: Path) -> None:  # All processes take part, and the first one writes.
        if full_finetuning:
            torch_bridge.save_pretrained(trainer.model, path, tokenizer)
        else:
            torch_bridge.save_adapter(trainer.model, path, tokenizer, settings=card)

    def save() -> None:
        with errors_name(path="output"):
            if is_first_process():
                _save(lambda path: replace_folder(write, path), trained)
            else:
                write(trained)
        end_together()

    def on_start() -> None:
        if is_first_process():
            write_settings(output / RUN_SETTINGS, settings)

    try:
        with errors_name(**_FLAG_OF):
            result = trainer.train(on_start)
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        if trainer.steps_in_model:
            how = "interrupted" if stopped else "an error ended the run"
            console.print(f"{how}: the weights are saved as they were after step {trainer.steps_in_model:,}")
            save()
        elif stopped:  # The trainer says it of an error.
            console.print("interrupted before a step was done: there is nothing to save")
        if stopped and (output / RUN_SETTINGS).exists():
            console.print("to go on:")
            console.print_command(["jaxpack", *resumed(sys.argv[1:])])
        raise
    evaluated = "".join(f", eval loss {loss:.4f}" for loss in list(result.evaluations.values())[-1:])
    if result.first_step_seconds:
        share = "" if result.peak_share is None else f" ({result.peak_share:.0%} of the device's peak)"
        took = (
            f"{result.tokens_per_second:,.0f} tokens/s{share}, {result.compile_seconds:.1f} s of compilation before"
            f" them, peak memory {result.peak_memory_bytes / 2**30:.2f} GiB"
        )
    else:
        took = "all steps were done in an earlier run"
    console.print(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}{evaluated}, {took}")
    save()
    if repo_id is not None:
        upload(trained, repo_id, hub_private_repo)


def _resize(network: Transformer, tokenizer: Tokenizer | None) -> None:
    """Gives the model rows for all tokens of the tokenizer, in place, and prints what has changed."""
    if tokenizer is None:
        raise InputError("`resize_vocab` must be off for a model without a tokenizer, got a model without one.")
    before, needed = network.config.vocab_size, rows_for(tokenizer)
    if needed <= before:
        console.print(f"the embedding keeps its {before:,} rows, which are enough for {needed:,} tokens")
        return
    add_rows(network, needed, tokenizer=tokenizer, pad_to_multiple_of=64)
    console.print(
        f"the embedding and the head have {network.config.vocab_size:,} rows, of which the last"
        f" {network.config.vocab_size - before:,} are new: {needed - before:,} for tokens that the model does not know"
    )


def resumed(arguments: list[str]) -> list[str]:
    """Returns the arguments of a run with `--resume-from-checkpoint latest`, in place of what it resumed from."""
    flag, kept, words = "--resume-from-checkpoint", [], iter(arguments)
    for word in words:
        if word == flag:
            next(words, None)  # its value
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return [*kept, flag, "latest"]


def _refuse_finished(output: Path, trained: Path, num_steps: int) -> None:
    """Refuses a finished run without a checkpoint, since `latest` would train it again."""
    if max((record["step"] for record in read_records(output)), default=0) == num_steps:
        raise InputError(
            f"`resume_from_checkpoint` must name a run with steps left, got 'latest' in {str(output)!r}, whose run is"
            f" finished: all {num_steps:,} steps are done, and {trained} holds the result. Choose another `output` to"
            " train again."
        )


def _save(write: Callable[[Path], None], path: Path) -> None:
    """Writes the trained weights to `path`; if that fails, to a temporary folder that the error names."""
    try:
        write(path)
        console.print(f"saved {path}")
    except InputError as error:
        refuge = Path(tempfile.mkdtemp(prefix="jaxpack-"))
        try:
            write(refuge / path.name)
        except InputError:
            refuge.rmdir()
            raise error from None
        raise InputError(f"{error} The trained weights were saved to {refuge / path.name} instead.") from error
