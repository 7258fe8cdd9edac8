"""Reads and writes Hugging Face folders: config, weights and tokenizer."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, install_command, reason
from jaxpack.model.config import ModelConfig
from jaxpack.model.lora import adapters, require_finite
from jaxpack.model.mxfp4 import mxfp4_store
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import Store, store_dense
from jaxpack.parallel.device import on_host
from jaxpack.parallel.processes import is_first_process
from jaxpack.utils.console import console
from jaxpack.utils.files import whole_folder
from torch_bridge.config_json import CONFIG_FILE, GENERATION_FILE, config_from_hf, config_to_hf
from torch_bridge.families import FAMILIES
from torch_bridge.io.experts import fuse_experts, fused_shapes
from torch_bridge.io.folder import (
    TORCH_WEIGHTS,
    WEIGHTS,
    SafetensorsFolder,
    has_weights,
    read_ahead,
    read_json,
    write_safetensors,
)
from torch_bridge.io.untrusted import require_regular_files, require_sound_tokenizer
from torch_bridge.quantized import ByteSource
from torch_bridge.sixteen_bit import MXFP4, QUANTISED_FIELDS, quantisation_of, unsupported_format
from torch_bridge.tensors import lazy_model, model_tensors, tensor_shapes
from torch_bridge.tokenizer_files import TOKENIZER_FILES, write_tokenizer

_NEEDED_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# `auto_map` names files with code, which are not copied. The other fields are written anew.
_REPLACED = ("auto_map", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", *QUANTISED_FIELDS)
_MAX_LISTED = 10_000  # a config with more layers or experts is refused before they are listed
# The files of a hub model that describe it: JSON files, and all that a copy of its tokenizer needs.
_DESCRIBING = ["*.json", *(pattern for pattern in TOKENIZER_FILES if not pattern.endswith(".json"))]
_TWICE = ["consolidated*", "*/*.json", "*/*.safetensors"]  # copies of the model for other programs


def from_pretrained(
    name_or_path: str, *, dtype: str | None = None, load_in_4bit: bool = False, lazy: bool = False
) -> tuple[Transformer, Tokenizer | None]:
    """Reads a model and its tokenizer from a Hugging Face folder, or from the hub.

    Weights that bitsandbytes quantised to 4 bits (NF4), and GPT-OSS' experts in MXFP4, stay in 4 bits. All weights of a
    model in 4 bits are frozen: add adapters to train it.

    Args:
      name_or_path: a folder with `config.json` and safetensors files, or the id of a model on the hub. If there is
        only `pytorch_model.bin`, or its shards, torch's weights-only loader reads them.
      dtype: the dtype of the weights and of the computation, "bfloat16", "float16" or "float32"; None is bfloat16 on a
        GPU and float32 on a CPU, where bfloat16 is slow; "auto" is the dtype in `config.json`, else float32.
      load_in_4bit: whether to hold the projections of a model of 16 or 32 bits in 4 bits. They are quantised one at a
        time while they are read, to the codes that bitsandbytes gives (NF4, nested). Embedding, head and norms keep
        `dtype`. Nothing changes for a folder that is in NF4 already. Matrices in MXFP4 stay as they are, too.
      lazy: whether to leave the weights in their files until they are needed. A `Trainer` then compiles the programs of
        its first steps before it reads them, and all programs if memory is scarce: the memory that compiling needs for
        a moment need not be free beside the weights.

    Returns:
      The model and its tokenizer; the tokenizer is None if the folder has none.

    Raises:
      InputError: the model is not supported, or its files are missing or incomplete.

    Example:
      >>> import torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model.config.architecture
      'Qwen3ForCausalLM'
    """
    for name, value in (("load_in_4bit", load_in_4bit), ("lazy", lazy)):
        if not isinstance(value, bool):
            raise InputError(f"`{name}` must be true or false, got {value!r:.80}.")
    folder, described, config = _read(str(name_or_path), weights=True)
    if dtype == "auto":
        stored = described[CONFIG_FILE].get("dtype") or described[CONFIG_FILE].get("torch_dtype")
        dtype = stored if stored in ("bfloat16", "float16") else "float32"
    tokenizer = _tokenizer(folder)  # first, so that an error comes before the slow read of the weights
    weights = _weights(folder)
    model = lazy_model(config, weights, dtype, load_in_4bit=load_in_4bit)
    model.source_files = tuple((name, json.dumps(content, indent=2) + "\n") for name, content in described.items())
    if lazy:
        read_ahead(folder)
    else:
        model.read_weights()
    return model, tokenizer


def read_config(name_or_path: str) -> tuple[ModelConfig, Tokenizer | None]:
    """Reads the architecture and the tokenizer of a model, without reading or downloading its weights.

    Args:
      name_or_path: as in `from_pretrained`.

    Returns:
      The architecture that `config.json` describes, and the tokenizer; the tokenizer is None if the folder has none.

    Raises:
      InputError: the model is not supported, or its config or tokenizer cannot be read.

    Example:
      >>> import torch_bridge
      >>> config, tokenizer = torch_bridge.read_config("path/to/Qwen3-4B")
      >>> config.architecture
      'Qwen3ForCausalLM'
    """
    folder, _, config = _read(str(name_or_path), weights=False)
    return config, _tokenizer(folder)


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer in a folder, such as that of an adapter; None if there is none, or no transformers.

    Raises:
      InputError: its files cannot be read.
    """
    if not _has_tokenizer(folder):
        return None
    require_regular_files(folder)
    return _tokenizer(folder)


