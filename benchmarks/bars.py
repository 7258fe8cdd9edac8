"""The bars of the training step: which work, beside whom, how much faster, and in how much of their memory."""

import dataclasses
from typing import Any

from rich.table import Table

from jaxpack.bench.cases import Case, Planned, case_of


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
    ),
    Bar(
        "Qwen3-4B, packed, against transformers and PEFT padded, 32 documents",
        Case(model="Qwen3-4B", remat="full"),
        tuple(Case(system=system, layout="padded", remat="full", **_DOCUMENTS) for system in ("trl", "trl-liger")),
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
    """What is to be measured, opponents next to ours."""
    return [Planned("bars", bar.work, case) for bar in BARS for case in (bar.ours, *bar.peers)]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A bar and what was reached: the records, None where one is missing or failed."""

    bar: Bar
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
    """Every bar that was measured, beside the fastest of its opponents, where all of them were."""
    found = []
    for bar in BARS:
        of_work = {case_of(r): r for r in records if r["plan"] == "bars" and r["label"] == bar.work}
        whole = {case: record for case, record in of_work.items() if "failed" not in record}
        peers = [whole.get(case) for case in bar.peers]
        fastest = None if None in peers else max(peers, key=lambda peer: peer["tokens_per_second"])
        if of_work:
            found.append(Verdict(bar, whole.get(bar.ours), fastest))
    return found


def bars_table(records: list[dict[str, Any]]) -> Table:
    """One line for each bar."""
    table = Table(title="the bars: ours and the fastest opponent's")
    for heading in ("work", "tokens/s", "GiB", "opponent", "tokens/s", "GiB", "speed", "bar", "memory", "bar", ""):
        table.add_column(heading, justify="left" if heading in ("work", "opponent") else "right")
    for verdict in verdicts(records):
        table.add_row(
            verdict.bar.work,
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
