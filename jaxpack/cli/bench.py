"""Implements `jaxpack bench`: measures a step on this device, by layout, batch size and memory choice."""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, get_args

import typer

from jaxpack.bench.cases import Case, Planned, ablation, batch_sizes, losses
from jaxpack.bench.measure import train_config
from jaxpack.bench.processes import Record, Results, in_own_process, request_of, run_all
from jaxpack.bench.report import draw_all, print_tables
from jaxpack.cli.reading import DATA_HELP, LENGTHS_HELP, MODEL_HELP, read_documents, require_one
from jaxpack.constants import Layout
from jaxpack.data.synthetic import save_documents
from jaxpack.errors import InputError
from jaxpack.utils.console import console
from jaxpack.utils.figures import require_matplotlib
from jaxpack.utils.files import require_free_folder

_DRAWN = 4000  # documents to draw if only their lengths are known
_RESULTS = "results.json"


def bench(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="New folder for results.json and the pictures.")],
    data: Annotated[list[str] | None, typer.Option(help=DATA_HELP)] = None,
    lengths: Annotated[Path | None, typer.Option(help=LENGTHS_HELP)] = None,
    plans: Annotated[
        str,
        typer.Option(
            help="Plans to measure, with commas between them. ablation goes from padded to padding-free to packed"
            " batches, then adds the kernels, then other memory choices; batch_sizes measures every layout at every"
            " batch size; losses follows the loss of a run in every layout."
        ),
    ] = "ablation,batch_sizes",
    sizes: Annotated[
        str, typer.Option(help="Batch sizes of the plan batch_sizes, in documents or packed rows.")
    ] = "1,2,4,8,16,32",
    documents: Annotated[
        int,
        typer.Option(
            help="Documents in a step of the plans ablation and losses; packed rows hold about as many tokens."
        ),
    ] = 32,
    max_length: Annotated[int, typer.Option(help="Most tokens in a document, and in a packed row.")] = 1024,
    steps: Annotated[
        int, typer.Option(help="Steps to time in each case; batch_sizes times more if a step has few documents.")
    ] = 10,
    loss_steps: Annotated[int, typer.Option(help="Steps to time in each case of the plan losses.")] = 100,
    remat: Annotated[
        str,
        typer.Option(help="Memory choice of the plans batch_sizes and losses: a value that --remat of train takes."),
    ] = "auto",
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the plan losses.")] = 2e-4,
    full_finetuning: Annotated[bool, typer.Option(help="Train all weights, instead of an adapter of rank 16.")] = False,
) -> None:
    """Measure tokens a second and peak memory of each case in its own process; print tables and draw pictures."""
    require_matplotlib()
    require_free_folder(output, "output")
    require_one(data, lengths)
    base = Case(
        model=model,
        max_length=max_length,
        remat=remat,
        full_finetuning=full_finetuning,
        steps=steps,
        learning_rate=learning_rate,
    )
    train_config(base)  # refuses bad settings now, not once per case
    batches = _sizes(sizes)
    for name, value in (("documents", documents), ("loss_steps", loss_steps)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")
    _, _, corpus = read_documents(model, data, lengths, drawn=_DRAWN)
    of_layouts = [dataclasses.replace(base, layout=layout) for layout in get_args(Layout)]
    cases_of = {
        "ablation": ablation(base, documents, corpus),
        "batch_sizes": [planned for of_layout in of_layouts for planned in batch_sizes(of_layout, batches)],
        "losses": losses(dataclasses.replace(base, steps=loss_steps), documents, corpus),
    }
    names = [name.strip() for name in plans.split(",")]
    if unknown := [name for name in names if name not in cases_of]:
        raise InputError(f"`plans` must be among {', '.join(cases_of)}, got {unknown[0]!r}.")
    planned = [case for name in dict.fromkeys(names) for case in cases_of[name]]

    results = Results(output / _RESULTS)
    console.print(f"{len(planned)} cases, each in a process of its own; {output / _RESULTS} is written after each")
    with tempfile.TemporaryDirectory() as folder:
        save_documents(path := Path(folder, "documents.npz"), corpus)
        sources = [str(lengths)] if lengths is not None else data or []
        name = f"{len(corpus):,} documents of {', '.join(Path(source).stem for source in sources)}"
        run_all(planned, results, lambda case, left: measure_elsewhere(case, path, left), data=name)
    print_tables(results.records)
    for picture in draw_all(results.records, output / _RESULTS):
        console.print(f"drew {picture}")
    if all("failed" in record for record in results.records):
        raise InputError(
            f"`model` must be one that trains on this device, got {model!r}, and every case failed; the first because:"
            f" {results.records[0]['failed']}."
        )


def measure_elsewhere(
    planned: Planned, documents: Path, seconds: float | None, command: tuple[str, ...] = ("-m", "jaxpack.cli.measure")
) -> Record:
    """Measures a case of jaxpack in its own process, on documents that `save_documents` wrote."""
    return in_own_process([sys.executable, *command], request_of(planned, documents=str(documents)), seconds=seconds)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(size) for size in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise InputError(f"`sizes` must be whole numbers of at least 1 with commas between them, got {text!r}.")
    return sizes
