"""Tests that a config is checked when made: types, then ranges; each error names argument, rule and value."""

import dataclasses
import inspect
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from jaxpack.errors import InputError
from jaxpack.settings import GenerateConfig, LoraConfig, TrainConfig


@pytest.mark.parametrize(
    ("config", "field", "value", "rule"),
    [
        (TrainConfig, "max_length", 1, "at least 2"),
        (TrainConfig, "max_length", 1024.5, "a whole number"),
        (TrainConfig, "max_length", "1024", "a whole number"),
        (TrainConfig, "save_total_limit", 2.5, "a whole number, or None"),
        (TrainConfig, "save_total_limit", 0, "at least 1"),
        (TrainConfig, "logging_steps", 0, "a whole number of at least 1, or a share of all steps"),
        (TrainConfig, "logging_steps", 1.5, "a whole number of at least 1, or a share of all steps"),
        (TrainConfig, "logging_steps", None, "a number"),
        (TrainConfig, "eval_steps", -0.1, "a share of all steps between 0 and 1, or None"),
        (TrainConfig, "eval_steps", True, "a share of all steps between 0 and 1, or None"),
        (TrainConfig, "save_steps", float("nan"), "a whole number of at least 0, or a share of all steps"),
        (TrainConfig, "save_steps", float("inf"), "a whole number of at least 0, or a share of all steps"),
        (TrainConfig, "max_steps", 0, "positive, or -1"),
        (TrainConfig, "packing", "no", "true or false"),
        (TrainConfig, "packing_strategy", "ffd", "one of"),
        (TrainConfig, "per_device_train_batch_size", 2.5, "a whole number"),
        (TrainConfig, "per_device_train_batch_size", True, "a whole number"),
        (TrainConfig, "learning_rate", 0, "a positive number"),
        (TrainConfig, "learning_rate", float("inf"), "a positive number"),
        (TrainConfig, "learning_rate", float("nan"), "a positive number"),
        (TrainConfig, "learning_rate", "2e-4", "a number"),
        (TrainConfig, "adam_beta2", 1.0, r"in \[0, 1\)"),
        (TrainConfig, "memory_limit", 0, "a positive number"),
        (TrainConfig, "memory_limit", "40", "a positive number"),
        (TrainConfig, "remat", "some", "one of"),
        (TrainConfig, "optim", None, "text"),
        (TrainConfig, "warmup_steps", -1, "0 or a positive number"),
        (TrainConfig, "compilation_cache_dir", None, "text"),
        (TrainConfig, "compilation_cache_dir", "", "a folder, 'auto' or 'none'"),
        (TrainConfig, "output_dir", 5, "text or None"),
        (TrainConfig, "resume_from_checkpoint", 5, "text or None"),
        (TrainConfig, "resume_from_checkpoint", "", "a folder or 'latest'"),
        (TrainConfig, "dataset_text_field", None, "text"),
        (TrainConfig, "seed", -1, r"in \[0, 2\*\*32\)"),
        (TrainConfig, "seed", 10**30, r"in \[0, 2\*\*32\)"),
        (LoraConfig, "seed", 2**32, r"in \[0, 2\*\*32\)"),
        (GenerateConfig, "seed", 10**30, r"in \[0, 2\*\*32\)"),
        (TrainConfig, "report_to", "comet", "'none' or among"),
        (TrainConfig, "report_to", ["wandb", "none"], "'none' or among"),
        (TrainConfig, "report_to", 3, "'none' or among"),
        (LoraConfig, "r", 8.5, "a whole number"),
        (LoraConfig, "lora_alpha", 0, "a positive number"),
        (LoraConfig, "lora_dropout", 1.0, r"in \[0, 1\)"),
        (LoraConfig, "target_modules", (), "at least one module"),
        (LoraConfig, "rank_pattern", "q_proj=8,q_proj=2", "map projections to whole numbers"),
        (TrainConfig, "output_dir", "", "a folder, or None"),
    ],
)
def test_a_wrong_value_is_refused_by_name(config, field, value, rule):
    with pytest.raises(InputError, match=f"`{field}` must .*{rule}.*, got ") as refused:
        config(**{field: value})
    assert str(refused.value).endswith(f"got {value!r}.")


