"""Tests that bad input ends in one sentence and exit status 2, and leaves every folder unchanged."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers_for_tests import small_tokenizer

import torch_bridge
from jaxpack.errors import InputError
from jaxpack.train.trainer import Trainer, TrainResult

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GOOD = [{"text": f"the cab {row} " * (1 + row % 4)} for row in range(12)]
OF_A_RUN = {"about.json", "checkpoints", "metrics.jsonl", "report.md", "run.yaml"}  # a run of one step has no picture
ONE_STEP = ["--packing", "--max-length", "64", "--per-device-train-batch-size", "2", "--max-steps", "1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture, exit_status: Callable[..., int]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process. Returns its exit status and its stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        status = exit_status(*arguments)
        out, err = capfd.readouterr()
        assert out == ""
        return status, err

    return run


def run_process(*arguments: object, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m jaxpack` in a process that executes the statements `before` first, if given."""
    start = ["-c", f"{before}; from jaxpack.cli import main; main()"] if before else ["-m", "jaxpack"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    """Returns every path below a folder, with the contents of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def the_error(stderr: str) -> str:
    """Returns the one sentence that stderr holds; besides, it may only say which rows have been read."""
    lines = [line for line in stderr.splitlines() if line.strip() and not re.search(r": [\d,]+ rows? of ", line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    assert lines[0].endswith("."), stderr
    assert not lines[0].endswith(".."), stderr
    return lines[0]


def require_all(fragments: list[str], message: str) -> None:
    for fragment in fragments:
        assert fragment in message


# --- Data -------------------------------------------------------------------------------------------------------------


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# The data file's contents (None: there is no file), and what the message says.
BAD_DATA: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["`data`", "existing file", "rows.jsonl"]),
    "empty": (b"", ["`data` must have at least one row", "rows.jsonl"]),
    "array": (
        b"[" + jsonl(GOOD[0]),
        ["must be JSON Lines, or one JSON array of objects", "rows.jsonl", "one value that cannot be read"],
    ),
    "not_json": (jsonl(GOOD[0], GOOD[1]) + b"\nthe cab\n" + jsonl(GOOD[2]), ["Line 4 of", "rows.jsonl", "JSON"]),
    "not_utf8": (jsonl(GOOD[0]) + '{"text": "é"}\n'.encode("latin-1"), ["Line 2 of", "rows.jsonl"]),
    "no_known_field": (jsonl({"question": "the", "answer": "cab"}), ["line 1 of", "'question'", "`text`"]),
    "field_missing": (jsonl(GOOD[0], {"txt": "the"}), ["line 2 of", "`text`", "'txt'"]),
    "labels_masked": (
        jsonl(
            {"input_ids": small_tokenizer()("the cab").input_ids, "labels": [-100] * 4},
            {"input_ids": [3, 4], "labels": [-100] * 2},
        ),
        ["2 rows with none", "line 1 of", "'the cab'"],
    ),
    "ids_past_the_vocabulary": (
        jsonl({"input_ids": [1, 2]}, {"input_ids": [1, 263]}),
        ["line 2 of", "263)", "got 263"],
    ),
    "messages_without_a_template": (jsonl({"messages": [{"role": "user", "content": "the"}]}), ["chat template"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name: str, base: Path, tmp_path: Path, run: Callable) -> None:
    content, fragments = BAD_DATA[name]
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_bytes(content)
    before = contents(tmp_path)
    status, stderr = run("train", "--model", base, "--data", data, "--output", tmp_path / "runs" / "first", *ONE_STEP)
    assert status == 2
    require_all(fragments, the_error(stderr))
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_bad_data_in_a_real_process(base: Path, tmp_path: Path) -> None:
    content, fragments = BAD_DATA["labels_masked"]
    (tmp_path / "rows.jsonl").write_bytes(content)
    before = contents(tmp_path)
    done = run_process("train", "--model", base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    require_all(fragments, the_error(done.stderr))
    assert contents(tmp_path) == before


def test_a_refusal_prints_no_empty_lines(base: Path, tmp_path: Path, run: Callable) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl({"text": 1}))
    _, stderr = run("train", "--model", base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run")
    assert stderr == the_error(stderr) + "\n"


def test_an_empty_output_folder_stays_as_it_was(base: Path, tmp_path: Path, run: Callable) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (tmp_path / "rows.jsonl").write_bytes(b"")
    assert run("train", "--model", base, "--data", tmp_path / "rows.jsonl", "--output", output)[0] == 2
    assert output.is_dir()
    assert not any(output.iterdir())


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def sharded(files: dict[str, str] | object) -> Callable[[Path], None]:
    """Turns the weights into one shard, beside an index file that holds `files`."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(json.dumps(files))

    return damage


def with_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def with_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def with_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
TWO_SHARDS = {"weight_map": {NORM: "model-00001-of-00002.safetensors", DOWN: "model-00002-of-00002.safetensors"}}

# The change to the folder, and what the message says.
BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no_folder": (shutil.rmtree, ["`model`", "model"]),
    "no_config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config_is_no_json": (with_file("config.json", b"{"), ["config.json", "JSON"]),
    "config_is_a_list": (with_file("config.json", b"[]"), ["config.json", "JSON object", "[]"]),
    "unsupported_architecture": (
        with_config(architectures=["GPT2LMHeadModel"]),
        ["`architectures`", "'Qwen3ForCausalLM'", "'GPT2LMHeadModel'"],
    ),
    "architectures_is_a_string": (
        with_config(architectures="Qwen3ForCausalLM"),
        ["`architectures`", "got 'Qwen3ForCausalLM'"],
    ),
    "unsupported_option": (with_config(hidden_act="relu"), ["`hidden_act`", "'silu'", "'relu'"]),
    "config_without_a_number": (with_config(vocab_size=None), ["config.json", "vocab_size", "None"]),
    "config_with_text_for_a_number": (with_config(hidden_size="48"), ["config.json", "hidden_size", "'48'"]),
    "config_with_text_for_a_real_number": (with_config(rms_norm_eps="1e-6"), ["config.json", "rms_norm_eps", "'1e-6'"]),
    "config_with_a_float_for_a_number": (with_config(num_hidden_layers=2.5), ["num_hidden_layers", "2.5"]),
    "rope_is_no_object": (with_config(rope_parameters="default"), ["rope_parameters", "'default'"]),
    "no_weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS, INDEX]),
    "missing_shard": (sharded(TWO_SHARDS), ["index", "'model-00002-of-00002.safetensors'"]),
    "index_is_no_object": (sharded([]), [INDEX, "JSON object"]),
    "index_with_a_list": (sharded({"weight_map": ["model-00001-of-00002.safetensors"]}), [INDEX, "weight_map"]),
    "index_with_a_name_too_long": (sharded({"weight_map": {NORM: "é" * 200}}), [INDEX, "ééé"]),
    "index_that_leaves_the_folder": (sharded({"weight_map": {NORM: "../x.safetensors"}}), [INDEX, "../x.safetensors"]),
    "truncated": (truncated, [WEIGHTS, "complete"]),
    "garbage": (with_file(WEIGHTS, b"\xff" * 1000), [WEIGHTS, "safetensors file"]),
    "garbage_header": (with_file(WEIGHTS, (64).to_bytes(8, "little") + b"x" * 64), [WEIGHTS, "safetensors file"]),
    "pointer": (with_file(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS, "git lfs pull"]),
    "empty_weights": (with_file(WEIGHTS, b""), [WEIGHTS, "safetensors file"]),
    "wrong_shape": (
        with_tensors(lambda tensors: tensors.update({DOWN: np.zeros((48, 81), np.float32)})),
        [DOWN, "[48, 81]", "[48, 80]", "1 tensor of the wrong shape"],
    ),
    "missing_tensor": (with_tensors(lambda tensors: tensors.pop(DOWN)), ["1 missing", DOWN]),
    "integer_dtype": (
        with_tensors(lambda tensors: tensors.update({NORM: np.ones(48, np.int32)})),
        [NORM, "I32", "BF16"],
    ),
    "wrong_shape_and_missing_tensor": (
        with_tensors(lambda tensors: [tensors.pop(DOWN), tensors.update({NORM: np.ones(47, np.float32)})]),
        ["1 missing", DOWN, "1 tensor of the wrong shape", NORM],  # one message names all mistakes
    ),
    "tokenizer_is_garbage": (with_file("tokenizer.json", b"the cab"), ["tokenizer"]),
    "tokenizer_is_a_list": (with_file("tokenizer.json", b"[]"), ["tokenizer"]),
    "tokenizer_config_is_a_list": (with_file("tokenizer_config.json", b"[]"), ["tokenizer"]),
    "config_that_the_tokenizer_refuses": (
        with_config(initializer_range="0.02"),
        ["tokenizer", "initializer_range", "'0.02'"],
    ),
    "model_type_of_another": (with_config(model_type="llama"), ["`model_type`", "'qwen3'", "'llama'"]),
    "tokenizer_is_missing_its_vocabulary": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(name: str, base: Path, data: Path, tmp_path: Path, run: Callable) -> None:
    damage, fragments = BAD_CHECKPOINTS[name]
    model = shutil.copytree(base, tmp_path / "model")
    damage(model)
    before = contents(tmp_path)
    status, stderr = run("train", "--model", model, "--data", data, "--output", tmp_path / "runs" / "first", *ONE_STEP)
    assert status == 2
    require_all(fragments, the_error(stderr))
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_bad_checkpoint_in_a_real_process(base: Path, data: Path, tmp_path: Path) -> None:
    damage, fragments = BAD_CHECKPOINTS["missing_shard"]
    model = shutil.copytree(base, tmp_path / "model")
    damage(model)
    before = contents(tmp_path)
    done = run_process("train", "--model", model, "--data", data, "--output", tmp_path / "run")
    assert done.returncode == 2
    require_all(fragments, the_error(done.stderr))
    assert contents(tmp_path) == before


def test_a_relative_folder_that_does_not_exist_and_the_hub_does_not_know(data: Path, tmp_path: Path) -> None:
    # "models/qwen" might be a model id, so the hub is asked. The hub's own message is long.
    before = contents(tmp_path)
    done = run_process(
        "train", "--model", "models/qwen", "--data", data, "--output", tmp_path / "run", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 2
    require_all(["`model`", "existing folder", "'models/qwen'"], the_error(done.stderr))
    assert contents(tmp_path) == before


# --- Flags ------------------------------------------------------------------------------------------------------------

# The flag, and what the message says: the flag's name as typed, the rule, and the value.
BAD_FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "max_length": (["--max-length", "1"], ["max_length", "at least 2", "got 1"]),
    "max_steps": (["--max-steps", "0"], ["max_steps", "positive", "got 0"]),
    "batch_size": (["--per-device-train-batch-size", "0"], ["per_device_train_batch_size", "at least 1", "got 0"]),
    "learning_rate": (["--learning-rate", "-1"], ["learning_rate", "positive", "got -1.0"]),
    "learning_rate_nan": (["--learning-rate", "nan"], ["learning_rate", "got nan"]),
    "learning_rate_inf": (["--learning-rate", "inf"], ["learning_rate", "got inf"]),
    "epochs_inf": (["--num-train-epochs", "inf", "--max-steps", "-1"], ["num_train_epochs", "got inf"]),
    "adam_beta2": (["--adam-beta2", "1"], ["adam_beta2", "[0, 1)", "got 1.0"]),
    "optim": (["--optim", "lion_8bit"], ["`optim` must be among ('adamw', 'adamw_8bit'", "got 'lion_8bit'. Use '"]),
    "lora_r": (["--lora-r", "0"], ["lora_r", "at least 1", "got 0"]),
    "lora_alpha": (["--lora-alpha", "0"], ["lora_alpha", "positive", "got 0.0"]),
    "lora_dropout": (["--lora-dropout", "1"], ["lora_dropout", "[0, 1)", "got 1.0"]),
    "target_modules": (["--target-modules", "q_proj,query"], ["target_modules", "'v_proj'", "['query']"]),
    "rank_pattern": (["--rank-pattern", "q_proj"], ["rank_pattern", "'q_proj=8,v_proj=4'", "got 'q_proj'"]),
    "adapter_and_a_new_one": (
        ["--adapter", "x", "--lora-r", "4"],
        ["`adapter`", "without flags of a new adapter, got both. Leave one"],
    ),
    "adapter_and_all_weights": (
        ["--adapter", "x", "--full-finetuning"],
        ["`full_finetuning`", "without flags of adapters, got both. Leave one"],
    ),
    "adapter_that_is_none": (["--adapter", "x"], ["`adapter`", "adapter_config.json", "'x'"]),
    "no_target_modules": (["--target-modules", ","], ["target_modules", "at least one"]),
    "dtype": (["--dtype", "int8"], ["dtype", "'bfloat16'", "got 'int8'"]),
    "save_steps": (["--save-steps", "-1"], ["save_steps", "a whole number of at least 0, or a share", "got -1"]),
    "save_total_limit": (["--save-total-limit", "0"], ["save_total_limit", "at least 1", "got 0"]),
    "weight": (["--data", "x.jsonl=many"], ["`data` must have a positive number", "'x.jsonl=many'"]),
    "pattern": (["--data", "nowhere/*.csv"], ["`data` must match at least one file", "'nowhere/*.csv'"]),
    "eval_split": (["--eval-split", "1"], ["`eval_split` must be a share", "0.02", "got 1.0"]),
    "eval_split_and_data": (
        ["--eval-split", "0.5", "--eval-data", "/proc/version"],
        ["`eval_split` must be None with an `eval_data`, got 0.5. Leave one of them out"],
    ),
    "eval_steps": (["--eval-steps", "0"], ["eval_steps", "at least 1", "got 0"]),
    "eval_steps_without_data": (["--eval-steps", "5"], ["eval_steps", "without an `eval_data`", "got 5"]),
    "eval_data": (["--eval-data", "nowhere.jsonl"], ["eval_data", "existing file", "got 'nowhere.jsonl'"]),
    "eval_data_of_a_set": (
        ["--eval-data", "math=nowhere.jsonl"],
        ["Evaluation set 'math': `eval_data` must be an existing file", "got 'nowhere.jsonl'"],
    ),
    "eval_data_with_a_name_and_without": (
        ["--eval-data", "math=/proc/version", "--eval-data", "/proc/version"],
        ["`eval_data` must have a name before each path", "got '/proc/version' without one beside the set 'math'"],
    ),
    "eval_steps_between_saves": (
        ["--eval-data", "/proc/version", "--eval-steps", "3", "--save-steps", "100"],
        ["`save_steps` must be a multiple of `eval_steps` (3)", "got 100"],
    ),
    "resume_from_no_checkpoint": (
        ["--resume-from-checkpoint", "/proc"],
        ["`resume_from_checkpoint` must be the folder of a checkpoint", "got '/proc'"],
    ),
    "report_to": (["--report-to", "tensorboard,comet"], ["report_to", "'wandb'", "got 'tensorboard,comet'"]),
    "config_of_no_known_kind": (["--config", "run.json"], ["`config`", ".yaml, .yml or .toml", "got 'run.json'"]),
    "eval_data_of_no_known_kind": (["--eval-data", "/proc/version"], ["`eval_data` must end in .jsonl", "got '/proc"]),
    "text_field": (["--dataset-text-field", "body"], ["`dataset_text_field` must be a field", "'body'", "['text']"]),
    "padded": (["--no-padding-free"], ["`padding_free` must be true with `packing`", "got False"]),
    "seed": (["--seed", str(10**30)], ["`seed` must be in [0, 2**32)", f"got {10**30}"]),
    "huge_batch": (["--per-device-train-batch-size", str(10**12)], ["`per_device_train_batch_size`", "below 2**31"]),
    "huge_rows": (["--max-length", str(10**11)], ["times the length of a row", "got 200000000000"]),
    "endless": (["--max-steps", str(10**12)], ["`max_steps` must come to at most 10,000,000 steps", "got 1,000,000,"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flag(name: str, base: Path, data: Path, tmp_path: Path, run: Callable) -> None:
    flags, fragments = BAD_FLAGS[name]
    before = contents(tmp_path)
    status, stderr = run("train", "--model", base, "--data", data, "--output", tmp_path / "run", *ONE_STEP, *flags)
    assert status == 2
    require_all(fragments, the_error(stderr))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--pakcing"], ["--pakcing", "--packing"]),
        (["--packing-strategy", "nonsense"], ["--packing-strategy", "nonsense", "bfd_split"]),
        (["--max-steps", "many"], ["--max-steps", "valid int"]),
        (["--lr-scheduler-type"], ["--lr-scheduler-type", "argument"]),
    ],
    ids=["typo", "no_such_choice", "no_number", "no_value"],
)
def test_a_flag_that_cannot_be_parsed_is_a_usage_error(
    flags: list[str], fragments: list[str], base: Path, data: Path, tmp_path: Path, run: Callable
) -> None:
    before = contents(tmp_path)
    status, stderr = run("train", "--model", base, "--data", data, "--output", tmp_path / "run", *flags)
    assert status == 2
    assert "Traceback" not in stderr
    require_all(fragments, stderr)
    assert contents(tmp_path) == before


def test_a_bad_flag_in_a_real_process(tmp_path: Path) -> None:
    # Neither of these files exists, since flags are checked before anything is read.
    done = run_process("train", "--model", "x", "--data", "y", "--output", tmp_path / "run", "--max-length", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    require_all(["`max_length`", "got 1"], the_error(done.stderr))
    assert contents(tmp_path) == {}


def test_a_bad_flag_of_generate_in_a_real_process(tmp_path: Path) -> None:
    done = run_process("generate", "--model", "x", "--prompt", "the cab", "--temperature", "-1")
    assert done.returncode == 2
    assert done.stdout == ""
    require_all(["`temperature`", "0 or a positive number", "got -1.0"], the_error(done.stderr))


@pytest.mark.parametrize("name", ["truncated", "missing_tensor", "tokenizer_is_garbage"])
def test_generate_refuses_a_bad_checkpoint_too(name: str, base: Path, tmp_path: Path, run: Callable) -> None:
    damage, fragments = BAD_CHECKPOINTS[name]
    model = shutil.copytree(base, tmp_path / "model")
    damage(model)
    before = contents(tmp_path)
    status, stderr = run("generate", "--model", model, "--prompt", "the cab", "--output", tmp_path / "texts.jsonl")
    assert status == 2
    require_all(fragments, the_error(stderr))
    assert contents(tmp_path) == before


# --- Output folders ---------------------------------------------------------------------------------------------------


def occupied(parent: Path) -> Path:
    (parent / "run").mkdir()
    (parent / "run" / "notes.txt").write_text("mine")
    return parent / "run"


def a_file(parent: Path) -> Path:
    (parent / "run").write_text("mine")
    return parent / "run"


@pytest.mark.parametrize(
    ("prepare", "fragments"),
    [
        (occupied, ["`output`", "empty", "run'"]),
        (a_file, ["`output`", "folder", "is a file", "run'"]),
        (lambda parent: a_file(parent) / "deeper", ["`output`", "deeper"]),
        (lambda _: Path("/proc/jaxpack"), ["`output`", "/proc"]),
        (lambda parent: parent / ("x" * 300), ["`output`", "xxx", os.strerror(errno.ENAMETOOLONG)]),
    ],
    ids=["occupied", "a_file", "below_a_file", "not_writable", "too_long"],
)
def test_bad_output(prepare: Callable, fragments: list[str], base: Path, data: Path, tmp_path: Path, run: Callable):
    output = prepare(tmp_path)
    before = contents(tmp_path)
    status, stderr = run("train", "--model", base, "--data", data, "--output", output, *ONE_STEP)
    assert status == 2
    require_all(fragments, the_error(stderr))
    assert contents(tmp_path) == before


def test_demo_refuses_an_occupied_folder_too(tmp_path: Path, run: Callable) -> None:
    output = occupied(tmp_path)
    before = contents(tmp_path)
    status, stderr = run("demo", "--output", output)
    assert status == 2
    require_all(["`output`", "empty"], the_error(stderr))
    assert contents(tmp_path) == before


# --- A disk that fills ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Makes the kernel refuse to let files grow beyond a size; Python ignores the signal, so the write fails."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def limit_files(num_bytes: int) -> str:
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes},) * 2)"


