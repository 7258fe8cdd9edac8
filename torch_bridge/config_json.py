"""Per architecture: what a Hugging Face `config.json` means, and which tensor is which parameter, as tables.

Adding a family is a `Family`: its tensor table, and a function that reads its config and refuses by name what it has
that jaxpack does not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxpack.errors import InputError
from jaxpack.model.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    YarnRopeScaling,
)

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"  # of `layer_types`


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor goes: a parameter's path in `Transformer`, and the projection whose rows of it the tensor is.

    A name with `{i}` goes to layer `i` of a stacked parameter.
    """

    path: str
    projection: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      model_type: what transformers calls it.
      tensors: by Hugging Face name; those of parameters that a model may lack are left out where it does.
      read: from `config.json` to what is special about it.
      fields: of a `config.json`, what `read` reads, with what transformers takes where it is not there.
    """

    model_type: str
    tensors: Mapping[str, Entry]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    fields: Mapping[str, Any]


_EMBEDDING_AND_HEAD = {
    "model.embed_tokens.weight": Entry("embedding"),
    "model.norm.weight": Entry("norm.scale"),
    "lm_head.weight": Entry("lm_head"),
}

_NORMS = {
    "model.layers.{i}.input_layernorm.weight": Entry("blocks.attention_norm.scale"),
    "model.layers.{i}.post_attention_layernorm.weight": Entry("blocks.feed_forward_norm.scale"),
}

_GEMMA_NORMS = {
    "model.layers.{i}.input_layernorm.weight": Entry("blocks.attention_norm.scale"),
    "model.layers.{i}.post_attention_layernorm.weight": Entry("blocks.attention.post_norm.scale"),
    "model.layers.{i}.pre_feedforward_layernorm.weight": Entry("blocks.feed_forward_norm.scale"),
    "model.layers.{i}.post_feedforward_layernorm.weight": Entry("blocks.feed_forward.post_norm.scale"),
}

_QK_NORMS = {
    "model.layers.{i}.self_attn.q_norm.weight": Entry("blocks.attention.q_norm.scale"),
    "model.layers.{i}.self_attn.k_norm.weight": Entry("blocks.attention.k_norm.scale"),
}


def _projections(kind: str) -> dict[str, Entry]:
    """The "weight" or "bias" of each."""
    return {
        f"model.layers.{{i}}.{module}.{projection}.{kind}": Entry(f"blocks.{linear}.{kind}", projection)
        for module, linear, projections in (
            ("self_attn", "attention.qkv", ("q_proj", "k_proj", "v_proj")),
            ("self_attn", "attention.out", ("o_proj",)),
            ("mlp", "feed_forward.gate_up", ("gate_proj", "up_proj")),
            ("mlp", "feed_forward.down", ("down_proj",)),
        )
        for projection in projections
    }


_PROJECTIONS = _projections("weight") | _projections("bias")
_LLAMA = _EMBEDDING_AND_HEAD | _NORMS | _PROJECTIONS
_GEMMA = _EMBEDDING_AND_HEAD | _GEMMA_NORMS | _PROJECTIONS


_PHI3_PROJECTIONS = {
    "model.layers.{i}.self_attn.qkv_proj.weight": Entry("blocks.attention.qkv.weight", "qkv_proj"),
    "model.layers.{i}.self_attn.o_proj.weight": Entry("blocks.attention.out.weight", "o_proj"),
    "model.layers.{i}.mlp.gate_up_proj.weight": Entry("blocks.feed_forward.gate_up.weight", "gate_up_proj"),
    "model.layers.{i}.mlp.down_proj.weight": Entry("blocks.feed_forward.down.weight", "down_proj"),
}


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _attention_bias(hf) | {"mlp_bias": _flag(hf, "mlp_bias")}


def _read_mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, "attention_bias", False)
    return {"sliding_window": hf["sliding_window"]}


def _read_qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True} | _qwen_window(hf)


def _read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True} | _attention_bias(hf) | _qwen_window(hf)


def _read_phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, "attention_bias", False)
    return {"fused_projections": True, "sliding_window": hf["sliding_window"]}


def _read_gemma2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"attn_logit_softcapping": hf["attn_logit_softcapping"]} | _gemma(hf, every=2)


def _read_gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, "attn_logit_softcapping", None)  # which transformers reads and does not use
    ropes = hf.get("rope_parameters") or {}
    if not isinstance(ropes, dict) or not ropes.keys() <= {_GLOBAL, _LOCAL}:
        raise InputError(f"`rope_parameters` must be an object of {_GLOBAL!r} and {_LOCAL!r}, got {ropes!r}.")
    full = ropes.get(_GLOBAL) or hf.get("rope_scaling")
    local = {"rope_parameters": ropes.get(_LOCAL), "rope_scaling": None, "rope_theta": hf["rope_local_base_freq"]}
    return {
        "qk_norm": True,
        "rope": _read_rope({**hf, "rope_parameters": full}),
        "local_rope": _read_rope({**hf, **local}),
    } | _gemma(hf, every=_whole(hf, "sliding_window_pattern"))


def _gemma(hf: Mapping[str, Any], every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; one layer in `every` attends to whole documents."""
    _require(hf, "use_bidirectional_attention", False)
    kinds = [_LOCAL if (i + 1) % every else _GLOBAL for i in range(_whole(hf, "num_hidden_layers"))]
    return {
        "unit_offset_norms": True,
        "post_norms": True,
        "scale_embeddings": True,
        "query_pre_attn_scalar": hf["query_pre_attn_scalar"],
        "final_logit_softcapping": hf["final_logit_softcapping"],
        **_attention_bias(hf),
        **_local_layers(hf, hf["sliding_window"], kinds),
    }


