"""Implements `jaxpack export`, which merges an adapter into its base model."""

import math
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import typer

import torch_bridge
from jaxpack.cli.config_file import RUN_SETTINGS, says_4bit
from jaxpack.cli.hub import HubIdOption, HubPrivateOption, PushOption, check_upload, upload
from jaxpack.cli.reading import ADAPTER_HELP, read_base, require_adapter
from jaxpack.errors import InputError, errors_name
from jaxpack.train.trained import is_checkpoint
from jaxpack.utils.console import console
from jaxpack.utils.files import require_new_folder, require_room
from torch_bridge.tensors import tensor_shapes


def export(
    adapter: Annotated[
        Path,
        typer.Option(help=ADAPTER_HELP),
    ],
    merged: Annotated[Path, typer.Option(help="New folder for the base model with the adapter merged into it.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model of the adapter: a Hugging Face folder, or the id of a model on the hub.",
            show_default="the one that the adapter names",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the merged weights: bfloat16, float16 or float32.",
            show_default="float16 for a base in float16, else bfloat16",
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            help="Merge into the weights beside which a run with --load-in-4bit trained its adapter: those of the base"
            " model, quantised to 4 bits (NF4) and made dense again.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="16-bit model to merge into, if the adapter was trained with weights in 4 bits: the folder or the id"
            " of the model that was quantised. Without this option, the adapter is merged into the dequantised weights,"
            " so that the merged model computes what was trained.",
            show_default="the weights of the adapter's training",
        ),
    ] = None,
    push_to_hub: PushOption = False,
    hub_model_id: HubIdOption = None,
    hub_private_repo: HubPrivateOption = None,
    verify: Annotated[
        bool, typer.Option(help="Check the merged folder: read it with torch, and compare its logits with jaxpack's.")
    ] = False,
) -> None:
    """Merge an adapter into its base model, and write the merged model to a new folder."""
    require_new_folder(merged, "merged")
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")
    require_adapter(adapter)
    repo_id = check_upload(push_to_hub, hub_model_id, hub_private_repo, merged)
    run = adapter.absolute().parents[1 if is_checkpoint(adapter) else 0]
    if not load_in_4bit and says_4bit(run / RUN_SETTINGS):
        console.print(
            f"{adapter}: the run trained this adapter beside weights in 4 bits. It is merged into the weights of the"
            " base model as they are, which the adapter has never seen. `--load-in-4bit` merges it into the quantised"
            " weights, made dense again, so that the merged model computes what was trained",
            style="yellow",
        )
    # "auto" keeps the stored dtype, so that each weight is rounded only once, when it is merged.
    network, tokenizer = read_base(model, adapter, "auto", load_in_4bit=load_in_4bit)
    torch_bridge.load_adapter(network, str(adapter))
    written = sum(map(math.prod, tensor_shapes(network).values())) * jnp.dtype(dtype or "bfloat16").itemsize
    require_room(merged, "merged", written)
    with errors_name(path="merged", folder="merged"):
        torch_bridge.save_merged(network, str(merged), tokenizer, dtype=dtype, base=base)
        console.print(f"saved {merged}")
        if verify:
            torch_bridge.verify(str(merged))
    if repo_id is not None:
        upload(merged, repo_id, hub_private_repo)
