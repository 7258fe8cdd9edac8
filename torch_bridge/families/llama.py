"""Llama has biases if its config says so."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import LLAMA, Family, attention_bias, flag


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return attention_bias(hf) | {"mlp_bias": flag(hf, "mlp_bias")}


FAMILY = Family("llama", LLAMA, _read, {"attention_bias": False, "mlp_bias": False})
