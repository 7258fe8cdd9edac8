"""Tests that packages import only from packages below them and never in a circle, and `import jaxpack` is light."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import jaxpack

ROOT = Path(jaxpack.__file__).parent.parent

# The rooms (packages and modules) from the ground up. A room may import from itself and from earlier rooms.
ROOMS = [
    "jaxpack.errors",
    "jaxpack.constants",
    "jaxpack.utils",
    "jaxpack.arguments",
    "jaxpack.settings",
    "jaxpack.parallel",
    "jaxpack.kernels",
    "jaxpack.data",
    "jaxpack.model",
    "jaxpack.optimizers",
    "jaxpack.planning",
    "jaxpack.objectives",
    "jaxpack.train",
    "jaxpack.generation",
    "jaxpack",  # __init__.py
    "torch_bridge",
    "jaxpack.bench",
    "jaxpack.cli",
    "jaxpack.__main__",
]
# Further limits: rooms that a room may not import although they come earlier in the list.
NARROWER = {
    "jaxpack.kernels": {"jaxpack.errors", "jaxpack.constants", "jaxpack.parallel"},
    "jaxpack.parallel": {"jaxpack.errors", "jaxpack.constants", "jaxpack.utils"},
    "jaxpack.data": {"jaxpack.errors", "jaxpack.constants", "jaxpack.utils", "jaxpack.settings"},
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ("jaxpack", "torch_bridge"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def imports_of(module: str, *, only_at_import: bool = False) -> set[str]:
    """Returns the modules that a module imports, ours and others; on request without imports inside functions."""
    tree = ast.parse(modules()[module].read_text())
    nodes = list(ast.walk(tree))
    if only_at_import:
        late = {n for f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
        checked = {
            n for i in nodes if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)
        }
        nodes = [n for n in nodes if n not in late and n not in checked]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in named}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_room_imports_only_from_rooms_above_it(module):
    room = room_of(module)
    allowed = NARROWER.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
    ours = {name for name in imports_of(module) if name in modules()}
    below = sorted(name for name in ours if room_of(name) not in allowed)
    assert not below, f"{module} of {room} imports {below}"


def test_every_room_is_named():
    folders = {f"jaxpack.{path.name}" for path in (ROOT / "jaxpack").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize("module", [name for name in sorted(modules()) if room_of(name) == "jaxpack.data"])
def test_data_imports_no_jax(module):
    assert not {name for name in imports_of(module) if name.split(".")[0] in ("jax", "flax", "optax", "jaxlib")}


def test_no_import_goes_in_a_circle():
    graph = {name: imports_of(name, only_at_import=True) & modules().keys() - {name} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_importing_jaxpack_does_not_load(module):
    code = f"import sys; from jaxpack import *; assert {module!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_jaxpack_needs_nothing_that_only_unix_has():
    absent = "import sys; sys.modules |= dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp', 'termios'))"
    code = f"{absent}; from jaxpack import *; from jaxpack.parallel import device; device.peak_memory_bytes()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_everything_public_is_there():
    assert all(hasattr(jaxpack, name) for name in jaxpack.__all__)
    assert len(set(jaxpack.__all__)) == len(jaxpack.__all__)
    assert set(jaxpack.__all__) <= set(dir(jaxpack))


def test_a_type_checker_sees_the_names_that_are_imported_when_they_are_used():
    (checked,) = (node for node in ast.parse(modules()["jaxpack"].read_text()).body if isinstance(node, ast.If))
    assert isinstance(checked.test, ast.Name)
    assert checked.test.id == "TYPE_CHECKING"
    seen = {node.module: tuple(alias.name for alias in node.names) for node in checked.body}
    assert seen == jaxpack._MODULES
    assert sorted(name for names in seen.values() for name in names) == sorted(jaxpack.__all__)


def test_a_renamed_name_still_works_and_warns():
    with pytest.warns(DeprecationWarning, match="jaxpack.Promise is now jaxpack.LayoutEstimate"):
        assert jaxpack.Promise is jaxpack.LayoutEstimate
    with pytest.raises(AttributeError, match="Promises"):
        jaxpack.Promises  # noqa: B018
