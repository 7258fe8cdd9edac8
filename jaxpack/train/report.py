"""Reports on a run, finished or not, from `metrics.jsonl` and `about.json`: Markdown with a picture beside it."""

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from jaxpack.data.evaluation_sets import UNNAMED, prefix_of
from jaxpack.errors import InputError, install_command, one_line, reason, visible
from jaxpack.train.metrics import ABOUT, METRICS, Record, read_records
from jaxpack.utils.figures import frame, new_figure
from jaxpack.utils.files import replace_file
from jaxpack.utils.json_file import parse_json, read_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ABOUT = ("started", "after", "num_steps", "padding_share", "model", "device", "versions", "remat", "plan", "settings")
REPORT, PICTURE = "report.md", "report.png"
_TRAIN, _EVAL = "#0072B2", "#D55E00"
_EXPERT_FIGURES = (
    ("busiest_expert", "tokens of the busiest expert over the mean (1 is even), first and last record", "{:.2f}"),
    ("unused_experts", "share of experts that no token of a micro-batch chose, first and last record", "{:.1%}"),
)


def write_report(folder: str | Path) -> Path:
    """Writes `report.md` into the output folder of a run, stopped or still going on, and returns its path.

    Draws `report.png` beside it if matplotlib is installed and there are at least two training records. Replaces
    earlier reports.

    Raises:
      InputError: the folder holds no run with a training record, or cannot be written to.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=16, lora_alpha=32))
      >>> config = jaxpack.TrainConfig(
      ...     packing=True, max_length=128, max_steps=2, learning_rate=2e-4, output_dir="out"
      ... )
      >>> result = jaxpack.Trainer(model, tokenizer, "train.jsonl", config).train()
      >>> jaxpack.write_report("out").name
      'report.md'
    """
    folder = Path(folder)
    records = read_records(folder)
    training, _ = _by_kind(records)
    if not training:
        raise InputError(
            f"`folder` must hold {METRICS} with a record of a step, got {str(folder)!r}, whose file has none."
        )
    about = _read_about(folder)
    if len(training) < 2:
        picture = "One record is not enough for a picture: a smaller `logging_steps` writes more."
    elif find_spec("matplotlib") is None:
        install = install_command("bench")
        picture = f"There is no picture, because matplotlib is not installed: run {install}, then `{_again(folder)}`."
    else:
        image = io.BytesIO()
        draw_run(records, _sets(about, records)).savefig(image, format="png", dpi=100)
        replace_file(folder / PICTURE, image.getvalue(), "folder")
        picture = f"![Loss, tokens a second, memory and padding, by step]({PICTURE})"
    path = folder / REPORT
    replace_file(path, _text(folder, records, about, picture).encode(), "folder")
    return path


def draw_run(records: list[Record], eval_sets: Sequence[str] = ()) -> "Figure":
    """Draws loss, tokens a second, memory and padding against the step, from the records of a `metrics.jsonl`.

    The loss of each set in `eval_sets` has a line of its own.
    """
    training, evaluations = _by_kind(records)
    figure = new_figure(12.5, 6.8)
    loss, *others = figure.subplots(2, 2).flat
    steps = [record["step"] for record in training]
    losses = [record["loss"] for record in training]
    loss.plot(steps, losses, color=_TRAIN, label="training, mean since the record before")
    if evaluations:
        points = ([record[name] for record in evaluations] for name in ("step", "eval_loss"))
        loss.plot(*points, color=_EVAL, marker="o", markersize=4, label="evaluation")
        for name in eval_sets:
            points = ([record[key] for record in evaluations] for key in ("step", _key(name, "loss")))
            loss.plot(*points, linestyle="--", linewidth=1, label=f"evaluation of {name}")
        loss.legend(frameon=False)
    frame(loss, "Does it learn?", "step", "loss")
    figures = (
        ("How many real tokens a second?", "real tokens/s", "tokens_per_second", 1),
        ("How much memory?", "peak device memory so far, GiB", "peak_memory_bytes", 2**-30),
        ("How much is padding?", "padding, % of all positions", "padding_share", 100),
    )
    for panel, (title, unit, name, factor) in zip(others, figures, strict=True):
        values = [factor * record[name] for record in training]
        panel.plot(steps, values, color=_TRAIN)
        panel.set_ylim(0, 1.1 * max(values) or 1)
        panel.yaxis.set_major_formatter("{x:,.10g}")
        frame(panel, title, "step", unit)
    return figure