def _attention_bias(hf: Mapping[str, Any]) -> dict[str, Any]:
    bias = _flag(hf, "attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _qwen_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Off, whatever `sliding_window` says, or on in the layers from `max_window_layers` on."""
    window = hf["sliding_window"] if _flag(hf, "use_sliding_window") else None
    first, layers = _whole(hf, "max_window_layers", least=0), range(_whole(hf, "num_hidden_layers"))
    return _local_layers(hf, window, [_LOCAL if window is not None and i >= first else _GLOBAL for i in layers])


def _local_layers(hf: Mapping[str, Any], window: int | None, default: list[str]) -> dict[str, Any]:
    kinds = _first(hf.get("layer_types"), default)
    allowed = (_GLOBAL,) if window is None else (_GLOBAL, _LOCAL)
    count = _whole(hf, "num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in allowed for kind in kinds):
        allowed = " or ".join(map(repr, allowed))
        raise InputError(f"`layer_types` must be a list of {count} that are {allowed}, got {kinds!r}.")
    return {"sliding_window": window, "local_layers": None if window is None else tuple(k == _LOCAL for k in kinds)}


_QWEN2 = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_PHI3 = {
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

_GEMMA2 = {
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
_GEMMA3 = _GEMMA2 | {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}

FAMILIES: dict[str, Family] = {
    "Gemma2ForCausalLM": Family("gemma2", _GEMMA, _read_gemma2, _GEMMA2),
    "Gemma3ForCausalLM": Family("gemma3_text", _GEMMA | _QK_NORMS, _read_gemma3, _GEMMA3),
    "LlamaForCausalLM": Family("llama", _LLAMA, _read_llama, {"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Family("mistral", _LLAMA, _read_mistral, {"sliding_window": 4096, "num_key_value_heads": 8}),
    "Phi3ForCausalLM": Family("phi3", _EMBEDDING_AND_HEAD | _NORMS | _PHI3_PROJECTIONS, _read_phi3, _PHI3),
    "Qwen2ForCausalLM": Family("qwen2", _LLAMA, _read_qwen2, _QWEN2),
    "Qwen3ForCausalLM": Family("qwen3", _LLAMA | _QK_NORMS, _read_qwen3, _QWEN2 | {"attention_bias": False}),
}

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _activation_field(family: Family) -> str:
    return "hidden_activation" if "hidden_activation" in family.fields else "hidden_act"


def config_from_hf(hf: Mapping[str, Any], name_or_path: str = "") -> ModelConfig:
    """Reads a Hugging Face `config.json`, in the form of transformers 4 or 5.

    Raises:
      InputError: an architecture or an option that is not supported, or a field that is missing.
    """
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise InputError(f"`architectures` must be one of {sorted(FAMILIES)} in a list, got {architectures!r}.")
    family = FAMILIES[architectures[0]]
    hf = {**family.fields, **hf}
    _require(hf, "model_type", family.model_type)  # by which transformers chooses the class
    _require(hf, "quantization_config", None)
    field = _activation_field(family)
    activation = _first(hf.get(field), family.fields.get(field), "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise InputError(f"`{field}` must be one of {sorted(_ACTIVATIONS)}, got {activation!r}.")
    special = family.read(hf)
    num_heads, hidden_size = _whole(hf, "num_attention_heads"), _whole(hf, "hidden_size")
    return ModelConfig(
        architecture=architectures[0],
        vocab_size=_whole(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(hf, "intermediate_size"),
        num_layers=_whole(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_whole(hf, "num_key_value_heads", default=num_heads),
        head_dim=_whole(hf, "head_dim", default=hidden_size // num_heads),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=special.pop("rope", None) or _read_rope(hf),
        activation=_ACTIVATIONS[activation],
        tie_word_embeddings=_flag(hf, "tie_word_embeddings"),
        max_position_embeddings=hf.get("max_position_embeddings"),
        name_or_path=name_or_path,
        **special,
    )


def _whole(hf: Mapping[str, Any], field: str, default: int | None = None, least: int = 1) -> int:
    value = _first(hf.get(field), default)
    if type(value) is not int or value < least:
        raise InputError(f"`{field}` must be a whole number of at least {least}, got {value!r}.")
    return value


_SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearRopeScaling,
    "dynamic": DynamicRopeScaling,
    "llama3": Llama3RopeScaling,
    "yarn": YarnRopeScaling,
    "longrope": LongRopeScaling,
}


def _read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 has one `rope_parameters`; before, there was `rope_theta` beside an optional `rope_scaling`.
    scaling = hf.get("rope_scaling") or {}
    rope = hf.get("rope_parameters") or scaling
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"`rope_parameters` must be an object, those of one rope, got {rope!r}.")
    if not isinstance(scaling, dict) or not scaling.items() <= rope.items():  # transformers would take `scaling`
        raise InputError(f"`rope_scaling` must not be beside `rope_parameters` that differ, got {scaling!r}.")
    theta = _first(rope.get("rope_theta"), hf.get("rope_theta", 10_000.0))
    kind = _first(rope.get("rope_type"), rope.get("type"), "default")
    partial = _first(rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), 1.0)
    if partial != 1 and "partial_rotary_factor" not in FAMILIES[hf["architectures"][0]].fields:
        raise InputError(f"`partial_rotary_factor` of {hf['architectures'][0]} must be 1, got {partial!r}.")
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):
        kind = "longrope"  # which Phi-3 has called so
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise InputError(f"`rope_type` must be 'default' or one of {sorted(_SCALINGS)}, got {kind!r}.")
    original, longest = "original_max_position_embeddings", "max_position_embeddings"
    given = {**rope, longest: hf.get(longest)}
    if hf.get(original) is not None:  # transformers goes by the one that is not among the others
        given[original] = hf[original]
    if kind == "longrope" and given.get("factor") is None:
        given["factor"] = _whole(given, longest) / _whole(given, original)
    fields = dataclasses.fields(_SCALINGS[kind])
    values = {field.name: given[field.name] for field in fields if given.get(field.name) is not None}
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise InputError(f"`rope_parameters` of type {kind!r} must have {required}, got none of {missing}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return RopeConfig(theta=theta, scaling=_SCALINGS[kind](**values), partial_rotary_factor=partial)


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters`, and what goes with them."""
    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1:
        parameters["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.scaling is None:
        return {"rope_parameters": parameters}
    (kind,) = (kind for kind, scaling in _SCALINGS.items() if isinstance(rope.scaling, scaling))
    values = {name: value for name, value in dataclasses.asdict(rope.scaling).items() if value is not None}
    values.pop("max_position_embeddings", None)  # the model's own
    beside = {name: values[name] for name in ("original_max_position_embeddings",) if name in values}
    return {"rope_parameters": parameters | {"rope_type": kind} | values} | beside


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The part of a `config.json` that a `ModelConfig` says; `config_from_hf` reads it back."""
    family = FAMILIES[config.architecture]
    (activation,) = (name for name, activation in _ACTIVATIONS.items() if activation == config.activation)
    rope = _rope_to_hf(config.rope)
    if config.local_rope is not None:
        local = _rope_to_hf(config.local_rope)["rope_parameters"]
        rope["rope_parameters"] = {_GLOBAL: rope["rope_parameters"], _LOCAL: local}
    special = {
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    if config.max_position_embeddings is not None:
        rope["max_position_embeddings"] = config.max_position_embeddings
    if config.local_layers is not None:
        special["layer_types"] = [_LOCAL if is_local else _GLOBAL for is_local in config.local_layers]
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


def tensor_table(config: ModelConfig) -> dict[str, tuple[Entry, int | None]]:
    """Every tensor of a checkpoint: its name, where it goes, and the layer; None outside the layers."""
    has = {
        "lm_head": not config.tie_word_embeddings,
        "blocks.attention.qkv.bias": config.qkv_bias,
        "blocks.attention.out.bias": config.out_bias,
        "blocks.feed_forward.gate_up.bias": config.mlp_bias,
        "blocks.feed_forward.down.bias": config.mlp_bias,
    }
    table: dict[str, tuple[Entry, int | None]] = {}
    for name, entry in FAMILIES[config.architecture].tensors.items():
        if not has.get(entry.path, True):
            continue
        if "{i}" in name:
            table |= {name.format(i=layer): (entry, layer) for layer in range(config.num_layers)}
        else:
            table[name] = (entry, None)
    return table


def _first(*values: Any) -> Any:
    """The first of some values that is there; None where none is."""
    return next((value for value in values if value is not None), None)


def _flag(hf: Mapping[str, Any], field: str) -> bool:
    value = hf.get(field) or False
    if not isinstance(value, bool):
        raise InputError(f"`{field}` must be true or false, got {value!r}.")
    return value


def _require(hf: Mapping[str, Any], field: str, expected: Any) -> None:
    if hf.get(field, expected) not in (expected, None):
        raise InputError(f"`{field}` must be {expected!r}, got {hf[field]!r}.")
