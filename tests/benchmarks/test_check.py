"""Tests the comparison of two results files: which rows are compared, and which change fails."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.check import changes_table, compare, main, read_rows
from jaxpack.bench.cases import Case, Planned
from jaxpack.errors import InputError

ROOT = Path(__file__).parent.parent.parent
CASE = Case(model="Qwen3-4B", remat="none")
OTHER = dataclasses.replace(CASE, rows=4)


def record(case: Case = CASE, *, rate: float = 1000.0, memory: float = 500.0, **fields: object) -> dict:
    figures = {"tokens_per_second": rate, "peak_memory_bytes": memory, "device": "a card", "data": "lengths"}
    return Planned("bars", "a label", case).record(**figures) | fields


def failed(case: Case = CASE) -> dict:
    return Planned("bars", "a label", case).record(data="lengths", failed="out of memory")


def write(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps({"benchmark": "training", "results": records}))
    return path


def check(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["check.py", str(old), str(new)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("rate", "memory", "faults"),
    [
        (1000, 500, []),
        (2000, 100, []),
        (970.1, 509.9, []),
        (970, 500, ["slower"]),
        (1000, 510, ["more memory"]),
        (900, 600, ["slower", "more memory"]),
    ],
)
def test_a_rate_may_not_fall_by_3_percent_nor_memory_grow_by_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, memory: float, faults: list[str]
):
    old, new = write(tmp_path / "old", [record()]), write(tmp_path / "new", [record(rate=rate, memory=memory)])
    (change,) = compare(read_rows(old), read_rows(new))
    assert change.faults == faults
    assert check(old, new, monkeypatch) == (1 if faults else 0)


def test_one_worse_row_of_several_fails_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    old = write(tmp_path / "old", [record(), record(OTHER)])
    new = write(tmp_path / "new", [record(), record(OTHER, rate=500)])
    assert check(old, new, monkeypatch) == 1
    said = capsys.readouterr().out
    assert "1 of 2 rows became worse" in said
    assert [line for line in said.splitlines() if line.startswith("slower: ")] == [
        "slower: bars: a label: jaxpack Qwen3-4B packed 4 rows remat none, 10 steps, lengths, a card"
    ]


def test_rows_of_one_file_alone_are_named_and_do_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    second, third = (dataclasses.replace(CASE, rows=rows) for rows in (2, 3))
    old, new = (write(tmp_path / name, [record(), record(case)]) for name, case in (("old", second), ("new", third)))
    assert check(old, new, monkeypatch) == 0
    alone = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("only in")]
    assert alone == [
        "only in the old file: bars: a label: jaxpack Qwen3-4B packed 2 rows remat none",
        "only in the new file: bars: a label: jaxpack Qwen3-4B packed 3 rows remat none",
    ]


@pytest.mark.parametrize(
    "fields", [{"device": "another card"}, {"data": "other lengths"}, {"steps": 99}, {"learning_rate": 1.0}], ids=str
)
def test_rows_of_another_device_data_or_case_are_not_compared(tmp_path: Path, fields: dict):
    old, new = write(tmp_path / "old", [record()]), write(tmp_path / "new", [record(**fields)])
    with pytest.raises(InputError, match="The files have no row of jaxpack in common"):
        compare(read_rows(old), read_rows(new))


def test_a_case_that_fails_now_and_ran_before_is_a_fault(tmp_path: Path):
    ran, fails = (
        write(tmp_path / "ran", [record(), record(OTHER)]),
        write(tmp_path / "fails", [failed(), record(OTHER)]),
    )
    assert [change.faults for change in compare(read_rows(ran), read_rows(fails))] == [["failed"], []]
    assert [change.faults for change in compare(read_rows(fails), read_rows(ran))] == [[], []]
    assert [change.faults for change in compare(read_rows(fails), read_rows(fails))] == [[], []]


def test_other_systems_are_not_compared(tmp_path: Path):
    peer = dataclasses.replace(CASE, system="unsloth")
    assert len(read_rows(write(tmp_path / "both", [record(), record(peer)]))) == 1


def test_the_table_shows_rates_peaks_and_changes(tmp_path: Path):
    old = read_rows(write(tmp_path / "old", [record(memory=2**30)]))
    new = read_rows(write(tmp_path / "new", [record(rate=1100, memory=2**29)]))
    cells = [list(column.cells) for column in changes_table(compare(old, new)).columns]
    shown = ["tokens/s", "1,000.00", "1,100.00", "+10.0%", "1.00", "0.50", "-50.0%", "ok"]
    assert [cell for (cell,) in cells][1:] == shown


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_results_file_of_the_repository_equals_itself(path: Path):
    if "main_job" in path.stem:
        with pytest.raises(InputError, match="it holds the benchmark 'main_job'"):
            read_rows(path)
        return
    changes = compare(read_rows(path), read_rows(path))
    assert {change.rate for change in changes} == {0.0}
    assert {change.memory for change in changes} == ({None} if "kernels" in path.stem else {0.0})


def test_a_slower_kernel_is_a_fault(tmp_path: Path):
    path = ROOT / "benchmarks" / "results" / "2026-11-24_h200_kernels.json"
    content = json.loads(path.read_text())
    columns = content["rows"][0]["columns"]
    for name in ("ours", "Liger"):
        columns[name]["median"] *= 1.04
    (tmp_path / "new.json").write_text(json.dumps(content))
    worse = [change for change in compare(read_rows(path), read_rows(tmp_path / "new.json")) if change.faults]
    assert [(change.new.name, change.faults) for change in worse] == [
        ("rope forward 16,384 tokens: ours, NVIDIA H200", ["slower"])
    ]


BAD = {
    "no JSON": ("hello", "must be a JSON file of results: Expecting value"),
    "a list": ("[1]", "must hold results of one of training, kernels, loss, loading, but it names no benchmark"),
    "an unknown benchmark": ('{"benchmark": "x"}', "but it holds the benchmark 'x'"),
    "no results": ('{"benchmark": "training"}', "holds a row of 'training' that cannot be read: KeyError: 'results'"),
    "a row without figures": ('{"benchmark": "loss", "results": [{"tokens": 1}]}', "cannot be read: KeyError: 'vocab'"),
    "no rate": (json.dumps({"benchmark": "training", "results": [record(rate=0)]}), "must be positive, got 0"),
    "an unknown layout": (
        json.dumps({"benchmark": "training", "results": [record() | {"layout": "x"}]}),
        "`layout` must",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str, message: str
):
    good, bad = write(tmp_path / "good.json", [record()]), tmp_path / "bad.json"
    bad.write_text(text)
    assert check(good, bad, monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert repr(str(bad)) in said


def test_a_missing_file_is_refused_by_name(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks" / "check.py"), str(tmp_path / "absent.json"), "new.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"'{tmp_path}/absent.json' must be a JSON file of results: No such file or directory" in done.stderr
