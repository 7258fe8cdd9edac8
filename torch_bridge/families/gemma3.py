"""Gemma 3 (the text model) is Gemma 2 with norms on queries and keys, and a separate RoPE for local layers."""

from collections.abc import Mapping
from typing import Any

from jaxpack.errors import InputError
from torch_bridge.families import gemma2
from torch_bridge.families.base import GLOBAL, LOCAL, QK_NORMS, Family, require, whole
from torch_bridge.families.rope import read_rope

_FIELDS = gemma2.FIELDS | {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    require(hf, "attn_logit_softcapping", None)  # transformers reads it and does not use it
    ropes = hf.get("rope_parameters") or {}
    if not isinstance(ropes, dict) or not ropes.keys() <= {GLOBAL, LOCAL}:
        raise InputError(f"`rope_parameters` must be an object with the keys {GLOBAL!r} and {LOCAL!r}, got {ropes!r}.")
    full = ropes.get(GLOBAL) or hf.get("rope_scaling")
    local = {"rope_parameters": ropes.get(LOCAL), "rope_scaling": None, "rope_theta": hf["rope_local_base_freq"]}
    return {
        "qk_norm": True,
        "rope": read_rope({**hf, "rope_parameters": full}),
        "local_rope": read_rope({**hf, **local}),
    } | gemma2.gemma(hf, every=whole(hf, "sliding_window_pattern"))


FAMILY = Family("gemma3_text", gemma2.TENSORS | QK_NORMS, _read, _FIELDS)
