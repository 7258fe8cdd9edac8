"""Tests that the notebooks run from first to last cell, with smaller settings than the notebooks show.

Also tests that the stored outputs come from one whole run on a GPU. Cells with the tag "shown-on-a-cpu" are an
exception: their outputs come from a CPU until the notebook is run again on a GPU, and the text above them says so.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "01_quickstart": "LAYERS, HIDDEN, BASE_STEPS, STEPS, MAX_LENGTH = 2, 128, 30, 30, 256",
    "02_jax_vs_torch_throughput": (
        'LAYERS, HIDDEN, VOCAB, DTYPE, STEPS, DOCUMENTS, MAX_LENGTH = 2, 128, 500, "float32", 8, 8, 256'
    ),
    "03_packing_and_exactness": 'LAYERS, HIDDEN, DTYPE, STEPS, DOCUMENTS, MAX_LENGTH = 2, 128, "float32", 8, 8, 256',
    "04_bring_your_own_model": "LAYERS, HIDDEN, VOCAB, STEPS = 2, 128, 500, 4",
}


def notebooks() -> dict[str, nbformat.NotebookNode]:
    return {path.stem: nbformat.read(path, 4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def test_every_notebook_has_settings_for_this_test():
    assert set(notebooks()) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_keeps_what_it_showed_on_an_nvidia_gpu(name):
    cells = [cell for cell in notebooks()[name].cells if cell.cell_type == "code"]
    on_gpu = [cell for cell in cells if "shown-on-a-cpu" not in cell.metadata.get("tags", [])]
    assert [cell.execution_count for cell in on_gpu] == list(range(1, len(on_gpu) + 1)), "run from top to bottom, once"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "NVIDIA" in text
    assert not re.search(r"(?<![\w~.])/(tmp|root|home|usr|opt)/", text), "a path of the machine it ran on"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    notebook = notebooks()[name]
    settings = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    shown = set(assigned(notebook.cells[settings].source))
    assert set(assigned(SMALL[name])) <= shown
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(SMALL[name]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


def assigned(source: str) -> list[str]:
    """Returns the names to which lines of settings assign a value."""
    names = [name for line in source.splitlines() for name in line.partition("#")[0].partition("=")[0].split(",")]
    return [name.strip() for name in names if name.strip()]
