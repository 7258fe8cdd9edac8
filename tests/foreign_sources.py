"""Reads settings of other libraries from their source files, since importing the libraries takes seconds."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

_SETTINGS = {"TrainingArguments", "_BaseConfig", "SFTConfig", "ModelConfig", "ScriptArguments", "LoraConfig"}
_SETTINGS |= {"PeftConfig", "PeftConfigMixin"}


def folder_of(package: str) -> Path:
    """Returns the folder of an installed package; skips the test if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent


def fields_of(path: Path) -> dict[str, Any]:
    """Returns the fields of a file's settings with their defaults; None if a default is no literal."""
    found = {}
    for one in _classes(path):
        if one.name in _SETTINGS:
            nodes = (node for node in one.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
            found |= {node.target.id: _literal(node.value) for node in nodes}
    return found


def arguments_of(path: Path, name: str) -> dict[str, Any]:
    """Returns the arguments of a class's `__init__` with their defaults; None if there is none, or no literal."""
    (one,) = (one for one in _classes(path) if one.name == name)
    (init,) = (node for node in one.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [argument.arg for argument in init.args.args]
    defaults = [None] * (len(names) - len(init.args.defaults)) + init.args.defaults
    return {name: _literal(default) for name, default in zip(names, defaults, strict=True)}


def _classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]


def _literal(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # of dataclasses.field
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
