"""Reads and writes PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpack.constants import WHOLE_MODULES
from jaxpack.errors import InputError
from jaxpack.model.lora import adapters, add_lora, require_finite
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import weight_of
from jaxpack.settings import LoraConfig
from jaxpack.utils.files import is_regular_file, whole_folder
from torch_bridge.io.folder import mismatches, read_json, some, tensor_count, write_tensors
from torch_bridge.io.safetensors_file import Tensor, read_header
from torch_bridge.patterns import match_all, match_ends
from torch_bridge.tensors import tensor_shapes, tensor_table

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"
_WHOLE = {"lm_head": _HEAD, "embed_tokens": _EMBEDDING, _EMBEDDING: _EMBEDDING}  # names for `modules_to_save`

# Fields that describe the base model or the software that wrote or ran the adapter, or that only matter with an option
# that is refused. They do not change the results of an adapter.
_TOLD = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "task_type"}
_TOLD |= {"megatron_core", "qalora_group_size", "runtime_config"}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern"}
_READ |= {"alpha_pattern", "modules_to_save", "ensure_weight_tying", "init_lora_weights", "bias"}
# The values of `init_lora_weights` that are accepted. All others change the base weights, and PEFT changes these again
# when it loads the adapter.
_STARTS = (True, False, None, "gaussian", "orthogonal")


def save_adapter(model: Transformer, path: str | Path) -> None:
    """Writes the model's LoRA adapters in PEFT's format, in float32; the folder appears whole or not at all.

    PEFT silently drops tensors that it does not expect: weights of modules that are not in `target_modules`, and keys
    with a wrong prefix. To prevent this, the names of the adapters' tensors come from the table that is also used to
    read checkpoints, and an assertion checks that every adapter of the model is in the table.

    Raises:
      InputError: the model has no adapters, or its trained weights are not finite, `path` is not empty, or the disk
        refused a write.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=8))
      >>> torch_bridge.save_adapter(model, "out/adapter")  # peft.PeftModel.from_pretrained reads it
    """
    if not adapters(model):
        raise InputError(
            "`model` must have LoRA adapters, got a model without any. Write a whole model with `save_pretrained`."
        )
    require_finite(model)
    tensors = adapter_tensors(model)
    with whole_folder(Path(path), "path") as folder:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(_peft_config(model), indent=2, sort_keys=True) + "\n")
        write_tensors(folder / ADAPTER_WEIGHTS, tensors)


def require_files(adapter: str | os.PathLike, *names: str) -> Path:
    """Returns the adapter's folder, or raises InputError if one of the files is missing."""
    for name in names:
        if not is_regular_file(Path(adapter) / name):
            raise InputError(
                f"`adapter` must be a folder with {name}, got {str(adapter)!r:.200}, which has no such file. Give the"
                " folder that PEFT or `save_adapter` wrote."
            )
    return Path(adapter)


