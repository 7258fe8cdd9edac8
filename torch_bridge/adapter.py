"""Reads and writes PEFT adapter folders: `adapter_config.json`, and the tensors beside it."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpack.constants import WHOLE_MODULES
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, not_installed
from jaxpack.model.lora import adapters, add_lora, layers_of_adapters, matrix_sizes, require_finite, untie
from jaxpack.model.targets import chosen_layers
from jaxpack.model.transformer import Transformer
from jaxpack.model.vocab import replace_new_rows, set_rows
from jaxpack.model.weights import weight_of
from jaxpack.parallel.processes import is_first_process
from jaxpack.settings import LoraConfig
from jaxpack.train.trained import is_checkpoint, load_from_checkpoint
from jaxpack.utils.console import console
from jaxpack.utils.files import is_regular_file, whole_folder
from jaxpack.utils.json_file import read_json
from torch_bridge.adapter_config import EMBEDDING, HEAD, WHOLE, adapter_places, peft_config, read_lora_config
from torch_bridge.io.folder import mismatches, some, tensor_count, write_tensors
from torch_bridge.io.safetensors_file import Tensor, read_header
from torch_bridge.model_card import CARD, model_card
from torch_bridge.tokenizer_files import write_tokenizer

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TORCH_WEIGHTS = "adapter_model.bin"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"  # DoRA's, which has no ".weight" behind its name
# PEFT writes a trained matrix of a resized vocabulary twice more, under names that it passes over when it reads them.
_COPIES = re.compile(r"(.*)\.(modules_to_save|original_module)\.weight")
_NOTHING: tuple[Any, ...] = (None, [], "")  # values of settings that choose no module or layer


def save_adapter(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model's LoRA adapters in PEFT's format, in float32; the folder appears whole or not at all.

    In a run of several processes all call it, and the first one writes.

    Beside the adapters lie the tokenizer with its chat template, if it is given, and a model card (README.md). If the
    vocabulary of the model was resized (`jaxpack.resize_vocab`), so do the embedding and the head, as PEFT writes them
    (`save_embedding_layers`). Then the base model must be resized before PEFT can load the adapter; the card shows how.

    PEFT silently drops tensors that it does not expect: weights of modules that are not in `target_modules`, and keys
    with a wrong prefix. To prevent this, one list of modules gives the names of the adapters' tensors and the names in
    the config, and an assertion checks that every adapter of the model is in the list.

    Args:
      settings: names and values that the model card lists, such as `vars(config)`.

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
    if not is_first_process():
        return
    if model.rows_of_base is not None:
        console.print(
            f"the vocabulary was resized: {path} holds the embedding and the head, too. Before PEFT loads it, the base"
            f" model needs `base.resize_token_embeddings({model.config.vocab_size})`"
        )
    with whole_folder(Path(path), "path") as folder:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(peft_config(model), indent=2, sort_keys=True) + "\n")
        write_tensors(folder / ADAPTER_WEIGHTS, tensors)
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)
        card = model_card(model, settings or {}, has_tokenizer=tokenizer is not None)
        (folder / CARD).write_text(card, encoding="utf-8")


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

    The folder may also be a checkpoint of a run: "out/checkpoints/500", "out/checkpoints/best" (with the lowest
    evaluation loss) or "out/checkpoints/latest".

    Supports LoRA, rsLoRA and DoRA, in all layers or in some of them for each projection, with ranks and alphas per
    projection, and a head and an embedding in `modules_to_save`. Any other setting that changes the results of an
    adapter raises an error that names the setting. A missing or an extra tensor raises an error that names the tensor.

    If the base model ties its head to its embedding, and the adapter holds two matrices that differ, the model is
    untied, with a warning. An unchanged copy of the base's head or embedding beside the adapters is passed over. A
    changed copy is read as if it were in `modules_to_save`, with a warning.

    If the vocabulary was resized for the adapter's training, the model's is resized, too, with a notice. The new rows
    are those of the adapter's file; a checkpoint that does not hold them gets those of `jaxpack.resize_vocab`.

    Raises:
      InputError: the folder is incomplete, belongs to another model, holds another kind of adapter or numbers that are
        not finite, or the model already has adapters.

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
    if is_checkpoint(Path(adapter)):
        return load_from_checkpoint(model, Path(adapter))
    folder = require_files(adapter, ADAPTER_CONFIG)
    peft = read_json(folder / ADAPTER_CONFIG)
    lora = read_lora_config(model, peft, folder / ADAPTER_CONFIG)
    path, tensors = _tensors(folder)
    copies = [name for name in WHOLE_MODULES if name not in lora.modules_to_save and _key(name) in tensors]
    narrowing = [f"`{name}`" for name in ("exclude_modules", "layers_to_transform") if peft.get(name) not in _NOTHING]
    described = ADAPTER_CONFIG + (f", with its {' and '.join(narrowing)}," if narrowing else "")
    rows = _vocab_size(tensors, model)
    _check_keys(_expected_shapes(model, lora, copies, rows), tensors, path, described)
    read = {name: tensor.read() for name, tensor in tensors.items()}  # read everything before the model changes
    if wrong := [name for name, values in read.items() if not np.isfinite(values).all()]:
        others = f" and {len(wrong) - 1} other tensors" if len(wrong) > 1 else ""
        raise InputError(
            f"{path} must hold finite numbers, got NaN or infinity in {wrong[0]}{others}. The training that wrote it"
            " failed: use an adapter or a checkpoint from before that."
        )
    if copies or rows != model.config.vocab_size:
        model.read_weights()
    if rows != model.config.vocab_size:
        console.print(f"{path}: the vocabulary is resized from {model.config.vocab_size:,} to {rows:,} tokens")
        set_rows(model, rows)
    for name in copies:
        replace_new_rows(model, model.head_name if name == "lm_head" else "embedding", read[_key(name)])
    changed = [name for name in copies if _differs(model, name, read[_key(name)], tensors[_key(name)].dtype)]
    if adapted := [name for name in changed if name in chosen_layers(model, lora)]:
        raise InputError(
            f"{path} must hold the base model's {' and '.join(adapted)} beside an adapter of it, got other values."
            " Use the base model that the adapter was trained on."
        )
    if changed:
        console.print(
            f"{path}: {' and '.join(changed)} beside the adapters differ from the base model's. They are read, trained"
            " and saved whole, as if they were in `modules_to_save`",
            style="yellow",
        )
    if len(copies) == len(changed) == 1 and model.config.tie_word_embeddings and not lora.modules_to_save:
        changed = list(WHOLE_MODULES)  # PEFT overwrites the one matrix of both
        read |= {_key(name): read[_key(copies[0])] for name in WHOLE_MODULES}
    whole = tuple(name for name in WHOLE_MODULES if name in lora.modules_to_save or name in changed)
    if model.config.tie_word_embeddings and whole:
        _untie_if_apart(model, [read[_key(name)] for name in whole], path, ties=bool(peft.get("ensure_weight_tying")))
    add_lora(model, dataclasses.replace(lora, modules_to_save=whole))
    if "embed_tokens" in whole:
        model.embedding.set_value(jnp.asarray(read[_key("embed_tokens")]))
    if "lm_head" in whole and not model.config.tie_word_embeddings:
        model.lm_head.set_value(jnp.asarray(read[_key("lm_head")]))
    layers: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for place in adapter_places(model, layers_of_adapters(model)):
        module = f"{_PREFIX}{place.module}"
        factors = place.from_peft(*(read[_PREFIX + name] for name in place.names))
        magnitude = (read[f"{module}.{_MAGNITUDE}"],) if lora.use_dora else ()
        layers.setdefault(place.name, []).append((*factors, *magnitude))
    for projection, one in adapters(model).items():
        parameters = [x for x in (one.lora_a, one.lora_b, one.magnitude) if x is not None]
        for parameter, arrays in zip(parameters, zip(*layers[projection], strict=True), strict=True):
            parameter.set_value(jnp.asarray(np.stack(arrays)))
    return model


class _Found(NamedTuple):
    """Describes a tensor of an adapter's file; `read` returns it in float32."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    read: Callable[[], np.ndarray]


