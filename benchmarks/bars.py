"""The bars of the training step: which work, beside whom, how much faster, and in how much of their memory."""

import dataclasses
from typing import Any

from rich.table import Table

from jaxpack.bench.cases import Case, Planned, case_of
from jaxpack.bench.report import of_plan


@dataclasses.dataclass(frozen=True)
class Bar:
    """One piece of work.

    Attributes:
      peers: opponents, of whom the fastest counts.
      speed: how many times its tokens a second are wanted.
      memory: the most of its peak memory; None where it does not matter.
    """

    work: str
    ours: Case
    peers: tuple[Case, ...]
    speed: float
    memory: float | None = 1.0


def _at_both_ends(model: str) -> tuple[Bar, Bar]:
    """Little memory and all that is asked for, beside Unsloth: 16 packed rows of 1,024."""

    def bar(what: str, remat: str, recompute: str) -> Bar:
        peer = Case(system="unsloth", model=model, remat=recompute)
        return Bar(f"{model}, {what}", Case(model=model, remat=remat), (peer,), 1.3)

    return bar("low memory", "offload", "unsloth"), bar("memory free", "none", "none")


_DOCUMENTS: dict[str, Any] = {"model": "Qwen3-4B", "rows": 32}
_FULL: dict[str, Any] = {"model": "Qwen3-0.6B", "full_finetuning": True, "remat": "none"}

BARS = (
    *_at_both_ends("Qwen3-4B"),
    *_at_both_ends("Qwen3-8B"),
    Bar(
        "Qwen3-4B, padding-free, 32 documents",
        Case(layout="padding-free", remat="offload", **_DOCUMENTS),
        (Case(system="unsloth", layout="padding-free", remat="unsloth", **_DOCUMENTS),),
        2.0,
        memory=None,
    ),
    Bar(  # each as it comes on such a card: ours with what "auto" takes, theirs with gradient checkpointing
        "Qwen3-4B, packed, against transformers and PEFT padded, 32 documents",
        Case(model="Qwen3-4B", remat="none"),
        (Case(system="trl", layout="padded", remat="full", **_DOCUMENTS),),
        10.0,
        memory=None,
    ),
    Bar(
        "Qwen3-0.6B, full fine-tuning, packed",
        Case(**_FULL),
        tuple(Case(system=system, **_FULL) for system in ("unsloth", "trl-liger")),
        1.3,
        memory=None,
    ),
)


def bars() -> list[Planned]:
    """What is to be measured, opponents next to ours; what two bars ask of, once."""
    work = {case: bar.work for bar in reversed(BARS) for case in (bar.ours, *bar.peers)}
    cases = dict.fromkeys(case for bar in BARS for case in (bar.ours, *bar.peers))
    return [Planned("bars", work[case], case) for case in cases]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A bar and what was reached on a device: the records, None where one is missing or failed."""

    bar: Bar
    device: str
    ours: dict[str, Any] | None
    peer: dict[str, Any] | None

    @property
    def speed(self) -> float | None:
        """Our tokens a second over the opponent's."""
        return self._ratio("tokens_per_second")

    @property
    def memory(self) -> float | None:
        """Our peak memory over the opponent's."""
        return self._ratio("peak_memory_bytes")

    @property
    def passed(self) -> bool | None:
        """Whether speed and memory reach the bar; None where that is not known."""
        if self.speed is None or self.memory is None:
            return None
        return self.speed >= self.bar.speed and (self.bar.memory is None or self.memory <= self.bar.memory)

    def _ratio(self, figure: str) -> float | None:
        return self.ours[figure] / self.peer[figure] if self.ours and self.peer else None


def verdicts(records: list[dict[str, Any]]) -> list[Verdict]:
    """Ours beside the fastest of a bar's opponents, where all were measured, on one device and the same data."""
    found = []
    measured = of_plan(records, "bars")
    for device, data in dict.fromkeys((record["device"], record["data"]) for record in measured):
        of_case = {case_of(r): r for r in measured if (r["device"], r["data"]) == (device, data)}
        for bar in BARS:
            ours, *peers = (of_case.get(case) for case in (bar.ours, *bar.peers))
            fastest = None if None in peers else max(peers, key=lambda peer: peer["tokens_per_second"])
            if ours or any(peers):
                found.append(Verdict(bar, device, ours, fastest))
    return found


def bars_table(records: list[dict[str, Any]]) -> Table:
    """One line for each bar."""
    table = Table(title="the bars: ours and the fastest opponent's")
    for heading in ("work", "on"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "GiB", "opponent", "tokens/s", "GiB", "speed", "bar", "memory", "bar", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for verdict in verdicts(records):
        table.add_row(
            verdict.bar.work,
            verdict.device,
            *_figures(verdict.ours),
            verdict.peer["system"] if verdict.peer else "-",
            *_figures(verdict.peer),
            "-" if verdict.speed is None else f"{verdict.speed:.2f} x",
            f">= {verdict.bar.speed:g} x",
            "-" if verdict.memory is None else f"{verdict.memory:.2f} x",
            "" if verdict.bar.memory is None else f"<= {verdict.bar.memory:g} x",
            {True: "pass", False: "FAIL", None: "-"}[verdict.passed],
        )
    return table


def _figures(record: dict[str, Any] | None) -> tuple[str, str]:
    if record is None:
        return "-", "-"
    return f"{record['tokens_per_second']:,.0f}", f"{record['peak_memory_bytes'] / 2**30:.2f}"