def load_adapter(model: Transformer, adapter: str) -> Transformer:
    """Adds the adapters of a PEFT folder to a model in place, and returns the model, which can be trained further.

    Supports LoRA and rsLoRA, with ranks and alphas per projection, and a head and an embedding in `modules_to_save`.
    Any other setting that changes the results of an adapter raises an error that names the setting. A missing or an
    extra tensor raises an error that names the tensor.

    Raises:
      InputError: the folder is incomplete, belongs to another model or holds another kind of adapter, or the model
        already has adapters.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> torch_bridge.save_adapter(jaxpack.add_lora(model, jaxpack.LoraConfig(r=8)), "out/adapter")
      >>> base, tokenizer = torch_bridge.from_pretrained(torch_bridge.base_of("out/adapter"))
      >>> model = torch_bridge.load_adapter(base, "out/adapter")
      >>> model.lora_config.r
      8
    """
    if adapters(model):
        raise InputError(
            "`model` must be without LoRA adapters, got a model that has them already. Load the adapter into a new copy"
            " of the base model."
        )
    folder = require_files(adapter, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    lora = _lora_config(model, read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    tensors = read_header(folder / ADAPTER_WEIGHTS)
    _check_keys(_expected_shapes(model, lora), tensors, folder / ADAPTER_WEIGHTS)
    read = {name: _read(tensor) for name, tensor in tensors.items()}  # read everything before the model changes
    head, embedding = (_PREFIX + f"{name}.weight" for name in (_HEAD, _EMBEDDING))
    both = model.config.tie_word_embeddings and {head, embedding} <= read.keys()
    if both and not np.array_equal(read[head], read[embedding]):
        raise InputError(
            f"{folder} must hold the same matrix for {_HEAD} and {_EMBEDDING}, because they are tied in the model"
            " (`tie_word_embeddings`), got two matrices that differ. Use the base model of the adapter's training."
        )
    add_lora(model, lora)
    if embedding in read:
        model.embedding.set_value(jnp.asarray(read[embedding]))
    if head in read and not model.config.tie_word_embeddings:
        model.lm_head.set_value(jnp.asarray(read[head]))
    for projection, factors in adapters(model).items():
        modules = [f"{_PREFIX}{module}" for module, name, _ in _modules(model) if name == projection]
        factors.lora_a.set_value(jnp.asarray(np.stack([read[f"{name}.lora_A.weight"] for name in modules])))
        factors.lora_b.set_value(jnp.asarray(np.stack([read[f"{name}.lora_B.weight"] for name in modules])))
    return model


def adapter_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the trained tensors of a model with adapters by their PEFT names, in float32.

    These are `lora_A` `[r, in]` and `lora_B` `[out, r]` of each layer's modules, and the matrices of `modules_to_save`.
    """
    found = adapters(model)
    tensors: dict[str, np.ndarray] = {}
    for module, projection, layer in _modules(model):
        if projection in found:
            adapter = found[projection]
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.asarray(adapter.lora_a[layer], np.float32)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.asarray(adapter.lora_b[layer], np.float32)
    assert len(tensors) == 2 * len(found) * model.config.num_layers, "an adapter is missing from the name table"
    for name in model.lora_config.modules_to_save if model.lora_config else ():
        matrix = model.head if name == "lm_head" else weight_of(model.embedding)
        tensors[f"{_PREFIX}{_WHOLE[name]}.weight"] = np.asarray(matrix.dense(jnp.float32))
    return tensors


def _modules(model: Transformer) -> Iterator[tuple[str, str, int]]:
    """Yields each projection of each layer: the Hugging Face module name, the projection's name, and the layer."""
    for name, (entry, layer) in tensor_table(model.config).items():
        if entry.projection is not None and layer is not None and entry.path.endswith(".weight"):
            yield name.removesuffix(".weight"), entry.projection, layer


def _read(tensor: Tensor) -> np.ndarray:
    buffer = np.empty(tensor.dtype.itemsize * math.prod(tensor.shape), np.uint8)
    return tensor.read(0, tensor.shape[0], buffer).astype(np.float32)


def _expected_shapes(model: Transformer, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    shapes = tensor_shapes(model)
    expected: dict[str, tuple[int, ...]] = {}
    for module, projection, _ in _modules(model):
        if projection in lora.target_modules:
            (out_features, in_features), rank = shapes[f"{module}.weight"], lora.rank_of(projection)
            expected[f"{_PREFIX}{module}.lora_A.weight"] = (rank, in_features)
            expected[f"{_PREFIX}{module}.lora_B.weight"] = (out_features, rank)
    for name in lora.modules_to_save:
        expected[f"{_PREFIX}{_WHOLE[name]}.weight"] = (model.config.vocab_size, model.config.hidden_size)
    return expected


def _check_keys(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: Path) -> None:
    problems = mismatches({name: tensor.shape for name, tensor in tensors.items()}, expected)
    if extra := [name for name in tensors if name not in expected]:
        problems.append(f"{tensor_count(extra)} that the config does not describe ({some(extra)})")
    if problems:
        raise InputError(
            f"{path} must hold the tensors that {ADAPTER_CONFIG} describes for this model, got {'; '.join(problems)}."
            " Use the base model that the adapter was trained on."
        )


def _lora_config(model: Transformer, peft: Mapping[str, Any], path: Path) -> LoraConfig:
    """Returns the `LoraConfig` that a PEFT config describes for this model's modules."""

    def require(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise InputError(f"`{name}` of {path} must be {rule}, got {peft.get(name)!r:.100}.")

    require(peft.get("peft_type") == "LORA", "peft_type", "'LORA'")
    require(peft.get("task_type") in ("CAUSAL_LM", None), "task_type", "'CAUSAL_LM'")
    require(peft.get("bias", "none") == "none", "bias", "'none'")
    starts = peft.get("init_lora_weights", True)
    require(isinstance(starts, str | bool | None) and starts in _STARTS, "init_lora_weights", f"one of {_STARTS}")
    for name in peft.keys() - _TOLD - _READ:
        require(not peft[name], name, "off, because jaxpack does not support it")
    require(type(peft.get("lora_dropout", 0.0)) in (int, float), "lora_dropout", "a number")
    for name in ("rank_pattern", "alpha_pattern"):
        require(isinstance(peft.get(name) or {}, dict), name, "a JSON object")
    whole = peft.get("modules_to_save") or []
    known = isinstance(whole, list) and all(isinstance(name, str) and name in _WHOLE for name in whole)
    require(known, "modules_to_save", f"a list of names among {sorted(_WHOLE)}")
    saved = {_WHOLE[name] for name in whole}
    if model.config.tie_word_embeddings and saved and peft.get("ensure_weight_tying"):
        saved = {_HEAD, _EMBEDDING}
    targets = _targets(model, peft.get("target_modules"), path)
    ranks = _by_projection(model, targets, peft, "rank_pattern", "r", path)
    alphas = _by_projection(model, targets, peft, "alpha_pattern", "lora_alpha", path)
    try:
        return LoraConfig(
            r=peft.get("r", 8),
            lora_alpha=peft.get("lora_alpha", 8),
            lora_dropout=peft.get("lora_dropout", 0.0),
            use_rslora=peft.get("use_rslora", False),
            target_modules=targets,
            rank_pattern=tuple(ranks.items()),
            alpha_pattern=tuple(alphas.items()),
            modules_to_save=tuple(name for name in WHOLE_MODULES if _WHOLE[name] in saved),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _targets(model: Transformer, wanted: Any, path: Path) -> tuple[str, ...]:
    """Returns the projections that PEFT's `target_modules` selects: by ends of module names, or by one pattern.

    A pattern must match whole module names.
    """
    named = isinstance(wanted, list) and all(isinstance(name, str) for name in wanted)
    if not wanted or not (named or isinstance(wanted, str)):
        raise InputError(
            f"`target_modules` of {path} must be a list of module names or one pattern, got {wanted!r:.100}."
        )

    modules = list(_modules(model))
    if wanted == "all-linear":
        wanted = [module for module, _, _ in modules]
    matched: set[str] = set()
    if isinstance(wanted, str):
        names = [_HEAD, _EMBEDDING, *(module for module, _, _ in modules)]
        (matched,) = match_all([wanted], names, f"`target_modules` of {path}")

    def is_target(module: str) -> bool:
        return module in matched or (named and any(f".{module}".endswith(f".{name}") for name in wanted))

    ends = {_HEAD, _EMBEDDING, *(module for module, _, _ in modules)}
    unknown = [name for name in wanted if named and not any(f".{end}".endswith(f".{name}") for end in ends)]
    outside = [name for name in (_HEAD, _EMBEDDING) if is_target(name)]
    if unknown or outside:
        raise InputError(
            f"`target_modules` of {path} must name only projections of the model's layers, got"
            f" {some([*unknown, *outside])}."
        )
    layers: dict[str, int] = {}
    for module, projection, _ in modules:
        layers[projection] = layers.get(projection, 0) + is_target(module)
    partial = [projection for projection, count in layers.items() if 0 < count < model.config.num_layers]
    if partial:
        raise InputError(
            f"`target_modules` of {path} must name a projection in all layers or in none, got {partial} in only some"
            " layers."
        )
    targets = tuple(projection for projection, count in layers.items() if count)
    if not targets:
        raise InputError(
            f"`target_modules` of {path} must match at least one projection of the model, got {wanted!r:.100}, which"
            " matches none."
        )
    return targets


def _by_projection(
    model: Transformer, targets: tuple[str, ...], peft: Mapping[str, Any], pattern: str, default: str, path: Path
) -> dict[str, Any]:
    """Returns each projection's value (its rank or alpha), if it differs from the default.

    The field `pattern` of the PEFT config maps regular expressions to values. A module gets the value of the first
    expression that matches the end of its name, or else the default.
    """
    values = peft.get(pattern) or {}
    modules = [module for module, projection, _ in _modules(model) if projection in targets]
    matched = dict(zip(values, match_ends(list(values), modules, f"`{pattern}` of {path}"), strict=True))
    found: dict[str, list[Any]] = {projection: [] for projection in targets}
    for module, projection, _ in _modules(model):
        if projection in found:
            key = next((key for key in values if module in matched[key]), None)
            found[projection].append(peft.get(default, 8) if key is None else values[key])
    for projection, those in found.items():
        if any(value != those[0] for value in those):
            raise InputError(
                f"`{pattern}` of {path} must give a projection the same value in all layers, got {those!r:.100} for"
                f" {projection}."
            )
    return {projection: those[0] for projection, those in found.items() if those[0] != peft.get(default, 8)}


def _peft_config(model: Transformer) -> dict:
    # Only long-standing fields of PEFT: older versions warn about fields that they do not know.
    config: Any = model.lora_config
    alpha = config.lora_alpha
    tying = {"ensure_weight_tying": True} if config.modules_to_save and model.config.tie_word_embeddings else {}
    return tying | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path or None,
        "revision": None,
        "r": config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # an integer in PEFT
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "target_modules": sorted(adapters(model)),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,  # see `_STARTS`: PEFT then changes no base weight when it loads the adapter
    }
