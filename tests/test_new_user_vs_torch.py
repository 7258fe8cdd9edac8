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

QUESTIONS = [{"prompt": f"What is {a} + {b}?", "completion": f" It is {a + b}."} for a in range(8) for b in range(8)]
_AT_MOST = 600  # seconds for the whole path on two cores


def here(start: str) -> str:
    return command(start).replace("path/to/Qwen3-4B", "build/demo/base")


def run(line: str, folder: Path) -> str:
    program, *arguments = shlex.split(line)
    assert program == "jaxpack"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxpack", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
