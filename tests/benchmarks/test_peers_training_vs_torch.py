"""Tests that the opponents' checkpoint is complete, and that TRL's step runs where TRL and a GPU are present."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import random_documents, small_config
from plain_bitsandbytes import bitsandbytes

from benchmarks.peers_training import (
    SPECIAL_TOKENS,
    fill,
    keep_documents_apart,
    make_clock,
    steady,
    write_checkpoint,
    write_zeros,
)
from jaxpack.bench.cases import Case, Planned
from jaxpack.bench.processes import request_of
from jaxpack.data.synthetic import save_documents

LENGTHS = "token_length_from,token_length_to,documents\n5,20,3\n20,90,1\n"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("llama", {}),
        ("qwen3_moe", {}),
        ("gpt_oss", {}),
    ],
    ids=str,
)
def test_checkpoint_is_whole(family, changes, tmp_path):
    write_checkpoint(tmp_path, small_config(family, vocab_size=300, **changes))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    model, report = loaded
    assert not any(report.values())
    assert not any(weight.any() for weight in model.parameters())
    fill(model)
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"
    assert tokenizer.pad_token_id == model.config.pad_token_id == SPECIAL_TOKENS.index("<|pad|>") < 10
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_checkpoint_takes_no_disk_space(tmp_path):
    write_zeros(tmp_path / "model.safetensors", {"a": (1024, 1024), "b": (1024, 4096)})
    file = (tmp_path / "model.safetensors").stat()
    assert file.st_size > 10 * 2**20
    assert 512 * file.st_blocks < 2**20


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_weights_are_random_but_for_norms_and_biases(family, tmp_path):
    write_checkpoint(tmp_path, small_config(family, vocab_size=300))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    fill(model)
    weights = {name: weight.detach().float() for name, weight in model.named_parameters()}
    assert weights["model.norm.weight"].eq(1).all()
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert weight.eq(0).all()
        elif weight.ndim == 1 and "norm" in name:
            assert weight.eq(1).all()
        elif weight.ndim > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.15), name
    matrices = [weight for weight in weights.values() if weight.ndim > 1 and weight.any()]
    assert len({tuple(matrix.flatten()[:20].tolist()) for matrix in matrices}) == len(matrices)
    fill(model)
    assert all(torch.equal(weights[name], weight.float()) for name, weight in model.named_parameters())


@pytest.mark.parametrize("double", [False, True])
def test_weights_in_4_bits_decode_to_random_numbers(double):
    functional = bitsandbytes().functional
    quantised = (
        bitsandbytes()
        .nn.Params4bit(
            torch.zeros(256, 512, dtype=torch.bfloat16),
            quant_type="nf4",
            compress_statistics=double,
            requires_grad=False,
        )
        .to("cpu")
    )
    layer = torch.nn.Module()
    layer.weight = quantised if quantised.bnb_quantized else quantised._quantize("cpu")
    assert layer.weight.quant_state.nested == double
    fill(layer)
    decoded = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert decoded.shape == (256, 512)
    assert decoded.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(decoded.mean().item()) < 0.002
    assert len(decoded.unique()) > 1000  # each block has its own scale: a matmul of few values takes less power


def test_packed_documents_of_gpt_oss_do_not_see_each_other(tmp_path):
    write_checkpoint(tmp_path, small_config("gpt_oss", vocab_size=300))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    fill(model)
    keep_documents_apart(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 10)  # all parts matter
        ids = torch.arange(10, 50)[None]
        documents = ids[:, :17], ids[:, 17:]
        positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(input_ids=document, use_cache=False).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)  # float32, in two layers
    assert packed.std() > 0.1


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adapts_experts", [False, True])
@pytest.mark.parametrize(
    ("family", "system", "layout"),
    [
        ("qwen3_moe", "trl", "packed"),
        ("qwen3_moe", "unsloth", "packed"),
        ("gpt_oss", "trl", "packed"),
        ("gpt_oss", "unsloth", "padded"),
    ],
)
def test_smoke_of_mixtures(family, system, layout, adapts_experts, tmp_path):
    if importlib.util.find_spec(system) is None:
        pytest.skip(f"needs {system}")
    sizes = {"hidden_size": 128, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8}
    sizes |= {"intermediate_size": 128} if family == "gpt_oss" else {}
    write_checkpoint(tmp_path / "checkpoint", small_config(family, vocab_size=512, **sizes))
    save_documents(tmp_path / "documents.npz", random_documents([20, 400, 100, 300] * 20, vocab_size=500))
    case = Case(
        model="checkpoint",
        system=system,
        layout=layout,
        rows=2,
        remat="unsloth" if system == "unsloth" else "full",
        adapts_experts=adapts_experts,
        steps=2,
    )
    paths = {name: str(tmp_path / name) for name in ("checkpoint", "documents")}
    paths["documents"] += ".npz"
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps(request_of(Planned("cases", layout, case), **paths, warm_up=2)))
    script = Path("benchmarks/peers_training.py").resolve()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    subprocess.run([sys.executable, str(script), str(request), str(result)], check=True, cwd=tmp_path, env=environment)
    record = json.loads(result.read_text())
    assert record["experts"] == "grouped_mm"
    assert all(abs(loss - math.log(512)) < 0.5 for loss in record["losses"])