def whole_lines(path: Path) -> list[dict]:
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.slow
def test_a_disk_that_fills_while_the_adapter_is_saved(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_process(  # the adapter has more than 100 kB, all else under 2 kB
        "train", "--model", base, "--data", data, "--output", output, *ONE_STEP, before=limit_files(16_384)
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(errors[0])
    require_all(["`output`", str(output / "adapter"), os.strerror(errno.EFBIG)], errors[0])
    assert {path.name for path in output.iterdir()} == OF_A_RUN  # no adapter/, no temporary folder
    assert len(whole_lines(output / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_a_disk_that_fills_with_metrics_does_not_stop_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    output, limit = tmp_path / "run", 8_000  # each file of the adapter: 6 kB at most; 30 lines of metrics: 10 kB
    flags = ["--lora-r", "1", "--target-modules", "q_proj", "--logging-steps", "1", "--max-steps", "30"]
    done = run_process(
        "train", "--model", base, "--data", data, "--output", output, *ONE_STEP, *flags, before=limit_files(limit)
    )
    assert done.returncode == 0, done.stderr
    lines = whole_lines(output / "metrics.jsonl")
    assert 1 < len(lines) < 30
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert (output / "metrics.jsonl").stat().st_size > limit - 500  # the run used the room that it had
    assert "metrics.jsonl ends here" in done.stderr
    assert "step    30" in done.stderr
    assert load_file(output / "adapter" / "adapter_model.safetensors")


def fill(disk: Path, leave: int) -> None:
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - leave))


def test_a_disk_without_room_for_the_adapter_is_refused_before_training(
    base: Path, data: Path, small_disk: Path, run: Callable
) -> None:
    fill(small_disk, leave=65_536)  # the adapter has more than 100 kB
    before = contents(small_disk)
    status, stderr = run("train", "--model", base, "--data", data, "--output", small_disk / "run", *ONE_STEP)
    assert status == 2
    require_all(["`output`", str(small_disk), "65,536"], the_error(stderr))
    assert contents(small_disk) == before


@pytest.mark.slow
def test_a_disk_that_something_else_fills_during_the_run(
    base: Path, data: Path, small_disk: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_and_fill(trainer: Trainer, *options: Callable) -> TrainResult:
        result = train(trainer, *options)
        fill(small_disk, leave=65_536)
        return result

    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", train_and_fill)
    output = small_disk / "run"
    status, stderr = run("train", "--model", base, "--data", data, "--output", output, *ONE_STEP)
    assert status == 2
    require_all(["error: ", str(output / "adapter"), os.strerror(errno.ENOSPC)], stderr.rstrip().splitlines()[-1])
    assert {path.name for path in output.iterdir()} == OF_A_RUN  # no adapter/, no temporary folder
    assert len(whole_lines(output / "metrics.jsonl")) == 1


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_disk_that_fills_while_a_model_is_saved(what: str, base: Path, tmp_path: Path) -> None:
    model, tokenizer = torch_bridge.from_pretrained(str(base))
    tokenizer.add_tokens([f"word {i}" for i in range(4_000)])  # the tokenizer is now larger than the weights
    limit = {"weights": 100_000, "tokenizer": 300_000}[what]
    with files_of_at_most(limit), pytest.raises(InputError) as caught:
        torch_bridge.save_pretrained(model, str(tmp_path / "model"), tokenizer)
    assert str(tmp_path / "model") in str(caught.value)
    assert contents(tmp_path) == {}
