"""Reads and writes PEFT's `adapter_config.json`: which modules have an adapter, and of which rank and strength."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpack.constants import WHOLE_MODULES
from jaxpack.errors import InputError
from jaxpack.model.lora import layers_of_adapters
from jaxpack.model.moe import experts_of
from jaxpack.model.targets import (
    EMBEDDING,
    HEAD,
    TABLES,
    Layers,
    Target,
    ends_with,
    expert_matrices_of,
    layers_of,
    names_for,
    projections_of,
    tables_of,
)
from jaxpack.model.transformer import Transformer
from jaxpack.settings import LoraConfig
from torch_bridge.families import FAMILIES
from torch_bridge.io.folder import some
from torch_bridge.patterns import match_all, match_ends

WHOLE = {"lm_head": HEAD, "embed_tokens": EMBEDDING, EMBEDDING: EMBEDDING}  # names for `modules_to_save`

# Fields that describe the base model or the software that wrote or ran the adapter, or that only matter with an option
# that is refused. They do not change the results of an adapter.
_TOLD = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "task_type"}
_TOLD |= {"megatron_core", "qalora_group_size", "runtime_config"}
_TOLD |= {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}
_TOLD |= {"fan_in_fan_out"}  # PEFT turns this off for linear layers, and all projections are linear layers
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern"}
_READ |= {"alpha_pattern", "modules_to_save", "ensure_weight_tying", "init_lora_weights", "bias"}
_READ |= {"use_dora", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
# The values of `init_lora_weights` that are accepted: they change no base weight.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Other values whose beginnings are known. With these PEFT changes base weights, again each time it reads the adapter.
_CHANGING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_LAYER_LISTS = ("layers", "model.layers")  # the names of the list of layers, as `layers_pattern` may give them

_MERGE = (
    "Merge the adapter with PEFT instead: save `PeftModel.from_pretrained(base, adapter).merge_and_unload()`, and use"
    " that as the model."
)
_CORRECT = "Correct the file, or save the adapter again."


class AdapterPlace(NamedTuple):
    """Says where PEFT's files hold the adapter of one projection of a layer, of all experts of a layer, or of a table.

    PEFT holds the factors of all E experts in two matrices: `lora_A` `[E * R, in]` is grouped by expert, and `lora_B`
    `[out, R * E]` by rank, so that the E experts of one rank are neighbours. PEFT takes an embedding for a matrix
    `[D, V]`, so its `lora_embedding_A` `[R, V]` is our B factor, transposed, and its `lora_embedding_B` `[D, R]` our A.

    Attributes:
      module: the module whose `lora_A` and `lora_B` are the factors.
      name: the name of the adapter in `adapters(model)`.
      layer: the layer.
      num_experts: the number of experts; 0 for a projection.
      turns: how many projections are interleaved in the rows of `lora_B`, see `io.experts`.
    """

    module: str
    name: str
    layer: int
    num_experts: int = 0
    turns: int = 1

    @property
    def names(self) -> tuple[str, str]:
        """Returns the names of the two factors' tensors, without a prefix."""
        if self.name == "embed_tokens":
            return f"{self.module}.lora_embedding_A", f"{self.module}.lora_embedding_B"
        return f"{self.module}.lora_A.weight", f"{self.module}.lora_B.weight"

    def to_peft(self, lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns PEFT's form of an adapter's factors: `[r, in]` and `[out, r]`, or those of all experts."""
        if self.name == "embed_tokens":
            return np.ascontiguousarray(lora_b.T), np.ascontiguousarray(lora_a.T)
        if not self.num_experts:
            return lora_a, lora_b
        E, O, R = lora_b.shape  # noqa: E741
        lora_b = lora_b.reshape(E, self.turns, O // self.turns, R).swapaxes(1, 2).reshape(E, O, R)
        return lora_a.reshape(-1, lora_a.shape[2]), lora_b.transpose(1, 2, 0).reshape(O, -1)

    def from_peft(self, lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns an adapter's factors from PEFT's form, the inverse of `to_peft`."""
        if self.name == "embed_tokens":
            return np.ascontiguousarray(lora_b.T), np.ascontiguousarray(lora_a.T)
        if not self.num_experts:
            return lora_a, lora_b
        E, O, I = self.num_experts, lora_b.shape[0], lora_a.shape[1]  # noqa: E741
        lora_b = lora_b.reshape(O // self.turns, self.turns, -1, E).swapaxes(0, 1).reshape(O, -1, E)
        return lora_a.reshape(E, -1, I), lora_b.transpose(2, 0, 1)


def adapter_places(model: Transformer, layers: Layers) -> Iterator[AdapterPlace]:
    """Yields the place of each layer's adapter, for the layers of projections and experts' matrices in `layers`."""
    for path, projection, layer in projections_of(model) + tables_of():
        if layer in layers.get(projection, ()):
            yield AdapterPlace(path, projection, layer)
    for layer in range(model.config.num_layers):
        wanted = [module for module in experts_of(model) if layer in layers.get(module.name, ())]
        for number, module in enumerate(wanted):
            # If both matrices of a module have adapters, PEFT makes the first the `base_layer` of the second.
            inner = ".base_layer" * (len(wanted) - 1 - number)
            parent = module.name.rpartition(".")[0]
            in_turns = FAMILIES[model.config.architecture].fuses_experts
            turns = len(module.projections) // module.num_experts if in_turns else 1
            yield AdapterPlace(f"model.layers.{layer}.{parent}{inner}", module.name, layer, module.num_experts, turns)


def read_lora_config(model: Transformer, peft: Mapping[str, Any], path: Path) -> LoraConfig:
    """Returns the `LoraConfig` that a PEFT config describes for this model's modules.

    `modules_to_save` may name only one of two tied matrices, which `LoraConfig` allows and `add_lora` does not.

    Args:
      model: the base model.
      peft: the content of `adapter_config.json`.
      path: the file, for errors.

    Raises:
      InputError: a setting changes the results and is not supported, or has a value that PEFT does not allow.
    """

    def require(ok: bool, name: str, rule: str, remedy: str = _MERGE) -> None:
        if not ok:
            raise InputError(f"`{name}` of {path} must be {rule}, got {peft.get(name)!r:.100}. {remedy}")

    require(peft.get("peft_type") == "LORA", "peft_type", "'LORA'")
    require(peft.get("task_type") in ("CAUSAL_LM", None), "task_type", "'CAUSAL_LM'", "Use an adapter of a causal LM.")
    require(peft.get("bias", "none") == "none", "bias", "'none'")
    _check_start(peft.get("init_lora_weights", True), path)
    for name in sorted(peft.keys() - _TOLD - _READ):
        require(not peft[name], name, "off, because jaxpack does not support it")
    require(type(peft.get("lora_dropout", 0.0)) in (int, float), "lora_dropout", "a number", _CORRECT)
    for name in ("rank_pattern", "alpha_pattern"):
        require(isinstance(peft.get(name) or {}, dict), name, "a JSON object", _CORRECT)
    whole = peft.get("modules_to_save") or []
    known = isinstance(whole, list) and all(isinstance(name, str) and name in WHOLE for name in whole)
    require(known, "modules_to_save", f"a list of names among {sorted(WHOLE)}")
    saved = {WHOLE[name] for name in whole}
    if model.config.tie_word_embeddings and saved and peft.get("ensure_weight_tying"):
        saved = {HEAD, EMBEDDING}
    parameters = _target_parameters(model, peft, path)
    targets = _targets(model, peft, path, may_be_empty=bool(parameters))
    ranks = _by_name(targets + parameters, peft, "rank_pattern", "r", path)
    alphas = _by_name(targets + parameters, peft, "alpha_pattern", "lora_alpha", path)
    try:
        return LoraConfig(
            r=peft.get("r", 8),
            lora_alpha=peft.get("lora_alpha", 8),
            lora_dropout=peft.get("lora_dropout", 0.0),
            use_rslora=peft.get("use_rslora", False),
            use_dora=peft.get("use_dora", False),
            target_modules=names_for(model, layers_of(targets)),
            target_parameters=names_for(model, layers_of(parameters)),
            rank_pattern=tuple(ranks.items()),
            alpha_pattern=tuple(alphas.items()),
            modules_to_save=tuple(name for name in WHOLE_MODULES if WHOLE[name] in saved),
        )
    except InputError as error:
        raise InputError(f"{path}: {error} {_CORRECT}") from error


def _check_start(start: Any, path: Path) -> None:
    """Refuses a way of initialising an adapter that changes the base weights, and unknown ones."""
    if start is None or isinstance(start, bool):
        return
    name = start.lower() if isinstance(start, str) else ""
    if name in _STARTS:
        return
    got = f"`init_lora_weights` of {path} must be one of {_STARTS}, got {start!r:.40}"
    if not name.startswith(_CHANGING_STARTS):
        raise InputError(f"{got}. {_MERGE}")
    if name == "loftq":
        raise InputError(
            f"{got}, with which PEFT quantises the base weights. If the base folder already holds the quantised"
            f" weights, set the field to true. {_MERGE}"
        )
    raise InputError(
        f"{got}, with which the first values of the adapter are subtracted from the base weights. Save the adapter with"
        " `save_pretrained(folder, path_initial_model_for_weight_conversion=initial)` of PEFT, which makes an ordinary"
        " adapter of it; or, if the base folder already holds the changed weights, set the field to true."
    )


def _target_parameters(model: Transformer, peft: Mapping[str, Any], path: Path) -> list[Target]:
    """Returns the experts' matrices with an adapter: those whose paths end with a target."""
    wanted = peft.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise InputError(f"`target_parameters` of {path} must be a list of names, got {wanted!r:.100}. {_CORRECT}")
    matrices = expert_matrices_of(model)
    unknown = [end for end in wanted if not any(ends_with(matrix.path, end) for matrix in matrices)]
    if unknown:
        names = sorted({matrix.name for matrix in matrices})
        among = f"among {names}" if names else "empty, because the model has no experts"
        raise InputError(f"`target_parameters` of {path} must be {among}, got {some(unknown)}. {_MERGE}")
    selected = _selected(wanted, [matrix.path for matrix in matrices], "target_parameters", path)
    return [matrix for matrix in matrices if matrix.path in selected]


def _targets(model: Transformer, peft: Mapping[str, Any], path: Path, *, may_be_empty: bool) -> list[Target]:
    """Returns the projections with an adapter, in the layers that have it.

    They are those of `target_modules` in `layers_to_transform` that `exclude_modules` does not select. PEFT passes over
    names that no module has, as long as another name selects one.
    """
    if may_be_empty and peft.get("target_modules") in (None, [], ""):
        return []
    projections = projections_of(model) + tables_of()
    names = [target.path for target in projections]
    wanted, excluded = (_names(peft, field, path) for field in ("target_modules", "exclude_modules"))
    if wanted == "all-linear":
        wanted = names[: -len(TABLES)]
    selected = _selected(wanted, names, "target_modules", path)
    selected -= _selected(excluded, names, "exclude_modules", path)
    fields = "`target_modules`" + (" without `exclude_modules`" if excluded else "")
    layers, is_narrowed = _numbers_of_layers(model, peft, path), peft.get("layers_to_transform") not in (None, [])
    fields += " in `layers_to_transform`" if is_narrowed else ""
    targets = [target for target in projections if target.path in selected and target.layer in layers]
    if is_narrowed:  # PEFT then leaves out what is in no layer.
        targets = [target for target in targets if target.name not in TABLES]
    if not targets:
        remedy = "Use the base model that the adapter was trained on."
        if model.config.num_experts:
            remedy = f"A router has no adapter here, and `target_parameters` names the experts' matrices. {_MERGE}"
        raise InputError(
            f"{fields} of {path} must match at least one projection of the model, got {wanted!r:.100}, which matches"
            f" none. {remedy}"
        )
    return targets


def _names(peft: Mapping[str, Any], field: str, path: Path) -> str | list[str]:
    """Reads a list of module names or one pattern; only `target_modules` must name something."""
    names = peft.get(field)
    if not names and field == "exclude_modules":
        return []
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not names or not (listed or isinstance(names, str)):
        raise InputError(
            f"`{field}` of {path} must be a list of module names or one pattern, got {names!r:.100}. {_CORRECT}"
        )
    return names


def _selected(wanted: str | list[str], names: Sequence[str], field: str, path: Path) -> set[str]:
    """Returns the module names that PEFT selects: by their ends, or as a whole by one pattern."""
    if isinstance(wanted, str):
        return match_all([wanted], names, f"`{field}` of {path}")[0]
    return {name for name in names if any(ends_with(name, end) for end in wanted)}


def _numbers_of_layers(model: Transformer, peft: Mapping[str, Any], path: Path) -> Collection[int]:
    """Returns the layers that `layers_to_transform` names; without it, all layers.

    PEFT passes over numbers that no layer has.
    """
    wanted, lists = peft.get("layers_to_transform"), peft.get("layers_pattern") or []
    if wanted is None or wanted == []:
        return range(model.config.num_layers)
    if isinstance(peft["target_modules"], str):
        raise InputError(
            f"`layers_to_transform` of {path} must be null beside a pattern in `target_modules`, because PEFT refuses"
            f" both, got {wanted!r:.100}. {_CORRECT}"
        )
    numbers = [wanted] if type(wanted) is int else wanted
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        raise InputError(f"`layers_to_transform` of {path} must be a list of layers, got {wanted!r:.100}. {_CORRECT}")
    lists = [lists] if isinstance(lists, str) else lists
    if lists and not (isinstance(lists, list) and any(name in _LAYER_LISTS for name in lists)):
        raise InputError(f"`layers_pattern` of {path} must name {_LAYER_LISTS[0]!r}, got {lists!r:.100}. {_CORRECT}")
    return numbers


def _by_name(
    targets: Sequence[Target], peft: Mapping[str, Any], pattern: str, default: str, path: Path
) -> dict[str, Any]:
    """Returns the value (rank or alpha) of each projection and each matrix of experts, if it is not the default.

    The field `pattern` of the PEFT config maps regular expressions to values. A module gets the value of the first
    expression that matches the end of its name, or else the default.
    """
    values = peft.get(pattern) or {}
    ends = match_ends(list(values), [target.path for target in targets], f"`{pattern}` of {path}")
    found: dict[str, list[Any]] = {}
    for target in targets:
        given = (value for value, matched in zip(values.values(), ends, strict=True) if target.path in matched)
        found.setdefault(target.name, []).append(next(given, peft.get(default, 8)))
    for projection, those in found.items():
        if any(value != those[0] for value in those):
            raise InputError(
                f"`{pattern}` of {path} must give a projection the same value in each layer, got {those!r:.100} for"
                f" {projection}. {_MERGE}"
            )
    return {projection: those[0] for projection, those in found.items() if those[0] != peft.get(default, 8)}


def peft_config(model: Transformer) -> dict[str, Any]:
    """Returns the content of `adapter_config.json` for a model with adapters."""
    # Only long-standing fields of PEFT: older versions warn about fields that they do not know.
    config: Any = model.lora_config
    alpha = config.lora_alpha
    own: dict[str, Any] = (
        {"ensure_weight_tying": True} if config.modules_to_save and model.config.tie_word_embeddings else {}
    )
    layers = layers_of_adapters(model)
    experts = {module.name for module in experts_of(model)}
    modules = {name: those for name, those in layers.items() if name not in experts}
    parameters = {name: those for name, those in layers.items() if name in experts}
    if parameters:
        own["target_parameters"] = sorted(names_for(model, parameters))
    # PEFT applies one list of layers to all projections. Where they have different layers, whole paths say which.
    lists = set(modules.values())
    alike = len(lists) == 1 and modules.keys().isdisjoint(TABLES) and lists != {tuple(range(model.config.num_layers))}
    return own | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path or None,
        "revision": None,
        "r": config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # an integer in PEFT
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": sorted(modules if alike else names_for(model, modules)),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": list(*lists) if alike else None,
        "layers_pattern": None,
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,  # see `_STARTS`: PEFT then changes no base weight when it loads the adapter
    }
