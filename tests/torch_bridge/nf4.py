"""Makes the bitsandbytes side of comparisons: quantised tensors, and small folders in 4 bits."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from plain_bitsandbytes import bitsandbytes
from safetensors.torch import load_file, save_file

from tests.torch_bridge import hf

bnb = bitsandbytes()
pytest.importorskip("accelerate")  # transformers needs it beside bitsandbytes

WEIGHTS = "model.safetensors"


def config(**changes: Any) -> transformers.BitsAndBytesConfig:
    """Returns a config of transformers for NF4 that computes in float32."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return transformers.BitsAndBytesConfig(**settings | {"bnb_4bit_compute_dtype": torch.float32} | changes)


def save(folder: Path, checkpoint: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """Writes a small random model in `folder`/base, and in 4 bits in `folder`/nf4. Returns the path of the second."""
    _, base = hf.save_model(folder / "base", checkpoint, dtype)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config(**changes), dtype=dtype
    )
    quantised.save_pretrained(folder / "nf4")
    return str(folder / "nf4")


def load(folder: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Reads a folder in 4 bits with transformers, for a computation in float32."""
    options = {"dtype": dtype, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tensors_of(name: str, matrix: torch.Tensor, **settings: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors with which bitsandbytes stores a matrix; see `quantize_4bit` for the settings."""
    settings = {"blocksize": 64, "quant_type": "nf4"} | settings
    codes, state = bnb.functional.quantize_4bit(matrix, **settings)
    return {name: codes} | {f"{name}.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}


def dense_of(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the matrix that bitsandbytes makes of stored tensors."""
    beside = {end.removeprefix(f"{name}."): x for end, x in tensors.items() if end.startswith(f"{name}.")}
    state = bnb.functional.QuantState.from_dict(beside, torch.device("cpu"))
    return bnb.functional.dequantize_4bit(tensors[name].view(torch.uint8), state)


def quantise(folder: Path, settings: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Quantises single matrices of a folder in 16 or 32 bits, each by its own settings.

    Returns all matrices as bitsandbytes makes them dense, in float32.
    """
    tensors = load_file(folder / WEIGHTS)
    dense = {}
    for name, own in settings.items():
        stored = tensors_of(name, tensors.pop(name), **own)
        dense[name] = dense_of(name, dict(stored)).float().numpy()
        tensors |= stored
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    others = {name: x.float().numpy() for name, x in tensors.items() if not _is_part(name, settings)}
    return others | dense


def _is_part(name: str, matrices: Iterable[str]) -> bool:
    return any(name == matrix or name.startswith(f"{matrix}.") for matrix in matrices)
