"""Reads our training runs in benchmarks/results, which the tests compare predictions with."""

import json
from pathlib import Path

_RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def measured_runs(gpu: str = "H200", **wanted: object) -> list[dict]:
    """Returns the runs of jaxpack's kernels on this GPU with these settings."""
    files = _RESULTS.glob(f"*_{gpu.lower()}_training*.json")
    rows = [row for path in files for row in json.loads(path.read_text())["results"]]
    wanted |= {"system": "jaxpack", "implementation": None}
    return [row for row in rows if "shapes" in row and all(row[name] == value for name, value in wanted.items())]


def id_of(row: dict) -> str:
    """Returns a short label of a run for test names."""
    return f"{row['label']} {row['rows']} {row['remat']}"


def may_be_off(row: dict) -> float:
    """Returns the tolerated relative error: 0.1, or 0.3 for steps up to 0.03 s, which depend on the host's speed."""
    return 0.1 if row["step_seconds"] > 0.03 else 0.3
