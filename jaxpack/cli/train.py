"""`jaxpack train`: a Hugging Face folder and a dataset in, an adapter or a trained model out."""

from pathlib import Path
from typing import Annotated

import jax
import typer
from flax import nnx

import torch_bridge
from jaxpack.cli.options import from_flags, with_flags
from jaxpack.config import LoraConfig, TrainConfig
from jaxpack.console import console
from jaxpack.errors import InputError
from jaxpack.files import require_free_folder, require_room
from jaxpack.lora import add_lora
from jaxpack.trainer import Trainer


@with_flags(TrainConfig, LoraConfig, leave_out=("output_dir",))
def train(
    model: Annotated[str, typer.Option(help="A Hugging Face folder, or the id of a model on the hub.")],
    data: Annotated[
        Path, typer.Option(help="A JSONL or Parquet file of text, prompt and completion, messages or input_ids.")
    ],
    output: Annotated[Path, typer.Option(help="A new folder, for adapter/ (or model/) and metrics.jsonl.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32.", show_default="bfloat16 on a GPU, float32 on a CPU"),
    ] = None,
    full_finetuning: Annotated[bool, typer.Option(help="Train all weights and no adapter.")] = False,
    **flags: object,
) -> None:
    """Fine-tune a model on a dataset."""
    config = from_flags(TrainConfig, flags, output_dir=str(output))
    lora = from_flags(LoraConfig, _with_names(flags))
    require_free_folder(output, "output")
    if not data.is_file():
        raise InputError(f"`data` must be an existing file, got {str(data)!r}.")
    network, tokenizer = torch_bridge.from_pretrained(model, dtype=dtype)
    if not full_finetuning:
        add_lora(network, lora)
    saved = jax.tree.leaves(nnx.state(network, nnx.Param if full_finetuning else nnx.LoRAParam))
    require_room(output, "output", sum(leaf.nbytes for leaf in saved))
    trainer = Trainer(network, tokenizer, data, config)
    result = trainer.train()
    console.print(
        f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}, {result.tokens_per_second:,.0f} tokens/s,"
        f" {result.compiled_shapes} shapes compiled in {result.compile_seconds:.1f} s,"
        f" peak memory {result.peak_memory_bytes / 2**30:.2f} GiB"
    )
    if full_finetuning:
        torch_bridge.save_pretrained(trainer.model, output / "model", tokenizer)
    else:
        torch_bridge.save_adapter(trainer.model, output / "adapter")
    console.print(f"saved {output / ('model' if full_finetuning else 'adapter')}")


def _with_names(flags: dict) -> dict:
    """`--target-modules q_proj,v_proj` as the names that it lists."""
    names = flags["target_modules"]
    if names is None or names == "all-linear":
        return flags
    return flags | {"target_modules": tuple(name.strip() for name in names.split(",") if name.strip())}
