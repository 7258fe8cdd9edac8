"""Qwen3 has Qwen2's windows, norms on queries and keys, and biases if its config says so."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families import qwen2
from torch_bridge.families.base import LLAMA, QK_NORMS, Family, attention_bias


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True} | attention_bias(hf) | qwen2.qwen_window(hf)


FAMILY = Family("qwen3", LLAMA | QK_NORMS, _read, qwen2.FIELDS | {"attention_bias": False})