def test_the_home_of_a_user_is_found(monkeypatch):
    """Without expansion, a folder named ~ would be made in the working directory."""
    monkeypatch.setenv("HOME", "/home/someone")
    names = ("output_dir", "resume_from_checkpoint", "compilation_cache_dir")
    assert {getattr(TrainConfig(**dict.fromkeys(names, "~/out")), name) for name in names} == {"/home/someone/out"}


def test_nothing_to_save_whole_is_what_peft_calls_none():
    assert LoraConfig(modules_to_save=None).modules_to_save == ()


def test_scalars_of_numpy_and_paths_are_taken_for_what_they_hold():
    given = {
        "max_length": np.int64(64),
        "learning_rate": np.float32(0.5),
        "packing": np.True_,
        "eval_steps": np.int32(3),
    }
    config = TrainConfig(**given, output_dir=Path("here"), resume_from_checkpoint=Path("there"))
    plain = {"max_length": 64, "learning_rate": 0.5, "packing": True, "eval_steps": 3}
    assert config == TrainConfig(**plain, output_dir="here", resume_from_checkpoint="there")
    assert [type(getattr(config, name)) for name in plain] == [int, float, bool, int]  # types that JSON has, too
    assert type(config.output_dir) is str


def test_padded_batches_are_refused_with_packing():
    with pytest.raises(InputError, match="`padding_free` must be true with `packing`, got False"):
        TrainConfig(packing=True, padding_free=False)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (
            {"early_stopping_patience": 0},
            "a whole number of at least 1, or None, got 0",
        ),
        ({"early_stopping_patience": 1.5}, "`early_stopping_patience` must be a whole number of at least 1, or None"),
        ({"early_stopping_patience": True}, "`early_stopping_patience` must be a whole number of at least 1, or None"),
        ({"early_stopping_patience": 1, "early_stopping_threshold": -0.1}, "must be 0 or a positive number, got -0.1"),
        ({"early_stopping_threshold": 0.1}, "`early_stopping_threshold` must be 0 without `early_stopping_patience`"),
    ],
)
def test_early_stopping_that_cannot_be_is_refused(given, rule):
    with pytest.raises(InputError, match=rule):
        TrainConfig(**given)


def test_a_schedule_that_would_ignore_its_warm_up_is_refused():
    with pytest.raises(InputError, match="`warmup_steps` must be 0 with `lr_scheduler_type` 'constant'"):
        TrainConfig(lr_scheduler_type="constant", warmup_steps=3)


@pytest.mark.parametrize(
    ("given", "every"),
    [
        ({}, 500),
        ({"eval_steps": 30}, 510),
        ({"eval_steps": 1000}, 1000),
        ({"eval_steps": 30, "save_steps": 60}, 60),
        ({"eval_steps": 30, "save_steps": 40}, 40),  # only the trainer refuses it
        ({"eval_steps": 30, "save_steps": 0}, 0),
    ],
)
def test_the_default_of_save_steps_gives_way_to_evaluations(given, every):
    assert TrainConfig(**given).steps_between_saves == every


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrainConfig(bf16=True), "`TrainConfig` has no argument `bf16` (set `dtype` where the model is read, "),
        (lambda: TrainConfig(learning_rte=1), "has no argument `learning_rte` (did you mean `learning_rate`?)."),
        (lambda: TrainConfig(warmup_ratio=0.1), "`warmup_ratio` (set `warmup_steps` to a share of all steps, such as "),
        (lambda: TrainConfig(max_seq_length=8), "`max_seq_length` (it is `max_length` here)."),
        (lambda: TrainConfig(r=8, x=1), "has no arguments `r` (it is a setting of `LoraConfig`) and `x`."),
        (lambda: LoraConfig(rank=8), "`LoraConfig` has no argument `rank` (it is `r` here)."),
        (lambda: LoraConfig(bias="none"), "has no argument `bias` (leave it out: no bias is trained"),
        (lambda: LoraConfig(max_length=8), "`max_length` (it is a setting of `TrainConfig`)."),
        (lambda: GenerateConfig(temprature=1.0), "`GenerateConfig` has no argument `temprature` (did you mean `temper"),
        (lambda: dataclasses.replace(TrainConfig(), fp16=True), "`TrainConfig` has no argument `fp16` (set `dtype`"),
    ],
)
def test_an_unknown_argument_is_answered_with_what_to_write(make, said):
    with pytest.raises(InputError) as refused:
        make()
    assert said in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("config", [TrainConfig, LoraConfig, GenerateConfig])
