"""Reads a Hugging Face `config.json` into a `ModelConfig`, and writes it back."""

from collections.abc import Mapping
from typing import Any

from jaxpack.constants import Activation
from jaxpack.errors import InputError
from jaxpack.kernels.gated_activation import CLAMPED_LIMIT, CLAMPED_SCALE
from jaxpack.kernels.mxfp4 import BLOCK
from jaxpack.model.config import ModelConfig
from torch_bridge.families import FAMILIES
from torch_bridge.families.base import GLOBAL, LOCAL, Family, first, flag, require, whole
from torch_bridge.families.rope import read_rope, rope_to_hf, rope_to_hf_4
from torch_bridge.sixteen_bit import MXFP4, quantisation_of, quantised_hint, unsupported_format

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _activation_field(family: Family) -> str:
    return "hidden_activation" if "hidden_activation" in family.fields else "hidden_act"


def config_from_hf(hf: Mapping[str, Any], name_or_path: str = "") -> ModelConfig:
    """Reads the fields of a `config.json`, in the form of transformers 4 or 5, into a `ModelConfig`.

    Raises:
      InputError: the architecture or an option is not supported, or a field is missing.
    """
    architecture = _architecture(hf)
    family = FAMILIES[architecture]
    hf = {**family.fields, **hf, "architectures": [architecture]}
    require(hf, "model_type", family.model_type)  # transformers chooses the class by it
    field, quantisation = quantisation_of(hf) or ("", None)
    form = unsupported_format(quantisation) if quantisation else None
    if form is not None and not (form == MXFP4 and family.fuses_experts):
        raise InputError(
            f"`{field}` must be null or describe bitsandbytes' NF4, because jaxpack reads weights of 16 and 32 bits and"
            f" NF4, got {form}: {quantisation!r:.200}. {quantised_hint(name_or_path, hf)}"
        )
    if form == MXFP4:
        for name in ("hidden_size", "intermediate_size"):
            if whole(hf, name) % BLOCK:
                raise InputError(f"`{name}` must be a multiple of {BLOCK} with MXFP4, got {hf[name]}.")
    field = _activation_field(family)
    activation = first(hf.get(field), family.fields.get(field), "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise InputError(f"`{field}` must be one of {sorted(_ACTIVATIONS)}, got {activation!r}.")
    special = family.read(hf)
    num_heads, hidden_size = whole(hf, "num_attention_heads"), whole(hf, "hidden_size")
    return ModelConfig(
        architecture=architecture,
        vocab_size=whole(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole(hf, "intermediate_size"),
        num_layers=whole(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=whole(hf, "num_key_value_heads", default=num_heads),
        head_dim=whole(hf, "head_dim", default=hidden_size // num_heads),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=special.pop("rope", None) or read_rope(hf, allows_partial="partial_rotary_factor" in family.fields),
        activation=special.pop("activation", _ACTIVATIONS[activation]),
        tie_word_embeddings=flag(hf, "tie_word_embeddings"),
        max_position_embeddings=hf.get("max_position_embeddings"),
        name_or_path=name_or_path,
        **special,
    )


def _architecture(hf: Mapping[str, Any]) -> str:
    """Returns the architecture that `architectures` names, or else that of `model_type`."""
    architectures = hf.get("architectures")
    if architectures is None or architectures == []:
        found = [name for name, family in FAMILIES.items() if family.model_type == hf.get("model_type")]
        if not found:
            raise InputError(
                f"`architectures` must be one of {sorted(FAMILIES)} in a list, or `model_type` one of"
                f" {sorted(family.model_type for family in FAMILIES.values())}, got {architectures!r} and"
                f" {hf.get('model_type')!r:.80}."
            )
        return found[0]
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise InputError(f"`architectures` must be one of {sorted(FAMILIES)} in a list, got {architectures!r:.200}.")
    return architectures[0]


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a `config.json` that a `ModelConfig` determines; `config_from_hf` reads them back.

    RoPE is in the form of transformers 5 and in that of version 4.
    """
    family = FAMILIES[config.architecture]
    kind = "silu" if config.activation == "clamped_silu" else config.activation
    (activation,) = (name for name, activation in _ACTIVATIONS.items() if activation == kind)
    rope = rope_to_hf(config.rope) | rope_to_hf_4(config.rope, family.model_type)
    if config.local_rope is not None:
        local = rope_to_hf(config.local_rope)["rope_parameters"]
        rope["rope_parameters"] = {GLOBAL: rope["rope_parameters"], LOCAL: local}
        rope["rope_local_base_freq"] = config.local_rope.theta
    special = {
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "swiglu_alpha": CLAMPED_SCALE,
        "swiglu_limit": CLAMPED_LIMIT,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }
    if config.max_position_embeddings is not None:
        rope["max_position_embeddings"] = config.max_position_embeddings
    if config.local_layers is not None:
        special["layer_types"] = [LOCAL if is_local else GLOBAL for is_local in config.local_layers]
    return {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        _activation_field(family): activation,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **rope,
        **{name: value for name, value in special.items() if name in family.fields},
    }
