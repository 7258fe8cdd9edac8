"""Configuration is checked when it is made: types first, then ranges, each error with argument, rule and value."""

import pytest

from jaxpack.config import LoraConfig, TrainConfig
from jaxpack.errors import InputError


@pytest.mark.parametrize(
    ("config", "field", "value", "rule"),
    [
        (TrainConfig, "max_length", 1, "at least 2"),
        (TrainConfig, "max_length", 1024.5, "a whole number"),
        (TrainConfig, "max_length", "1024", "a whole number"),
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
        (TrainConfig, "warmup_steps", -1, "0 or a positive number"),
        (TrainConfig, "compilation_cache_dir", None, "a folder, 'auto' or 'none'"),
        (TrainConfig, "compilation_cache_dir", "", "a folder, 'auto' or 'none'"),
        (TrainConfig, "report_to", "comet", "'none' or among"),
        (TrainConfig, "report_to", ["wandb", "none"], "'none' or among"),
        (TrainConfig, "report_to", 3, "'none' or among"),
        (LoraConfig, "r", 8.5, "a whole number"),
        (LoraConfig, "lora_alpha", 0, "a positive number"),
        (LoraConfig, "lora_dropout", 1.0, r"in \[0, 1\)"),
        (LoraConfig, "target_modules", (), "at least one module"),
    ],
)
def test_a_wrong_value_is_refused_by_name(config, field, value, rule):
    with pytest.raises(InputError, match=f"`{field}` must .*{rule}.*, got ") as refused:
        config(**{field: value})
    assert str(refused.value).endswith(f"got {value!r}.")


def test_a_schedule_that_would_ignore_its_warm_up_is_refused():
    with pytest.raises(InputError, match="`warmup_steps` must be 0 with 'constant'"):
        TrainConfig(lr_scheduler_type="constant", warmup_steps=3)


def test_a_memory_limit_that_nothing_would_read_is_refused():
    with pytest.raises(InputError, match="`memory_limit` must be None unless `remat` is 'auto', got 40"):
        TrainConfig(memory_limit=40, remat="full")


def test_names_of_modules_come_as_a_list_or_as_a_string():
    expected = ("q_proj", "v_proj")
    for given in (expected, ["q_proj", "v_proj"], "q_proj,v_proj", " q_proj, v_proj "):
        assert LoraConfig(target_modules=given).target_modules == expected


def test_destinations_come_as_a_list_or_as_a_string_or_not_at_all():
    for given in (None, "none", "", [], ["none"]):
        assert TrainConfig(report_to=given).report_to == ()
    for given in (("tensorboard", "wandb"), ["tensorboard", "wandb", "wandb"], "tensorboard, wandb"):
        assert TrainConfig(report_to=given, output_dir="here").report_to == ("tensorboard", "wandb")


def test_destinations_without_a_folder_to_write_to_are_refused():
    with pytest.raises(InputError, match=r"`report_to` must be 'none' where there is no `output_dir`, got"):
        TrainConfig(report_to="wandb")
