"""Data that lies beside the project, where it does."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def beside(name: str) -> Path:
    """A file of it; a test that needs it is left out without."""
    path = _SHARED / name
    if not path.is_file():
        pytest.skip(f"needs {name} in ../shared/data")
    return path
