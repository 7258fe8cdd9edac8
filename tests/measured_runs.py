"""Our training runs in benchmarks/results, which predictions are compared with."""

import json
from pathlib import Path

_RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def measured_runs(**wanted: object) -> list[dict]:
    """Those on an H200 with these settings, and our kernels."""
    rows = [row for path in _RESULTS.glob("*_h200_training*.json") for row in json.loads(path.read_text())["results"]]
    wanted |= {"system": "jaxpack", "implementation": None}
    return [row for row in rows if "shapes" in row and all(row[name] == value for name, value in wanted.items())]
