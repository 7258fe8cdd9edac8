"""Tests that names of other libraries are answered with names that exist, and that none of TRL's is left unanswered."""

import dataclasses
import inspect
import re

import pytest
import typer.main
from foreign_sources import fields_of, folder_of

import jaxpack
import torch_bridge
from jaxpack import cli
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.utils import foreign_names
from jaxpack.utils.foreign_names import ALIASES, OPPOSITES, hint

FIELDS = {field.name for config in (TrainConfig, LoraConfig) for field in dataclasses.fields(config)}


def flags_of(command: str) -> set[str]:
    group = typer.main.get_command(cli.app)
    return {parameter.name for parameter in group.get_command(typer.Context(group), command).params}


@pytest.mark.parametrize("package", ["sft", "commands", "peft"])
def test_every_name_of_trl_and_peft_is_known_or_answered(package: str):
    trl, peft, transformers = (folder_of(name) for name in ("trl", "peft", "transformers"))
    files = {
        "sft": [transformers / "training_args.py", trl / "trainer" / "base_config.py", trl / "trainer/sft_config.py"],
        "commands": [trl / "trainer" / "model_config.py", trl / "scripts" / "utils.py"],
        "peft": [peft / "tuners" / "lora" / "config.py"],
    }
    names = {name for path in files[package] for name in fields_of(path) if not name.startswith("_")}
    assert len(names) > 10
    known = FIELDS | flags_of("train") | ALIASES.keys() | OPPOSITES.keys()
    sure = known | foreign_names._RENAMED.keys() | foreign_names._ADVICE.keys()
    assert sorted(names - sure - OTHERS) == []


# Settings of classes that stand beside those in the files above, or that this project may still add.
OTHERS = {"lr_scheduler_kwargs"}


def test_answers_name_what_exists():
    functions = (jaxpack.Trainer, torch_bridge.from_pretrained, jaxpack.add_lora)
    there = FIELDS | {name for function in functions for name in inspect.signature(function).parameters}
    there |= {*jaxpack.__all__, *torch_bridge.__all__, *flags_of("train"), "lora_A", "lora_B"}
    there |= {f"jaxpack {command}" for command in cli.COMMANDS}
    answers = {*foreign_names._ADVICE.values(), *foreign_names._RENAMED.values(), *ALIASES.values()}
    named = {name for answer in answers for name in re.findall(r"`([^`=]+)[^`]*`", answer)}
    assert named - there == set()
    assert {*foreign_names._RENAMED.values()} <= FIELDS | {*inspect.signature(jaxpack.Trainer).parameters}
    assert {*ALIASES.values(), *OPPOSITES.values()} <= flags_of("train")


def test_no_name_of_ours_is_taken_for_a_foreign_one():
    assert not FIELDS & (foreign_names._RENAMED.keys() | OPPOSITES.keys())
    assert not flags_of("train") & (ALIASES.keys() | OPPOSITES.keys() | foreign_names._RENAMED.keys())


@pytest.mark.parametrize(
    ("name", "known", "answer"),
    [
        ("max_seq_length", ["max_length", "max_steps"], " (it is `max_length` here)"),
        ("lora_r", ["r", "lora_alpha"], " (it is `r` here)"),
        ("r", ["lora_r", "lora_alpha"], " (it is `lora_r` here)"),
        ("rank", ["lora_r"], " (it is `lora_r` here)"),
        ("lora_target_modules", ["target_modules"], " (it is `target_modules` here)"),
        ("Learning-Rte", ["learning_rate"], " (did you mean `learning_rate`?)"),
        ("lora_alpha", ["learning_rate"], " (it is a setting of `LoraConfig`)"),
        ("question", ["learning_rate"], ""),
    ],
)
def test_a_hint_is_certain_or_the_nearest_name(name: str, known: list[str], answer: str):
    assert hint(name, known) == answer


def test_commands_without_training_do_not_advise_on_it():
    assert hint("gradient_checkpointing", ["model"]).startswith(" (set `remat`")
    assert hint("gradient_checkpointing", ["model"], is_of_training=False) == ""
