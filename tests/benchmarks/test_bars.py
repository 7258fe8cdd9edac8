"""Tests the bars of the step benchmark: which systems are compared, and which results pass."""

import dataclasses
import io
from typing import Any, cast

import pytest
from rich.console import Console

from benchmarks.bars import BARS, bars, bars_table, cards, cards_table, draw_bars, verdicts
from benchmarks.peers_training import RECOMPUTE, SYSTEMS
from jaxpack.bench.cases import Case, Planned
from jaxpack.bench.report import GIB


def measured(work: str, case: Case, tokens_per_second: float, peak: float) -> dict:
    figures = {"tokens_per_second": tokens_per_second, "peak_memory_bytes": peak}
    return Planned("bars", work, case).record(data="lengths", device="a card", date="2026-11-24", **figures)


def test_the_fastest_opponent_counts_and_only_when_all_are_measured():
    bar = next(bar for bar in BARS if len(bar.peers) == 2 and bar.speed == 1.3)
    slow, fast = bar.peers
    ours = measured(bar.work, bar.ours, 130, 5)
    records = [ours, measured(bar.work, slow, 50, 1), measured(bar.work, fast, 100, 10)]
    (verdict,) = verdicts(records)
    assert (verdict.bar, verdict.speed, verdict.memory, verdict.passed) == (bar, 1.3, 0.5, True)
    records[1] = Planned("bars", bar.work, slow).record(failed="it did")
    (verdict,) = verdicts(records)
    assert (verdict.speed, verdict.passed) == (None, None)


def test_a_failed_opponent_leaves_the_others_to_compare_but_no_bar_is_passed():
    bar = next(bar for bar in BARS if len(bar.peers) == 2 and bar.speed is not None)
    first, second = bar.peers
    ours, peer = measured(bar.work, bar.ours, 300, 5), measured(bar.work, first, 100, 5)
    failed = Planned("bars", bar.work, second).record(data="lengths", date="2026-11-24", failed="out of memory")
    (verdict,) = verdicts([ours, peer, failed])
    assert (verdict.speed, verdict.passed) == (3.0, None)
    (verdict,) = verdicts([ours, peer, failed | {"date": "2026-11-25"}])
    assert verdict.speed is None
    (verdict,) = verdicts([ours, failed])
    assert verdict.speed is None


@pytest.mark.parametrize(
    "other", [{"device": "another card"}, {"data": "other lengths"}, {"date": "2026-11-25"}], ids=str
)
def test_nothing_is_compared_with_what_ran_elsewhere(other):
    bar = BARS[0]
    records = [measured(bar.work, bar.ours, 130, 1), measured(bar.work, bar.peers[0], 100, 1) | other]
    assert [verdict.passed for verdict in verdicts(records)] == [None, None]


def test_half_a_comparison_is_told_until_there_is_a_whole_one():
    bar = BARS[0]
    half = [measured(bar.work, bar.ours, 120, 1)]
    whole = [x | {"date": "2026-11-25"} for x in (*half, measured(bar.work, bar.peers[0], 100, 1))]
    assert [verdict.speed for verdict in verdicts(half)] == [None]
    assert [verdict.speed for verdict in verdicts(half + whole)] == [1.2]
    elsewhere = [x | {"device": "another card"} for x in whole]
    assert [verdict.speed for verdict in verdicts(half + elsewhere)] == [None, 1.2]


@pytest.mark.parametrize(("ours", "passed"), [((1.3, 1.0), True), ((1.29, 1.0), False), ((1.3, 1.01), False)])
def test_speed_and_memory_both_count(ours, passed):
    bar = BARS[0]
    records = [measured(bar.work, bar.ours, *ours), measured(bar.work, bar.peers[0], 1.0, 1.0)]
    assert verdicts(records)[0].passed is passed
    assert list(bars_table(records).columns[-1].cells) == ["pass" if passed else "FAIL"]


def test_opponents_do_the_same_work():
    for bar in BARS:
        for peer in bar.peers:
            assert peer.system in SYSTEMS
            assert peer.remat in RECOMPUTE
            if peer.layout == bar.ours.layout:
                same = {"system": "jaxpack", "remat": bar.ours.remat, "memory_limit": bar.ours.memory_limit}
                assert dataclasses.replace(peer, **same) == bar.ours


def test_what_two_bars_ask_of_is_measured_once():
    shared = Case(model="Qwen3-4B", remat="none")
    asking = [bar for bar in BARS if bar.ours == shared]
    assert len(asking) == 2
    cases = [planned.case for planned in bars()]
    assert len(set(cases)) == len(cases)
    assert cases.count(shared) == 1
    (record,) = (measured(planned.label, shared, 1.0, 1.0) for planned in bars() if planned.case == shared)
    assert [verdict.bar for verdict in verdicts([record])] == asking


def test_a_work_is_drawn_as_measured_where_its_opponents_are_known():
    first, second = BARS[0], BARS[2]
    records = [measured(first.work, first.ours, 300, 6 * GIB), measured(first.work, first.peers[0], 200, 9 * GIB)]
    figure = draw_bars([*records, measured(second.work, second.ours, 100, GIB)])
    speed, memory = figure.axes
    assert [cast("Any", bar).get_width() for bar in speed.patches] == [300, 200]
    assert [cast("Any", bar).get_width() for bar in memory.patches] == [6, 9]
    assert [text.get_text() for text in speed.texts] == ["jaxpack 300   x 1.50", "Unsloth 200"]
    assert speed.get_title(loc="left") == "Qwen3-4B: speed"
    assert [label.get_text() for label in speed.get_yticklabels()] == ["low memory"]


def test_each_model_is_drawn_on_axes_of_its_own():
    small, large = BARS[0], next(bar for bar in BARS if bar.ours.model == "Qwen3-8B")
    rates = {small: 900, large: 10}
    records = [measured(bar.work, case, rates[bar], GIB) for bar in rates for case in (bar.ours, *bar.peers)]
    figure = draw_bars(records)
    speeds = figure.axes[::2]
    assert [panel.get_title(loc="left") for panel in speeds] == ["Qwen3-4B: speed", "Qwen3-8B: speed"]
    for panel, rate in zip(speeds, rates.values(), strict=True):
        assert rate < panel.get_xlim()[1] < 2 * rate


def test_works_of_several_devices_are_drawn_side_by_side_with_their_names():
    first, second = BARS[:2]
    here = [measured(bar.work, case, 300, GIB) for bar in (first, second) for case in (bar.ours, *bar.peers)]
    figure = draw_bars([*here, *(record | {"device": "another"} for record in here)])
    labels = [label.get_text().split("\n")[-1] for label in figure.axes[0].get_yticklabels()]
    assert labels == ["a card", "another"] * 2


def test_the_table_of_smaller_cards_compares_each_run_with_its_prediction():
    first, second, *_ = cards()
    figures = {"tokens_per_second": 1.0, "peak_memory_bytes": 2.2 * GIB, "step_seconds": 0.3, "chosen_remat": "full"}
    figures |= {"predicted_peak_bytes": 2 * GIB, "predicted_step_seconds": 0.25}
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(cards_table([first.record(**figures), second.record(failed="no memory"), bars()[0].record(**figures)]))
    text = shown.export_text()
    ran, failed = (line for line in text.splitlines() if "on a card of" in line)
    assert "1.10 x" in ran
    assert "1.20 x" in ran
    assert "failed: no memory" in failed
