"""Tests what `jaxpack train` writes, that its flags set the configuration, and that a seed fixes the result."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer.main
import yaml
from safetensors.numpy import load_file
from tokenizers_for_tests import small_tokenizer, write_checkpoint

import jaxpack
import torch_bridge
from jaxpack import cli
from jaxpack.data.batching import Batches
from jaxpack.data.packing import PackedBatch
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.run import Run
from jaxpack.train.step import Metrics
from torch_bridge.tensors import model_tensors

RECORD = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "padding_share", "peak_memory_bytes"}
SETTINGS = ["--packing", "--max-length", "64", "--per-device-train-batch-size", "2", "--logging-steps", "2"]
ADAPTER = ["--lora-r", "4", "--target-modules", "q_proj, down_proj"]
STEPS = ["--max-steps", "3", "--learning-rate", "1e-2"]


def train(*arguments: object) -> None:
    jaxpack_command("train", *arguments)


def jaxpack_command(*arguments: object) -> None:
    """Runs the installed command's entry point in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxpack", *map(str, arguments)])
        status = None
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code
        assert not status


@dataclasses.dataclass(frozen=True)
class Inputs:
    base: Path
    data: Path

    def flags(self, output: Path) -> list[object]:
        return ["--model", self.base, "--data", self.data, "--output", output]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"the cab {row} " * (1 + row % 3), "completion": f" ab {row}"} for row in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Inputs(write_checkpoint(folder / "base"), folder / "rows.jsonl")


@pytest.fixture(scope="module")
def adapter_run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapter") / "runs" / "first"  # its parent is missing, too
    train(*inputs.flags(output), *SETTINGS, *STEPS, *ADAPTER)
    return output


# --- What a run writes ------------------------------------------------------------------------------------------------


def test_a_run_writes_an_adapter_and_its_metrics_and_nothing_else(adapter_run: Path) -> None:
    files = {str(path.relative_to(adapter_run)) for path in adapter_run.rglob("*") if path.is_file()}
    about = {"about.json", "metrics.jsonl", "report.md", "report.png", "run.yaml"}
    of_last_step = {name for name in files if name.startswith("checkpoints/3/")}
    assert of_last_step
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    adapter |= {"tokenizer_config.json"}
    assert files - of_last_step == about | {f"adapter/{name}" for name in adapter}
    assert [path.name for path in adapter_run.parent.iterdir()] == ["first"]


