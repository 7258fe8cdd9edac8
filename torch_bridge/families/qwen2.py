"""Qwen2 has biases on queries, keys and values, and optionally a sliding window in its later layers."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import GLOBAL, LLAMA, LOCAL, Family, flag, local_layers, whole

FIELDS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True} | qwen_window(hf)


def qwen_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the window: on from layer `max_window_layers`, or off in all layers without `use_sliding_window`."""
    window = hf["sliding_window"] if flag(hf, "use_sliding_window") else None
    first, layers = whole(hf, "max_window_layers", least=0), range(whole(hf, "num_hidden_layers"))
    return local_layers(hf, window, [LOCAL if window is not None and i >= first else GLOBAL for i in layers])


FAMILY = Family("qwen2", LLAMA, _read, FIELDS)
