"""Walks a new user's path by the README alone.

The path: the demo, training on one's own JSONL, an adapter that PEFT loads, text from the adapter, the run repeated by
its settings, and the run resumed from its last checkpoint.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from readme_blocks import ROOT, command
from tokenizers_for_tests import write_checkpoint

QUESTIONS = [{"prompt": f"What is {a} + {b}?", "completion": f" It is {a + b}."} for a in range(8) for b in range(8)]
_AT_MOST = 600  # seconds for the whole path on two cores


def here(start: str) -> str:
    return command(start).replace("path/to/Qwen3-4B", "build/demo/base")


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(line)
    assert program == "jaxpack"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "jaxpack", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def run(line: str, folder: Path) -> str:
    done = typed(line, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(line: str, folder: Path) -> str:
    done = typed(line, folder)
    assert done.returncode == 2, done.stderr
    return done.stderr


CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in QUESTIONS
]
ALPACA = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in QUESTIONS]
SHAREGPT = [
    {
        "id": str(i),
        "conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}],
    }
    for i, row in enumerate(QUESTIONS)
]


@pytest.mark.slow
def test_a_chat_file_an_alpaca_file_and_a_sharegpt_dump_train_one_adapter(tmp_path: Path) -> None:
    begin = time.monotonic()
    write_checkpoint(tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (tmp_path / "alpaca_data.json").write_text(json.dumps(ALPACA))
    (tmp_path / "dump.json").write_text(json.dumps(SHAREGPT))
    files = "--data chats.jsonl --data alpaca_data.json --data dump.json"
    small = {"--data train.jsonl": files, "path/to/Qwen3-4B": "base", "4096": "512", "200": "8", "2e-4": "2e-2"}
    line = (
        re.sub("|".join(small), lambda found: small[found.group()], command("jaxpack train --model"))
        + " --logging-steps 1"
    )
    refused = fail(line, tmp_path)  # a base model has no chat template
    assert "`tokenizer` must have a chat template for rows of messages, got one without. Set `chat_template`" in refused
    run(f"{line} --chat-template alpaca", tmp_path)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    (tmp_path / "asked.jsonl").write_text(json.dumps(CHATS[9]) + "\n")
    run("jaxpack generate --adapter out/adapter --prompts asked.jsonl --max-new-tokens 8 --output text.jsonl", tmp_path)
    (shown,) = map(json.loads, (tmp_path / "text.jsonl").read_text().splitlines())
    assert shown["prompt"] == CHATS[9]["messages"][:1]
    assert time.monotonic() - begin < _AT_MOST


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls deprecated functions of transformers
def test_from_the_demo_to_text_of_ones_own_adapter(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    begin = time.monotonic()
    run("jaxpack demo --output build/demo", tmp_path)  # the command behind `make demo`
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    assert "padding-free" in run(here("jaxpack inspect"), tmp_path)
    assert (tmp_path / "lengths.png").exists()
    small = {"4096": "128", "200": "40", "2e-4": "2e-2"}
    run(re.sub("|".join(small), lambda found: small[found.group()], here("jaxpack train --model")), tmp_path)

    first, again = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("out", "again"))
    run("jaxpack train --config out/run.yaml --output again", tmp_path)
    assert again.read_bytes() == first.read_bytes()
    again.unlink()
    run("jaxpack train --config again/run.yaml --resume-from-checkpoint latest", tmp_path)
    assert again.read_bytes() == first.read_bytes()

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "build/demo/base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "build/demo/base")
    tokens = tokenizer(QUESTIONS[9]["prompt"], return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(tokens).logits
        tuned = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        assert (tuned(tokens).logits - before).abs().max() > 1
        written = tuned.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
    theirs = tokenizer.decode(written, skip_special_tokens=True)

    line = here("jaxpack generate").replace("two and two", QUESTIONS[9]["prompt"]).replace("64", "8")
    run(f"{line.strip()} --output text.jsonl", tmp_path)
    (shown,) = map(json.loads, (tmp_path / "text.jsonl").read_text().splitlines())
    assert shown["completion"] == theirs
    assert "It is" in theirs
    assert shown["without_adapter"] != theirs
    assert time.monotonic() - begin < _AT_MOST
