"""Torch modules in memory, through DLPack: the one importer of torch."""

from typing import Any

import jax
import numpy as np
import torch

from jaxpack.errors import InputError
from jaxpack.transformer import Transformer
from torch_bridge.convert import build_model
from torch_bridge.names import CONFIG_FILE, GENERATION_FILE, config_from_hf


def from_torch(module: torch.nn.Module, *, dtype: str | None = None) -> Transformer:
    """A model with the weights of a transformers model in memory; the two share nothing afterwards.

    `dtype` is that of `from_pretrained`.

    Raises:
      InputError: the module is no transformers model, or one that is not supported.
    """
    if not hasattr(module, "config") or hasattr(module, "peft_config"):
        raise InputError(f"`module` must be a plain transformers model, got {type(module).__name__}.")
    hf: dict[str, Any] = module.config.to_dict() | {"architectures": [type(module).__name__]}
    config = config_from_hf(hf, module.config.name_or_path)
    model = build_model(config, _ModuleTensors(module), dtype)
    generation = getattr(module, "generation_config", None)
    described = {CONFIG_FILE: module.config, GENERATION_FILE: generation}
    model.source_files = tuple((name, it.to_json_string(use_diff=False)) for name, it in described.items() if it)
    return model


class _ModuleTensors:
    def __init__(self, module: torch.nn.Module):
        self.description = type(module).__name__
        self._tensors = module.state_dict()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> jax.Array:
        return jax.dlpack.from_dlpack(self._tensors[name][first:last].detach().contiguous())
