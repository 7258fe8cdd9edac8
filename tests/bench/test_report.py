"""Tables and figures show the values of the records."""

import dataclasses
import io
import math
from typing import get_args

import numpy as np
import pytest
from models import random_documents
from rich.console import Console
from rich.table import Table

from jaxpack.bench import report
from jaxpack.bench.cases import ABLATION, OFFLOADED, Case, Planned, ablation, batch_sizes, losses
from jaxpack.constants import Layout

GIB = 2**30


def records(plan: list[Planned]) -> list[dict]:
    return [
        planned.record(
            data="lengths",
            date="2026-11-24",
            device="a device",
            tokens_per_second=1000.0 + 300 * number**2,
            step_seconds=0.1,
            peak_memory_bytes=(3 + number) * GIB,
            padding_share=0.01 * number,
            compile_seconds=5.0,
            found_programs=0,
            warm_up_seconds=1.0,
            losses=[9.0 - 0.1 * step for step in range(20)],
            loss_seconds=[0.5 * (step + 1) for step in range(20)],
        )
        for number, planned in enumerate(plan)
    ]


BASE = Case(model="small")
DOCUMENTS = random_documents([100, 200])
ABLATED = records(ablation(BASE, 32, DOCUMENTS))


def every_layout(sizes: tuple[int, ...]) -> list[Planned]:
    bases = [dataclasses.replace(BASE, layout=layout) for layout in get_args(Layout)]
    return [planned for base in bases for planned in batch_sizes(base, sizes)]


def shown(table: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("left_out", [None, "padding-free", "with kernels", "keeping all"])
def test_the_factors_multiply_to_the_whole(left_out):
    stages = report.ablation_stages([r | ({"failed": "it did"} if r["label"] == left_out else {}) for r in ABLATED])
    chain = [stage for stage in stages if stage["label"] in ABLATION]
    assert [stage["label"] for stage in chain] == [label for label in ABLATION if label != left_out]
    whole = chain[-1]["tokens_per_second"] / chain[0]["tokens_per_second"]
    assert math.prod(stage["factor"] for stage in chain) == pytest.approx(whole) == pytest.approx(chain[-1]["total"])
    assert whole > 2
    (offloaded,) = (stage for stage in stages if stage["label"] == OFFLOADED)
    before = next(stage for stage in reversed(chain) if stage["label"] != "keeping all")
    assert offloaded["total"] == pytest.approx(offloaded["factor"] * before["total"])


def test_the_order_of_the_records_does_not_matter():
    assert report.ablation_stages(ABLATED[::-1]) == report.ablation_stages(ABLATED)


def test_tables_hold_the_figures_and_what_failed():
    failed = ABLATED[0] | {"plan": "cases", "failed": "no memory"}
    opponent = ABLATED[1] | {"plan": "cases", "system": "unsloth", "remat": "unsloth"}
    del opponent["compile_seconds"]  # it compiles within its warm-up
    text = shown(report.results_table([*ABLATED, failed, opponent]))
    assert text.count("failed") == 1
    assert text.count("unsloth") == 2
    assert all(f"{record['tokens_per_second']:,.0f}" in text for record in ABLATED)
    assert "99.0%" in text  # valid tokens, where 1 % is padding
    text = shown(report.ablation_table(ABLATED))
    assert f"x {ABLATED[4]['tokens_per_second'] / ABLATED[0]['tokens_per_second']:.2f}" in text


def test_batch_sizes_are_drawn_as_measured_and_a_system_has_its_color():
    peers = [Planned("batch_sizes", "unsloth packed", Case(model="small", system="unsloth", remat="unsloth", rows=2))]
    drawn = records([*every_layout((1, 4, 2)), *peers])
    speed, memory, valid = report.draw_batch_sizes(drawn).axes
    packed = sorted((r for r in drawn if r["label"] == "jaxpack packed"), key=lambda record: record["rows"])
    expected = (
        (speed, [record["tokens_per_second"] for record in packed]),
        (memory, [record["peak_memory_bytes"] / GIB for record in packed]),
        (valid, [100 * (1 - record["padding_share"]) for record in packed]),
    )
    for panel, values in expected:
        line = panel.lines[2]  # after padded and padding-free
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 4])
        np.testing.assert_allclose(line.get_ydata(), values)
        assert "jaxpack packed" in [text.get_text() for text in panel.texts]
    found = [round(255 * part) for part in speed.lines[3].get_color()]
    assert found == [int(report.COLORS["unsloth"][i : i + 2], 16) for i in (1, 3, 5)]


def test_the_ablation_is_drawn_as_measured():
    speed, memory = report.draw_ablation(ABLATED).axes
    widths = [[bar.get_width() for bar in panel.patches] for panel in (speed, memory)]
    np.testing.assert_allclose(widths[0], [record["tokens_per_second"] for record in ABLATED])
    np.testing.assert_allclose(widths[1], [record["peak_memory_bytes"] / GIB for record in ABLATED])
    heights = [bar.get_y() for bar in speed.patches]
    assert heights == sorted(heights, reverse=True)  # read from top to bottom
    assert f"x {report.ablation_stages(ABLATED)[1]['factor']:.2f}" in speed.texts[1].get_text()


def test_losses_are_drawn_against_steps_and_seconds():
    by_step, by_time = report.draw_losses(records(losses(BASE, 32, DOCUMENTS))).axes
    for panel, along in ((by_step, np.arange(1, 21)), (by_time, 0.5 * np.arange(1, 21))):
        assert len(panel.lines) == 3
        np.testing.assert_allclose(panel.lines[0].get_xdata(), along)
        np.testing.assert_allclose(panel.lines[0].get_ydata(), 9 - 0.1 * np.arange(20))


def test_every_plan_that_was_measured_has_a_picture(tmp_path):
    failed = [record | {"failed": "it did"} for record in records(batch_sizes(BASE, (1,)))]
    drawn = report.draw_all([*ABLATED, *failed], tmp_path / "results.json")
    assert drawn == [tmp_path / "results_ablation.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("field", ["model", "full_finetuning", "data", "device"])
def test_what_is_not_alike_has_pictures_of_its_own(field, tmp_path):
    others = [record | {field: not record[field] if field == "full_finetuning" else "other"} for record in ABLATED]
    assert report.comparable([*ABLATED, *others]) == [ABLATED, others]
    drawn = report.draw_all([ABLATED[0], others[0]], tmp_path / "results.json")
    assert drawn == [tmp_path / "results_ablation_1.png", tmp_path / "results_ablation_2.png"]
