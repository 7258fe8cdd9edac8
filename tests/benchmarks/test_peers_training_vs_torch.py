"""Tests that the opponents' checkpoint is complete, and that TRL's step runs where TRL and a GPU are present."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from models import small_config

from benchmarks.peers_training import SPECIAL_TOKENS, make_clock, steady, write_checkpoint

LENGTHS = "token_length_from,token_length_to,documents\n5,20,3\n20,90,1\n"


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_is_whole(tied, tmp_path):
    write_checkpoint(tmp_path, small_config("qwen3", vocab_size=300, tie_word_embeddings=tied))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values())
    weights = dict(model.named_parameters())
    assert weights["model.norm.weight"].eq(1).all()
    projections = [weights[f"model.layers.0.mlp.{name}_proj.weight"].float() for name in ("gate", "up")]
    assert not torch.equal(*projections)
    assert all(0.015 < x.std() < 0.025 for x in projections)
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"
    assert tokenizer.pad_token_id == model.config.pad_token_id == SPECIAL_TOKENS.index("<|pad|>") < 10
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_a_step_that_is_larger_than_all_before_it_is_not_counted():
    assert steady([5, 3, 5, 6, 6, 2, 7]).tolist() == [False, True, True, False, True, True, False]


@pytest.mark.parametrize("lengths", [[3, 5, 2], [16]], ids=str)
def test_places_behind_the_last_document_are_no_tokens(lengths):
    clock = make_clock({"layout": "packed", "rows": 2, "max_length": 8})
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(16 - sum(lengths), dtype=torch.long)])
    clock.count({"input_ids": torch.arange(16)[None], "position_ids": positions[None]})
    assert (clock.tokens, clock.documents, clock.slots) == ([sum(lengths)], [len(lengths)], [16])


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or not torch.cuda.is_available(), reason="needs TRL and a GPU"
)
@pytest.mark.parametrize("layout", ["padded", "padding-free"])
def test_smoke(layout, tmp_path):
    lengths, output = tmp_path / "lengths.csv", tmp_path / "result.json"
    lengths.write_text(LENGTHS)
    command = f"benchmarks/bench_training.py --system trl --layout {layout} --lengths {lengths} --model tiny"
    command += f" --rows 2 --steps 2 --documents 60 --output {output} --remat full none"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, *command.split()], check=True, env=environment)
    results = json.loads(output.read_text())["results"]
    assert all(result["documents_in_step"] == 10 * [2] for result in results)
    assert (results[0]["padding_share"] > 0) == (layout == "padded")
