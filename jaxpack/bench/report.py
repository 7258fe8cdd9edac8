"""Shows records as tables and as pictures. Needs no device; only the pictures need matplotlib."""

import io
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from jaxpack.bench.cases import ABLATION, OFFLOADED
from jaxpack.bench.processes import Record
from jaxpack.utils.console import TextConsole
from jaxpack.utils.figures import Line, frame, head, label_ends, lying_bars, new_figure
from jaxpack.utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors by Okabe and Ito, safe for color-blind readers; each system has the same one in every picture.
COLORS = {"jaxpack": "#0072B2", "unsloth": "#D55E00", "trl": "#4D4D4D", "trl-liger": "#CC79A7"}
NAMES = {"unsloth": "Unsloth", "trl": "TRL", "trl-liger": "TRL + Liger"}
LINES = {"packed": ("-", "o"), "padding-free": ("--", "s"), "padded": (":", "^")}
GIB = 2**30


def results_table(records: list[Record]) -> Table:
    """Returns a table with one line for each record, in their order."""
    table = Table(title="training speed and peak memory; each line was measured in its own process")
    for heading in ("plan", "system", "model", "layout", "rows", "remat", "kernels or attention"):
        table.add_column(heading, no_wrap=True)
    for heading in ("real tokens/s", "step, ms", "peak memory, GiB", "not padding", "compile, s", "warm-up, s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        model = record["model"] + (", all weights" if record["full_finetuning"] else "")
        model += ", 4-bit" if record.get("load_in_4bit") else ""
        model += f", {record['optim']}" if record.get("optim", "adamw") != "adamw" else ""
        remat = record["remat"] + (f": {record.get('chosen_remat', '?')}" if record["remat"] == "auto" else "")
        about = [record["plan"], record["system"], model, record["layout"], str(record["rows"]), remat]
        about.append((record["implementation"] or "fastest") if record["system"] == "jaxpack" else _attention(record))
        if "failed" in record:
            table.add_row(*about, "failed")
            continue
        compiled = "-"  # an opponent compiles within its warm-up
        if "compile_seconds" in record:
            compiled = "cached" if record["found_programs"] else f"{record['compile_seconds']:.1f}"
        table.add_row(
            *about,
            f"{record['tokens_per_second']:,.0f}",
            f"{1e3 * record['step_seconds']:,.1f}",
            f"{record['peak_memory_bytes'] / GIB:.2f}",
            f"{valid_share(record):.1%}",
            compiled,
            f"{record['warm_up_seconds']:.1f}",
        )
    return table


def ablation_table(records: list[Record]) -> Table:
    """Returns a table of the factor by which each choice multiplies the tokens a second."""
    table = Table(
        title=f"ablation: each line adds to the line before, and `factor` is its gain in tokens/s\n{_about(records)}"
    )
    for heading in ("", "real tokens/s", "factor", "factor over padded", "peak memory, GiB"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for stage in ablation_stages(records):
        table.add_row(
            stage["label"],
            f"{stage['tokens_per_second']:,.0f}",
            f"x {stage['factor']:.2f}",
            f"x {stage['total']:.2f}",
            f"{stage['peak_memory_bytes'] / GIB:.2f}",
        )
    return table


def valid_share(record: Record) -> float:
    """Returns the share of a run's positions that hold a token."""
    return 1 - record["padding_share"]


def ablation_stages(records: list[Record]) -> list[dict[str, Any]]:
    """Returns the stages in order, with `factor` over the stage before and `total` over the first stage.

    Offloading has the same stage before it as "keeping all". The records must be `comparable`. Missing and failed
    stages are left out; the factor of the next stage is then over the last stage that is left.
    """
    found = {record["label"]: record for record in of_plan(records, "ablation")}
    chain = [found[label] for label in ABLATION if label in found]
    before = {record["label"]: previous for previous, record in itertools.pairwise(chain)}
    if OFFLOADED in found and chain:
        kernels = ABLATION[: ABLATION.index("keeping all")]
        before[OFFLOADED] = next((found[label] for label in reversed(kernels) if label in found), chain[0])
        chain.append(found[OFFLOADED])

    def ratio(record: Record, other: Record) -> float:
        return record["tokens_per_second"] / other["tokens_per_second"]

    return [
        record | {"factor": ratio(record, before.get(record["label"], record)), "total": ratio(record, chain[0])}
        for record in chain
    ]


def of_plan(records: list[Record], plan: str) -> list[Record]:
    """Returns the records of a plan that did not fail."""
    return [record for record in records if record["plan"] == plan and "failed" not in record]


def comparable(records: list[Record]) -> list[list[Record]]:
    """Groups records that may be compared: same model, kind of training, maximum length, dataset and device."""
    fields = ("model", "full_finetuning", "load_in_4bit", "max_length", "data", "device")
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(field, False) for field in fields), []).append(record)
    return list(groups.values())


