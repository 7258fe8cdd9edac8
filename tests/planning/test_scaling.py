"""Tests that predictions for several devices follow from the sizes of the model, and that the page has their table."""

import json
from pathlib import Path

import jax
import pytest

from jaxpack.bench.models import abstract_model
from jaxpack.bench.pages import with_block
from jaxpack.bench.scaling import shape_on, table
from jaxpack.model.presets import SHAPES
from jaxpack.model.weights import split_trained
from jaxpack.planning.cards import card_named
from jaxpack.planning.memory import peak_bytes
from jaxpack.planning.scaling import Links, mesh_seconds, traffic_of
from jaxpack.planning.time import step_seconds

H200 = card_named("H200").rates
ROOT = Path(__file__).parent.parent.parent
MEASURED = json.loads((ROOT / "benchmarks/results/2026-11-30_h200_meshes.json").read_text())["results"]


def matrices_of_layers(model: str) -> int:
    """Returns the number of elements in the matrices of all layers."""
    _, trained, _ = split_trained(abstract_model(SHAPES[model], None))
    return sum(x.size for x in jax.tree.leaves(trained["blocks"]) if x.ndim == 3)


def test_the_page_has_the_table_that_the_command_makes():
    page = (ROOT / "docs/scaling.md").read_text()
    assert with_block(page, table()) == page, "run `make docs-tables`"


def test_adapters_send_their_gradient_twice_around_a_ring():
    step = shape_on("Qwen3-0.6B", True, 4, 1)
    traffic = traffic_of(step, 4, 1)
    assert (traffic.gathered, traffic.gathered_outside, traffic.scattered) == (0, 0, 0)
    assert traffic.reduced == pytest.approx(2 * 3 / 4 * 4 * step.trained)


def test_shards_are_gathered_in_both_directions_and_gradients_scattered_in_float32():
    elements = matrices_of_layers("Qwen3-0.6B")
    traffic = traffic_of(shape_on("Qwen3-0.6B", True, 1, 8), 1, 8)
    assert traffic.gathered == pytest.approx(2 * 7 / 8 * 2 * elements)
    assert traffic.scattered == 0
    assert traffic.gathered_outside == 0
    whole = traffic_of(shape_on("Qwen3-0.6B", False, 2, 4), 2, 4)
    embedding = SHAPES["Qwen3-0.6B"].vocab_size * SHAPES["Qwen3-0.6B"].hidden_size  # which is the head, too
    assert whole.gathered == pytest.approx(2 * 3 / 4 * 2 * elements)
    assert whole.gathered_outside == pytest.approx(3 / 4 * 2 * embedding)
    assert whole.scattered == pytest.approx(3 / 4 * 4 * (elements + embedding))
    # The shards of both copies are added up; norms are whole everywhere.
    assert whole.reduced == pytest.approx(2 * 1 / 2 * 4 * (elements + embedding) / 4, rel=1e-3)


def test_one_device_sends_nothing_and_takes_no_longer():
    step = shape_on("Qwen3-0.6B", True, 1, 1)
    assert mesh_seconds(step, "full", H200, 1, 1) == step_seconds(step, "full", H200)


def test_slow_links_show_and_fast_ones_hide_behind_computation():
    step = shape_on("Qwen3-0.6B", True, 1, 8)
    alone = step_seconds(step, "full", H200)
    fast = mesh_seconds(step, "full", H200, 1, 8, Links(within=1e15, beside=1e15))
    slow = mesh_seconds(step, "full", H200, 1, 8, Links(within=1e9, beside=1e15))
    assert fast == pytest.approx(alone, rel=1e-4)
    gathered = traffic_of(step, 1, 8).gathered / 1e9
    beside = mesh_seconds(step, "full", H200, 1, 8, Links(within=1e15, beside=1e9))
    assert beside - fast == pytest.approx(gathered, rel=1e-4)
    assert gathered - alone < slow - alone <= gathered + traffic_of(step, 1, 8).reduced / 1e9


def test_devices_that_share_matrices_need_less_memory():
    alone, shared = (peak_bytes(shape_on("Qwen3-8B", True, 1, fsdp), "full") for fsdp in (1, 8))
    held = 2 * matrices_of_layers("Qwen3-8B")
    two_layers = 2 * held / SHAPES["Qwen3-8B"].num_layers
    assert alone - shared == pytest.approx(held * 7 / 8 - two_layers, rel=1e-3)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']} {row['rows']} {row['mesh']}")
def test_a_measured_run_takes_what_is_predicted(row):
    sizes = {"data": 1, "fsdp": 1} | {name: row["devices"] for name in ("data", "fsdp") if name in row["mesh"]}
    step = shape_on(row["model"], not row["full_finetuning"], **sizes, rows=row["rows"])
    assert mesh_seconds(step, row["chosen_remat"], H200, **sizes) == pytest.approx(row["step_seconds"], rel=0.1)
    assert peak_bytes(step, row["chosen_remat"]) == pytest.approx(row["peak_memory_bytes"], rel=0.1)
