"""Tests that the kernel benchmark runs at toy sizes and that its results are right."""

import json
import subprocess
import sys

import pytest

LENGTHS = "token_length_from,token_length_to,documents\n5,20,3\n20,90,1\n"


@pytest.mark.parametrize("operation", ["rope"])
@pytest.mark.slow
def test_smoke(operation, tmp_path):
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(LENGTHS)
    command = f"benchmarks/bench_kernels.py --smoke --no-peers --only {operation} --lengths {lengths}"
    subprocess.run([sys.executable, *command.split(), "--output-dir", tmp_path], check=True, stdout=subprocess.DEVNULL)
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["device"]
    assert result["versions"]["jax"]
    measured = [column for row in result["rows"] for column in row["columns"].values()]
    assert measured
    assert all(error < 0.02 for column in measured for error in column["errors"])
