"""The bars of the step: what is compared with what, and that measured parts are kept."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import bars_training
from benchmarks.bars_training import WORK, commands_of, verdicts


def measured(tokens_per_second: float, peak: float) -> dict[str, float]:
    return {"tokens_per_second": tokens_per_second, "peak_memory_bytes": peak}


def test_the_fastest_opponent_counts():
    work = next(work for work in WORK if len(work.peers) == 2 and work.speed == 1.3)
    ours, slow, fast = commands_of(work)
    results = {ours: measured(130, 5), slow: measured(50, 1), fast: measured(100, 10)}
    (verdict,) = (verdict for verdict in verdicts(results) if verdict.work is work)
    assert (verdict.speed, verdict.memory, verdict.passed) == (1.3, 0.5, True)
    results[slow] = {"failed": "exit code 1"}
    (verdict,) = (verdict for verdict in verdicts(results) if verdict.work is work)
    assert (verdict.speed, verdict.passed) == (None, None)


@pytest.mark.parametrize(("ours", "passed"), [((1.3, 1.0), True), ((1.29, 1.0), False), ((1.3, 1.01), False)])
def test_speed_and_memory_both_count(ours, passed):
    work = WORK[0]
    mine, theirs = commands_of(work)
    verdict = verdicts({mine: measured(*ours), theirs: measured(1.0, 1.0)})[0]
    assert verdict.passed is passed


def test_every_flag_is_one_of_the_scripts():
    for script in {command.split()[0] for work in WORK for command in commands_of(work)}:
        usage = subprocess.run(
            [sys.executable, f"benchmarks/{script}", "--help"],
            check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
        ).stdout  # fmt: skip
        for command in (command for work in WORK for command in commands_of(work) if command.startswith(script)):
            assert all(flag in usage for flag in command.split() if flag.startswith("--"))


def test_what_was_measured_is_kept_and_nothing_is_started_out_of_time(tmp_path):
    output, lengths = tmp_path / "results.json", tmp_path / "lengths.csv"
    lengths.write_text("token_length_from,token_length_to,documents\n5,20,3\n")
    ours, theirs = commands_of(WORK[0])
    record = {"benchmark": "training_bars", "results": {ours: measured(2.0, 2.0**30)}}
    output.write_text(json.dumps(record))
    command = f"benchmarks/bars_training.py --lengths {lengths} --output {output} --seconds 0 --only low"
    shown = subprocess.run([sys.executable, *command.split()], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert f"left: {theirs}" in shown and f"left: {ours}" not in shown
    assert json.loads(output.read_text()) == record


def test_a_configuration_that_fails_is_recorded(tmp_path):
    lengths = tmp_path / "none.csv"
    result = bars_training.measure(commands_of(WORK[0])[0], lengths, None)
    assert result["failed"] not in (None, 0)
