"""Per architecture: what a Hugging Face `config.json` means, and which tensor is which parameter, as tables.

Adding a family is a `Family`: its tensor table, and a function that reads its config and refuses by name what it has
that jaxpack does not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxpack.config import Llama3RopeScaling, ModelConfig, RopeConfig
from jaxpack.errors import InputError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor goes: a parameter's path in `Transformer`, and the projection whose rows of it the tensor is.

    A name with `{i}` goes to layer `i` of a stacked parameter.
    """

    path: str
    projection: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: `tensors` by Hugging Face name, and `read`, from `config.json` to what is special about it."""

    tensors: Mapping[str, Entry]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]


_LLAMA_TENSORS = {
    "model.embed_tokens.weight": Entry("embedding"),
    "model.layers.{i}.input_layernorm.weight": Entry("blocks.attention_norm.scale"),
    "model.layers.{i}.self_attn.q_proj.weight": Entry("blocks.attention.qkv.weight", "q_proj"),
    "model.layers.{i}.self_attn.k_proj.weight": Entry("blocks.attention.qkv.weight", "k_proj"),
    "model.layers.{i}.self_attn.v_proj.weight": Entry("blocks.attention.qkv.weight", "v_proj"),
    "model.layers.{i}.self_attn.o_proj.weight": Entry("blocks.attention.out.weight", "o_proj"),
    "model.layers.{i}.post_attention_layernorm.weight": Entry("blocks.feed_forward_norm.scale"),
    "model.layers.{i}.mlp.gate_proj.weight": Entry("blocks.feed_forward.gate_up.weight", "gate_proj"),
    "model.layers.{i}.mlp.up_proj.weight": Entry("blocks.feed_forward.gate_up.weight", "up_proj"),
    "model.layers.{i}.mlp.down_proj.weight": Entry("blocks.feed_forward.down.weight", "down_proj"),
    "model.norm.weight": Entry("norm.scale"),
    "lm_head.weight": Entry("lm_head"),
}

_QWEN3_TENSORS = _LLAMA_TENSORS | {
    "model.layers.{i}.self_attn.q_norm.weight": Entry("blocks.attention.q_norm.scale"),
    "model.layers.{i}.self_attn.k_norm.weight": Entry("blocks.attention.k_norm.scale"),
}


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, "mlp_bias", False)
    return {"qk_norm": False}


def _read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, "use_sliding_window", False)
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise InputError(f"`layer_types` must all be 'full_attention', got {sorted(set(hf['layer_types']))}.")
    return {"qk_norm": True}


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_LLAMA_TENSORS, _read_llama),
    "Qwen3ForCausalLM": Family(_QWEN3_TENSORS, _read_qwen3),
}


def config_from_hf(hf: Mapping[str, Any], name_or_path: str = "") -> ModelConfig:
    """Reads a Hugging Face `config.json`, in the form of transformers 4 or 5.

    Raises:
      InputError: an architecture or an option that is not supported, or a field that is missing.
    """
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise InputError(f"`architectures` must be one of {sorted(FAMILIES)} in a list, got {architectures!r}.")
    _require(hf, "hidden_act", "silu")
    _require(hf, "attention_bias", False)
    _require(hf, "quantization_config", None)
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
        rope=_read_rope(hf),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        name_or_path=name_or_path,
        **FAMILIES[architectures[0]].read(hf),
    )


def _whole(hf: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = hf.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise InputError(f"`{field}` of `config.json` must be a whole number of at least 1, got {value!r}.")
    return value


def _read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 has one `rope_parameters`; before, there was `rope_theta` beside an optional `rope_scaling`.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"`rope_parameters` must be an object, got {rope!r}.")
    theta = rope.get("rope_theta") or hf.get("rope_theta", 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "llama3":
        fields = [field.name for field in dataclasses.fields(Llama3RopeScaling)]
        missing = [name for name in fields if name not in rope]
        if missing:
            raise InputError(f"`rope_parameters` of type 'llama3' must have {fields}, got none of {missing}.")
        return RopeConfig(theta=theta, llama3=Llama3RopeScaling(**{name: rope[name] for name in fields}))
    raise InputError(f"`rope_type` must be 'default' or 'llama3', got {kind!r}.")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The part of a `config.json` that a `ModelConfig` says; `config_from_hf` reads it back."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.llama3 is not None:
        rope |= {"rope_type": "llama3"} | dataclasses.asdict(config.rope.llama3)
    return {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def tensor_table(config: ModelConfig) -> dict[str, tuple[Entry, int | None]]:
    """Every tensor of a checkpoint: its name, where it goes, and the layer; None outside the layers."""
    table: dict[str, tuple[Entry, int | None]] = {}
    for name, entry in FAMILIES[config.architecture].tensors.items():
        if "{i}" in name:
            table |= {name.format(i=layer): (entry, layer) for layer in range(config.num_layers)}
        elif not (entry.path == "lm_head" and config.tie_word_embeddings):
            table[name] = (entry, None)
    return table


def _require(hf: Mapping[str, Any], field: str, expected: Any) -> None:
    if hf.get(field, expected) not in (expected, None):
        raise InputError(f"`{field}` of `config.json` must be {expected!r}, got {hf[field]!r}.")