def _tensors(folder: Path) -> tuple[Path, dict[str, _Found]]:
    """Returns an adapter's file and its tensors, by the names that PEFT writes: those with a prefix."""
    path = folder / ADAPTER_WEIGHTS
    if not path.exists() and (folder / _TORCH_WEIGHTS).exists():
        path = folder / _TORCH_WEIGHTS
        try:
            from torch_bridge.live import read_torch_file
        except ImportError as error:
            raise not_installed(str(path), "torch", "torch") from error
        found = {name: _Found(*tensor) for name, tensor in read_torch_file(path).items()}
    else:
        require_files(folder, ADAPTER_WEIGHTS)
        found = {
            name: _Found(tensor.shape, tensor.dtype, functools.partial(_read, tensor))
            for name, tensor in read_header(path).items()
        }
    named = {name if name.startswith(_PREFIX) else _PREFIX + name: tensor for name, tensor in found.items()}
    if len(named) < len(found):
        raise InputError(
            f"{path} must hold each tensor once, got some with the prefix {_PREFIX!r} and without it. Save the adapter"
            " again with PEFT."
        )
    of_adapted = {_base_layer(name): _key(name) for name in WHOLE_MODULES}
    named = {of_adapted.get(name, name): tensor for name, tensor in named.items()}
    keys = set(map(_key, WHOLE_MODULES)) & named.keys()
    copies = [name for name in named if (copy := _COPIES.fullmatch(name)) and f"{copy[1]}.weight" in keys]
    return path, {name: tensor for name, tensor in named.items() if name not in copies}