def _by_kind(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Returns the records of training steps, and the records of evaluations."""
    return [record for record in records if "loss" in record], [record for record in records if "eval_loss" in record]


def _sets(about: dict[str, Any], records: list[Record]) -> list[str]:
    """Returns the names of a run's evaluation sets that all evaluations have; one set without a name has none."""
    _, evaluations = _by_kind(records)
    return [name for name in about.get("eval_sets", ()) if all(_key(name, "loss") in one for one in evaluations)]


def _key(name: str, metric: str) -> str:
    """Returns the public name of a metric of a set; "" is all sets together."""
    return f"eval_{prefix_of(name)}{metric}"


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = parse_json(read_file(folder / ABOUT), finite=False)
    except (OSError, ValueError) as error:
        raise InputError(f"`folder` must hold {ABOUT}, got {str(folder)!r}: {reason(error)}.") from error
    missing = [name for name in _ABOUT if not isinstance(about, dict) or name not in about]
    if missing:
        raise InputError(
            f"`folder` must hold the {ABOUT} that a run wrote, got {str(folder)!r}, whose file lacks"
            f" {', '.join(missing)}."
        )
    return about


def _text(folder: Path, records: list[Record], about: dict[str, Any], picture: str) -> str:
    after, done = about["after"], max(record["step"] for record in records)
    settings = yaml.safe_dump(about["settings"], sort_keys=False, default_flow_style=None, allow_unicode=True)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    began = f"continued after step {after:,} at" if after else "started at"
    return "\n".join(
        [
            f"# {_inline(folder.resolve().name)}: {done:,} of {about['num_steps']:,} steps",
            "",
            _inline(f"{about['model']}, {began} {about['started']} on {about['device']}."),
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name} | {_inline(value)} |" for name, value in _figures(records, about)),
            "",
            picture,
            "",
            "## Data and model",
            "",
            *(f"- {_inline(line)}" for line in about["plan"]),
            "",
            "## Settings",
            "",
            "```yaml",
            visible(settings.rstrip("\n")),
            "```",
            "",
            "## Versions",
            "",
            _inline(f"{versions}; {about['device']}"),
            "",
        ]
    )


def _inline(text: str) -> str:
    """Writes a text of a file so that Markdown neither ends the table cell nor reads HTML or links in it."""
    return one_line(str(text)).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def _figures(records: list[Record], about: dict[str, Any]) -> list[tuple[str, str]]:
    training, evaluations = _by_kind(records)
    first, last = training[0], training[-1]
    losses = f"{first['loss']:.4f}, {last['loss']:.4f} (step {last['step']:,})"
    lines = [("training loss, first and last record", losses)]
    if evaluations:
        lines.append(("evaluation loss, last", _evaluation(evaluations[-1])))
        best = min(evaluations, key=lambda record: math.inf if math.isnan(record["eval_loss"]) else record["eval_loss"])
        lines.append(("evaluation loss, lowest", _evaluation(best)))
        for name in _sets(about, records):
            shown = f"{_evaluation(evaluations[-1], name)}; {_evaluation(best, name)}"
            lines.append((f"evaluation loss of {name}, last, and where that of all sets is lowest", shown))
    rate = float(np.median([record["tokens_per_second"] for record in training]))
    lines.append(("tokens per second without padding, median of the records", f"{rate:,.0f}"))
    if (at_peak := about.get("peak_tokens_per_second")) is not None:  # Runs of older versions do not have it.
        lines.append(("share of the published rate in bfloat16, for what these tokens need", f"{rate / at_peak:.0%}"))
    peak = max(record["peak_memory_bytes"] for record in training) / 2**30
    lines.append(("peak memory of the device", f"{peak:.2f} GiB"))
    lines.append(("share of padding among all positions", f"{about['padding_share']:.2%}"))
    for name, line, form in _EXPERT_FIGURES:
        if name in first and name in last:
            shown = ", ".join(form.format(record[name]) for record in (first, last))
            lines.append((line, f"{shown} (step {last['step']:,})"))
    lines.append(("recomputation in the backward pass", f"`remat` {about['remat']}"))
    start = f"{last['first_step_seconds']:.1f} s, of which compiling took {last['compile_seconds']:.1f} s"
    lines.append(("time until the first step ended", start))
    return lines


def _evaluation(record: Record, name: str = UNNAMED) -> str:
    # Only the exponential of a cross entropy is a perplexity: another objective's records have none.
    perplexity = record.get(_key(name, "perplexity"))
    shown = "" if perplexity is None else f", perplexity {perplexity:.2f}"
    return f"{record[_key(name, 'loss')]:.4f}{shown} (step {record['step']:,})"


def _again(folder: Path) -> str:
    return f"jaxpack.write_report({str(folder)!r})"
