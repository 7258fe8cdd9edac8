"""The step beside its opponents, work by work: which is faster, by how much, and in how much memory.

    PYTHONPATH=. python benchmarks/bars_training.py --lengths LENGTHS.csv --site SITE --output RESULTS.json

Runs `bench_training.py` and `peers_training.py` (SITE is its `--site`), every configuration in a process of its own,
and writes RESULTS.json after each. What that file holds already is not run again: the work can be done in parts,
`--only` what has a word in its name, or as much as starts within `--seconds`.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of work, ours and its opponents' flags, and the bar.

    Attributes:
      ours: flags of `bench_training.py`.
      peers: flags of `peers_training.py`, one string for each opponent; the fastest counts.
      speed: how many times an opponent's tokens a second are wanted.
      memory: the most of the opponent's peak memory; None where it does not matter.
    """

    name: str
    ours: str
    peers: tuple[str, ...]
    speed: float
    memory: float | None = 1.0


def low_and_free(model: str) -> tuple[Work, Work]:
    """Both ends of the memory scale, beside Unsloth: 16 packed rows of 1,024."""
    unsloth = f"--system unsloth --model {model} --recompute"
    return (
        Work(f"{model}, low memory", f"--model {model} --remat offload", (f"{unsloth} unsloth",), 1.3),
        Work(f"{model}, memory free", f"--model {model} --remat none", (f"{unsloth} none",), 1.3),
    )


WORK = (
    *low_and_free("Qwen3-4B"),
    *low_and_free("Qwen3-8B"),
    Work(
        "Qwen3-4B, padding-free, 32 documents",
        "--model Qwen3-4B --layout padding-free --rows 32 --remat offload",
        ("--system unsloth --model Qwen3-4B --layout padding-free --rows 32 --recompute unsloth",),
        2.0,
    ),
    Work(
        "Qwen3-4B packed, transformers and PEFT padded, 32 documents",
        "--model Qwen3-4B --remat full",
        (
            "--system trl --model Qwen3-4B --layout padded --rows 32 --recompute full",
            "--system trl-liger --model Qwen3-4B --layout padded --rows 32 --recompute full",
        ),
        10.0,
        None,
    ),
    Work(
        "Qwen3-0.6B, full fine-tuning, packed",
        "--model Qwen3-0.6B --full-finetuning --remat none",
        (
            "--system unsloth --model Qwen3-0.6B --full-finetuning --recompute none",
            "--system trl-liger --model Qwen3-0.6B --full-finetuning --recompute none",
        ),
        1.3,
        None,
    ),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A bar, and what was reached: None where something was not measured."""

    work: Work
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
        """Whether speed and memory reach the bar."""
        if self.speed is None or self.memory is None:
            return None
        return self.speed >= self.work.speed and (self.work.memory is None or self.memory <= self.work.memory)

    def _ratio(self, figure: str) -> float | None:
        return self.ours[figure] / self.peer[figure] if self.ours and self.peer else None


def verdicts(results: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Every bar beside the fastest of its opponents, where all of them were measured."""
    found = []
    for work in WORK:
        ours, *peers = (results.get(command) for command in commands_of(work))
        if None in peers or any("failed" in peer for peer in peers):
            fastest = None
        else:
            fastest = max(peers, key=lambda peer: peer["tokens_per_second"])
        found.append(Verdict(work, None if ours and "failed" in ours else ours, fastest))
    return found


def commands_of(work: Work) -> list[str]:
    """Script and flags of each configuration, ours first; what a result is known by."""
    return [f"bench_training.py {work.ours}", *(f"peers_training.py {peer}" for peer in work.peers)]


def measure(command: str, lengths: Path, site: Path | None) -> dict[str, Any]:
    """Runs one configuration."""
    script, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        call = [sys.executable, str(Path(__file__).with_name(script)), *flags]
        call += ["--lengths", str(lengths), "--output", str(output)]
        if script.startswith("peers") and site is not None:
            call += ["--site", str(site)]
        process = subprocess.run(call, stdout=sys.stderr)
        if not output.exists():
            return {"failed": f"exit code {process.returncode}"}
        (result,) = json.loads(output.read_text())["results"]
        return result


def print_table(found: list[Verdict], console: Console) -> None:
    """One line for each piece of work."""
    table = Table(title="tokens/s and GiB, ours and the fastest opponent's")
    for heading in ("work", "ours", "", "opponent", "", "", "speed", "bar", "memory", ""):
        table.add_column(heading, justify="left" if heading in ("work", "opponent") else "right")
    for verdict in found:
        table.add_row(
            verdict.work.name,
            *figures_of(verdict.ours),
            verdict.peer["system"] if verdict.peer else "-",
            *figures_of(verdict.peer),
            "-" if verdict.speed is None else f"{verdict.speed:.2f}",
            f">= {verdict.work.speed:g}",
            "-" if verdict.memory is None else f"{verdict.memory:.2f}",
            {True: "pass", False: "FAIL", None: "-"}[verdict.passed],
        )
    console.print(table)


def figures_of(result: dict[str, Any] | None) -> tuple[str, str]:
    """Tokens a second and GiB, for people."""
    if result is None:
        return "-", "-"
    return f"{result['tokens_per_second']:,.0f}", f"{result['peak_memory_bytes'] / 2**30:.2f}"


def main() -> None:
    """Measures what is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--site", type=Path, help="a folder of the opponents' packages")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of work")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing more is started")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    record = json.loads(options.output.read_text()) if options.output.exists() else {"benchmark": "training_bars"}
    results = record.setdefault("results", {})
    for work in WORK:
        if not any(part in work.name for part in options.only):
            continue
        for command in commands_of(work):
            if command in results and "failed" not in results[command]:
                continue
            if time.monotonic() >= end:
                print(f"left: {command}", flush=True)
                continue
            results[command] = measure(command, options.lengths, options.site)
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    print_table(verdicts(results), Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    main()
