"""Tests that docstrings begin with a plain sentence, and that every public name has an example that runs."""

import ast
import doctest
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers_for_tests import write_checkpoint

ROOT = Path(__file__).parent.parent
SOURCES = [path for top in ("jaxpack", "torch_bridge", "benchmarks", "tests") for path in (ROOT / top).rglob("*.py")]
PUBLIC = [
    (package, name) for package in ("jaxpack", "torch_bridge") for name in importlib.import_module(package).__all__
]
NEEDS_TORCH = {"from_torch", "verify"}


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def is_no_sentence(docstring: str) -> bool:
    return re.match("(Of|What|Those|That)\\b", docstring) is not None


def test_no_docstring_begins_in_the_middle_of_a_sentence():
    assert [(path, text) for path in SOURCES for text in docstrings(path.read_text()) if is_no_sentence(text)] == []


def test_half_a_sentence_is_found():
    source = 'def f():\n    """Of so many inches."""\n\nclass A:\n    r"""What a run did."""\n'
    assert list(map(is_no_sentence, docstrings(source))) == [False, True, True]
    assert not is_no_sentence("Offloads residuals.")


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the folder that the examples are run in: with a small checkpoint and a dataset."""
    write_checkpoint(tmp_path / "path" / "to" / "Qwen3-4B")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "two and two", "completion": " is four"}) + "\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("user_folder")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers calls deprecated functions of its own
@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_the_example_of_a_public_name_runs(package: str, name: str):
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    value = getattr(importlib.import_module(package), name)
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={}))
    assert example.examples, f"{package}.{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
