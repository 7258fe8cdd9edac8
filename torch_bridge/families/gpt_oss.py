"""GPT-OSS has experts with biases and a clamped activation, attention sinks, and a window in every second layer."""

from collections.abc import Mapping
from typing import Any

from jaxpack.kernels.gated_activation import CLAMPED_LIMIT, CLAMPED_SCALE
from jaxpack.model.config import RopeConfig, YarnRopeScaling
from torch_bridge.families.base import (
    EMBEDDING_AND_HEAD,
    GLOBAL,
    LOCAL,
    NORMS,
    PROJECTIONS,
    Entry,
    Family,
    attention_bias,
    experts,
    first,
    local_layers,
    require,
    whole,
)

_ATTENTION = {name: entry for name, entry in PROJECTIONS.items() if ".self_attn." in name} | {
    "model.layers.{i}.self_attn.sinks": Entry("blocks.attention.sinks")
}
_ROUTER = {
    f"model.layers.{{i}}.mlp.router.{kind}": Entry(f"blocks.feed_forward.router.{kind}") for kind in ("weight", "bias")
}
_FIELDS = {
    "attention_bias": True,
    "layer_types": None,
    "num_experts": None,
    "num_local_experts": None,  # 128; older files call it `num_experts`
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "swiglu_alpha": CLAMPED_SCALE,
    "swiglu_limit": CLAMPED_LIMIT,
}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    require(hf, "hidden_act", "silu")
    require(hf, "swiglu_alpha", CLAMPED_SCALE)
    require(hf, "swiglu_limit", CLAMPED_LIMIT)
    kinds = [GLOBAL if i % 2 else LOCAL for i in range(whole(hf, "num_hidden_layers"))]
    count = first(hf["num_local_experts"], hf["num_experts"], 128)
    rope = {} if hf.get("rope_parameters") or hf.get("rope_scaling") else {"rope": _default_rope(hf)}
    return rope | {
        "activation": "clamped_silu",
        "attention_sinks": True,
        "router_bias": True,
        "experts_bias": True,
        "num_experts": whole({"num_local_experts": count}, "num_local_experts"),
        "num_experts_per_tok": whole(hf, "num_experts_per_tok"),
        "moe_intermediate_size": whole(hf, "intermediate_size"),
        **attention_bias(hf),
        **local_layers(hf, hf["sliding_window"], kinds),
    }


def _default_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Returns the RoPE that transformers takes if the config describes none."""
    scaling = YarnRopeScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
    return RopeConfig(theta=first(hf.get("rope_theta"), 150_000.0), scaling=scaling)


_TENSORS = EMBEDDING_AND_HEAD | NORMS | _ATTENTION | _ROUTER | experts("weight") | experts("bias")
FAMILY = Family("gpt_oss", _TENSORS, _read, _FIELDS, fuses_experts=True)
