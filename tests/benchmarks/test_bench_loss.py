"""Tests that the loss benchmark computes a plausible loss."""

import json
import math
import os
import subprocess
import sys


def test_smoke():
    command = "benchmarks/bench_loss.py --tokens 128 --vocab 500 --hidden 32"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    shown = subprocess.run(
        [sys.executable, *command.split()], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result = json.loads(shown.splitlines()[-1])
    assert abs(result["loss"] - math.log(500)) < 0.1  # the head's logits are near zero
    assert result["gradient_bytes"] >= 2 * (128 + 500) * 32
    assert result["seconds"] > 0
