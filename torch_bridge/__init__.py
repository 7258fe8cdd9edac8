"""Reads and writes Hugging Face checkpoints and PEFT adapters."""

from typing import TYPE_CHECKING, Any

from torch_bridge.adapter import load_adapter, save_adapter
from torch_bridge.gguf_files.save import save_gguf
from torch_bridge.hub import push_to_hub
from torch_bridge.merged import save_merged
from torch_bridge.pretrained import from_pretrained, read_config, save_pretrained
from torch_bridge.verification import base_of, verify

if TYPE_CHECKING:
    from torch_bridge.live import from_torch

__all__ = [
    "base_of",
    "from_pretrained",
    "from_torch",
    "load_adapter",
    "push_to_hub",
    "read_config",
    "save_adapter",
    "save_gguf",
    "save_merged",
    "save_pretrained",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Only users who pass torch modules import torch.
    if name == "from_torch":
        from torch_bridge.live import from_torch

        return from_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
