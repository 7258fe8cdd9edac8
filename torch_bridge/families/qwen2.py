"""Qwen2 has biases of queries, keys and values, and a window in its later layers where that is on."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import GLOBAL, LLAMA, LOCAL, Family, flag, local_layers, whole

FIELDS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True} | qwen_window(hf)


def qwen_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the window: off, whatever `sliding_window` says, or on in the layers from `max_window_layers` on."""
    window = hf["sliding_window"] if flag(hf, "use_sliding_window") else None
    first, layers = whole(hf, "max_window_layers", least=0), range(whole(hf, "num_hidden_layers"))
    return local_layers(hf, window, [LOCAL if window is not None and i >= first else GLOBAL for i in layers])


FAMILY = Family("qwen2", LLAMA, _read, FIELDS)