def described_store(name_or_path: str) -> Store:
    """Returns how a model's `config.json` says that projections are stored, for predictions without its weights.

    Raises:
      InputError: as in `read_config`.
    """
    _, described, _ = _read(str(name_or_path), weights=False)
    quantisation = quantisation_of(described[CONFIG_FILE])
    if quantisation is None:
        return store_dense
    if unsupported_format(quantisation[1]) == MXFP4:
        return mxfp4_store
    return nf4_store(nested=bool(quantisation[1].get("bnb_4bit_use_double_quant")))  # others are refused


def read_tensors(name_or_path: str) -> tuple[dict[str, Any], ModelConfig, ByteSource]:
    """Returns a model's `config.json`, the architecture that it describes, and its tensors, of which none is read yet.

    Raises:
      InputError: as in `from_pretrained`.
    """
    folder, described, config = _read(str(name_or_path), weights=True)
    return described[CONFIG_FILE], config, _weights(folder)


def save_pretrained(model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model without adapters as a Hugging Face folder that `AutoModelForCausalLM` reads, in the model's dtype.

    In a run of several processes all call it, and the first one writes.

    Raises:
      InputError: the model has adapters (use `save_adapter`), or its trained weights are not finite, `path` is not
        empty, or the disk refused a write.

    Example:
      >>> import torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> torch_bridge.save_pretrained(model, "out/model", tokenizer)
    """
    if adapters(model):
        raise InputError(
            "`model` must be without LoRA adapters, got a model that has them. Write the adapters with `save_adapter`,"
            " or the merged model with `save_merged`."
        )
    model.read_weights()
    require_finite(model)
    tensors = ((name, tensor.astype(model.dtype)) for name, tensor in model_tensors(model))
    with written_by_first(path) as folder:
        write_folder(folder, model, tensors, jnp.dtype(model.dtype).name, tokenizer)


@contextlib.contextmanager
def written_by_first(path: str | Path) -> Iterator[Path | None]:
    """Yields a new folder that becomes `path` at the end, as `whole_folder` does; None in all but the first process.

    The other processes only take part in gathering what is in shards.
    """
    if is_first_process():
        with whole_folder(Path(path), "path") as folder:
            yield folder
    else:
        yield None


def write_folder(
    folder: Path | None,
    model: Transformer,
    tensors: Iterable[tuple[str, ArrayLike]],
    dtype: str,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a checkpoint: config, generation config, weights in `dtype` and tokenizer.

    Args:
      folder: None writes nothing, but computes all tensors, see `written_by_first`.

    Raises:
      OSError: the disk refused a write.
    """
    tensors = ((name, on_host(tensor) if isinstance(tensor, jax.Array) else tensor) for name, tensor in tensors)
    if folder is None:
        for _ in tensors:
            pass
        return
    source = dict(model.source_files)
    hf = json.loads(source.get(CONFIG_FILE, "{}"))
    hf = {name: value for name, value in hf.items() if name not in _REPLACED}
    hf |= config_to_hf(model.config) | {"dtype": dtype, "torch_dtype": dtype}  # the name in transformers 5, and in 4
    (folder / CONFIG_FILE).write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
    generation = source.get(GENERATION_FILE)
    if (end := _end_of_answers(tokenizer)) is not None:
        generation = _stopping_at(end, generation, hf.get("eos_token_id"))
    if generation is not None:
        (folder / GENERATION_FILE).write_text(generation)
    shapes = tensor_shapes(model)
    if FAMILIES[model.config.architecture].fuses_experts:
        shapes, tensors = fused_shapes(shapes), fuse_experts(tensors)
    write_safetensors(folder, shapes, dtype, tensors)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer)


