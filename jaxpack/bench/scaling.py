"""Makes the table of docs/scaling.md that predicts rates on 1 to 1,024 GPUs: `make docs-tables`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import AbstractMesh

from jaxpack.bench.models import abstract_model
from jaxpack.bench.pages import with_block
from jaxpack.constants import Remat
from jaxpack.model.presets import SHAPES
from jaxpack.optimizers.optimizer import state_bytes
from jaxpack.parallel.mesh import AXES
from jaxpack.planning.cards import card_named
from jaxpack.planning.choose import gib
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import peak_bytes
from jaxpack.planning.mesh import on_mesh
from jaxpack.planning.scaling import mesh_seconds
from jaxpack.planning.time import step_seconds
from jaxpack.settings import LoraConfig, TrainConfig

ROWS, ROW = 16, 1024  # on each GPU
# The works: the model, whether adapters are trained, the choice of `remat`, and how many GPUs share the matrices.
WORKS: tuple[tuple[str, bool, Remat, int], ...] = (
    ("Qwen3-8B", True, "keep_attention", 1),
    ("Qwen3-32B", True, "keep_attention", 1),
    ("Qwen3-32B", True, "keep_attention", 8),
    ("Qwen3-8B", False, "keep_attention", 8),
    ("Qwen3-32B", False, "keep_attention", 8),
)
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)


def shape_on(model: str, has_adapters: bool, data: int, fsdp: int, rows: int = ROWS) -> StepShape:
    """Returns the step of one device of a mesh, with so many rows of `ROW` tokens."""
    abstract = abstract_model(SHAPES[model], LoraConfig(r=16) if has_adapters else None)
    mesh = AbstractMesh((data, fsdp), AXES)
    moments = state_bytes(TrainConfig(), abstract, mesh)
    return StepShape.of(on_mesh(abstract, mesh), (1, rows, ROW), optimizer_bytes=moments)


def table() -> Iterator[str]:
    """Yields the lines of the table in Markdown: a row for each work, a column for each number of GPUs.

    A cell holds the predicted tokens a second of all GPUs, and their share of as many single GPUs. The memory is that
    of each GPU.
    """
    rates = card_named("H200").rates
    yield f"| model | trained | GPUs that share the matrices | memory | {' | '.join(f'{n:,}' for n in COUNTS)} |"
    yield f"|---|---|---|---|{'---|' * len(COUNTS)}"
    for model, has_adapters, remat, most in WORKS:
        cells, memory = [], ""
        for count in COUNTS:
            fsdp = min(most, count)
            step = shape_on(model, has_adapters, count // fsdp, fsdp)
            peak = peak_bytes(step, remat)
            memory = gib(peak)
            if peak > card_named("H200").memory_bytes:
                cells.append("-")
                continue
            alone = step_seconds(step, remat, rates)
            seconds = mesh_seconds(step, remat, rates, count // fsdp, fsdp)
            cells.append(f"{count * ROWS * ROW / seconds:,.0f} ({alone / seconds:.1%})")
        what = "adapters" if has_adapters else "all weights"
        yield f"| {model} | {what} | {'none' if most == 1 else f'up to {most}'} | {memory} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_block(path.read_text(), table()))