def test_the_adapter_is_of_the_modules_and_the_rank_that_the_flags_say(adapter_run: Path, inputs: Inputs) -> None:
    config = json.loads((adapter_run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == str(inputs.base)
    tensors = load_file(adapter_run / "adapter" / "adapter_model.safetensors")
    modules = [f"{layer}.{module}" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")]
    names = [f"base_model.model.model.layers.{module}.lora_{side}.weight" for module in modules for side in "AB"]
    assert sorted(tensors) == sorted(names)
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        assert np.isfinite(tensor).all()
        assert tensor.shape[1 if "lora_B" in name else 0] == 4
        assert np.abs(tensor).max() > 0  # lora_B began at zero, so it was trained


def test_a_checkpoint_is_merged_like_the_adapter(inputs: Inputs, adapter_run: Path, tmp_path: Path) -> None:
    merged = [tmp_path / "adapter", tmp_path / "checkpoint"]
    for adapter, folder in zip(("adapter", "checkpoints/latest"), merged, strict=True):
        jaxpack_command("export", "--adapter", adapter_run / adapter, "--merged", folder)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in merged)
    assert all(np.array_equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_loss_of_an_adapter_is_computed_alone(inputs: Inputs, adapter_run: Path, tmp_path: Path) -> None:
    found = []
    for flags in (["--adapter", adapter_run / "adapter"], ["--model", inputs.base]):
        jaxpack_command("evaluate", *flags, "--data", inputs.data, *SETTINGS[:-2], "--output", tmp_path / "loss.json")
        found.append(json.loads((tmp_path / "loss.json").read_text()))
        (tmp_path / "loss.json").unlink()
    trained, base = (metrics["eval_loss"] for metrics in found)
    assert trained < base
    assert found[0]["eval_perplexity"] == pytest.approx(np.exp(trained))
    network, tokenizer = torch_bridge.from_pretrained(str(inputs.base))
    config = TrainConfig(packing=True, max_length=64, per_device_train_batch_size=2)
    alone = jaxpack.evaluate(network, tokenizer, str(inputs.data), config)
    assert alone["eval_loss"] == pytest.approx(base, rel=1e-5)


def test_evaluation_sets_have_names(inputs: Inputs, tmp_path: Path, capfd: Any) -> None:
    lines = inputs.data.read_text().splitlines(keepends=True)
    files = {"a": lines[:5], "b": lines[5:8], "c": lines[8:]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    sets = [f"first={tmp_path}/a.jsonl", f"second={tmp_path}/b.jsonl", f"first={tmp_path}/c.jsonl"]
    flags = [word for one in sets for word in ("--eval-data", one)]
    train(*inputs.flags(tmp_path / "run"), *SETTINGS, *ADAPTER, *flags, "--max-steps", 1, "--save-steps", 0)
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert settings["eval_data"] == sets
    assert str(tmp_path) not in (tmp_path / "run" / "adapter" / "README.md").read_text()
    (recorded,) = (
        record
        for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in record
    )
    said = " ".join(capfd.readouterr().err.split())
    assert f"step 1 eval second_loss {recorded['eval_second_loss']:.4f} perplexity" in said
    flags = [word.replace("--eval-data", "--data") for word in flags]
    adapter = ["--adapter", tmp_path / "run" / "adapter"]
    jaxpack_command("evaluate", *adapter, *flags, *SETTINGS[:-2], "--output", tmp_path / "loss.json")
    found = json.loads((tmp_path / "loss.json").read_text())
    names = [f"eval_{name}{metric}" for name in ("", "first_", "second_") for metric in ("loss", "perplexity")]
    assert list(found) == names
    for name in names:
        assert found[name] == pytest.approx(recorded[name], rel=1e-5)


def test_training_goes_on_from_an_adapter(inputs: Inputs, adapter_run: Path, tmp_path: Path) -> None:
    train(*inputs.flags(tmp_path / "more"), *SETTINGS, *STEPS, "--adapter", adapter_run / "adapter")
    before, after = (run / "adapter" for run in (adapter_run, tmp_path / "more"))
    assert (after / "adapter_config.json").read_text() == (before / "adapter_config.json").read_text()
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, after))
    assert new.keys() == old.keys()
    # Three steps of Adam move no number by much more than the sum of their learning rates.
    for name, tensor in new.items():
        assert 0 < np.abs(tensor - old[name]).max() < 3.1e-2


def test_an_interrupt_saves_what_is_trained_so_far(
    inputs: Inputs, adapter_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    get = Batches.__getitem__

    def interrupt(batches: Batches, step: int) -> PackedBatch:
        if step == 2:
            raise KeyboardInterrupt
        return get(batches, step)

    monkeypatch.setattr(Batches, "__getitem__", interrupt)
    arguments = ["jaxpack", "train", *inputs.flags(tmp_path / "run"), *SETTINGS, *STEPS, *ADAPTER]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "interrupted: the weights are saved as they were after step 2" in capsys.readouterr().err
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    whole = load_file(adapter_run / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == whole.keys()
    for name, tensor in saved.items():
        if "lora_B" in name:
            assert np.abs(tensor).max() > 0  # trained for two steps
            assert (tensor != whole[name]).any()  # not for three


@pytest.mark.parametrize("fault", ["nan", "error"])
def test_cases_a_run_that_fails_leaves_the_adapter_of_its_last_whole_state(
    inputs: Inputs, adapter_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_status: Callable,
    capsys: pytest.CaptureFixture, fault: str,
) -> None:  # fmt: skip
    step = Run.step

    def fail(run: Run, batch: PackedBatch) -> Metrics:
        if run.started < 2:
            return step(run, batch)
        if fault == "error":
            raise RuntimeError("the driver is gone")
        metrics = step(run, batch)
        run.state = run.state._replace(trainable=jax.tree.map(lambda x: x * jnp.nan, run.state.trainable))
        return metrics._replace(loss=metrics.loss * jnp.nan)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", fail)
        arguments = ["train", *inputs.flags(tmp_path / "run"), *SETTINGS, *STEPS, *ADAPTER, "--save-steps", 2]
        if fault == "nan":
            assert exit_status(*arguments) == 1
        else:
            with pytest.raises(RuntimeError, match="the driver is gone"):
                exit_status(*arguments)
    told = capsys.readouterr().err
    assert "an error ended the run: the weights are saved as they were after step 2" in told
    assert "Traceback" not in told
    assert ("error: the run's weights must stay finite, but after step 3" in told) == (fault == "nan")
    arguments = ["--resume-from-checkpoint", "latest", "--save-steps", 2]
    assert exit_status("train", *inputs.flags(tmp_path / "run"), *SETTINGS, *STEPS, *ADAPTER, *arguments) == 0
    resumed, whole = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", adapter_run))
    assert resumed.read_bytes() == whole.read_bytes()


def test_an_interrupt_before_a_step_is_done_leaves_the_folder_to_the_next_run(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_status: Callable, capsys: Any
) -> None:
    def interrupt(run: Run, cache: object, **options: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "compile", interrupt)
    assert exit_status("train", *inputs.flags(tmp_path / "run"), *SETTINGS, *STEPS, *ADAPTER) == 130
    assert "interrupted before a step was done: there is nothing to save" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_that_goes_on_says_so(
    inputs: Inputs, adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = shutil.copytree(adapter_run, tmp_path / "run")
    train(*inputs.flags(output), *SETTINGS, *STEPS, *ADAPTER, "--resume-from-checkpoint", "latest")
    said = capsys.readouterr().err
    assert ", all steps were done in an earlier run" in said
    assert " tokens/s" not in said
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (output / name).read_bytes() == (adapter_run / name).read_bytes()


def test_a_finished_run_without_a_checkpoint_is_not_repeated(
    inputs: Inputs, adapter_run: Path, tmp_path: Path, exit_status: Callable, capsys: Any
) -> None:
    output = shutil.copytree(adapter_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    flags = [*inputs.flags(output), *SETTINGS, *STEPS, *ADAPTER, "--resume-from-checkpoint", "latest"]
    assert exit_status("train", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"whose run is finished: all 3 steps are done, and {output}/adapter holds the result. Choose" in error


def test_metrics_are_a_line_of_numbers_for_every_logging_steps_and_for_the_last_step(adapter_run: Path) -> None:
    content = (adapter_run / "metrics.jsonl").read_text()
    assert content.endswith("\n")
    records = [json.loads(line) for line in content.splitlines()]
    assert [record["step"] for record in records] == [2, 3]
    for record in records:
        assert record.keys() >= RECORD
        assert all(np.isfinite(value) for value in record.values())
        assert record["loss"] > 0
        assert record["grad_norm"] > 0
        assert record["tokens_per_second"] > 0
        assert 0 <= record["padding_share"] < 1
        assert 1e7 < record["peak_memory_bytes"] < 1e11
    # The rate decays linearly from 1e-2 to 0 in three steps: the second step has two thirds of it, the third one third.
    np.testing.assert_allclose([record["learning_rate"] for record in records], [2e-2 / 3, 1e-2 / 3], rtol=1e-5)


@pytest.mark.slow
def test_a_seed_fixes_every_byte_of_the_adapter(inputs: Inputs, adapter_run: Path, tmp_path: Path) -> None:
    # A separate process remembers nothing, and its strings have other hashes.
    flags = [*inputs.flags(tmp_path / "again"), *SETTINGS, *STEPS, *ADAPTER]
    command = [sys.executable, "-m", "jaxpack", "train", *map(str, flags)]
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as in conftest.py: same program
    done = subprocess.run(command, check=True, timeout=120, env=environment, stderr=subprocess.PIPE, text=True)
    assert "1 of 1 were found compiled" in done.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (adapter_run / "adapter" / name).read_bytes()


def test_full_finetuning_writes_a_model_that_reads_back_and_differs_from_its_base(
    inputs: Inputs, tmp_path: Path
) -> None:
    train(*inputs.flags(tmp_path / "run"), *SETTINGS, *STEPS, "--full-finetuning")
    written = ["about.json", "checkpoints", "metrics.jsonl", "model", "report.md", "report.png", "run.yaml"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == written
    base, _ = torch_bridge.from_pretrained(str(inputs.base))
    trained, tokenizer = torch_bridge.from_pretrained(str(tmp_path / "run" / "model"))
    assert tokenizer("ab the cab").input_ids == small_tokenizer()("ab the cab").input_ids
    assert dataclasses.replace(trained.config, name_or_path="") == dataclasses.replace(base.config, name_or_path="")
    before = dict(model_tensors(base))
    for name, tensor in model_tensors(trained):
        assert np.isfinite(tensor).all()
        # Adam's first update moves every element that has a gradient by the learning rate, about 1e-2.
        assert np.abs(np.asarray(tensor) - np.asarray(before[name])).max() > 5e-3, name


def test_named_chat_templates_are_saved_with_the_model(inputs: Inputs, tmp_path: Path) -> None:
    # transformers writes every template but the default into a separate folder.
    model, tokenizer = torch_bridge.from_pretrained(str(inputs.base))
    templates = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ messages[0]['role'] }}"}
    tokenizer.chat_template = templates
    torch_bridge.save_pretrained(model, str(tmp_path / "model"), tokenizer)
    assert torch_bridge.from_pretrained(str(tmp_path / "model"))[1].chat_template == templates


def test_a_run_on_a_mix_of_files_holds_out_a_share(inputs: Inputs, tmp_path: Path, capfd: Any) -> None:
    more = tmp_path / "more.csv"
    more.write_text("text\n" + "the cab\n" * 8)
    mixed = ["--data", f"{inputs.data}=0.5", "--data", f"{more}=0.5", "--eval-split", "0.25"]
    model = ["--model", inputs.base, "--output", tmp_path / "run"]
    train(*model, *mixed, *SETTINGS, *ADAPTER, "--max-steps", "1", "--save-steps", "0")
    said = " ".join(capfd.readouterr().err.split())
    assert f"8 of 20 rows of {inputs.data} (50.0%), 8 of 8 rows of {more} (50.0%)" in said
    assert " 12 documents, " in said
    assert "evaluation: 4 documents held out (eval_split 0.25), " in said
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert settings["data"] == [f"{inputs.data}=0.5", f"{more}=0.5"]
    assert settings["eval_split"] == 0.25


# --- Flags ------------------------------------------------------------------------------------------------------------

FIELDS = [
    (config, field)
    for config in (TrainConfig, LoraConfig)
    for field in dataclasses.fields(config)
    if field.name != "output_dir"  # its flag is --output
]


# Further flags, without which a setting may not have another value than its default.
PARTS = ["--instruction-part", "Q:", "--response-part", "A:"]
NEEDED = {
    "optim_args": ["--optim", "sgd"],
    "lr_scheduler_kwargs": ["--lr-scheduler-type", "cosine"],
    "instruction_part": PARTS,
    "response_part": PARTS,
    "streaming": ["--packing", "--max-steps", "9"],
    "early_stopping_threshold": ["--early-stopping-patience", "2"],
}


def flag_of(field: dataclasses.Field) -> str:
    return "--" + {"r": "lora_r"}.get(field.name, field.name).replace("_", "-")


def another_value(field: dataclasses.Field) -> Any:
    """Returns a valid value that is not the default."""
    special = {
        "max_length": 64,
        "max_steps": 7,
        "eval_steps": 7,
        "eval_split": 0.125,
        "early_stopping_patience": 3,
        "resume_from_checkpoint": "latest",
        "chat_template": "chatml",
        "instruction_part": "### Question:",
        "response_part": "### Answer:\n",
        "chat_template_date": "2031-02-03",
        "report_to": ("tensorboard",),
        "save_total_limit": 5,
        "memory_limit": 40.5,
        "optim": "adamw_8bit",
        "optim_args": "momentum=0.5",
        "lr_scheduler_kwargs": "num_cycles=2.0",
        "loraplus_lr_ratio": 16.0,
        "neftune_noise_alpha": 7.5,
        "offload_weights": "on",
        "offload_embedding": "off",
        "dataset_text_field": "body",
        "target_modules": ("q_proj", "v_proj"),
        "exclude_modules": ("k_proj",),
        "layers_to_transform": (0, 2),
        "rank_pattern": "q_proj=8,v_proj=4",
        "alpha_pattern": "q_proj=2.5",
        "modules_to_save": ("lm_head",),
        "target_parameters": ("mlp.experts.down_proj",),
        "implementation": "xla",
        "mesh": "data=1",
        "compilation_cache_dir": "programs",
    }
    if field.name in special:
        return special[field.name]
    if get_origin(field.type) is Literal:
        return next(choice for choice in get_args(field.type) if choice != field.default)
    if field.type is bool:
        return not field.default
    return field.default + 3 if field.type is int else field.default / 2 or 0.5


@pytest.fixture
def configurations(inputs: Inputs, tmp_path: Path, what_is_trained: Callable) -> Callable:
    """Returns the TrainConfig and the LoraConfig that flags make, without training."""

    def configurations(*flags: object) -> tuple[TrainConfig, LoraConfig]:
        found = what_is_trained(*inputs.flags(tmp_path / "run"), *flags)
        return found["config"], found["lora"]

    return configurations


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=lambda x: getattr(x, "name", None))
def test_every_field_has_a_flag_that_sets_it_alone(config: type, field: dataclasses.Field, configurations: Callable):
    value = another_value(field)
    assert value != field.default
    flag = flag_of(field)
    if isinstance(value, bool):
        given = [flag if value else f"--no-{flag[2:]}"]
    else:
        given = [flag, ",".join(map(str, value)) if isinstance(value, tuple) else value]
    needed = NEEDED.get(field.name, [])
    plain, changed = configurations(*needed), configurations(*needed, *given)
    for before, after in zip(plain, changed, strict=True):
        expected = {field.name: value} if hasattr(before, field.name) else {}  # --seed sets both seeds
        assert after == dataclasses.replace(before, **expected)


def test_defaults_are_those_of_the_dataclasses(configurations: Callable, tmp_path: Path) -> None:
    settings, lora = configurations()
    assert settings == TrainConfig(output_dir=str(tmp_path / "run"))
    assert lora == LoraConfig()


def test_the_default_of_a_flag_that_two_configurations_share_is_what_help_says(configurations: Callable) -> None:
    assert configurations() == configurations("--seed", TrainConfig().seed)


@pytest.mark.parametrize("columns", [80, 200])
def test_help_shows_every_flag_in_full(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    train("--help")
    shown = capsys.readouterr().out
    missing = [flag_of(field) for _, field in FIELDS if flag_of(field) not in shown]
    assert missing == []


def test_every_flag_has_help() -> None:
    group = typer.main.get_command(cli.app)
    command = group.get_command(typer.Context(group), "train")
    assert [parameter.name for parameter in command.params if not parameter.help] == []


# --- Imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["jaxpack", "torch_bridge", "the commands"])
def test_importing_needs_neither_torch_nor_transformers(module: str) -> None:
    names = [f"jaxpack.cli.{name}" for name in cli.COMMANDS] if module == "the commands" else [module]
    # `*`, because jaxpack imports its names when they are used; of torch_bridge's names, `from_torch` needs torch.
    imports = "; ".join(f"import {name}" if name == "torch_bridge" else f"from {name} import *" for name in names)
    script = f"{imports}; import sys; print(*({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""
    assert done.stderr == ""
