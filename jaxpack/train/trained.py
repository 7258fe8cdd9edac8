"""Takes the adapters out of a checkpoint, so that any step of a run can be tried, merged or handed on."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpack.errors import InputError, errors_name
from jaxpack.model.lora import add_lora, untie
from jaxpack.model.transformer import Transformer
from jaxpack.model.vocab import set_rows
from jaxpack.model.weights import split_trained
from jaxpack.settings import LoraConfig
from jaxpack.train.checkpoint import (
    ADAPTERS,
    FOLDER,
    LATEST,
    arrays_by_name,
    best_checkpoint,
    read_checkpoint,
    read_description,
    steps_in,
)
from jaxpack.train.record import Record
from jaxpack.utils.console import console

BEST = "best"


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path names a checkpoint: its folder, or "best" or "latest" in a folder of checkpoints."""
    in_folder = path.name in (BEST, LATEST) and path.parent.name == FOLDER
    return (in_folder and not path.exists()) or os.path.lexists(path / "run")


def find_checkpoint(path: Path) -> Path:
    """Returns the folder of a checkpoint; for "best" that with the lowest evaluation loss, for "latest" the newest.

    Raises:
      InputError: there is no such checkpoint.
    """
    if path.exists() or path.name not in (BEST, LATEST):
        return path
    steps = steps_in(path.parent)
    if not steps:
        raise InputError(
            f"`adapter` must be a checkpoint of a run, got {str(path)!r}, but there is no checkpoint there."
        )
    newest = path.parent / str(steps[-1])
    if path.name == LATEST:
        return newest
    best = best_checkpoint(path.parent, _description(newest).evaluations)
    if best is None:
        raise InputError(
            f"`adapter` must be a checkpoint with an evaluation loss, got {str(path)!r}, but the run there had no"
            f" evaluation data. Name a step, such as {str(newest)!r}."
        )
    return best


def base_of_checkpoint(path: Path) -> str:
    """Returns the name or path of the model that the run of a checkpoint has trained.

    Raises:
      InputError: there is no such checkpoint, it is damaged, or an older version of jaxpack wrote it.
    """
    path = find_checkpoint(path)
    if base := _description(path).base:
        return base
    raise InputError(
        f"`model` must name the base model of {str(path)!r}, which does not name it. Give the model of the run."
    )


def template_of_checkpoint(path: Path) -> str:
    """Returns the text of the chat template that the run of a checkpoint had; empty if it had none.

    Raises:
      InputError: there is no such checkpoint, or it is damaged.
    """
    return _description(find_checkpoint(path)).chat_template


def load_from_checkpoint(model: Transformer, path: Path) -> Transformer:
    """Adds the adapters of a checkpoint to a model in place, with the whole matrices that were trained beside them.

    If the vocabulary was resized for the run, the model's is resized, too, with a notice.

    Raises:
      InputError: there is no such checkpoint, it is damaged, its run had no adapters, or the model is not its base.
    """
    path = find_checkpoint(path)
    with errors_name(resume_from_checkpoint="adapter"):
        record, arrays = read_checkpoint(path)
    lora = _lora_config(record, path)
    _require_base(model, record, path)
    rows = record.identity.get("vocab_size", model.config.vocab_size)
    if rows != model.config.vocab_size:
        model.read_weights()
        console.print(f"{path}: the vocabulary is resized from {model.config.vocab_size:,} to {rows:,} tokens")
        set_rows(model, rows)
    if model.config.tie_word_embeddings and not record.identity.get("tie_word_embeddings"):
        untie(model)
    add_lora(model, lora)
    _, trainable, _ = split_trained(model)
    named = arrays_by_name({"trainable": trainable})
    if wrong := [name for name, leaf in named.items() if name not in arrays or arrays[name].shape != leaf.shape]:
        raise InputError(f"`model` must be the base of {str(path)!r}, got a model with another shape of `{wrong[0]}`.")
    leaves = [jnp.asarray(arrays[name]) for name in named]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(trainable), leaves))
    return model


def _description(path: Path) -> Record:
    with errors_name(resume_from_checkpoint="adapter"):
        return read_description(path)


def _lora_config(record: Record, path: Path) -> LoraConfig:
    settings = {
        name.removeprefix(ADAPTERS): value for name, value in record.identity.items() if name.startswith(ADAPTERS)
    }
    if not settings:
        raise InputError(
            f"`adapter` must be a checkpoint of a run with adapters, got {str(path)!r}, whose run trained all weights."
            " Continue the run with `resume_from_checkpoint`: it writes the model at its end."
        )
    settings |= {name: dict(settings[name]) for name in ("rank_pattern", "alpha_pattern")}
    names = settings["target_modules"]
    settings["target_parameters"] = tuple(name for name in names if ".experts." in name)  # experts have full names
    settings["target_modules"] = tuple(name for name in names if ".experts." not in name)
    settings["modules_to_save"] = tuple(settings["modules_to_save"])
    return LoraConfig(**settings)


def _require_base(model: Transformer, record: Record, path: Path) -> None:
    """Refuses a model whose settings are not those of the run's model, except its vocabulary and whether it is tied."""
    for name, value in json.loads(json.dumps(dataclasses.asdict(model.config))).items():
        there = record.identity.get(name, value)
        if there != value and name not in ("tie_word_embeddings", "name_or_path", "vocab_size"):
            raise InputError(
                f"`model` must be the base of {str(path)!r}, whose `{name}` is {there!r}, got a model with {value!r}."
            )