def test_a_config_is_still_a_dataclass_with_its_signature(config):
    parameters = inspect.signature(config).parameters
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    assert {name: parameter.default for name, parameter in parameters.items()} == defaults
    assert dataclasses.replace(config(), seed=7) == config(seed=7) != config()
    assert pickle.loads(pickle.dumps(config())) == config()
    with pytest.raises(TypeError):
        config(5)  # no argument has a place


def test_rows_of_no_length_are_refused():
    with pytest.raises(InputError, match=r"`max_length` must be a number with `packing`, .*, such as 4096, got None"):
        TrainConfig(packing=True, max_length=None)
    assert TrainConfig(max_length=None).max_length is None


def test_a_whole_number_of_steps_is_an_int():
    steps = {"logging_steps": 3.0, "eval_steps": 4.0, "save_steps": 8.0}
    config = TrainConfig(**steps)
    assert [type(getattr(config, name)) for name in steps] == [int, int, int]


@pytest.mark.parametrize("num_steps", [1, 3, 15, 30, 999])
@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.999])
def test_a_share_of_steps_is_rounded_up_as_in_transformers(num_steps, share):
    config = TrainConfig(logging_steps=share, eval_steps=share, save_steps=2 * share if share < 0.5 else share)
    found = config.in_whole_steps(num_steps)
    whole = math.ceil(num_steps * share)
    assert (found.logging_steps, found.eval_steps) == (whole, whole)
    assert found.save_steps % whole == 0  # each checkpoint has an eval loss
    assert 0 <= found.save_steps - math.ceil(num_steps * config.save_steps) < whole
    assert found == dataclasses.replace(
        config, logging_steps=whole, eval_steps=whole, save_steps=found.save_steps
    )  # and nothing else changes


def test_steps_that_are_no_shares_stay():
    config = TrainConfig(logging_steps=1, eval_steps=7, save_steps=0)
    assert config.in_whole_steps(100) is config
    assert TrainConfig(save_steps=0.5).in_whole_steps(25).save_steps == 13


def test_a_memory_limit_that_nothing_would_read_is_refused():
    with pytest.raises(InputError, match="`memory_limit` must be None unless `remat` is 'auto', got 40"):
        TrainConfig(memory_limit=40, remat="full")


def test_names_of_modules_come_as_a_list_or_as_a_string():
    expected = ("q_proj", "v_proj")
    for given in (expected, ["q_proj", "v_proj"], "q_proj,v_proj", " q_proj, v_proj "):
        assert LoraConfig(target_modules=given).target_modules == expected


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((name, "adamw") for name in ("adamw", "adamw_torch", "adamw_torch_fused")),
        *((name, "adamw_8bit") for name in ("adamw_8bit", "adamw_bnb_8bit")),
        *((name, "lion") for name in ("lion", "lion_32bit")),
        *((name, name) for name in ("adafactor", "muon", "sgd")),
    ],
)
def test_an_optimizer_has_the_names_that_trl_knows(given, meant):
    assert TrainConfig(optim=given).optim == meant


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_torch_8bit", "lion_8bit", "rmsprop", "AdamW", ""])
def test_another_optimizer_is_refused_with_what_to_use(name):
    rule = rf"`optim` must be among \('adamw', 'adamw_8bit', .*\), got {name!r}\. Use 'adamw_8bit' .* as `optimizer`\."
    with pytest.raises(InputError, match=rule):
        TrainConfig(optim=name)


def test_destinations_come_as_a_list_or_as_a_string_or_not_at_all():
    for given in (None, "none", "", [], ["none"]):
        assert TrainConfig(report_to=given).report_to == ()
    for given in (("tensorboard", "wandb"), ["tensorboard", "wandb", "wandb"], "tensorboard, wandb"):
        assert TrainConfig(report_to=given, output_dir="here").report_to == ("tensorboard", "wandb")


def test_destinations_without_a_folder_to_write_to_are_refused():
    rule = "`report_to` must be 'none' unless `output_dir` names a folder for the metrics, got"
    with pytest.raises(InputError, match=rule):
        TrainConfig(report_to="wandb")