def print_tables(records: list[Record], *more: Table) -> None:
    """Prints the results, any ablations, and `more` to stdout, 240 columns wide if stdout is no terminal."""
    ablations = map(ablation_table, comparable(of_plan(records, "ablation")))
    TextConsole(width=None if sys.stdout.isatty() else 240).print(results_table(records), *ablations, *more)


def draw_all(records: list[Record], results: Path) -> list[Path]:
    """Draws the pictures of each plan beside the results file, and returns their paths."""
    drawn = []
    for plan, draw in (("batch_sizes", draw_batch_sizes), ("ablation", draw_ablation), ("losses", draw_losses)):
        groups = comparable(of_plan(records, plan))
        for number, group in enumerate(groups, 1):
            drawn.append(results.with_name(f"{results.stem}_{plan}{f'_{number}' if len(groups) > 1 else ''}.png"))
            image = io.BytesIO()
            draw(group).savefig(image, format="png", dpi=130)
            replace_file(drawn[-1], image.getvalue(), "output")
    return drawn


def draw_batch_sizes(records: list[Record]) -> "Figure":
    """Draws tokens a second, memory and the share of valid tokens against the batch size, a line per series."""
    figure = new_figure(9.5, 9)
    panels = figure.subplot_mosaic([["speed", "speed"], ["memory", "valid"]]).values()
    titles = ("How many real tokens a second?", "How much memory?", "How much is not padding?")
    units = ("real tokens/s", "peak memory, GiB", "not padding, % of all positions")
    figures = (
        lambda record: record["tokens_per_second"],
        lambda record: record["peak_memory_bytes"] / GIB,
        lambda record: 100 * valid_share(record),
    )
    for panel, title, unit, figure_of in zip(panels, titles, units, figures, strict=True):
        lines = []
        # All systems fill rows alike: the share of valid tokens is drawn for one system; the table has it for all.
        shown = [r for r in records if unit != units[2] or r["system"] == records[0]["system"]]
        for label in dict.fromkeys(record["label"] for record in shown):
            series = sorted((r for r in shown if r["label"] == label), key=lambda record: record["rows"])
            rows, values = [r["rows"] for r in series], [figure_of(r) for r in series]
            lines.append(Line(_name(label), _shade(series[0]["system"], 1.0), rows, values))
            panel.plot(rows, values, markersize=5, linewidth=1.8, **_style(series[0]))
        panel.set_xscale("log", base=2)
        sizes = sorted({record["rows"] for record in records})
        panel.set_xticks(sizes, list(map(str, sizes)))
        if unit == units[0]:
            panel.set_yscale("log")
            _plain_ticks(panel)
        else:
            panel.set_ylim(bottom=0)
        frame(panel, title, f"batch size: documents, or packed rows of {records[0]['max_length']:,}", unit)
        label_ends(panel, lines)
    head(figure, _about(records))
    return figure


