"""Defines `Family` and `Entry`, the tensor tables that families share, and readers of `config.json` fields."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxpack.errors import InputError

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # values of `layer_types`


@dataclasses.dataclass(frozen=True)
class Entry:
    """Maps a tensor to a parameter's path in `Transformer`, and to the rows of one projection (None: all rows).

    A name with `{i}` goes to layer `i` of a stacked parameter. A name with `{e}` goes to the rows of expert `e`.
    """

    path: str
    projection: str | None = None
    expert: int | None = None

    @property
    def rows(self) -> str | None:
        """Returns the name of the rows in the module's `projections`."""
        return self.projection if self.expert is None else f"{self.expert}.{self.projection}"


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes one architecture.

    Attributes:
      model_type: the name of the architecture in transformers.
      tensors: entries by Hugging Face name; entries of optional parameters are left out if a model lacks them.
      read: returns the family's own `ModelConfig` fields from a `config.json`.
      fields: the `config.json` fields that `read` reads, with the defaults of transformers.
      fuses_experts: whether files hold all experts of a layer in one tensor, see `fuse_experts`.
    """

    model_type: str
    tensors: Mapping[str, Entry]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    fields: Mapping[str, Any]
    fuses_experts: bool = False


EMBEDDING_AND_HEAD = {
    "model.embed_tokens.weight": Entry("embedding"),
    "model.norm.weight": Entry("norm.scale"),
    "lm_head.weight": Entry("lm_head"),
}

NORMS = {
    "model.layers.{i}.input_layernorm.weight": Entry("blocks.attention_norm.scale"),
    "model.layers.{i}.post_attention_layernorm.weight": Entry("blocks.feed_forward_norm.scale"),
}

QK_NORMS = {
    "model.layers.{i}.self_attn.q_norm.weight": Entry("blocks.attention.q_norm.scale"),
    "model.layers.{i}.self_attn.k_norm.weight": Entry("blocks.attention.k_norm.scale"),
}


def _projections(kind: str) -> dict[str, Entry]:
    """Returns the entries of all projections, for their "weight" or their "bias"."""
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


PROJECTIONS = _projections("weight") | _projections("bias")
LLAMA = EMBEDDING_AND_HEAD | NORMS | PROJECTIONS

ROUTER = {"model.layers.{i}.mlp.gate.weight": Entry("blocks.feed_forward.router.weight")}


def experts(kind: str) -> dict[str, Entry]:
    """Returns the entries of all experts' projections, for their "weight" or their "bias".

    Names that belong to one tensor of all experts follow one another; see `torch_bridge.io.experts`.
    """
    return {
        f"model.layers.{{i}}.mlp.experts.{{e}}.{projection}.{kind}": Entry(
            f"blocks.feed_forward.{module}.{kind}", projection
        )
        for module, projections in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",)))
        for projection in projections
    }


def attention_bias(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `attention_bias`: whether all projections of the attention have biases."""
    bias = flag(hf, "attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def local_layers(hf: Mapping[str, Any], window: int | None, default: list[str]) -> dict[str, Any]:
    """Reads which layers attend within `window`: from `layer_types`, or from `default` without it.

    Raises:
      InputError: `layer_types` does not have one kind for each layer, or has local layers without a window.
    """
    kinds = first(hf.get("layer_types"), default)
    allowed = (GLOBAL,) if window is None else (GLOBAL, LOCAL)
    count = whole(hf, "num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in allowed for kind in kinds):
        allowed = " or ".join(map(repr, allowed))
        raise InputError(f"`layer_types` must be a list of {count} names, each {allowed}, got {kinds!r}.")
    return {"sliding_window": window, "local_layers": None if window is None else tuple(k == LOCAL for k in kinds)}


def whole(hf: Mapping[str, Any], field: str, default: int | None = None, least: int = 1) -> int:
    """Reads a whole number of at least `least`; a null or missing field is `default`.

    Raises:
      InputError: the field is anything else, or is missing and has no default.
    """
    value = first(hf.get(field), default)
    if type(value) is not int or value < least:
        raise InputError(f"`{field}` must be a whole number of at least {least}, got {value!r}.")
    return value


def flag(hf: Mapping[str, Any], field: str) -> bool:
    """Reads true or false; a null or missing field is false.

    Raises:
      InputError: the field is anything else.
    """
    value = hf.get(field) or False
    if not isinstance(value, bool):
        raise InputError(f"`{field}` must be true or false, got {value!r}.")
    return value


def require(hf: Mapping[str, Any], field: str, expected: Any) -> None:
    """Requires a field to be `expected`, null or missing.

    Raises:
      InputError: the field is anything else.
    """
    if hf.get(field, expected) not in (expected, None):
        raise InputError(f"`{field}` must be {expected!r}, got {hf[field]!r}.")


def first(*values: Any) -> Any:
    """Returns the first value that is not None, or None if all are."""
    return next((value for value in values if value is not None), None)
