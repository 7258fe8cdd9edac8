"""Reads torch modules (through DLPack) and files written by torch; the only module of the bridge that imports torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxpack.errors import InputError, not_installed, reason
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import platform_of
from torch_bridge.config_json import CONFIG_FILE, GENERATION_FILE, config_from_hf
from torch_bridge.io.experts import Cut, split_experts
from torch_bridge.io.folder import TORCH_WEIGHTS, some, tensor_count, tensors_of
from torch_bridge.io.pickle_file import require_plain_records
from torch_bridge.tensors import build_model

_DTYPES = {getattr(torch, name): jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}


def from_torch(module: torch.nn.Module, *, dtype: str | None = None) -> Transformer:
    """Converts a transformers model in memory into a `Transformer`; the two share no memory afterwards.

    Args:
      module: a transformers model without PEFT adapters, such as one from `AutoModelForCausalLM.from_pretrained`.
      dtype: the dtype of the weights and of the computation, as in `from_pretrained`.

    Raises:
      InputError: the module is no transformers model, is not supported, or is not in memory.

    Example:
      >>> import torch_bridge, transformers
      >>> module = transformers.AutoModelForCausalLM.from_pretrained("path/to/Qwen3-4B")
      >>> model = torch_bridge.from_torch(module)
      >>> model.config.architecture
      'Qwen3ForCausalLM'
    """
    if not hasattr(getattr(module, "config", None), "to_dict") or hasattr(module, "peft_config"):
        raise InputError(
            f"`module` must be a transformers model without PEFT adapters, got {type(module).__name__}. Pass the base"
            " model, and read its adapter with `load_adapter`."
        )
    source: Any = module.config
    hf: dict[str, Any] = source.to_dict() | {"architectures": [type(module).__name__]}
    config = config_from_hf(hf, source.name_or_path)
    model = build_model(config, _ModuleTensors(module), dtype)
    generation = getattr(module, "generation_config", None)
    described = {CONFIG_FILE: module.config, GENERATION_FILE: generation}
    model.source_files = tuple((name, it.to_json_string(use_diff=False)) for name, it in described.items() if it)
    return model


@torch.no_grad()
def torch_logits(model: str, adapter: str | None, tokens: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """Returns the float32 logits of rows of tokens, by transformers on the CPU, or by PEFT if `adapter` is given.

    Args:
      vocab_size: the number of rows of the embedding that an adapter was trained with.

    Raises:
      InputError: a package is missing, or cannot read its folder, or reads only part of it.
    """
    try:
        from transformers import AutoModelForCausalLM

        # Some versions choose an attention for Gemma 2 that leaves out the soft-cap.
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, **options, output_loading_info=True)
        module, found = loaded
        if adapter is not None:
            from peft import PeftModel

            if module.get_input_embeddings().weight.shape[0] != vocab_size:
                module.resize_token_embeddings(vocab_size, mean_resizing=False)
            module = PeftModel.from_pretrained(module, adapter)
    except ImportError as error:
        raise not_installed("`verify`", str(error.name), "hf,torch") from error
    except Exception as error:  # each check of these packages raises its own class
        where = model if adapter is None else f"{adapter} on {model}"
        raise InputError(
            f"{where} must be a folder that transformers and PEFT can read, got their error: {reason(error):.400}."
        ) from error
    layers: Any = module.modules()
    for layer in layers:
        if hasattr(layer, "compute_dtype"):  # a projection in 4 bits, which may be set to compute in 16
            layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # some CPUs compute such a projection in bfloat16 otherwise
            layer.support_avx512bf16_for_cpu = False
    if any(found.values()):
        wrong = {kind: sorted(map(str, keys))[:4] for kind, keys in found.items() if keys}
        raise InputError(f"{model} must hold exactly the tensors that transformers expects, got differences: {wrong}.")
    return module.eval()(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


class _ModuleTensors:
    """Provides the tensors of a module on any device, without the entries of its state that are no tensors.

    Raises:
      InputError: a tensor holds no values, as after offloading by accelerate.
    """

    def __init__(self, module: torch.nn.Module):
        self.description = type(module).__name__
        tensors = {name: x for name, x in module.state_dict().items() if isinstance(x, torch.Tensor)}
        self._tensors = split_experts(tensors, _cut)
        self.unreadable = _unreadable(self._tensors)
        if absent := [name for name, tensor in self._tensors.items() if tensor.is_meta]:
            raise InputError(
                f"`module` must have its weights in memory, got {tensor_count(absent)} on the device 'meta', without"
                f" values ({some(absent)}). Load the module without offloading."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> jax.Array | np.ndarray:
        """Returns rows `first` to `last` (exclusive) of a tensor, see `TensorSource.read`."""
        part = jax.dlpack.from_dlpack(self._tensors[name][first:last].detach().contiguous())
        # A JAX array on the CPU would stay on the host, and so would everything computed from it.
        return np.asarray(part) if platform_of(part) == "cpu" else part

    def stored(self, name: str) -> tuple[str, int]:
        """Returns the dtype of a tensor and the number of its bytes, see `ByteSource.stored`."""
        return _stored(self._tensors[name])

    def read_bytes(self, name: str, buffer: np.ndarray) -> None:
        """Fills `buffer` with all bytes of a tensor, see `ByteSource.read_bytes`."""
        _copy_bytes(self._tensors[name], buffer)


class TorchFolder:
    """Provides the tensors of `pytorch_model.bin`, or of the shards in its index, through a memory map.

    These files are pickles, which may run any code: only torch's weights-only loader reads them.

    Raises:
      InputError: as in `tensors_of`; or the loader cannot read a file, or the file holds something else.
    """

    def __init__(self, folder: Path):
        self.description = str(folder)
        self._tensors = split_experts(tensors_of(folder, TORCH_WEIGHTS, _read_pickle), _cut)
        self.unreadable = _unreadable(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> np.ndarray:
        """Returns rows `first` to `last` (exclusive) of a tensor, copied into `buffer`; see `TensorSource.read`."""
        part = self._tensors[name][first:last]
        held = buffer[: part.numel() * part.itemsize]
        torch.from_numpy(held).view(part.dtype).view(part.shape).copy_(part)
        return held.view(_DTYPES[part.dtype]).reshape(part.shape)

    def stored(self, name: str) -> tuple[str, int]:
        """Returns the dtype of a tensor and the number of its bytes, see `ByteSource.stored`."""
        return _stored(self._tensors[name])

    def read_bytes(self, name: str, buffer: np.ndarray) -> None:
        """Fills `buffer` with all bytes of a tensor, see `ByteSource.read_bytes`."""
        _copy_bytes(self._tensors[name], buffer)


def _cut(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    one = tensor[cut.expert]
    return (one.T if cut.is_transposed else one)[cut.rows]


def _stored(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.itemsize


def _copy_bytes(tensor: torch.Tensor, buffer: np.ndarray) -> None:
    torch.from_numpy(buffer).copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))


def read_torch_file(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
    """Returns a file's tensors by name: for each its shape, its dtype, and a function that reads it in float32.

    Raises:
      InputError: as in `TorchFolder`, or a tensor is of another dtype than float32, bfloat16 and float16.
    """

    def reads(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        return lambda: tensor.detach().float().numpy().copy()  # the file is mapped: it must not change the values later

    tensors = _read_pickle(path)
    for name, form in _unreadable(tensors).items():
        raise InputError(f"{name:.80} of {path} must be a dense tensor of {', '.join(map(str, _DTYPES))}, got {form}.")
    return {name: (tuple(tensor.shape), _DTYPES[tensor.dtype], reads(tensor)) for name, tensor in tensors.items()}


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    require_plain_records(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle may raise any class
        raise InputError(
            f"{path} must be a file of weights that `torch.load(weights_only=True, mmap=True)` can read, got an error"
            f" from it: {reason(error):.200}."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dict from names to tensors, got {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path} must hold a dict from names to tensors, got {type(tensor).__name__} under {name!r:.80}."
            )
    return content


def _unreadable(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the dtypes and forms of tensors that cannot be read, by name."""
    return {
        name: f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type == "meta"
    }
