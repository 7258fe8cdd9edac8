"""Defines the bars of the training step: the work, the opponents, and the required speed and memory ratios."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from jaxpack.bench.cases import Case, Planned, case_of
from jaxpack.bench.report import COLORS, GIB, NAMES, of_plan
from jaxpack.constants import Layout
from jaxpack.utils.figures import frame, head, lying_bars, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Bar:
    """Holds one bar: a piece of work, its opponents, and the speed and memory to reach.

    Attributes:
      peers: the opponents, of which the fastest counts.
      speed: the required ratio of our tokens a second to the opponent's; None only shows both.
      memory: the largest allowed ratio of our peak memory to the opponent's; None if memory does not matter.
    """

    work: str
    ours: Case
    peers: tuple[Case, ...]
    speed: float | None
    memory: float | None = 1.0


def _at_both_ends(model: str, frugal: str) -> tuple[Bar, Bar]:
    """Returns the bars for 16 packed rows of 1,024 tokens beside Unsloth, with little memory and with as much as asked.

    `frugal` is our fastest memory choice within Unsloth's least memory.
    """

    def bar(what: str, remat: str, recompute: str) -> Bar:
        peer = Case(system="unsloth", model=model, remat=recompute)
        return Bar(f"{model}, {what}", Case(model=model, remat=remat), (peer,), 1.3)

    return bar("low memory", frugal, "unsloth"), bar("memory free", "none", "none")


def _padding_free(what: str, remat: str, recompute: str, speed: float | None) -> Bar:
    """Returns a bar for padding-free batches of 32 documents a step, about 4,000 tokens."""
    ours, peer = (
        Case(system=system, layout="padding-free", remat=choice, **_DOCUMENTS)
        for system, choice in (("jaxpack", remat), ("unsloth", recompute))
    )
    return Bar(f"Qwen3-4B, padding-free, 32 documents, {what}", ours, (peer,), speed, memory=None)


def _padded(what: str, remat: str, speed: float | None) -> Bar:
    """Returns a bar for 16 packed rows of 1,024 tokens (about 128 documents) beside 32 padded documents.

    The 32 documents are padded to the longest of them, which determines the time of such a step: the mean of ten steps
    is known to 7 %.
    """
    peer = Case(system="trl", layout="padded", remat="full", steps=100, **_DOCUMENTS)
    work = f"Qwen3-4B, packed against TRL's padding, {what}"
    return Bar(work, Case(model="Qwen3-4B", remat=remat), (peer,), speed, memory=None)


def _four_bit(work: str, speed: float, remat: str = "offload", memory_limit: float | None = None, **fields: Any) -> Bar:
    """Returns a bar for a model in 4 bits beside Unsloth's 4-bit run of the same size with its least memory.

    `remat` is our fastest memory choice within Unsloth's memory, or "auto" within a `memory_limit`.
    """
    ours = Case(load_in_4bit=True, remat=remat, memory_limit=memory_limit, **fields)
    return Bar(work, ours, (Case(system="unsloth", load_in_4bit=True, remat="unsloth", **fields),), speed)


def _qwen3_moe(what: str, speed: float | None, **fields: Any) -> Bar:
    """Returns a bar for 16 packed rows of a mixture with adapted experts, each system with its least memory.

    In 4 bits TRL holds the experts in 16 bits, because bitsandbytes knows only linear layers.
    """
    ours = Case(model="Qwen3-30B-A3B", adapts_experts=True, remat="offload", **fields)
    peers = tuple(dataclasses.replace(ours, system=system, remat=remat) for system, remat in _LEAST.items())
    return Bar(f"Qwen3-30B-A3B, {what}", ours, peers, speed, memory=None)


def _gpt_oss(what: str, **fields: Any) -> Bar:
    """Returns a bar for 16 packed rows of GPT-OSS, each system with its least memory.

    Unsloth packs no rows of GPT-OSS, and pads 32 documents a step. Both opponents hold the weights in 16 bits, since
    they decode MXFP4 unless they can download kernels.
    """
    ours = Case(model="gpt-oss-20b", remat="offload", **fields)
    trl = dataclasses.replace(ours, system="trl", remat="full")
    unsloth = dataclasses.replace(ours, system="unsloth", remat="unsloth", layout="padded", rows=32, steps=30)
    return Bar(f"gpt-oss-20b, {what}", ours, (unsloth, trl), None, memory=None)


_LEAST = {"unsloth": "unsloth", "trl": "full"}
_DOCUMENTS: dict[str, Any] = {"model": "Qwen3-4B", "rows": 32}
_FULL: dict[str, Any] = {"model": "Qwen3-0.6B", "full_finetuning": True, "remat": "none"}

BARS = (
    *_at_both_ends("Qwen3-4B", "offload"),
    *_at_both_ends("Qwen3-8B", "offload_heads"),
    _padding_free("as each comes", "none", "unsloth", 2.0),  # on such a card
    _padding_free("both keeping all", "none", "none", None),
    _padding_free("low memory", "offload", "unsloth", None),
    _padded("as each comes", "none", 10.0),
    _padded("both recomputing", "full", None),
    Bar(
        "Qwen3-0.6B, full fine-tuning, packed",
        Case(**_FULL),
        tuple(Case(system=system, **_FULL) for system in ("unsloth", "trl-liger")),
        1.3,
        memory=None,
    ),
    _four_bit("Qwen3-4B in 4 bits, 16 rows", 1.3, model="Qwen3-4B"),
    _four_bit(
        "Qwen3-4B in 4 bits, one row, 8-bit Adam", 4.0, "auto", 3.1, model="Qwen3-4B", rows=1, optim="adamw_8bit"
    ),
    _four_bit("Qwen3-8B in 4 bits, 16 rows", 1.3, "offload_heads", model="Qwen3-8B"),
    _qwen3_moe("16 rows", 2.0),
    _qwen3_moe("16 rows, in 4 bits, 8-bit Adam", None, load_in_4bit=True, optim="adamw_8bit"),
    _gpt_oss("16 rows", adapts_experts=False),
    _gpt_oss("16 rows, experts adapted", adapts_experts=True),
)

# The runs on smaller cards. Each entry: the model, whether it is in 4 bits, layout, batch size, the card's GiB.
_ON_CARDS: tuple[tuple[str, bool, Layout, int, float], ...] = (
    ("Qwen3-0.6B", False, "packed", 16, 6),
    ("Qwen3-0.6B", False, "packed", 16, 8),
    ("Qwen3-0.6B", False, "padding-free", 32, 4),
    ("Qwen3-0.6B", False, "padded", 4, 4),
    ("Qwen3-0.6B", True, "packed", 8, 4),
    ("Qwen3-0.6B", True, "packed", 32, 6),
    ("Qwen3-0.6B", True, "padding-free", 8, 4),
    ("Qwen3-0.6B", True, "padded", 8, 4),
    ("Qwen3-4B", False, "packed", 16, 11.5),
    ("Qwen3-4B", False, "packed", 16, 24),
    ("Qwen3-4B", False, "padding-free", 8, 11.5),
    ("Qwen3-4B", False, "padded", 4, 12),
    ("Qwen3-4B", True, "packed", 1, 4),
    ("Qwen3-4B", True, "packed", 16, 6),
    ("Qwen3-4B", True, "padding-free", 8, 6),
    ("Qwen3-4B", True, "padded", 4, 5),
    ("Qwen3-8B", False, "packed", 4, 20),
    ("Qwen3-8B", False, "packed", 16, 23.5),
    ("Qwen3-8B", False, "padding-free", 8, 23.5),
    ("Qwen3-8B", False, "padded", 4, 24),
    ("Qwen3-8B", True, "packed", 16, 11.5),
    ("Qwen3-8B", True, "packed", 16, 48),
    ("Qwen3-8B", True, "padding-free", 8, 12),
    ("Qwen3-8B", True, "padded", 4, 10),
)


def cards() -> list[Planned]:
    """Returns the runs on smaller cards. Each must fit, and must take the predicted memory and time."""
    return [
        Planned(
            "cards",
            f"{model} on {card:g} GiB",
            Case(model=model, load_in_4bit=four, layout=layout, rows=rows, remat="auto", card=card),
        )
        for model, four, layout, rows, card in _ON_CARDS
    ]


def cards_table(records: list[dict[str, Any]]) -> Table:
    """Returns a table of the runs on smaller cards, with what was measured over what was predicted."""
    table = Table(title="runs on smaller cards: measured, and measured over predicted")
    for heading in ("run", "choice", "tokens/s", "GiB", "memory", "time"):
        table.add_column(heading, justify="left" if heading in ("run", "choice") else "right", no_wrap=True)
    for record in records:
        if record["plan"] != "cards":
            continue
        run = str(case_of(record)).removeprefix("jaxpack ")
        if "failed" in record:
            table.add_row(run, "-", f"failed: {record['failed'][:60]}", "", "", "")
            continue
        memory = record["peak_memory_bytes"] / record["predicted_peak_bytes"]
        time = record["step_seconds"] / record["predicted_step_seconds"]
        table.add_row(run, record["chosen_remat"], *_figures(record), f"{memory:.2f} x", f"{time:.2f} x")
    return table


def bars() -> list[Planned]:
    """Returns the cases to measure, opponents next to ours; a case that two bars share comes once."""
    work = {case: bar.work for bar in reversed(BARS) for case in (bar.ours, *bar.peers)}
    cases = dict.fromkeys(case for bar in BARS for case in (bar.ours, *bar.peers))
    return [Planned("bars", work[case], case) for case in cases]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Holds a bar and the two records measured for it on a device; None for a missing or failed record.

    `whole` is whether all opponents were measured. If some failed, the fastest of the others is shown, but the bar is
    neither passed nor missed.
    """

    bar: Bar
    device: str
    ours: dict[str, Any] | None
    peer: dict[str, Any] | None
    whole: bool = True

    @property
    def speed(self) -> float | None:
        """Returns our tokens a second divided by the opponent's."""
        return self._ratio("tokens_per_second")

    @property
    def memory(self) -> float | None:
        """Returns our peak memory divided by the opponent's."""
        return self._ratio("peak_memory_bytes")

    @property
    def passed(self) -> bool | None:
        """Returns whether speed and memory reach the bar; None if that is not known or not asked."""
        if self.speed is None or self.memory is None or self.bar.speed is None or not self.whole:
            return None
        return self.speed >= self.bar.speed and (self.bar.memory is None or self.memory <= self.bar.memory)

    def _ratio(self, figure: str) -> float | None:
        return self.ours[figure] / self.peer[figure] if self.ours and self.peer else None