def draw_ablation(records: list[Record]) -> "Figure":
    """Draws bars of tokens a second, with the factor of each stage, and bars of memory."""
    stages = ablation_stages(records)
    figure = new_figure(9.5, 0.7 * len(stages) + 1.6)
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = -np.arange(len(stages))
    shades = [_shade("jaxpack", 0.35 if stage["implementation"] == "xla" else 1.0) for stage in stages]
    speeds = [stage["tokens_per_second"] for stage in stages]
    gigabytes = [stage["peak_memory_bytes"] / GIB for stage in stages]
    factors = ["", *(f"   x {stage['factor']:.2f}" for stage in stages[1:])]
    lying_bars(speed, places, speeds, shades, [f"{x:,.0f}{factor}" for x, factor in zip(speeds, factors, strict=True)])
    lying_bars(memory, places, gigabytes, shades, [f"{x:.1f}" for x in gigabytes])
    speed.set_yticks(places, [_stage_name(stage) for stage in stages])
    chain = [stage for stage in stages if stage["label"] in ABLATION]
    total = f" x {chain[-1]['total']:.1f} in all" if len(chain) > 1 else ""
    frame(speed, f"What does each choice bring?{total}", "real tokens/s (x: factor over the bar before)", "")
    frame(memory, "How much memory?", "peak memory, GiB", "")
    head(figure, _about(records) + "\nPale bars use XLA's operations. Offloading replaces keeping all.")
    return figure


def draw_losses(records: list[Record]) -> "Figure":
    """Draws the loss of each layout against steps, and against seconds."""
    figure = new_figure(9.5, 4.4)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for record in records:
        window = max(1, len(record["losses"]) // 30)
        smooth = np.convolve(record["losses"], np.ones(window) / window, "valid")
        width = {"padded": 3.6, "padding-free": 2.4, "packed": 1.4}[record["layout"]]  # equal losses then hide no line
        style = _style(record) | {"marker": "", "linewidth": width}
        by_step.plot(np.arange(window, len(record["losses"]) + 1), smooth, label=record["label"], **style)
        by_time.plot(record["loss_seconds"][window - 1 :], smooth, **style)
    smoothed = f"training loss (mean of {window} steps)" if window > 1 else "training loss"
    frame(by_step, "Does the layout change what is learned?", "step", smoothed)
    frame(by_time, "How soon is it learned?", "seconds of training, without compilation", "")
    by_step.legend(frameon=False)
    head(figure, _about(records))
    return figure


# Helpers.


def _attention(record: Record) -> str:
    """Returns the name of an opponent's attention, from a record that holds its name or a dict with its `backend`."""
    found = record.get("attention", "-")
    return found["backend"] if isinstance(found, dict) else found


def _style(record: Record) -> dict[str, Any]:
    line, marker = LINES[record["layout"]]
    strength = {"packed": 1.0, "padding-free": 0.75, "padded": 0.6}[record["layout"]]
    color = _shade(record["system"], strength if record["system"] == "jaxpack" else max(strength, 0.75))
    return {"linestyle": line, "marker": marker, "color": color}


def _shade(system: str, strength: float) -> tuple[float, ...]:
    """Returns the RGB color of a system, mixed with white: `strength` 1 is pure color, 0 is white."""
    color = COLORS.get(system, "#009E73")
    return tuple(1 - strength * (1 - int(color[i : i + 2], 16) / 255) for i in (1, 3, 5))


def _name(label: str) -> str:
    for system, name in NAMES.items():
        if label.startswith(f"{system} "):
            return name + label.removeprefix(system)
    return label


def _stage_name(stage: Record) -> str:
    rows = f"rows of {stage['max_length']:,}" if stage["layout"] == "packed" else "documents"
    return f"{stage['label']}\n{stage['rows']} {rows}, remat {stage['remat']}"


def _plain_ticks(panel: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _about(records: list[Record]) -> str:
    first = records[0]
    what = "all weights trained" if first["full_finetuning"] else "LoRA r=16"
    what += ", 4-bit" if first.get("load_in_4bit") else ""
    dates = " and ".join(dict.fromkeys(record["date"] for record in records))
    return f"{first['model']}, {what}, {first['data']}. {first['device']}, {dates}."
