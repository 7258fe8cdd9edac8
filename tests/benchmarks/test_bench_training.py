"""Tests that the step benchmark runs on a small model and records what it measures and what fails."""

import json
import os
import subprocess
import sys

import pytest

from jaxpack.bench.cases import Case, Planned
from jaxpack.bench.processes import request_of
from jaxpack.cli.measure import measure_here

LENGTHS = "token_length_from,token_length_to,documents\n5,20,3\n20,90,1\n"


@pytest.mark.slow
def test_a_part_is_measured_the_rest_is_kept_and_what_fails_is_recorded(tmp_path):
    lengths, output = tmp_path / "lengths.csv", tmp_path / "result.json"
    lengths.write_text(LENGTHS)

    def run(*more: str) -> subprocess.CompletedProcess:
        command = f"benchmarks/bench_training.py --lengths {lengths} --model tiny --rows 1 --steps 1"
        command += f" --max-length 128 --documents 100 --output {output}"
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "TMPDIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *command.split(), *more], capture_output=True, text=True, env=environment, check=False
        )

    # The opponent fails, as if it were not installed. The folder of packages is the first that its process searches.
    site = tmp_path / "site"
    site.mkdir()
    (site / "trl.py").write_text("raise ModuleNotFoundError('No module named trl')")
    failed = run("--system", "trl", "--site", str(site))
    (record,) = json.loads(output.read_text())["results"]
    assert failed.returncode == 1
    assert "No module named" in record["failed"]
    assert record["failed"] in failed.stderr

    shown = run("--remat", "full", "none", "--only", "remat none")
    assert shown.returncode == 0, shown.stderr
    kept, ours = json.loads(output.read_text())["results"]
    assert kept == record
    assert (ours["system"], ours["model"], ours["remat"], ours["data"]) == (
        "jaxpack",
        "tiny",
        "none",
        "100 documents of lengths",
    )
    assert ours["tokens_per_second"] > 0
    assert len(ours["losses"]) == 4
    assert ours["device"]
    assert shown.stderr.count("tokens/s") == 1

    again = run("--remat", "none", "--missing")
    assert again.returncode == 0
    assert "tokens/s," not in again.stderr
    assert json.loads(output.read_text())["results"] == [kept, ours]


@pytest.mark.parametrize(
    ("plan", "cases"),
    [
        ("bars", 35),
        ("cards", 24),
        ("batch_sizes", 42),
        ("batch_sizes --sizes 1 8 32 --load-in-4bit --only packed", 6),
        ("ablation", 6),
        ("losses", 3),
    ],
)
def test_a_plan_is_made_of_the_documents_and_nothing_starts_without_time(plan, cases, tmp_path):
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(LENGTHS)
    command = f"benchmarks/bench_training.py --plan {plan} --lengths {lengths} --seconds 0"
    # The script leaves the device to the processes that it starts, so it needs no device itself.
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "nowhere"}
    shown = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, env=environment, check=False
    )
    assert shown.returncode == 1
    said = {line for line in shown.stderr.splitlines() if not line.startswith("the dataset: ")}
    assert len(said) == shown.stderr.count(f"{plan.split()[0]}: ") == cases
    assert shown.stderr.count("no time left") == cases


def test_a_smaller_card_needs_a_gpu(tmp_path, monkeypatch):
    """A case that says how large its card is never runs on a device whose memory it cannot limit."""
    monkeypatch.setenv("PATH", str(tmp_path))
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps(request_of(Planned("cases", "packed", Case(model="tiny", card=4.0)), documents="")))
    measure_here(request, result)
    assert "`card` must be None without an NVIDIA GPU, got 4" in json.loads(result.read_text())["failed"]


def test_text_may_hold_whatever_else_ends_a_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    from bench_training import text_documents

    rows = [{"prompt": f"What is {i} and\u2028one?", "completion": f" {i + 1}\x85"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert len(text_documents(data)) == len(rows)