def verdicts(records: list[dict[str, Any]]) -> list[Verdict]:
    """Compares, for each bar, ours with the fastest opponent; all measured on one device, data and day.

    A day with missing measurements is left out if another day has all of them. A failed opponent leaves the comparison
    to the others.
    """
    found = []
    failed = {
        (record.get("data"), record.get("date"), case_of(record))
        for record in records
        if record["plan"] == "bars" and "failed" in record
    }
    sittings: dict[tuple[str, ...], dict[Case, dict[str, Any]]] = {}
    for record in of_plan(records, "bars"):
        sitting = tuple(record[field] for field in ("device", "data", "date"))
        sittings.setdefault(sitting, {})[case_of(record)] = record
    for (device, data, date), of_case in sittings.items():
        for bar in BARS:
            ours, *peers = (of_case.get(case) for case in (bar.ours, *bar.peers))
            measured = [peer for peer in peers if peer is not None]
            whole = len(measured) == len(peers)
            tried = all(case in of_case or (data, date, case) in failed for case in bar.peers)
            fastest = max(measured, key=lambda peer: peer["tokens_per_second"]) if measured and tried else None
            if ours or measured:
                found.append(Verdict(bar, device, ours, fastest, whole))
    known = {(verdict.bar, verdict.device) for verdict in found if verdict.speed is not None}
    told = (verdict for verdict in found if verdict.speed is not None or (verdict.bar, verdict.device) not in known)
    return sorted(told, key=lambda verdict: BARS.index(verdict.bar))


