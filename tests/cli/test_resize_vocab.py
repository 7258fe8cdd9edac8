"""Tests that a model whose tokenizer was given new tokens is trained, and its adapter used, by commands alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import yaml
from flax import nnx
from models import small_config
from tokenizers_for_tests import small_tokenizer

import torch_bridge
from jaxpack.model.transformer import Transformer

SETTINGS = ["--packing", "--max-length", 64, "--per-device-train-batch-size", 2, "--lora-r", 2]
SETTINGS += ["--max-steps", 2, "--save-steps", 1, "--learning-rate", "1e-2"]
WHOLE = ["--modules-to-save", "embed_tokens,lm_head"]


@pytest.fixture
def given(tmp_path: Path) -> list[Any]:
    """Writes a model, a tokenizer with two more tokens than the model has rows, and rows with one of the tokens."""
    tokenizer: Any = small_tokenizer()
    rows = len(tokenizer)
    model = Transformer(small_config("llama", vocab_size=rows), dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokenizer.add_tokens(["<one>", "<two>"])
    torch_bridge.save_pretrained(model, tmp_path / "base", tokenizer)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"the cab <two> {n}"}) + "\n" for n in range(8)))
    return ["--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", *SETTINGS]


def test_commands_train_generate_and_merge(given: list[Any], exit_status: Callable, tmp_path: Path, capfd: Any):
    rows = len(small_tokenizer())
    more = -(-(rows + 2) // 64) * 64
    assert exit_status("train", *given, "--output", tmp_path / "refused") == 2
    said = " ".join(capfd.readouterr().err.split())
    assert f"got {rows + 1} in" in said
    assert "`--resize-vocab` of `jaxpack train`" in said

    assert exit_status("train", *given, *WHOLE, "--resize-vocab", "--output", tmp_path / "run") == 0
    said = " ".join(capfd.readouterr().err.split())
    assert (
        f"have {more} rows, of which the last {more - rows} are new: 2 for tokens that the model does not know" in said
    )
    assert "not trained" not in said
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["resize_vocab"] is True
    for adapter in ("adapter", "checkpoints/latest"):
        asked = ["--prompt", "the <one>", "--max-new-tokens", 2, "--output", tmp_path / f"{len(adapter)}.jsonl"]
        assert exit_status("generate", "--adapter", tmp_path / "run" / adapter, *asked) == 0
    assert exit_status("export", "--adapter", tmp_path / "run" / "adapter", "--merged", tmp_path / "merged") == 0
    merged, _ = torch_bridge.from_pretrained(str(tmp_path / "merged"))
    assert merged.config.vocab_size == more
    resumed = ["--resume-from-checkpoint", tmp_path / "run" / "checkpoints" / "1", "--output", tmp_path / "resumed"]
    assert exit_status("train", *given, *WHOLE, "--resize-vocab", *resumed) == 0
    files = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", tmp_path / "resumed"))
    first, second = (path.read_bytes() for path in files)
    assert first == second


def test_a_run_says_if_new_rows_are_not_trained_or_not_needed(
    given: list[Any], exit_status: Callable, tmp_path: Path, capfd: Any
):
    flags = ["--resize-vocab", "--max-steps", 1, "--save-steps", 0]
    assert exit_status("train", *given, *flags, "--output", tmp_path / "frozen") == 0
    assert "the new rows of the embedding are not trained" in " ".join(capfd.readouterr().err.split())
    further = ["--adapter", tmp_path / "frozen" / "adapter"]
    without_rank = given[: given.index("--lora-r")] + given[given.index("--lora-r") + 2 :]
    assert exit_status("train", *without_rank, *flags, *further, "--output", tmp_path / "further") == 0
    assert "rows, which are enough for" in " ".join(capfd.readouterr().err.split())
