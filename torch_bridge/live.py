"""Torch modules in memory, through DLPack, and the files that torch writes: the one importer of torch in the bridge."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxpack.errors import InputError, reason
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import platform_of
from torch_bridge.config_json import CONFIG_FILE, GENERATION_FILE, config_from_hf
from torch_bridge.io.folder import TORCH_WEIGHTS, some, tensors_of
from torch_bridge.tensors import build_model

_DTYPES = {getattr(torch, name): jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}


def from_torch(module: torch.nn.Module, *, dtype: str | None = None) -> Transformer:
    """A model with the weights of a transformers model in memory; the two share nothing afterwards.

    `dtype` is that of `from_pretrained`.

    Raises:
      InputError: the module is no transformers model, one that is not supported, or not in memory.
    """
    if not hasattr(getattr(module, "config", None), "to_dict") or hasattr(module, "peft_config"):
        raise InputError(f"`module` must be a plain transformers model, got {type(module).__name__}.")
    hf: dict[str, Any] = module.config.to_dict() | {"architectures": [type(module).__name__]}
    config = config_from_hf(hf, module.config.name_or_path)
    model = build_model(config, _ModuleTensors(module), dtype)
    generation = getattr(module, "generation_config", None)
    described = {CONFIG_FILE: module.config, GENERATION_FILE: generation}
    model.source_files = tuple((name, it.to_json_string(use_diff=False)) for name, it in described.items() if it)
    return model


@torch.no_grad()
def torch_logits(model: str, adapter: str | None, tokens: np.ndarray) -> np.ndarray:
    """Of rows of tokens, float32, on the CPU: what transformers reads of a folder, or PEFT with an adapter's.

    Raises:
      InputError: either package is missing, or does not read its folder, or not whole.
    """
    try:
        from transformers import AutoModelForCausalLM

        # Some versions take an attention for Gemma 2 that leaves out its soft-cap.
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        module, found = AutoModelForCausalLM.from_pretrained(model, **options, output_loading_info=True)
        if adapter is not None:
            from peft import PeftModel

            module = PeftModel.from_pretrained(module, adapter)
    except ImportError as error:
        raise InputError(f"`verify` needs `pip install jaxpack[hf,torch]`, got no {error.name}.") from error
    except Exception as error:  # each of their checks has a class of its own
        where = model if adapter is None else f"{adapter} on {model}"
        raise InputError(
            f"{where} must be what torch reads, got a folder that it does not: {reason(error):.400}."
        ) from error
    if any(found.values()):
        wrong = {kind: sorted(map(str, keys))[:4] for kind, keys in found.items() if keys}
        raise InputError(f"{model} must be read whole by transformers, got {wrong}.")
    return module.eval()(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


class _ModuleTensors:
    """The tensors of a module, of any device; what else its state holds, such as packed parameters, is none of them.

    Raises:
      InputError: a tensor has no numbers, as those that accelerate has offloaded.
    """

    def __init__(self, module: torch.nn.Module):
        self.description = type(module).__name__
        self._tensors = {name: x for name, x in module.state_dict().items() if isinstance(x, torch.Tensor)}
        if absent := [name for name, tensor in self._tensors.items() if tensor.is_meta]:
            raise InputError(f"`module` must have its weights in memory, got {len(absent)} on 'meta' ({some(absent)}).")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> jax.Array | np.ndarray:
        part = jax.dlpack.from_dlpack(self._tensors[name][first:last].detach().contiguous())
        # An array of JAX would stay on the host, and all that is made of it.
        return np.asarray(part) if platform_of(part) == "cpu" else part


class TorchFolder:
    """The tensors of `pytorch_model.bin`, or of the shards that its index lists, through a memory map.

    They are pickles, which may run whatever code they like: only torch's weights-only loader ever reads them.

    Raises:
      InputError: what `tensors_of` refuses, and a file that this loader does not read or that holds something else.
    """

    def __init__(self, folder: Path):
        self.description = str(folder)
        self._tensors = tensors_of(folder, TORCH_WEIGHTS, _read_pickle)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> np.ndarray:
        part = self._tensors[name][first:last]
        held = buffer[: part.numel() * part.itemsize]
        torch.from_numpy(held).view(part.dtype).view(part.shape).copy_(part)
        return held.view(_DTYPES[part.dtype]).reshape(part.shape)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle ends in any of them
        raise InputError(
            f"{path} must be weights that `torch.load(weights_only=True, mmap=True)` reads, got a file that it does"
            f" not: {reason(error):.200}."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dict of tensors, got {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path} must hold tensors by name, got {type(tensor).__name__} at {name!r:.80}.")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(
                f"{name:.80} of {path} must be a dense tensor of {', '.join(map(str, _DTYPES))}, got {tensor.layout} of"
                f" {tensor.dtype} on {tensor.device}."
            )
    return content
