"""Finds data that may lie beside the project."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def beside(name: str) -> Path:
    """Returns the path of a file in ../shared/data. Skips the test if the file is not there."""
    path = _SHARED / name
    if not path.is_file():
        pytest.skip(f"needs {name} in ../shared/data")
    return path
