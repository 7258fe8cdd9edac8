"""Tests that docs/memory.md has the table of what fits on which card that the command makes, and that it is true."""

import itertools
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from jaxpack.bench.models import abstract_model
from jaxpack.bench.pages import with_block
from jaxpack.bench.what_fits import CARDS, MODELS, MOST_ROWS, largest_batch, table
from jaxpack.model.presets import SHAPES
from jaxpack.planning.cards import card_named

PAGE = Path(__file__).parent.parent.parent / "docs/memory.md"


def test_the_page_has_the_table_that_the_command_makes():
    page = PAGE.read_text()
    assert with_block(page, table()) == page, "run `make docs-tables`"


def test_more_memory_and_a_smaller_model_take_as_many_rows_or_more():
    assert [card_named(name).gigabytes for name in CARDS] == [8, 12, 16, 24, 32, 48, 80]
    for model in ("Qwen3-8B", "Qwen3-14B"):
        rows = [found[0] if (found := largest_batch(model, card)) else 0 for card in CARDS]
        assert rows == sorted(rows)
        assert rows[0] < rows[-1] == MOST_ROWS
    dense = [model for model in MODELS if SHAPES[model].architecture == "Qwen3ForCausalLM"]
    for larger, smaller in itertools.pairwise(reversed(dense)):
        few, many = largest_batch(larger, "RTX 4090"), largest_batch(smaller, "RTX 4090")
        assert many is not None or few is None
        assert few is None or few[0] <= many[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_as_large_as_their_names_say(name):
    model = abstract_model(SHAPES[name], None)
    billions = sum(x.size for x in jax.tree.leaves(nnx.state(model))) / 1e9
    (in_name,) = re.findall(r"-([\d.]+)b", name, re.IGNORECASE)
    assert billions == pytest.approx(float(in_name), rel=0.1)
