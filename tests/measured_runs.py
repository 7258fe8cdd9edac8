"""Our training runs in benchmarks/results, which predictions are compared with."""

import json
from pathlib import Path

_RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def measured_runs(gpu: str = "H200", **wanted: object) -> list[dict]:
    """Those on such a GPU with these settings, and our kernels."""
    files = _RESULTS.glob(f"*_{gpu.lower()}_training*.json")
    rows = [row for path in files for row in json.loads(path.read_text())["results"]]
    wanted |= {"system": "jaxpack", "implementation": None}
    return [row for row in rows if "shapes" in row and all(row[name] == value for name, value in wanted.items())]


def id_of(row: dict) -> str:
    """For the names of tests."""
    return f"{row['label']} {row['rows']} {row['remat']}"


def may_be_off(row: dict) -> float:
    """A tenth of what was measured; more of the shortest steps, which go by how fast the host is."""
    return 0.1 if row["step_seconds"] > 0.03 else 0.3
