"""Measures the training step beside its opponents: tokens a second, memory, and the gain of each choice.

    PYTHONPATH=. python benchmarks/bench_training.py --lengths LENGTHS.csv --plan bars --site SITE --output RESULTS.json
    PYTHONPATH=. python benchmarks/bench_training.py --lengths LENGTHS.csv --model Qwen3-4B --remat offload --profile
    PYTHONPATH=. python benchmarks/bench_training.py --draw RESULTS.json [RESULTS.json ...]

Plans: `bars` (every bar, with its opponents), `cards` (runs with the memory of smaller cards), `batch_sizes` (1 to 32
or --sizes, every layout and system), `ablation` (padded to packed to kernels to memory choices), `losses` (runs over
the same text in every layout), and `cases`, the default: the case that the flags describe, for each --remat. Each case
runs in its own process, on random weights and documents of the lengths in LENGTHS.csv, a histogram with the columns
`token_length_from`, `token_length_to` and `documents`. Rates count real tokens, of steps after the warm-up; peak memory
is the allocator's own.

RESULTS.json is written after each case, and older records are kept: a plan can be run in parts, by --only (a part of a
printed line), --missing (skips recorded cases, failures too) and --seconds. Without matplotlib there are no pictures:
--draw makes tables and pictures on any machine, of all files together, beside the last file. SITE is a folder with the
opponents' packages (and a `libcudart.so` that one of them needs).
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from bars import bars, bars_table, cards, cards_table, draw_bars, verdicts
from peers_training import SYSTEMS, write_checkpoint
from timing import Event, jax_kernel_events

from jaxpack.bench import cases
from jaxpack.bench.cases import Case, Planned
from jaxpack.bench.processes import Results, in_own_process, read_records, request_of, run_all
from jaxpack.bench.report import draw_all, of_plan, print_tables
from jaxpack.cli.bench import measure_elsewhere
from jaxpack.cli.demo import sample, train_tokenizer
from jaxpack.cli.measure import measure_here
from jaxpack.constants import Layout
from jaxpack.data.documents import Documents
from jaxpack.data.reading import load_documents
from jaxpack.data.synthetic import drawn_documents, save_documents
from jaxpack.errors import InputError
from jaxpack.model.presets import SHAPES

COPIES = ("MemcpyD2H", "MemcpyH2D")  # copies between device and host, which have their own streams
DEFAULT_REMAT = {"jaxpack": ["offload", "none"], "unsloth": ["unsloth", "none"], "trl": ["full"], "trl-liger": ["full"]}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# Plans.


def batch_sizes(base: Case, sizes: Sequence[int]) -> list[Planned]:
    """Plans ours in every layout, Unsloth by default and packed, and TRL padded, each with its least memory."""
    lines = (
        ("jaxpack", "padded", "offload"),
        ("jaxpack", "padding-free", "offload"),
        ("jaxpack", "packed", "offload"),
        ("unsloth", "padding-free", "unsloth"),
        ("unsloth", "packed", "unsloth"),
        ("trl", "padded", "full"),
        ("trl-liger", "padded", "full"),
    )
    return [
        planned
        for system, layout, remat in lines
        for planned in cases.batch_sizes(
            dataclasses.replace(base, system=system, layout=layout, remat=remat), tuple(sizes)
        )
    ]


def losses(base: Case, documents: Documents) -> list[Planned]:
    """Plans 150 steps of 32 documents with all weights trained: adapters on a random model learn little."""
    base = dataclasses.replace(base, full_finetuning=True, steps=150, learning_rate=3e-4)
    return cases.losses(base, 32, documents)


PLANS: dict[str, Callable[[Case, Documents, Sequence[int]], list[Planned]]] = {
    "bars": lambda base, documents, sizes: bars(),
    "cards": lambda base, documents, sizes: cards(),
    "batch_sizes": lambda base, documents, sizes: batch_sizes(base, sizes),
    "ablation": lambda base, documents, sizes: cases.ablation(base, 32, documents),
    "losses": lambda base, documents, sizes: losses(base, documents),
}


def plan_of(options: argparse.Namespace, documents: Documents) -> list[Planned]:
    """Returns the plan that the flags name, or the cases that they describe."""
    if options.model not in SHAPES and not Path(options.model, "config.json").exists():
        raise InputError(f"`model` must be a folder with a config.json, or one of {[*SHAPES]}, got {options.model!r}.")
    fields = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Case)}
    base = Case(**{name: value for name, value in fields.items() if value is not None and name != "remat"})
    if options.plan != "cases":
        plan = PLANS[options.plan](base, documents, options.sizes)
    else:
        choices = options.remat or DEFAULT_REMAT[base.system]
        plan = [Planned("cases", base.layout, dataclasses.replace(base, remat=remat)) for remat in choices]
    chosen = [planned for planned in plan if any(part in str(planned) for part in options.only)]
    if not chosen:
        raise InputError(f"`only` must be a part of a case's line, such as {str(plan[0])!r}, got {options.only}.")
    return chosen


def text_documents(data: Path | None) -> Documents:
    """Tokenizes rows of text (by default the bundled questions) with a tokenizer trained on them."""
    if data is None:
        rows = sample()
    else:
        with data.open(encoding="utf-8") as lines:  # `splitlines` would also split at characters inside a text
            rows = list(map(json.loads, lines))
    tokenizer = train_tokenizer(rows)
    return load_documents(rows, tokenizer, vocab_size=len(tokenizer))


# Measuring.


def measure_peer(planned: Planned, documents: Path, seconds: float | None, site: Path | None) -> dict[str, Any]:
    """Measures a case of an opponent in a process that finds its packages first, and none of ours."""
    case = planned.case
    checkpoint = Path(case.model).resolve()  # a folder, or else a shape
    if case.model in SHAPES:
        checkpoint = Path(tempfile.gettempdir(), "jaxpack-peers", case.model)
        if not (checkpoint / "config.json").exists():
            write_checkpoint(checkpoint, SHAPES[case.model])
    request = request_of(planned, documents=str(documents), checkpoint=str(checkpoint), warm_up=8)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {**OFFLINE, "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"UNSLOTH_COMPILE_LOCATION": str(Path(folder, "unsloth_compiled_cache"))}
        environment |= {"HF_HOME": str(Path(folder, "huggingface"))}
        if site is not None:
            for key in ("PYTHONPATH", "LD_LIBRARY_PATH"):
                environment[key] = os.pathsep.join(filter(None, [str(site.resolve()), environment.get(key)]))
        command = [sys.executable, str(Path(__file__).resolve().with_name("peers_training.py"))]
        return in_own_process(command, request, seconds=seconds, env=environment, cwd=folder)


def by_name(events: list[Event]) -> list[dict[str, Any]]:
    """Lists what ran in a step, longest first: count, seconds and, for copies, the seconds during a kernel."""
    found: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        found[event.name].append(event)
    computing = sorted((e.start, e.start + e.seconds) for e in events if not e.name.startswith(COPIES))
    begins, ends = np.array(computing).reshape(-1, 2).T

    def hidden(copy: Event) -> float:
        """Returns the seconds of a copy during kernels, summed, since kernels run one after another on their stream."""
        last = copy.start + copy.seconds
        return float(np.sum(np.clip(np.minimum(ends, last) - np.maximum(begins, copy.start), 0, None)))

    rows = [
        {
            "name": name,
            "count": len(members),
            "seconds": sum(event.seconds for event in members),
            **({"hidden_seconds": sum(map(hidden, members))} if name.startswith(COPIES) else {}),
        }
        for name, members in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def profile_lines(record: dict[str, Any]) -> list[str]:
    """Returns a table of the forty longest kernels of a step."""
    lines = []
    for kernel in record.get("kernels", [])[:40]:
        hidden = f", {1e3 * kernel['hidden_seconds']:.2f} ms of it behind kernels" if "hidden_seconds" in kernel else ""
        lines.append(f"  {1e3 * kernel['seconds']:8.2f} ms {kernel['count']:5} x {kernel['name']}{hidden}")
    return lines


def main() -> None:
    """Measures the cases that the flags choose, then prints tables and draws pictures."""
    if sys.argv[1:2] == ["--here"]:
        measure_here(*map(Path, sys.argv[2:]), profiled=lambda run: by_name(jax_kernel_events(run)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=("cases", *PLANS), default="cases")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=cases.BATCH_SIZES, help="batch sizes of the plan `batch_sizes`"
    )
    parser.add_argument("--lengths", type=Path, help="CSV histogram of document lengths; `losses` needs none")
    parser.add_argument("--data", type=Path, help="JSONL file of texts for `losses` (default: the bundled questions)")
    parser.add_argument("--documents", type=int, default=4000, help="number of documents to draw from the histogram")
    parser.add_argument("--site", type=Path, help="folder of the opponents' Python packages")
    parser.add_argument("--output", type=Path, help="JSON file to which the results are added")
    parser.add_argument("--only", nargs="+", default=[""], help="measure cases whose line contains one of these")
    parser.add_argument("--missing", action="store_true", help="measure only cases that --output does not hold yet")
    parser.add_argument("--seconds", type=float, help="time for all cases; a case that would exceed it is not started")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one jaxpack step")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="RESULTS", help="only show these results")
    parser.add_argument(
        "--model", default="Qwen3-4B", help="a shape with random weights, or a folder (see write_gpt_oss.py)"
    )
    parser.add_argument("--system", choices=("jaxpack", *SYSTEMS))
    parser.add_argument("--layout", choices=get_args(Layout))
    parser.add_argument("--rows", type=int, help="batch size in rows if packed, else in documents (16)")
    parser.add_argument("--max-length", type=int, help="maximum length of a document or a packed row (1024)")
    parser.add_argument("--remat", nargs="+", help="for jaxpack: offload to none; for Unsloth: unsloth, full, none")
    parser.add_argument("--implementation", choices=("xla", "pallas"))
    parser.add_argument("--full-finetuning", action="store_true")
    parser.add_argument("--adapts-experts", action="store_true", help="give the experts of a mixture adapters, too")
    parser.add_argument("--load-in-4bit", action="store_true", help="hold the frozen projections in 4 bits")
    parser.add_argument("--optim", help="adamw (the default) or adamw_8bit")
    for name in ("--offload-weights", "--offload-embedding"):
        parser.add_argument(name, choices=("auto", "on", "off"), help="as in `TrainConfig` (auto)")
    parser.add_argument("--mesh", help="as in `TrainConfig` (auto); --rows are those of each device")
    parser.add_argument("--card", type=float, help="GiB of the device that the process may take")
    parser.add_argument("--memory-limit", type=float, help="GiB that a run with --remat auto may take")
    parser.add_argument("--steps", type=int, help="number of steps that are timed (10)")
    options = parser.parse_args()
    if options.draw is None and options.lengths is None and options.plan != "losses":
        parser.error("--lengths must be given, except with --draw and `--plan losses`")
    try:
        if options.draw:
            records, whole, path = list(chain(*map(read_records, options.draw))), True, options.draw[-1]
        else:
            (records, whole), path = run(options), options.output
        report(records, path)
    except InputError as error:
        parser.error(str(error))
    sys.exit(not whole)


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Measures, and returns all records and whether they cover every requested case."""
    with tempfile.TemporaryDirectory() as folder:
        lengths = options.lengths if options.plan != "losses" else None
        documents = drawn_documents(lengths, options.documents) if lengths else text_documents(options.data)
        save_documents(path := Path(folder, "documents.npz"), documents)
        ours = (str(Path(__file__).resolve()), "--here") if options.profile else ("-m", "jaxpack.cli.measure")

        def measure(planned: Planned, seconds: float | None) -> dict[str, Any]:
            if planned.case.system != "jaxpack":
                return measure_peer(planned, path, seconds, options.site)
            figures = measure_elsewhere(planned, path, seconds, ours)
            for line in profile_lines(figures):
                print(line, flush=True)
            return figures

        results = Results(options.output)
        source = lengths or options.data
        data = f"{len(documents):,} documents of {source.stem if source else 'the gsm8k sample'}"
        plan = plan_of(options, documents)
        run_all(plan, results, measure, data=data, seconds=options.seconds, only_missing=options.missing)
    known = [results.of(planned, data) for planned in plan]
    return results.records, all(record and "failed" not in record for record in known)


def report(records: list[dict[str, Any]], path: Path | None) -> None:
    """Prints the tables, and draws pictures beside the results file if matplotlib is installed."""
    tables = {"bars": bars_table, "cards": cards_table}
    print_tables(records, *(table(records) for plan, table in tables.items() if of_plan(records, plan)))
    try:
        for picture in draw_everything(records, path) if path else []:
            print(picture, flush=True)
    except InputError as error:  # matplotlib is missing
        print(error, flush=True)


def draw_everything(records: list[dict[str, Any]], path: Path) -> list[Path]:
    """Draws the pictures of `jaxpack bench` and the picture of the bars."""
    drawn = draw_all(records, path)
    if any(verdict.speed is not None for verdict in verdicts(records)):
        drawn.append(path.with_name(f"{path.stem}_bars.png"))
        draw_bars(records).savefig(drawn[-1], dpi=130)
    return drawn


if __name__ == "__main__":
    main()
