"""Reads and writes Hugging Face checkpoints and PEFT adapters."""

from typing import TYPE_CHECKING, Any

from torch_bridge.adapter import load_adapter as load_adapter
from torch_bridge.adapter import save_adapter as save_adapter
from torch_bridge.merged import save_merged as save_merged
from torch_bridge.pretrained import from_pretrained as from_pretrained
from torch_bridge.pretrained import read_config as read_config
from torch_bridge.pretrained import save_pretrained as save_pretrained
from torch_bridge.verification import base_of as base_of
from torch_bridge.verification import verify as verify

if TYPE_CHECKING:
    from torch_bridge.live import from_torch as from_torch


def __getattr__(name: str) -> Any:
    # Only users who pass torch modules import torch.
    if name == "from_torch":
        from torch_bridge.live import from_torch

        return from_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
