"""Qwen3-MoE has Qwen3's attention, with one window for all layers, and experts in place of each feed-forward."""

from collections.abc import Mapping
from typing import Any

from torch_bridge.families.base import (
    EMBEDDING_AND_HEAD,
    NORMS,
    PROJECTIONS,
    QK_NORMS,
    ROUTER,
    Family,
    attention_bias,
    experts,
    flag,
    require,
    whole,
)

_ATTENTION = {name: entry for name, entry in PROJECTIONS.items() if ".self_attn." in name}
_FIELDS = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 768,
    "num_experts": None,  # 128; transformers 5 writes it as `num_local_experts`
    "num_local_experts": None,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    require(hf, "decoder_sparse_step", 1)
    if hf["mlp_only_layers"] != []:
        require(hf, "mlp_only_layers", None)
    sizes = {
        "num_experts": whole(hf, "num_local_experts" if hf["num_experts"] is None else "num_experts", default=128),
        "num_experts_per_tok": whole(hf, "num_experts_per_tok"),
        "moe_intermediate_size": whole(hf, "moe_intermediate_size"),
        "norm_topk_prob": flag(hf, "norm_topk_prob"),
    }
    window = {"sliding_window": hf["sliding_window"] if flag(hf, "use_sliding_window") else None}
    return {"qk_norm": True} | sizes | attention_bias(hf) | window


_TENSORS = EMBEDDING_AND_HEAD | NORMS | QK_NORMS | _ATTENTION | ROUTER | experts("weight")
FAMILY = Family("qwen3_moe", _TENSORS, _read, _FIELDS)
