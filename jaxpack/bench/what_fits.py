"""Makes the table of docs/memory.md that says which model can be trained on which card: `make docs-tables`."""

import bisect
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxpack.bench.models import abstract_model
from jaxpack.bench.pages import with_block
from jaxpack.model.mxfp4 import mxfp4_store
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.presets import SHAPES
from jaxpack.model.weights import Store, store_dense
from jaxpack.planning.cards import card_named
from jaxpack.planning.choose import Prediction, fits, gib, predict_all, usable_bytes
from jaxpack.planning.cost import StepShape
from jaxpack.settings import LoraConfig, TrainConfig

CARDS = ("RTX 4060 Ti 8GB", "RTX 3060", "RTX 5080", "RTX 4090", "RTX 5090", "RTX A6000", "H100")
MODELS = tuple(name for name in SHAPES if name != "tiny")
# The forms in which frozen weights are stored, with the functions that make them from dense matrices.
FORMS: dict[str, Store] = {"16-bit": store_dense, "4-bit": nf4_store(), "MXFP4": mxfp4_store}
MOST_ROWS = 64
ROW = 1024  # tokens
RANK = 16
HOST_GIB = 32  # free memory of the host


def largest_batch(model: str, card: str, form: str = "16-bit") -> tuple[int, Prediction] | None:
    """Returns the most rows that can be trained at once, with the fastest choice for them; None if not even one fits.

    The model has the default adapters: on all projections, or in a mixture on those of the attention. Every token of a
    row may have a target.

    Args:
      model: a name of `SHAPES`.
      card: a card's name.
      form: one of `forms_of(model)`.
    """
    one_row, named = _one_row(model, form), card_named(card)
    memory = usable_bytes(TrainConfig(), card=named)
    assert memory is not None

    def fitting(rows: int) -> list[Prediction]:
        step = dataclasses.replace(one_row, shape=(1, rows, ROW), max_targets=rows * ROW)
        return fits(predict_all(step, named.rates), memory, HOST_GIB * 2**30)

    sizes = range(1, MOST_ROWS + 1)
    rows = bisect.bisect_left(sizes, True, key=lambda rows: not fitting(rows))
    return (rows, fitting(rows)[0]) if rows else None


def forms_of(model: str) -> tuple[str, ...]:
    """Returns the forms in which a model's weights are trained. GPT-OSS is published in MXFP4."""
    return ("16-bit", "MXFP4" if SHAPES[model].architecture == "GptOssForCausalLM" else "4-bit")


@functools.cache
def _one_row(model: str, form: str) -> StepShape:
    abstract = abstract_model(SHAPES[model], LoraConfig(r=RANK), store=FORMS[form])
    return dataclasses.replace(StepShape.of(abstract, (1, 1, ROW)), compiles_first=True)


def table() -> Iterator[str]:
    """Yields the lines of the table in Markdown: a row for each model and form of its weights, a column for each card.

    A cell holds the number of rows, the predicted memory, and a star if frozen weights lie in the host's memory.
    """
    cards = [card_named(name) for name in CARDS]
    titles = [f"{card.gigabytes} GB<br>{card.name.removesuffix(f' {card.gigabytes}GB')}" for card in cards]
    yield f"| model | weights | {' | '.join(titles)} |"
    yield f"|---|---|{'---|' * len(cards)}"
    for model in MODELS:
        for form in forms_of(model):
            found = [largest_batch(model, card, form) for card in CARDS]
            cells = ["-" if cell is None else _cell(*cell) for cell in found]
            yield f"| {model} | {form} | {' | '.join(cells)} |"


def _cell(rows: int, prediction: Prediction) -> str:
    return f"{rows} ({gib(prediction.peak_bytes)}){'*' if any(prediction.choice.offloads) else ''}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_block(path.read_text(), table()))
