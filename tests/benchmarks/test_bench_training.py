"""The benchmark of the step runs, on one layer, and reports what it is asked for."""

import json
import os
import subprocess
import sys

import numpy as np

LENGTHS = "token_length_from,token_length_to,documents\n5,20,3\n20,90,1\n"


def test_smoke(tmp_path):
    lengths, output = tmp_path / "lengths.csv", tmp_path / "result.json"
    lengths.write_text(LENGTHS)
    command = f"benchmarks/bench_training.py --lengths {lengths} --model Qwen3-0.6B --layers 1 --rows 1 --steps 1"
    command += f" --max-length 128 --documents 100 --remat full none --output {output}"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    shown = subprocess.run(
        [sys.executable, *command.split()], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert shown.stdout.count("tokens/s") == 2
    full, everything = json.loads(output.read_text())["results"]
    assert (full["remat"], everything["remat"]) == ("full", "none")
    np.testing.assert_allclose(full["losses"], everything["losses"], atol=1e-2)
    assert full["tokens_per_second"] > 0
