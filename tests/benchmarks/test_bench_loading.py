"""Tests that the loading benchmark measures both ways of loading, at a size too small for real figures."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_smoke():
    command = "benchmarks/bench_loading.py --model Qwen3-0.6B --layers 1 --vocab 1000 --repeats 1 --cold"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    shown = subprocess.run(
        [sys.executable, *command.split()], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result = json.loads(shown.splitlines()[-1])
    assert result["bytes"] > 2 * 15_000_000
    assert result["ratio"] == result["copy"]["seconds"] / result["load"]["seconds"] > 0
    assert result["load"]["host_bytes"] > 0 < result["copy"]["host_bytes"]
