"""Reads the RoPE fields of a `config.json` into a `RopeConfig`, and writes them back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpack.errors import InputError
from jaxpack.model.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnRopeScaling,
)
from torch_bridge.families.base import first, whole

_SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearRopeScaling,
    "dynamic": DynamicRopeScaling,
    "llama3": Llama3RopeScaling,
    "yarn": YarnRopeScaling,
    "longrope": LongRopeScaling,
}


def read_rope(hf: Mapping[str, Any], *, allows_partial: bool = False) -> RopeConfig:
    """Reads one RoPE, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Args:
      allows_partial: whether the family's RoPE may rotate only a part of each head.

    Raises:
      InputError: the kind of RoPE is not supported, or one of its fields is missing.
    """
    # transformers 5 has one `rope_parameters`; version 4 has `rope_theta` and an optional `rope_scaling`.
    scaling = hf.get("rope_scaling") or {}
    rope = hf.get("rope_parameters") or scaling
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"`rope_parameters` must be an object with the parameters of one RoPE, got {rope!r}.")
    if not isinstance(scaling, dict) or not _agree(scaling, rope):  # transformers would take `scaling`
        raise InputError(f"`rope_scaling` must agree with `rope_parameters`, got {scaling!r} beside {rope!r}.")
    theta = first(rope.get("rope_theta"), hf.get("rope_theta", 10_000.0))
    kind = first(rope.get("rope_type"), rope.get("type"), "default")
    partial = first(rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), 1.0)
    if partial != 1 and not allows_partial:
        raise InputError(f"`partial_rotary_factor` of {hf['architectures'][0]} must be 1, got {partial!r}.")
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):
        kind = "longrope"  # Phi-3 has used these names for it
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise InputError(f"`rope_type` must be 'default' or one of {sorted(_SCALINGS)}, got {kind!r}.")
    original, longest = "original_max_position_embeddings", "max_position_embeddings"
    given = {**rope, longest: hf.get(longest)}
    if hf.get(original) is not None:  # transformers prefers the top-level field
        given[original] = hf[original]
    if kind == "longrope" and given.get("factor") is None:
        given["factor"] = whole(given, longest) / whole(given, original)
    fields = dataclasses.fields(_SCALINGS[kind])
    values = {field.name: given[field.name] for field in fields if given.get(field.name) is not None}
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise InputError(f"`rope_parameters` of type {kind!r} must have the fields {required}, got no {missing}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return RopeConfig(theta=theta, scaling=_SCALINGS[kind](**values), partial_rotary_factor=partial)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Returns `rope_parameters`, and the fields beside it, as `read_rope` reads them."""
    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1:
        parameters["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.scaling is None:
        return {"rope_parameters": parameters}
    (kind,) = (kind for kind, scaling in _SCALINGS.items() if isinstance(rope.scaling, scaling))
    values = {name: value for name, value in dataclasses.asdict(rope.scaling).items() if value is not None}
    values.pop("max_position_embeddings", None)  # the model's config holds it
    beside = {name: values[name] for name in ("original_max_position_embeddings",) if name in values}
    return {"rope_parameters": parameters | {"rope_type": kind} | values} | beside


def rope_to_hf_4(rope: RopeConfig, model_type: str) -> dict[str, Any]:
    """Returns the same RoPE in the fields of transformers 4, which passes over `rope_parameters` and says nothing."""
    partial = {} if rope.partial_rotary_factor == 1 else {"partial_rotary_factor": rope.partial_rotary_factor}
    fields = {"rope_theta": rope.theta, "rope_scaling": None} | partial
    if rope.scaling is None:
        return fields
    parameters = rope_to_hf(rope)["rope_parameters"]
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaling["rope_type"] == "longrope" and model_type == "phi3":  # which allows `type` and the two factors alone
        names = ("short_factor", "long_factor", "attention_factor")
        scaling = {"type": "longrope"} | {name: scaling[name] for name in names if name in scaling}
    return fields | {"rope_scaling": scaling}


def _agree(scaling: Mapping[str, Any], rope: Mapping[str, Any]) -> bool:
    kinds = [first(fields.get("rope_type"), fields.get("type")) for fields in (scaling, rope)]
    rest = {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    return not scaling or (kinds[0] == kinds[1] and rest.items() <= rope.items())
