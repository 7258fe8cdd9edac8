"""Tests `jaxpack train --config FILE`: flags override the file, and a run's own file repeats the run."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxpack.cli.config_file import write_settings
from jaxpack.cli.options import to_flags
from jaxpack.settings import LoraConfig, TrainConfig

# Metrics that differ between any two runs.
MEASURED = {"tokens_per_second", "peak_memory_bytes", "compile_seconds", "first_step_seconds"}


def write_rows(path: Path) -> Path:
    rows = [{"prompt": f"the cab {row} " * (1 + row % 3), "completion": f" ab {row}"} for row in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def written(folder: Path, text: str, suffix: str = "yaml") -> Path:
    path = folder / f"settings.{suffix}"
    path.write_text(text)
    return path


# --- Which value counts -----------------------------------------------------------------------------------------------

# The setting; its text in YAML and in TOML, and the value that results; the flags that override it, and their value.
CASES: dict[str, tuple[str, str, Any, list[object], Any]] = {
    "max_length": ("64", "64", 64, ["--max-length", 96], 96),
    "learning_rate": ("2e-4", "2e-4", 2e-4, ["--learning-rate", 1e-3], 1e-3),
    "warmup_steps": ("3", "3", 3.0, ["--warmup-steps", 0.1], 0.1),
    "packing": ("true", "true", True, ["--no-packing"], False),
    "padding_free": ("no", "false", False, ["--padding-free"], True),
    "packing_strategy": ("wrapped", '"wrapped"', "wrapped", ["--packing-strategy", "bfd_split"], "bfd_split"),
    "dataset_text_field": ("body", '"body"', "body", ["--dataset-text-field", "text"], "text"),
    "compilation_cache_dir": ("2026-11-24", '"2026-11-24"', "2026-11-24", ["--compilation-cache-dir", "none"], "none"),
    "eval_steps": ("7", "7", 7, ["--eval-steps", 9], 9),
    "memory_limit": ("40", "40", 40.0, ["--memory-limit", 20.5], 20.5),
    "seed": ("3", "3", 3, ["--seed", 0], 0),
    "report_to": ("[tensorboard]", '["tensorboard"]', ("tensorboard",), ["--report-to", "none"], ()),
    "lora_r": ("8", "8", 8, ["--lora-r", 4], 4),
    "lora_alpha": ("8", "8", 8, ["--lora-alpha", 2.5], 2.5),
    "target_modules": ("[q_proj, v_proj]", '"q_proj, v_proj"', ("q_proj", "v_proj"), ["--target-modules", "k_proj"],
                       ("k_proj",)),
    "exclude_modules": ('".*[.]0[.].*"', '".*[.]0[.].*"', ".*[.]0[.].*", ["--exclude-modules", "k_proj"], ("k_proj",)),
    "layers_to_transform": ("[0, 2-3]", '"0,2,3"', (0, 2, 3), ["--layers-to-transform", 1], (1,)),
    "rank_pattern": ("{q_proj: 8}", "{ q_proj = 8 }", (("q_proj", 8),), ["--rank-pattern", "v_proj=4,o_proj=2"],
                     (("v_proj", 4), ("o_proj", 2))),
    "alpha_pattern": ("{q_proj: 8}", '"q_proj=8"', (("q_proj", 8.0),), ["--alpha-pattern", ""], ()),
}  # fmt: skip


@pytest.mark.parametrize(("text", "suffix"), [("seed: 7", "yaml"), ("seed = 7", "toml")])
def test_a_byte_order_mark_is_no_part_of_a_file(
    text, suffix, data: Path, tmp_path: Path, what_is_trained: Callable
) -> None:
    given = ["--model", "x", "--data", data, "--output", tmp_path / "run"]
    found = what_is_trained(*given, "--config", written(tmp_path, "\ufeff" + text, suffix))
    assert found["config"].seed == 7


@pytest.mark.parametrize("name", CASES)
def test_a_flag_overrides_the_file_and_the_file_the_default(
    name: str, data: Path, tmp_path: Path, what_is_trained: Callable
) -> None:
    in_yaml, in_toml, expected, flags, other = CASES[name]
    files = [written(tmp_path, f"{name}: {in_yaml}\n"), written(tmp_path, f"{name} = {in_toml}\n", "toml")]

    def values(*more: object) -> dict[str, Any]:
        found = what_is_trained("--model", "x", "--data", data, "--output", tmp_path / "run", *more)
        lora = {{"r": "lora_r"}.get(field, field): value for field, value in vars(found["lora"]).items()}
        return lora | {"lora_seed": lora["seed"]} | vars(found["config"])

    plain = values()
    assert plain[name] not in (expected, other) or plain[name] == other  # `other` may be the default
    changes = {name, "lora_seed"} if name == "seed" else {name}
    for file in files:
        for given, value in ((["--config", file], expected), ([*flags, "--config", file], other)):
            found = values(*given)
            assert found[name] == value
            assert type(found[name]) in (type(value), float)
            assert {one for one in plain if found[one] != plain[one]} <= changes


def test_model_data_and_output_may_be_in_the_file(data: Path, tmp_path: Path, what_is_trained: Callable) -> None:
    lines = {"model": "here", "data": str(data), "eval_data": str(data), "output": str(tmp_path / "run"), "dtype": None}
    file = written(tmp_path, yaml.safe_dump(lines))
    found = what_is_trained("--config", file)
    assert (found["model"], found["data"], found["eval_data"], found["dtype"]) == ("here", str(data), str(data), None)
    assert found["config"] == TrainConfig(output_dir=str(tmp_path / "run"))
    assert found["lora"] == LoraConfig()
    found = what_is_trained("--config", file, "--model", "there", "--dtype", "float16", "--output", tmp_path / "other")
    assert (found["model"], found["dtype"]) == ("there", "float16")
    assert found["config"].output_dir == str(tmp_path / "other")


def test_parameters_of_schedules_and_optimizers_are_mappings_as_a_run_writes_them(
    data: Path, tmp_path: Path, what_is_trained: Callable
) -> None:
    schedule = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    file = written(tmp_path, f"{schedule}optim: sgd\noptim_args: {{momentum: 0.9, nesterov: true}}\n")
    given = ["--model", "x", "--data", data, "--output", tmp_path / "run"]
    config = what_is_trained(*given, "--config", file)["config"]
    assert config.lr_scheduler_kwargs == (("min_lr", 1e-6),)
    assert config.optim_args == (("momentum", 0.9), ("nesterov", True))
    flags = {name: value for name, value in to_flags(config).items() if name != "output_dir"}
    write_settings(tmp_path / "run.yaml", flags)
    assert what_is_trained(*given, "--config", tmp_path / "run.yaml")["config"] == config
    flags = ["--lr-scheduler-kwargs", "min_lr=2e-6", "--optim-args", "momentum=0.5"]
    changed = what_is_trained(*given, "--config", file, *flags)["config"]
    assert (changed.lr_scheduler_kwargs, changed.optim_args) == ((("min_lr", 2e-6),), (("momentum", 0.5),))


def test_one_way_to_train_on_the_command_line_takes_the_place_of_another_in_the_file(
    data: Path, tmp_path: Path, what_is_trained: Callable, exit_status: Callable, capsys: pytest.CaptureFixture
) -> None:
    files = {
        "new": written(tmp_path, "lora_r: 8\ntarget_modules: q_proj\nmax_length: 64\n", "1.yaml"),
        "adapter": written(tmp_path, "adapter: old\nmax_length: 64\n", "2.yaml"),
        "full": written(tmp_path, "full_finetuning: true\nmax_length: 64\n", "3.yaml"),
    }
    flags = {"new": ["--lora-r", 4], "adapter": ["--adapter", "new"], "full": ["--full-finetuning"]}
    inputs = ["--model", "x", "--data", data, "--output", tmp_path / "run"]
    for held, file in files.items():
        for typed, flag in flags.items():
            found = what_is_trained(*inputs, "--config", file, *flag)
            assert found["config"].max_length == 64
            assert found["adapter"] == ("new" if typed == "adapter" else None)
            modules = "all-linear" if held != "new" else ("q_proj",)
            assert found["lora"] == (LoraConfig(r=4, target_modules=modules) if typed == "new" else None)
    found = what_is_trained(*inputs, "--config", files["full"], "--no-full-finetuning")
    assert found["lora"] == LoraConfig()
    both = written(tmp_path, "lora_r: 8\nfull_finetuning: true\n")  # both ways in one file
    assert exit_status("train", *inputs, "--config", both) == 2
    assert (
        "`full_finetuning` must be without flags of adapters, got both. Leave one of them out."
        in capsys.readouterr().err
    )


def test_epochs_that_are_typed_go_before_steps_in_the_file(
    data: Path, tmp_path: Path, what_is_trained: Callable
) -> None:
    inputs = ["--model", "x", "--data", data, "--output", tmp_path / "run"]
    inputs += ["--config", written(tmp_path, "max_steps: 7\nnum_train_epochs: 5.0\n")]

    def lengths(*typed: object) -> tuple[int, float]:
        config = what_is_trained(*inputs, *typed)["config"]
        return config.max_steps, config.num_train_epochs

    assert lengths() == (7, 5.0)
    assert lengths("--num-train-epochs", 1) == (-1, 1.0)
    assert lengths("--max-steps", 9) == (9, 5.0)
    assert lengths("--num-train-epochs", 1, "--max-steps", 9) == (9, 1.0)


def test_the_home_of_a_user_is_found_in_a_file(
    data: Path, tmp_path: Path, what_is_trained: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = written(tmp_path, f"model: x\ndata: ~/{data.name}\noutput: ~/run\n")
    (tmp_path / data.name).write_bytes(data.read_bytes())
    found = what_is_trained("--config", file)
    assert found["data"] == str(tmp_path / data.name)
    file = written(tmp_path, f"model: x\ndata: [~/{data.name}=0.7, {data}=3e-1]\noutput: ~/run\n")
    assert what_is_trained("--config", file)["data"] == [f"{tmp_path / data.name}=0.7", f"{data}=3e-1"]
    assert found["config"].output_dir == str(tmp_path / "run")


# --- What is refused --------------------------------------------------------------------------------------------------

# The file's text, and what the message says.
BAD: dict[str, tuple[str, str, list[str]]] = {
    "unknown": ("learning_rte: 1", "yaml", ["'learning_rte' (did you mean `learning_rate`?)", "settings.yaml'"]),
    "unknown_ones": ("a_b_c: 1\nmax-lengths: 2", "yaml", ["'a_b_c', 'max-lengths' (did you mean `max_length`?)"]),
    "of_another_library": ("bf16: true\nwarmup_ratio: 0.1", "yaml", ["'bf16' (set `dtype` ", "`warmup_steps=0.03`)"]),
    "field_of_the_dataclass": ("r: 8", "yaml", ["'r' (it is `lora_r` here)"]),
    "one_setting_twice": (
        "max_steps: 8\nmax-steps: 9",
        "yaml",
        ["once, got 'max_steps' and 'max-steps', which are"],
    ),
    "one_setting_by_two_names": (
        "output: a\noutput_dir: b",
        "yaml",
        ["once, got 'output' and 'output_dir', which"],
    ),
    "opposite": ("use_peft: 1", "yaml", ["`use_peft` must be true or false, got 1 in"]),
    "the_file_itself": ("config: other.yaml", "yaml", ["got 'config'"]),
    "table": ("[train]\nmax_length = 64", "toml", ["got 'train'"]),
    "name_that_is_a_number": ("3: 4", "yaml", ["got 3 in"]),
    "text_for_a_whole_number": ("max_steps: '64'", "yaml", ["`max_steps` must be a whole number, got '64' in"]),
    "float_for_a_whole_number": ("max_steps = 64.0", "toml", ["`max_steps` must be a whole number, got 64.0"]),
    "true_for_a_whole_number": ("max_length: true", "yaml", ["`max_length` must be a whole number or null, got True"]),
    "null": ("max_steps: null", "yaml", ["`max_steps` must be a whole number, got None"]),
    "optional": ("eval_steps: often", "yaml", ["`eval_steps` must be a number or null, got 'often'"]),
    "half_a_step": ("eval_steps: 1.5", "yaml", ["`eval_steps` must be a whole number of at least 1, or a share"]),
    "text_for_a_number": ("learning_rate: fast", "yaml", ["`learning_rate` must be a number, got 'fast'"]),
    "true_for_a_number": ("learning_rate: yes", "yaml", ["`learning_rate` must be a number, got True"]),
    "number_for_true": ("packing: 1", "yaml", ["`packing` must be true or false, got 1"]),
    "text_for_true": ("packing = 'true'", "toml", ["`packing` must be true or false, got 'true'"]),
    "no_choice": ("remat: some", "yaml", ["`remat` must be one of ('auto', 'offload', ", "got 'some'"]),
    "list_for_text": ("dataset_text_field: [text]", "yaml", ["`dataset_text_field` must be text, got ['text']"]),
    "list_of_numbers": ("target_modules: [1]", "yaml", ["`target_modules` must be text or a list of text, got [1]"]),
    "list_for_a_mapping": ("rank_pattern: [q_proj]", "yaml", ["`rank_pattern` must be text or a mapping, got ['q_pr"]),
    "number_for_a_path": ("data: 7", "yaml", ["`data` must be text or a list of text, got 7"]),
    "out_of_range": ("max_length: 1", "yaml", ["`max_length` must be at least 2"]),
    "rank": (
        "rank_pattern: {q_proj: 1.5}",
        "yaml",
        ["`rank_pattern` must map projections to whole", "got 'q_proj=1.5'"],
    ),
    "twice": ("seed: 1\nseed: 2", "yaml", ["YAML or TOML file", "'seed' is there twice", "line 2"]),
    "twice_in_toml": ("seed = 1\nseed = 2", "toml", ["YAML or TOML file", "overwrite a value"]),
    "braces": (
        "target_modules: {{ modules }}",
        "yaml",
        ["YAML or TOML file", "with braces in it needs quotes", "line 1"],
    ),
    "empty": ("", "yaml", ["`config` must hold names of flags with their values", "with nothing"]),
    "empty_toml": (
        "# max_length = 64",
        "toml",
        ["`config` must hold names of flags with their values", "with nothing"],
    ),
    "list": ("- max_length: 64", "yml", ["must hold names of flags with their values", "with [{'max_length': 64}]"]),
    "word": ("max_length", "yaml", ["must hold names of flags with their values", "with 'max_length'"]),
    "no_yaml": ("max_length: [64", "yaml", ["must be a YAML or TOML file", "line 1"]),
    "no_toml": ("max_length: 64", "toml", ["must be a YAML or TOML file", "line 1"]),
    "cases_aliases": (
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklm")),
        "yaml",
        ["YAML or TOML file", "an alias is not allowed", "line 2"],
    ),
    "cases_deep": ("a: " + "[" * 5000, "yaml", ["YAML or TOML file", "recursion"]),
    "cases_deep_toml": ("a = " + "[" * 5000, "toml", ["YAML or TOML file", "recursion"]),
    "cases_control": ('"learning_rte\\e[31m": 1', "yaml", ["learning_rte\\x1b[31m"]),
    "suffix": ("{}", "json", ["`config` must end in .yaml, .yml or .toml", "settings.json'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_sentence(
    name: str, data: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    text, suffix, fragments = BAD[name]
    file = written(tmp_path, text, suffix)
    inputs = ["--model", "x", "--output", tmp_path / "run", *([] if "data" in text else ["--data", data])]
    assert_refused(["train", *inputs, "--config", file], fragments)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, exit_status: Callable, capsys: Any) -> None:
    assert exit_status("train", "--config", tmp_path / "no.yaml") == 2
    message = f"error: `config` must be a YAML or TOML file, got '{tmp_path}/no.yaml': No such file or directory.\n"
    assert capsys.readouterr().err == message


def test_what_neither_has_is_still_asked_for(tmp_path: Path, exit_status: Callable, capsys: Any) -> None:
    assert exit_status("train", "--config", written(tmp_path, "model: x\ndata: y\n")) == 2
    assert "'--output'" in capsys.readouterr().err


# --- A run's own file -------------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in MEASURED} for line in lines]


def adapter(folder: Path) -> list[bytes]:
    return [(folder / "adapter" / f"adapter_{name}").read_bytes() for name in ("config.json", "model.safetensors")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder for runs. The runs have names that YAML could take for something other than text."""
    return tmp_path_factory.mktemp("runs")


