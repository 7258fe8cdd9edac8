"""Selects the matrices that get an adapter, in some layers or in all, by the names that Hugging Face and PEFT use."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import nnx

from jaxpack.errors import InputError
from jaxpack.model.linear import Linear
from jaxpack.model.moe import experts_of
from jaxpack.model.transformer import Transformer
from jaxpack.settings import LoraConfig

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
# Matrices outside of the layers that may have an adapter: their names in `adapters`, and in Hugging Face's model.
TABLES = {"embed_tokens": EMBEDDING, "lm_head": HEAD}
_PARENTS = {"attention": "self_attn", "feed_forward": "mlp"}  # Hugging Face's names of the parts of a layer

# The layers in which a projection or a matrix of experts has an adapter, in ascending order, by its name.
Layers = dict[str, tuple[int, ...]]


class Target(NamedTuple):
    """Names a matrix of a layer that may have an adapter.

    Attributes:
      path: its whole name in Hugging Face's model, such as "model.layers.3.self_attn.q_proj".
      name: the name of its adapter in `adapters`, such as "q_proj" or "mlp.experts.down_proj".
      layer: the number of the layer.
    """

    path: str
    name: str
    layer: int


def projections_of(model: Transformer) -> list[Target]:
    """Returns the projections of all layers, without the experts' matrices."""
    names = [
        (f"{_PARENTS[str(path[0])]}.{name}", name)
        for path, module in nnx.iter_modules(model.blocks)
        if isinstance(module, Linear)
        for name, _ in module.projections
    ]
    return _in_all_layers(model, names)


def tables_of() -> list[Target]:
    """Returns the embedding and the head, which get an adapter only if they are named."""
    return [Target(path, name, 0) for name, path in TABLES.items()]


def expert_matrices_of(model: Transformer) -> list[Target]:
    """Returns the experts' matrices of all layers; empty for a model without experts."""
    return _in_all_layers(model, [(module.name, module.name) for module in experts_of(model)])


def _in_all_layers(model: Transformer, names: list[tuple[str, str]]) -> list[Target]:
    layers = range(model.config.num_layers)
    return [Target(f"model.layers.{layer}.{within}", name, layer) for layer in layers for within, name in names]


def ends_with(path: str, end: str) -> bool:
    """Returns whether the last parts of a name with dots are `end`, as PEFT matches names."""
    return f".{path}".endswith(f".{end}")


def chosen_layers(model: Transformer, config: LoraConfig) -> Layers:
    """Returns the layers in which each projection, and each matrix of the experts, gets an adapter.

    Raises:
      InputError: a name in `target_modules`, `exclude_modules` or `target_parameters` is no module of this model, a
        pattern matches none or more than projections, a layer does not exist, or no projection is left.
    """
    projections, experts = projections_of(model), expert_matrices_of(model)
    return layers_of(_chosen_projections(model, config, projections) + _chosen_experts(config, experts))


def names_for(model: Transformer, layers: Layers) -> tuple[str, ...]:
    """Returns names for `target_modules` or `target_parameters` that choose exactly these layers.

    They are the names of what has an adapter in all layers, and whole paths of everything else.
    """
    count = model.config.num_layers
    whole = {name for name, those in layers.items() if len(those) == count or name in TABLES}
    single = [
        target.path
        for target in projections_of(model) + expert_matrices_of(model)
        if target.name not in whole and target.layer in layers.get(target.name, ())
    ]
    return (*(name for name in layers if name in whole), *single)


def layers_of(targets: Iterable[Target]) -> Layers:
    """Returns the layers in which some targets are, by the names of these targets."""
    found: dict[str, list[int]] = {}
    for target in targets:
        found.setdefault(target.name, []).append(target.layer)
    return {name: tuple(sorted(layers)) for name, layers in found.items()}


def _chosen_projections(model: Transformer, config: LoraConfig, projections: list[Target]) -> list[Target]:
    wanted = config.target_modules
    if wanted == ():
        return []
    if wanted == "all-linear":
        chosen = projections
    else:
        chosen = _selected(model, "target_modules", wanted, projections + tables_of(), "'all-linear' or ")
    count = model.config.num_layers
    layers: Any = config.layers_to_transform  # a tuple, as `LoraConfig` has read it
    if outside := [layer for layer in layers if layer not in range(count)]:
        raise InputError(
            f"`layers_to_transform` must be among the model's {count} layers, 0 to {count - 1}, got {outside}."
        )
    if layers:
        # As in PEFT, this leaves out what is in no layer.
        chosen = [target for target in chosen if target.layer in layers and target.name not in TABLES]
    if config.exclude_modules:
        excluded = set(_selected(model, "exclude_modules", config.exclude_modules, projections + tables_of()))
        chosen = [target for target in chosen if target not in excluded]
    if not chosen:
        raise InputError(
            "`layers_to_transform` and `exclude_modules` must leave at least one projection of `target_modules`, got"
            f" {layers} and {config.exclude_modules!r}, which leave none."
        )
    return chosen


def _selected(
    model: Transformer, field: str, wanted: str | tuple[str, ...], projections: list[Target], instead: str = ""
) -> list[Target]:
    """Returns the projections that a pattern matches as a whole, or whose paths end with one of some names."""
    if isinstance(wanted, str):
        pattern = re.compile(wanted)
        found = [target for target in projections if pattern.fullmatch(target.path)]
        if not found:
            raise InputError(
                f"`{field}` must be a pattern that matches the whole path of a projection, such as"
                f" {projections[0].path!r}, got {wanted!r}, which matches none. Names have commas between them:"
                " 'q_proj,v_proj'."
            )
        return found
    unknown = sorted(end for end in set(wanted) if not any(ends_with(target.path, end) for target in projections))
    if unknown:
        hint = " `target_parameters` names the experts' matrices, such as 'mlp.experts.down_proj'."
        hint = hint if experts_of(model) else ""
        known = sorted({target.name for target in projections})
        raise InputError(f"`{field}` must be {instead}among {known}, got {unknown}.{hint}")
    return [target for target in projections if any(ends_with(target.path, end) for end in wanted)]


def _chosen_experts(config: LoraConfig, matrices: list[Target]) -> list[Target]:
    """Returns the experts' matrices whose paths end with a name in `target_parameters`, as PEFT matches them."""
    wanted = config.target_parameters
    unknown = [end for end in wanted if not any(ends_with(target.path, end) for target in matrices)]
    if unknown and not matrices:
        raise InputError(
            f"`target_parameters` must be empty for a model without experts, got {unknown}. Name its projections in"
            " `target_modules` instead."
        )
    if unknown:
        known = sorted({target.name for target in matrices})
        raise InputError(f"`target_parameters` must be among {known}, got {unknown}.")
    return [target for target in matrices if any(ends_with(target.path, end) for end in wanted)]