def _end_of_answers(tokenizer: Tokenizer | None) -> int | None:
    """Returns the token with which the tokenizer's chat template ends an answer, or None if there is none."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return None
    return tokenizer.get_added_vocab().get(ChatTemplate(tokenizer).answer_end() or "")


def _stopping_at(end: int, generation: str | None, eos: Any) -> str | None:
    """Returns a `generation_config.json` that names a token at which generation stops; the same if it does already.

    Programs generate on past the end of an answer that it does not name, such as one of a template of the user's.

    Args:
      end: the token.
      generation: the text of the file, or None if there is none.
      eos: what `config.json` names, which counts without the file. If nothing is named, nothing is added.
    """
    content = json.loads(generation or "{}")
    named = content.get("eos_token_id", eos)
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not named or end in named:
        return generation
    return json.dumps({**content, "eos_token_id": [end, *named]}, indent=2) + "\n"


def _read(name_or_path: str, *, weights: bool) -> tuple[Path, dict[str, dict[str, Any]], ModelConfig]:
    """Returns the folder, the contents of its JSON files by name, and the `ModelConfig` that they describe.

    The weights of a model on the hub are downloaded only once its config was read.
    """
    folder = _folder(name_or_path)
    described, config = _described(folder, name_or_path)
    if weights and not os.path.isdir(name_or_path):
        folder = _download(name_or_path, "*.safetensors")
        if not has_weights(folder, WEIGHTS):
            folder = _download(name_or_path, "pytorch_model*.bin")
        require_regular_files(folder)
    return folder, described, config


def _described(folder: Path, name_or_path: str) -> tuple[dict[str, dict[str, Any]], ModelConfig]:
    require_regular_files(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"`model` must hold a {CONFIG_FILE}, got {str(folder)!r}, which has no such file.")
    described = {name: read_json(folder / name) for name in (CONFIG_FILE, GENERATION_FILE) if (folder / name).is_file()}
    try:
        for field in ("num_hidden_layers", "num_experts", "num_local_experts"):
            if type(count := described[CONFIG_FILE].get(field)) is int and count > _MAX_LISTED:
                raise InputError(f"`{field}` must be at most {_MAX_LISTED:,}, got {count:.10g}.")
        return described, config_from_hf(described[CONFIG_FILE], name_or_path)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Some field has a type that no such model has: a list for a number, say.
        raise InputError(
            f"{folder / CONFIG_FILE} must describe a model, got a field that cannot be read: {reason(error)}."
        ) from error


def _folder(name_or_path: str) -> Path:
    """Returns a folder, or downloads the files that describe a model on the hub."""
    if os.path.isdir(name_or_path):  # unlike `Path.is_dir`, false for an invalid or forbidden path
        if not os.access(name_or_path, os.R_OK | os.X_OK):
            raise InputError(
                f"`model` must be a folder that may be read, got {name_or_path!r}, which this user may not read."
            )
        return Path(name_or_path)
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")) or os.path.exists(name_or_path):
        raise InputError(
            "`model` must be an existing folder or the id of a model on the hub (owner/name), got"
            f" {name_or_path!r:.200}."
        )
    return _download(name_or_path)


def _download(name: str, *more: str) -> Path:
    """Downloads the files that describe a model on the hub, and those that match further patterns."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"`model` must be an existing folder, got {name!r}. If it is the id of a model on the hub, install"
            f" the Python package huggingface_hub to download it, with {install_command('hf')}."
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[*_DESCRIBING, *more], ignore_patterns=_TWICE))
    except Exception as error:  # no network, no such model, or no permission: the hub's message says which
        raise InputError(
            f"`model` must be an existing folder or the id of a model on the hub, got {name!r}: {reason(error)}."
        ) from error


def _weights(folder: Path) -> ByteSource:
    if has_weights(folder, WEIGHTS) or not has_weights(folder, TORCH_WEIGHTS):
        return SafetensorsFolder(folder)
    try:
        from torch_bridge.live import TorchFolder
    except ImportError as error:
        raise InputError(
            f"{folder} must hold {WEIGHTS}, got {TORCH_WEIGHTS}, which only the Python package torch reads, and torch"
            f" is not installed. Install it with {install_command('torch')}."
        ) from error
    return TorchFolder(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _NEEDED_FILES)


def _tokenizer(folder: Path) -> Tokenizer | None:
    if not _has_tokenizer(folder):
        console.print(f"{folder} has no tokenizer: the model can be trained only on rows of `input_ids`")
        return None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers warns that torch is missing
    try:
        from transformers import AutoTokenizer
    except ImportError:
        console.print(
            "the tokenizer is not read, because the Python package transformers is not installed: the model can be"
            f" trained on rows of `input_ids` only. Install transformers with {install_command('hf')}"
        )
        return None
    require_sound_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it may ask the user, and wait
    except Exception as error:  # transformers raises any class for bad files or a bad config
        raise InputError(
            f"{folder} must hold a tokenizer that transformers reads, got this error: {reason(error):.400}."
        ) from error
