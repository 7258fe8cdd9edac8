"""Tests that `jaxpack train` reads flags as TRL's users write them, and answers all unknown ones in one sentence."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from readme_blocks import ROOT

from jaxpack.settings import TrainConfig


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the cab"}\n')
    return path


@pytest.fixture
def inputs(data: Path, tmp_path: Path) -> list[object]:
    return ["--model", "x", "--data", data, "--output", tmp_path / "run"]


# Words as in TRL's commands, and the words that mean the same here.
SAME: dict[str, tuple[list[object], list[object]]] = {
    "underscores": (["--max_length", 64, "--learning_rate=1e-3"], ["--max-length", 64, "--learning-rate", "1e-3"]),
    "mixed": (["--max-grad_norm", 2], ["--max-grad-norm", 2]),
    "list": (
        ["--lora_target_modules", "q_proj", "v_proj", "--seed", 3],
        ["--target-modules", "q_proj,v_proj", "--seed", 3],
    ),
    "list_at_the_end": (
        ["--modules_to_save", "lm_head", "embed_tokens"],
        ["--modules-to-save", "lm_head,embed_tokens"],
    ),
    "mapping": (["--rank_pattern", "q_proj=8", "v_proj=4"], ["--rank-pattern", "q_proj=8,v_proj=4"]),
    "all_linear": (["--lora_target_modules", "all-linear"], []),
    "whole_modules": (["--lora_modules_to_save=lm_head"], ["--modules-to-save", "lm_head"]),
    "true": (["--packing", "True", "--seed", 3], ["--packing", "--seed", 3]),
    "false": (["--padding_free=false"], ["--no-padding-free"]),
    "no": (["--no_padding_free"], ["--no-padding-free"]),
    "no_and_false": (["--no-padding-free", "False"], []),
    "dtype": (["--torch_dtype", "float16"], ["--dtype", "float16"]),
    "negative": (["--max_steps", "-1"], []),
    "value_like_a_flag": (["--dataset_text_field", "--max_length"], ["--dataset-text-field=--max_length"]),
    "peft": (["--use_peft", "--lora_r", 8, "--lora_alpha", 4], ["--lora-r", 8, "--lora-alpha", 4]),
    "peft_is_true": (["--use_peft", "True"], []),
    "no_peft": (["--use_peft", "False"], ["--full-finetuning"]),
    "all_checkpoints": (["--save_total_limit", "None"], ["--save-total-limit", "none"]),
    "shares": (["--logging_steps", "0.1", "--save_steps", "0.5"], ["--logging-steps", ".1", "--save-steps", ".5"]),
}


@pytest.mark.parametrize("name", SAME)
def test_words_of_trl_mean_what_ours_mean(name: str, inputs: list, what_is_trained: Callable) -> None:
    theirs, ours = SAME[name]
    found = what_is_trained(*inputs, *theirs)
    assert found == what_is_trained(*inputs, *ours)
    if ours:
        assert found != what_is_trained(*inputs)  # a word that is ignored would be the same, too


def test_inputs_have_trls_names(data: Path, tmp_path: Path, inputs: list, what_is_trained: Callable) -> None:
    theirs = ["--model_name_or_path", "x", "--dataset_name", data, "--output_dir", tmp_path / "run"]
    assert what_is_trained(*theirs) == what_is_trained(*inputs)
    pairs = zip(theirs[::2], theirs[1::2], strict=True)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({str(key)[2:]: str(value) for key, value in pairs}))
    assert what_is_trained("--config", file) == what_is_trained(*inputs)


def test_the_line_of_the_page_is_read_as_it_is(data: Path, tmp_path: Path, what_is_trained: Callable) -> None:
    page = (ROOT / "docs" / "coming_from_trl.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    words = shlex.split(block.replace("\\\n", " ").replace("train.jsonl", str(data)))
    assert words[:2] == ["jaxpack", "train"]
    words[words.index("out")] = str(tmp_path / "out")
    found = what_is_trained(*words[2:])
    assert (found["model"], Path(found["data"]), found["lora"].target_modules) == (
        "path/to/Qwen3-4B",
        data,
        ("q_proj", "v_proj"),
    )
    assert found["config"] == TrainConfig(
        output_dir=str(tmp_path / "out"), packing=True, max_length=4096, save_steps=0.1
    )


# A settings file as for TRL, and the words that mean the same.
FILES: dict[str, tuple[str, list[object]]] = {
    "dashes": ("max-length: 64", ["--max-length", 64]),
    "modules": ("lora_target_modules: [q_proj, v_proj]", ["--target-modules", "q_proj,v_proj"]),
    "peft": ("use_peft: true", []),
    "no_peft": ("use_peft: false", ["--full-finetuning"]),
    "all_checkpoints": ("save_total_limit: null", ["--save-total-limit", "none"]),
    "whole_documents": ("max_length: null", ["--max-length", "none"]),
    "shares": ("logging_steps: 0.1\neval_steps: 0.2", ["--logging-steps", 0.1, "--eval-steps", 0.2]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_trl_means_what_flags_mean(
    name: str, inputs: list, tmp_path: Path, what_is_trained: Callable
) -> None:
    text, flags = FILES[name]
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert what_is_trained(*inputs, "--config", file) == what_is_trained(*inputs, *flags)


def test_a_switch_that_a_file_turns_on_is_turned_off(inputs: list, tmp_path: Path, what_is_trained: Callable) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("load_in_4bit: true")
    on, off = [*inputs, "--config", file], [*inputs, "--config", file, "--load_in_4bit", "False"]
    assert what_is_trained(*off) == what_is_trained(*inputs) != what_is_trained(*on)


def test_none_is_a_number_of_neither_documents_nor_checkpoints(inputs: list, what_is_trained: Callable) -> None:
    found = what_is_trained(*inputs, "--max_length", "none", "--save_total_limit", "none")["config"]
    assert (found.max_length, found.save_total_limit) == (None, None)


# Each case has the words that `train` is given, and parts of the sentence that it answers.
REFUSED: dict[str, tuple[list[object], list[str]]] = {
    "unknown": (["--learning_rte", "1"], ["`jaxpack train` has no flag `--learning_rte` (did you mean `--learning-"]),
    "several": (
        ["--bf16", "True", "--max_seq_length", "64", "--eval_strategy", "steps", "--gradient_checkpointing"],
        [
            "has no flags `--bf16` (set `--dtype` where",
            "`--max_seq_length` (it is `--max-length` here)",
            "`--eval_strategy` (leave it out: ",
            " and `--gradient_checkpointing` (set `--remat`: ",
        ],
    ),
    "with_a_value": (["--warmup_ratio", "0.1"], ["to a share of all steps, such as `--warmup-steps 0.03`)."]),
    "unlike_any": (["--question"], ["`jaxpack train` has no flag `--question`."]),
    "its_values": (["--bits", "4", "8", "--seed", "3"], ["`jaxpack train` has no flag `--bits`."]),
    "length": (["--max_length", "none", "--packing"], ["`max_length` must be a number with `packing`", "got None."]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unknown_is_refused_at_once(name: str, inputs: list, assert_refused: Callable[..., None]) -> None:
    words, fragments = REFUSED[name]
    assert_refused(["train", *inputs, *words], fragments)


def test_a_number_that_is_none_is_not_any_word(inputs: list, exit_status: Callable, capsys: Any) -> None:
    assert exit_status("train", *inputs, "--save-total-limit", "all") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "'--save-total-limit': 'all' is neither a whole number nor none." in said


def test_a_switch_has_a_truth_value_or_none(inputs: list, exit_status: Callable, capsys: Any) -> None:
    assert exit_status("train", *inputs, "--packing=maybe") == 2
    assert "maybe" in capsys.readouterr().err


def test_every_command_takes_underscores_and_names_its_own_flags(exit_status: Callable, capsys: Any) -> None:
    for command, flag in (("generate", "max_new_tokens"), ("inspect", "max_length"), ("bench", "loss_steps")):
        ours = f"--{flag.replace('_', '-')}"
        assert exit_status(command, f"--{flag}s", "1") == 2
        assert f"`jaxpack {command}` has no flag `--{flag}s` (did you mean `{ours}`?)." in capsys.readouterr().err
        assert exit_status(command, f"--{flag}", "x") == 2
        assert f"'{ours}'" in capsys.readouterr().err
    assert exit_status("generate", "--gradient_checkpointing") == 2
    assert "`jaxpack generate` has no flag `--gradient_checkpointing`." in capsys.readouterr().err


def test_a_run_with_none_is_repeated_by_its_settings(inputs: list, tmp_path: Path, what_is_trained: Callable) -> None:
    from jaxpack.cli.config_file import write_settings
    from jaxpack.cli.options import to_flags

    config = TrainConfig(max_length=None, save_total_limit=None, logging_steps=0.1, output_dir=str(tmp_path / "run"))
    flags = to_flags(config)
    del flags["output_dir"]
    write_settings(tmp_path / "run.yaml", flags)
    assert what_is_trained(*inputs, "--config", tmp_path / "run.yaml")["config"] == config


def test_line_breaks_of_parts_are_read_as_a_shell_and_a_file_give_them(
    inputs: list, tmp_path: Path, what_is_trained: Callable
) -> None:
    from jaxpack.cli.config_file import write_settings
    from jaxpack.cli.options import to_flags

    instruction, response = "<|im_start|>user\n", "### 'A':\n\n"
    typed = ["--instruction_part", r"<|im_start|>user\n", "--response_part", r"### 'A':\n\n"]
    config = TrainConfig(output_dir=str(tmp_path / "run"), instruction_part=instruction, response_part=response)
    assert what_is_trained(*inputs, *typed)["config"] == config
    assert what_is_trained(*inputs, "--instruction-part", instruction, "--response-part", response)["config"] == config
    flags = to_flags(config)
    del flags["output_dir"]
    write_settings(tmp_path / "run.yaml", flags)
    assert what_is_trained(*inputs, "--config", tmp_path / "run.yaml")["config"] == config
