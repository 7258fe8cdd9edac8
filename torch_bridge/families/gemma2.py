"""Gemma 2 has norms before and after each branch, soft-caps, and a sliding window in every second layer."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import (
    EMBEDDING_AND_HEAD,
    GLOBAL,
    LOCAL,
    PROJECTIONS,
    Entry,
    Family,
    attention_bias,
    local_layers,
    require,
    whole,
)

_NORMS = {
    "model.layers.{i}.input_layernorm.weight": Entry("blocks.attention_norm.scale"),
    "model.layers.{i}.post_attention_layernorm.weight": Entry("blocks.attention.post_norm.scale"),
    "model.layers.{i}.pre_feedforward_layernorm.weight": Entry("blocks.feed_forward_norm.scale"),
    "model.layers.{i}.post_feedforward_layernorm.weight": Entry("blocks.feed_forward.post_norm.scale"),
}

TENSORS = EMBEDDING_AND_HEAD | _NORMS | PROJECTIONS

FIELDS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"attn_logit_softcapping": hf["attn_logit_softcapping"]} | gemma(hf, every=2)


def gemma(hf: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Reads the fields that Gemma 2 and 3 share; one layer in `every` attends to whole documents."""
    require(hf, "use_bidirectional_attention", False)
    kinds = [LOCAL if (i + 1) % every else GLOBAL for i in range(whole(hf, "num_hidden_layers"))]
    return {
        "unit_offset_norms": True,
        "post_norms": True,
        "scale_embeddings": True,
        "query_pre_attn_scalar": hf["query_pre_attn_scalar"],
        "final_logit_softcapping": hf["final_logit_softcapping"],
        **attention_bias(hf),
        **local_layers(hf, hf["sliding_window"], kinds),
    }


FAMILY = Family("gemma2", TENSORS, _read, FIELDS)