FIRST, SECOND, THIRD, FOURTH = (Path(name) for name in ("1e3", "2026-11-24", "yes", "0x10"))


@pytest.fixture
def first(base: Path, folder: Path, exit_status: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    if not FIRST.exists():
        flags = ["--packing", "--max-length", 64, "--per-device-train-batch-size", 2, "--max-steps", 4, "--seed", 7]
        flags += ["--learning-rate", 1e-2, "--logging-steps", 1, "--save-steps", 2, "--lora-r", 4]
        flags += ["--rank-pattern", "q_proj=2", "--target-modules", "q_proj,v_proj"]
        data = write_rows(Path("rows.jsonl"))
        assert exit_status("train", "--model", base, "--data", data, "--output", FIRST, *flags) == 0
    return FIRST


def settings(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "run.yaml").read_text())


def test_the_file_of_a_run_repeats_it_bit_for_bit(first: Path, exit_status: Callable) -> None:
    assert exit_status("train", "--config", first / "run.yaml", "--output", SECOND) == 0
    assert adapter(SECOND) == adapter(first)
    assert records(SECOND) == records(first)
    assert settings(first) | {"output": str(SECOND)} == settings(SECOND)
    chosen = {"output": "1e3", "rank_pattern": {"q_proj": 2}, "dtype": "float32", "max_grad_norm": 1, "seed": 7}
    assert {name: settings(first)[name] for name in chosen} == chosen


def test_a_flag_makes_another_run_which_its_own_file_goes_on_with(first: Path, exit_status: Callable) -> None:
    assert exit_status("train", "--config", first / "run.yaml", "--output", THIRD, "--seed", 8) == 0
    assert adapter(THIRD) != adapter(first)
    before = adapter(THIRD), records(THIRD)
    assert exit_status("train", "--config", THIRD / "run.yaml", "--resume-from-checkpoint", "latest") == 0
    assert (adapter(THIRD), records(THIRD)) == before
    assert settings(THIRD)["seed"] == 8
    assert settings(THIRD)["resume_from_checkpoint"] is None


def test_the_file_of_a_run_that_goes_on_from_an_adapter_names_no_new_one(first: Path, exit_status: Callable) -> None:
    config = ["--config", first / "run.yaml", "--adapter", first / "adapter"]
    assert exit_status("train", *config, "--output", FOURTH) == 0
    assert settings(FOURTH)["adapter"] == "1e3/adapter"
    assert "lora_r" not in settings(FOURTH)
    assert exit_status("train", "--config", FOURTH / "run.yaml", "--output", "again") == 0
    assert adapter(Path("again")) == adapter(FOURTH) != adapter(first)
