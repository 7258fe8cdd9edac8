"""Mistral is Llama without biases, and with the same sliding window in all layers."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import LLAMA, Family, require


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    require(hf, "attention_bias", False)
    return {"sliding_window": hf["sliding_window"]}


FAMILY = Family("mistral", LLAMA, _read, {"sliding_window": 4096, "num_key_value_heads": 8})