def _key(name: str) -> str:
    """Returns the name in an adapter's file of a matrix of `modules_to_save`."""
    return f"{_PREFIX}{WHOLE[name]}.weight"


def _base_layer(name: str) -> str:
    """Returns the name in an adapter's file of a copy of a matrix that has an adapter."""
    return f"{_PREFIX}{WHOLE[name]}.base_layer.weight"


def _vocab_size(tensors: Mapping[str, "_Found"], model: Transformer) -> int:
    """Returns the number of rows of the embedding and the head in an adapter's file; the model's if they disagree."""
    rows = {
        tensors[key].shape[0] for key in map(_key, WHOLE_MODULES) if key in tensors and len(tensors[key].shape) == 2
    }
    return rows.pop() if len(rows) == 1 else model.config.vocab_size


def _differs(model: Transformer, name: str, copy: np.ndarray, dtype: np.dtype | None) -> bool:
    """Returns whether a copy of a matrix, stored in `dtype`, differs from the model's by more than rounding."""
    matrix = model.head if name == "lm_head" else weight_of(model.embedding)
    base = np.asarray(matrix.dense(jnp.float32))
    return not any(np.array_equal(copy.astype(kind), base.astype(kind)) for kind in (dtype, matrix.dtype))


def _untie_if_apart(model: Transformer, matrices: Sequence[np.ndarray], path: Path, *, ties: bool) -> None:
    """Unties a model whose adapter holds only one of the head and the embedding, or two that differ.

    Args:
      matrices: what the adapter holds: the head, the embedding or both.
      path: the adapter's file.
      ties: whether the adapter says that both are one matrix (`ensure_weight_tying`).
    """
    if len(matrices) == 2 and np.array_equal(matrices[0], matrices[1]):
        return
    if ties:
        raise InputError(
            f"{path} must hold the same matrix for {HEAD} and {EMBEDDING}, because of `ensure_weight_tying`, got two"
            " matrices that differ. Use the base model of the adapter's training."
        )
    console.print(
        f"{path}: the head and the embedding were trained apart, although the base model ties them"
        " (`tie_word_embeddings`). The model is untied, and so is a merged model that is written from it",
        style="yellow",
    )
    untie(model)


