"""Implements `jaxpack export`, which merges an adapter into its base model, and writes a folder or a GGUF file."""

import math
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import typer

import torch_bridge
from jaxpack.cli.config_file import RUN_SETTINGS, says_4bit
from jaxpack.cli.hub import HubIdOption, HubPrivateOption, PushOption, check_upload, upload
from jaxpack.cli.reading import AdapterOption, read_base, require_model_or_adapter
from jaxpack.errors import InputError, errors_name
from jaxpack.train.trained import is_checkpoint
from jaxpack.utils.console import console
from jaxpack.utils.files import require_new_folder, require_room
from torch_bridge.gguf_files.save import require_gguf, require_new_gguf, require_quantize
from torch_bridge.tensors import tensor_shapes


def export(
    adapter: AdapterOption = None,
    merged: Annotated[
        Path | None, typer.Option(help="New folder for the base model with the adapter merged into it.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="New GGUF file for llama.cpp and Ollama, such as model.gguf: the base model with the adapter merged"
            " into it or, without --adapter, the model itself. A Modelfile for Ollama is written beside it.",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="How the GGUF file holds matrices: bf16, f16, f32, or q8_0 (8.5 bits a weight).",
            show_default="bf16",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model of the adapter: a Hugging Face folder, or the id of a model on the hub. Without --adapter,"
            " the model that --gguf writes.",
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
    """Merge an adapter into its base model; write the merged model as a folder, a GGUF file, or both."""
    _check(adapter, merged, gguf, quantize, model, dtype)
    wants_hub = push_to_hub or hub_model_id is not None or hub_private_repo
    if merged is None and (wants_hub or verify or dtype is not None):
        raise InputError("`merged` must be given with `dtype`, `verify` and the flags of the hub, got none.")
    repo_id = None if merged is None else check_upload(push_to_hub, hub_model_id, hub_private_repo, merged)
    if adapter is not None:
        _warn_of_4bit(adapter, load_in_4bit)
    # "auto" keeps the stored dtype, so that each weight is rounded only once, when it is merged.
    network, tokenizer = read_base(model, adapter, "auto", load_in_4bit=load_in_4bit)
    if adapter is not None:
        torch_bridge.load_adapter(network, str(adapter))
    if merged is not None:
        written = sum(map(math.prod, tensor_shapes(network).values())) * jnp.dtype(dtype or "bfloat16").itemsize
        require_room(merged, "merged", written)
        with errors_name(path="merged", folder="merged"):
            torch_bridge.save_merged(network, str(merged), tokenizer, dtype=dtype, base=base)
            console.print(f"saved {merged}")
            if verify:
                torch_bridge.verify(str(merged))
    if gguf is not None:
        with errors_name(path="gguf"):
            torch_bridge.save_gguf(network, gguf, tokenizer, quantize=quantize or "bf16", base=base)
            console.print(f"saved {gguf}")
    if merged is not None and repo_id is not None:
        upload(merged, repo_id, hub_private_repo)


def _check(
    adapter: Path | None,
    merged: Path | None,
    gguf: Path | None,
    quantize: str | None,
    model: str | None,
    dtype: str | None,
) -> None:
    """Refuses flags that do not fit together, and outputs that cannot be written, before anything is read."""
    if merged is None and gguf is None:
        raise InputError("`merged` or `gguf` must be given, got none: they say where the model is written.")
    if merged is not None and adapter is None:
        raise InputError(
            "`adapter` must be given with `merged`, which merges it into a model, got none. `gguf` writes a model"
            " without an adapter, too."
        )
    require_model_or_adapter(model, adapter)
    if merged is not None:
        require_new_folder(merged, "merged")
    if gguf is None and quantize is not None:
        raise InputError(f"`quantize` must be given with `gguf` only, got {quantize!r:.40} without it.")
    if gguf is not None:
        require_gguf("`gguf`")
        require_quantize(quantize or "bf16")
        with errors_name(path="gguf"):
            require_new_gguf(gguf)
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")


def _warn_of_4bit(adapter: Path, load_in_4bit: bool) -> None:
    """Says that an adapter was trained beside weights in 4 bits, if the base is read in 16 bits."""
    run = adapter.absolute().parents[1 if is_checkpoint(adapter) else 0]
    if not load_in_4bit and says_4bit(run / RUN_SETTINGS):
        console.print(
            f"{adapter}: the run trained this adapter beside weights in 4 bits. It is merged into the weights of the"
            " base model as they are, which the adapter has never seen. `--load-in-4bit` merges it into the quantised"
            " weights, made dense again, so that the merged model computes what was trained",
            style="yellow",
        )
