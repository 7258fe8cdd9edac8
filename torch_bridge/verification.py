"""Checks a folder against torch: compares the logits of transformers (PEFT for an adapter) with jaxpack's."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack.errors import InputError, install_command, not_installed, reason
from jaxpack.model.transformer import Transformer
from jaxpack.train.trained import base_of_checkpoint, is_checkpoint
from jaxpack.utils.console import console
from jaxpack.utils.files import is_regular_file
from jaxpack.utils.json_file import read_json
from torch_bridge.adapter import ADAPTER_CONFIG, load_adapter, require_files
from torch_bridge.config_json import CONFIG_FILE, config_from_hf
from torch_bridge.pretrained import from_pretrained
from torch_bridge.sixteen_bit import quantisation_of

_RANDOM_TOKENS = 64
_FIELDS_OF_4 = ("rope_theta", "rope_scaling", "torch_dtype")
_REMEDY = "Write the folder again, with `save_pretrained` or `save_merged`, which write the fields of both versions."
_TOLERANCE = 1e-3  # of the largest logit: ten times the effect of the order of float32 sums in 36 layers


def verify(folder: str, *, base: str | None = None, prompt: str | None = None) -> float:
    """Reads a folder with torch and with jaxpack, in float32, and prints how far their logits on a prompt are apart.

    Also checks that `config.json` means the same to transformers 4, which takes the RoPE from `rope_theta` and
    `rope_scaling`, as to version 5. If the file has no field of version 4, a warning says what that version reads.

    Args:
      folder: a model folder or a PEFT adapter folder.
      base: the base model of an adapter; None is the model that the adapter's config names.
      prompt: a text for the folder's tokenizer; None is 64 random tokens.

    Returns:
      The largest absolute difference between two logits.

    Raises:
      InputError: the folder cannot be read, torch's logits differ too much, the fields of transformers 4 do not mean
        what those of version 5 do, or torch is missing.

    Example:
      >>> import torch_bridge
      >>> torch_bridge.verify("path/to/Qwen3-4B") < 1e-4
      True
    """
    try:
        from torch_bridge.live import torch_logits
    except ImportError as error:
        raise not_installed("`verify`", "torch", "hf,torch") from error
    if not os.path.isdir(folder):
        raise InputError(f"`folder` must be an existing folder, got {str(folder)!r:.200}.")
    adapter = folder if is_regular_file(Path(folder) / ADAPTER_CONFIG) else None
    if adapter is None and base is not None:
        raise InputError(f"`base` must be None unless `folder` holds an adapter, got {base!r}.")
    model_folder = folder if adapter is None else (base_of(adapter) if base is None else base)
    model, tokenizer = from_pretrained(model_folder, dtype="float32")
    _check_fields_of_4(model_folder, model)
    _require_packages_for_4bit(model_folder, model)
    if adapter is not None:
        load_adapter(model, adapter)
    if prompt is None:
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, _RANDOM_TOKENS)
    elif tokenizer is None:
        raise InputError(
            f"`prompt` must be None, because {str(model_folder)!r:.200} has no tokenizer, got {prompt!r:.80}."
        )
    else:
        encode: Any = tokenizer  # which takes a single text, too
        tokens = np.asarray(encode(prompt).input_ids)
        if not tokens.size:
            raise InputError(f"`prompt` must have at least one token, got {prompt!r:.80}.")
    tokens = tokens.astype(np.int32)[None]
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model.logits(jnp.asarray(tokens)))
    theirs = torch_logits(model_folder, adapter, tokens, vocab_size=model.config.vocab_size)
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    line = (
        f"logits of {'transformers' if adapter is None else 'PEFT'} and jaxpack differ by at most {difference:.1e} of"
        f" {largest:.3g}, the largest logit; the likeliest token is the same at {agree:.0%} of {tokens.size} places"
    )
    if not difference <= _TOLERANCE * largest:
        raise InputError(f"`folder` must give the same logits in torch and in jaxpack, got {folder!r}, where {line}.")
    console.print(f"{folder}: {line}")
    return difference


def _require_packages_for_4bit(folder: str, model: Transformer) -> None:
    """Refuses a folder in 4 bits if packages are missing with which transformers reads it."""
    if quantisation_of(json.loads(dict(model.source_files)[CONFIG_FILE])) is None:
        return
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"`verify` of {folder}, whose weights are in 4 bits, needs the Python packages bitsandbytes and accelerate,"
            f" got an installation without {' and '.join(missing)}. Install with {install_command('bitsandbytes')}."
        )


def _check_fields_of_4(folder: str, model: Transformer) -> None:
    """Compares what transformers 4 reads from `config.json` with the model: its RoPE, and the dtype of its weights."""
    hf: dict[str, Any] = json.loads(dict(model.source_files)[CONFIG_FILE])
    both = [str(hf[name]).removeprefix("torch.") for name in ("torch_dtype", "dtype") if hf.get(name) is not None]
    if len(set(both)) > 1:
        raise InputError(
            f"`torch_dtype` and `dtype` of {CONFIG_FILE} in {folder} must be the same, because transformers 4 reads the"
            f" first and version 5 the second, got {both[0]!r:.40} and {both[1]!r:.40}. {_REMEDY}"
        )
    config = model.config
    try:
        read = config_from_hf({name: value for name, value in hf.items() if name != "rope_parameters"})
        differs = (read.rope, read.local_rope) != (config.rope, config.local_rope)
        theirs = f"{read.rope}" + ("" if read.local_rope is None else f" and, in local layers, {read.local_rope}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # as in `from_pretrained`
        differs, theirs = True, f"an error ({reason(error)})"
    if not differs:
        return
    ours = f"{config.rope}" + ("" if config.local_rope is None else f" and, in local layers, {config.local_rope}")
    found = (
        f"transformers 4 takes {theirs:.300} from `rope_theta` and `rope_scaling`, and version 5 takes {ours:.300} from"
        " `rope_parameters`"
    )
    if not hf.keys().isdisjoint(_FIELDS_OF_4):
        raise InputError(
            f"{CONFIG_FILE} in {folder} must describe the same RoPE to transformers 4 and 5, got one from which"
            f" {found}. {_REMEDY}"
        )
    console.print(
        f"{folder}: only transformers 5 reads {CONFIG_FILE} as it is meant: {found}. {_REMEDY}", style="yellow"
    )


def base_of(adapter: str) -> str:
    """Returns the base model of a PEFT adapter folder: the name or path that its `adapter_config.json` records.

    The folder may also be a checkpoint of a run, see `load_adapter`.

    Raises:
      InputError: the folder has no `adapter_config.json`, or the file names no base model.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> torch_bridge.save_adapter(jaxpack.add_lora(model, jaxpack.LoraConfig(r=8)), "out/adapter")
      >>> torch_bridge.base_of("out/adapter")
      'path/to/Qwen3-4B'
    """
    if is_checkpoint(Path(adapter)):
        return base_of_checkpoint(Path(adapter))
    name = read_json(require_files(adapter, ADAPTER_CONFIG) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"`base_model_name_or_path` of {adapter} must name the base model, got {name!r:.80}. Pass the base"
            " model explicitly."
        )
    return name