def adapter_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the trained tensors of a model with adapters by their PEFT names, in float32.

    These are `lora_A` and `lora_B` of each layer's modules, see `AdapterPlace`, with DoRA also their
    `lora_magnitude_vector`, and the matrices of `modules_to_save`. If the vocabulary was resized, the embedding and the
    head are among them in any case.
    """
    found = adapters(model)
    tensors: dict[str, np.ndarray] = {}
    for place in adapter_places(model, layers_of_adapters(model)):
        arrays, name = found[place.name].at(place.layer), f"{_PREFIX}{place.module}"
        assert arrays is not None, "the layer has no adapter"
        lora_a, lora_b = (np.asarray(factor, np.float32) for factor in arrays[:2])
        tensors |= zip((_PREFIX + one for one in place.names), place.to_peft(lora_a, lora_b), strict=True)
        if arrays.magnitude is not None:
            tensors[f"{name}.{_MAGNITUDE}"] = np.asarray(arrays.magnitude, np.float32)
    per_layer = {name: 2 if one.magnitude is None else 3 for name, one in found.items()}
    expected = sum(per_layer[name] * len(one.lora_a) for name, one in found.items())
    assert len(tensors) == expected, "an adapter has no place in the file"
    whole = model.lora_config.modules_to_save if model.lora_config else ()
    for name in WHOLE_MODULES if model.rows_of_base is not None else whole:
        matrix = model.head if name == "lm_head" else weight_of(model.embedding)
        tensors[_base_layer(name) if name in found else _key(name)] = np.asarray(matrix.dense(jnp.float32))
    return tensors


def _read(tensor: Tensor) -> np.ndarray:
    buffer = np.empty(tensor.nbytes, np.uint8)
    return tensor.read(0, tensor.shape[0], buffer).astype(np.float32)


def _expected_shapes(
    model: Transformer, lora: LoraConfig, copies: Sequence[str], vocab_size: int
) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    sizes = matrix_sizes(model)
    for place in adapter_places(model, chosen_layers(model, lora)):
        (out_features, in_features), name = sizes[place.name], f"{_PREFIX}{place.module}"
        rank = lora.rank_of(place.name) * max(1, place.num_experts)
        if place.name in WHOLE_MODULES:
            out_features = vocab_size
        if place.name == "embed_tokens":
            out_features, in_features = in_features, out_features
        expected |= zip(
            (_PREFIX + one for one in place.names), ((rank, in_features), (out_features, rank)), strict=True
        )
        if lora.use_dora:
            expected[f"{name}.{_MAGNITUDE}"] = (out_features,)
    for name in (*lora.modules_to_save, *copies):
        expected[_key(name)] = (vocab_size, model.config.hidden_size)
    return expected


def _check_keys(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, _Found], path: Path, described: str
) -> None:
    problems = mismatches({name: tensor.shape for name, tensor in tensors.items()}, expected)
    if extra := [name for name in tensors if name not in expected]:
        problems.append(f"{tensor_count(extra)} that the config does not describe ({some(extra)})")
    if not problems:
        return
    remedy = "Use the base model that the adapter was trained on."
    if any(re.search(r"\.experts\.\d+\.", name) for name in tensors):
        remedy = (
            "Its experts have an adapter for each projection of each expert, as under transformers 4, which jaxpack"
            " does not read: merge it there with PEFT's `merge_and_unload`, and use the result as the model."
        )
    raise InputError(
        f"{path} must hold the tensors that {described} describes for this model, got {'; '.join(problems)}. {remedy}"
    )
