"""Phi-3 and Phi-4 have fused projections, one sliding window, and a RoPE that may rotate a part of each head."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import EMBEDDING_AND_HEAD, NORMS, Entry, Family, require

_PROJECTIONS = {
    "model.layers.{i}.self_attn.qkv_proj.weight": Entry("blocks.attention.qkv.weight", "qkv_proj"),
    "model.layers.{i}.self_attn.o_proj.weight": Entry("blocks.attention.out.weight", "o_proj"),
    "model.layers.{i}.mlp.gate_up_proj.weight": Entry("blocks.feed_forward.gate_up.weight", "gate_up_proj"),
    "model.layers.{i}.mlp.down_proj.weight": Entry("blocks.feed_forward.down.weight", "down_proj"),
}

_FIELDS = {
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    require(hf, "attention_bias", False)
    return {"fused_projections": True, "sliding_window": hf["sliding_window"]}


FAMILY = Family("phi3", EMBEDDING_AND_HEAD | NORMS | _PROJECTIONS, _read, _FIELDS)