def bars_table(records: list[dict[str, Any]]) -> Table:
    """Returns a table with one line for each bar."""
    table = Table(title="the bars: figures of jaxpack, then of the fastest opponent")
    for heading in ("work", "on"):
        table.add_column(heading, no_wrap=True)
    figures = ("tokens/s", "GiB")
    for heading in (*figures, "opponent", *figures, "speed", "required", "memory", "allowed", "passed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for verdict in verdicts(records):
        table.add_row(
            verdict.bar.work,
            verdict.device,
            *_figures(verdict.ours),
            verdict.peer["system"] if verdict.peer else "-",
            *_figures(verdict.peer),
            "-" if verdict.speed is None else f"{verdict.speed:.2f} x",
            "" if verdict.bar.speed is None else f">= {verdict.bar.speed:g} x",
            "-" if verdict.memory is None else f"{verdict.memory:.2f} x",
            "" if verdict.bar.memory is None else f"<= {verdict.bar.memory:g} x",
            {True: "pass", False: "FAIL", None: "-"}[verdict.passed],
        )
    return table


def _figures(record: dict[str, Any] | None) -> tuple[str, str]:
    if record is None:
        return "-", "-"
    return f"{record['tokens_per_second']:,.0f}", f"{record['peak_memory_bytes'] / GIB:.2f}"


def draw_bars(records: list[dict[str, Any]]) -> "Figure":
    """Draws ours beside the fastest opponent, for each work whose opponents were measured, too.

    Each model has a row of panels with axes of its own, so that the bars of a large model can be compared, too.
    """
    found = [verdict for verdict in verdicts(records) if verdict.speed is not None]
    models: dict[str, list[Verdict]] = {}
    for verdict in found:
        models.setdefault(verdict.bar.ours.model, []).append(verdict)
    several_devices = len({verdict.device for verdict in found}) > 1
    rows = [len(group) for group in models.values()]
    figure = new_figure(9.5, 0.82 * sum(rows) + 0.75 * len(rows) + 0.6)
    grid = figure.subplots(
        len(rows), 2, sharey="row", width_ratios=(3, 2), height_ratios=[count + 0.4 for count in rows], squeeze=False
    )
    for (model, group), panels in zip(models.items(), grid, strict=True):
        _draw_model(model, group, *panels, with_device=several_devices)
    for panel, along in zip(grid[-1], ("real tokens/s", "peak memory, GiB"), strict=True):
        panel.set_xlabel(along)
    pairs = [record for verdict in found for record in (verdict.ours, verdict.peer) if record is not None]
    data, devices, date = (
        " and ".join(sorted({pair[field] for pair in pairs})) for field in ("data", "device", "date")
    )
    head(figure, f"The same documents and optimizer for both: {data}.\n{devices}, {date}. x: factor over the opponent.")
    return figure


def _draw_model(model: str, group: list[Verdict], speed: "Axes", memory: "Axes", *, with_device: bool) -> None:
    pairs = [record for verdict in group for record in (verdict.ours, verdict.peer) if record is not None]
    places = np.concatenate([[-2.4 * i, -2.4 * i - 0.85] for i in range(len(group))])
    labels = [_written_in_two(verdict.bar.work.removeprefix(f"{model}, ")) for verdict in group]
    if with_device:
        labels = [f"{label}\n{verdict.device}" for label, verdict in zip(labels, group, strict=True)]
    for panel, field, unit, form in (
        (speed, "tokens_per_second", 1, ",.0f"),
        (memory, "peak_memory_bytes", GIB, ".1f"),
    ):
        values = [record[field] / unit for record in pairs]
        texts = [f"{NAMES.get(r['system'], r['system'])} {x:{form}}" for r, x in zip(pairs, values, strict=True)]
        for at in range(0, len(pairs), 2):
            texts[at] += f"   x {values[at] / values[at + 1]:.2f}"
        lying_bars(panel, places, values, [COLORS[record["system"]] for record in pairs], texts, room=1.8)
        panel.set_ylim(places[-1] - 0.7, 0.7)
        panel.locator_params(axis="x", nbins=5)
    speed.set_yticks(places[::2] - 0.42, labels)
    frame(speed, f"{model}: speed", "", "")
    frame(memory, "memory", "", "")


def _written_in_two(work: str) -> str:
    """Breaks the name of a piece of work where it has several parts, so that it takes at most two lines."""
    first, *others = work.split(", ")
    return f"{first}\n{', '.join(others)}" if others else first
