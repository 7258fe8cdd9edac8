"""Each case runs in its own process: its results are saved at once, and a failure does not stop the rest."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from models import random_documents

from jaxpack.bench.cases import Case, Planned, ablation, batch_sizes, losses
from jaxpack.bench.processes import OutOfTime, Results, answer, in_own_process, read_records, run_all
from jaxpack.errors import InputError

FIGURES = {
    "tokens_per_second": 10.0,
    "step_seconds": 0.1,
    "peak_memory_bytes": 2**30,
    "padding_share": 0.25,
}
PLAN = [Planned("cases", "packed", Case(model="small", rows=rows)) for rows in (1, 2, 3)]


def test_a_failure_is_recorded_and_the_rest_goes_on_each_written_at_once(tmp_path, capsys):
    path = tmp_path / "results.json"
    written = []

    def measure(planned: Planned, left: float | None) -> dict:
        written.append(len(json.loads(path.read_text())["results"]) if path.exists() else 0)
        return {"failed": "no memory"} if planned.case.rows == 2 else FIGURES

    run_all(PLAN, Results(path), measure, data="lengths")
    assert written == [0, 1, 2]
    records = read_records(path)
    assert [record["rows"] for record in records] == [1, 2, 3]
    assert [record.get("failed") for record in records] == [None, "no memory", None]
    shown = capsys.readouterr().err
    assert shown.count("10 tokens/s") == 2
    assert shown.count("failed: no memory") == 1


def test_results_are_added_to_a_file_and_replace_those_of_the_same_case(tmp_path):
    path = tmp_path / "results.json"
    run_all(PLAN[:2], Results(path), lambda *_: FIGURES, data="lengths")
    run_all(PLAN[1:], Results(path), lambda *_: FIGURES | {"tokens_per_second": 20.0}, data="lengths")
    run_all(PLAN[:1], Results(path), lambda *_: FIGURES | {"tokens_per_second": 30.0}, data="other lengths")
    found = [(record["data"], record["rows"], record["tokens_per_second"]) for record in read_records(path)]
    assert found == [("lengths", 1, 10.0), ("lengths", 2, 20.0), ("lengths", 3, 20.0), ("other lengths", 1, 30.0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_missing_cases_are_those_that_are_not_recorded(tmp_path):
    results = Results(tmp_path / "results.json")
    results.add(PLAN[0].record(data="lengths", process_seconds=1.0, **FIGURES))
    results.add(PLAN[1].record(data="lengths", process_seconds=1.0, failed="no memory"))
    asked = []

    def measure(planned: Planned, left: float | None) -> dict:
        asked.append(planned.case.rows)
        raise OutOfTime

    for data, expected in (("lengths", [3]), ("other lengths", [1, 2, 3])):
        asked.clear()
        run_all(PLAN, results, measure, data=data, only_missing=True)
        assert asked == expected
    assert len(results.records) == 2  # a case that had no time gets no record


@pytest.mark.parametrize(("took", "left", "asked"), [(50.0, 100.0, True), (100.0, 50.0, False), (0.0, 0.0, False)])
def test_a_case_starts_where_one_like_it_would_end_in_time(took, left, asked):
    other = Planned("cases", "packed", Case(model="small", system="trl"))
    results = Results(None)
    results.add(PLAN[0].record(data="lengths", process_seconds=took, **FIGURES))
    results.add(other.record(data="lengths", process_seconds=1000.0, **FIGURES))
    given = []
    run_all(PLAN[1:2], results, lambda _, seconds: given.append(seconds) or FIGURES, data="lengths", seconds=left)
    assert [seconds == pytest.approx(left, abs=1) for seconds in given] == [True] * asked


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"results": [{"plan": "cases"}]}')
    with pytest.raises(InputError, match=r"`output` must be a file of results or not exist yet, got .*results\.json"):
        Results(tmp_path / "results.json")


def run(code: str, **options) -> dict:
    start = "import json, sys, time; asked, answered = sys.argv[1:]; "
    return in_own_process([sys.executable, "-c", start + code], {"case": 5}, **options)


def test_a_process_is_asked_and_answers():
    answers = "file = open(answered, 'w'); file.write(json.dumps({'of': json.load(open(asked))['case']})); file.close()"
    assert run(answers) == {"of": 5}
    assert run(f"{answers}; sys.exit(3)") == {"of": 5}  # a crash after the answer does not matter


def test_a_process_that_dies_says_why(capfd):
    assert run("print('more', flush=True); sys.exit('no memory')") == {"failed": "exit code 1: no memory"}
    assert "more" in capfd.readouterr().err
    assert run("print('more', flush=True); open(answered, 'w').write('{\"failed\": \"why\"}')") == {"failed": "why"}
    assert "more" in capfd.readouterr().err
    assert run("sys.exit(3)") == {"failed": "exit code 3: the process printed nothing"}
    with pytest.raises(OutOfTime):
        run("time.sleep(60)", seconds=0.5)


def test_an_error_is_an_answer(tmp_path: Path):
    def fail() -> dict:
        raise InputError("`rows` must be at least 1, got 0.")

    answer(tmp_path / "result.json", fail)
    expected = {"failed": "InputError: `rows` must be at least 1, got 0"}
    assert json.loads((tmp_path / "result.json").read_text()) == expected


def test_plans_vary_one_thing_at_a_time():
    """Each factor of the ablation measures what its name says, and losses compare the same work."""
    documents = random_documents([100, 200, 300])
    base = Case(model="small", max_length=250)
    padded, free, packed, kernels, everything, offloaded = (x.case for x in ablation(base, 8, documents))
    changed = [
        {name for name, value in vars(a).items() if vars(b)[name] != value}
        for a, b in ((padded, free), (free, packed), (packed, kernels), (kernels, everything), (kernels, offloaded))
    ]
    assert changed == [{"layout"}, {"layout", "rows"}, {"implementation"}, {"remat"}, {"remat"}]
    assert padded.implementation == "xla"
    layouts = [(x.case.layout, x.case.rows) for x in losses(base, 8, documents)]
    assert layouts == [(case.layout, case.rows) for case in (padded, free, packed)]
    assert (free.rows, packed.rows) == (8, 6)  # 183.3 tokens of a document are kept


def test_small_batches_of_documents_are_timed_for_longer():
    base = Case(model="small", steps=10)
    for layout, steps in (("padded", [128, 16, 10]), ("padding-free", [128, 16, 10]), ("packed", [10, 10, 10])):
        plan = batch_sizes(dataclasses.replace(base, layout=layout), (1, 8, 32))
        assert [planned.case.steps for planned in plan] == steps


@pytest.mark.parametrize("field", [{"rows": 0}, {"steps": 0}, {"layout": "loose"}, {"remat": "some"}], ids=str)
def test_a_case_that_cannot_be_is_refused(field):
    (name,) = field
    with pytest.raises(InputError, match=f"`{name}` must be .*, got {field[name]!r}"):
        Case(**{"model": "small"} | field)
