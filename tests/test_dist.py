"""Tests the wheel and the sdist: both hold the package's data, and the installed wheel runs without the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import jaxpack

pytestmark = pytest.mark.slow
ROOT = Path(jaxpack.__file__).parent.parent
DATA = {
    "jaxpack/cli/sample/gsm8k.jsonl",
    "jaxpack/cli/sample/LICENSE",
    "jaxpack/py.typed",
    "torch_bridge/py.typed",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds both in an environment of their own, the wheel from the sdist, and returns their folder."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_sdist_holds_the_sources_and_their_data(built: Path):
    (path,) = built.glob("*.tar.gz")
    assert path.name == f"jaxpack-{jaxpack.__version__}.tar.gz"
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert DATA | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names
    assert sources() <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "notebooks", "build", ".venv"))}


def test_the_wheel_holds_the_packages_and_their_data(wheel: zipfile.ZipFile):
    info = f"jaxpack-{jaxpack.__version__}.dist-info"
    names = set(wheel.namelist())
    assert DATA | {f"{info}/licenses/LICENSE", f"{info}/licenses/jaxpack/cli/sample/LICENSE"} <= names
    assert sources() <= names
    assert {name.split("/")[0] for name in names} == {"jaxpack", "torch_bridge", info}


def test_the_wheel_names_its_version_its_project_and_that_it_is_typed(wheel: zipfile.ZipFile):
    about = message_from_bytes(wheel.read(f"jaxpack-{jaxpack.__version__}.dist-info/METADATA"))
    assert about["Version"] == jaxpack.__version__
    assert "Homepage, https://github.com/jaxpack/jaxpack" in about.get_all("Project-URL")
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert about["License-Expression"] == "Apache-2.0"


def test_the_installed_wheel_runs_without_the_checkout(built: Path, tmp_path: Path):
    (path,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(path)]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = (
        "import jaxpack, torch_bridge; from jaxpack import *; from jaxpack.cli.demo import sample;"
        "print(jaxpack.__file__, torch_bridge.__file__, len(sample()), sep='\\n')"
    )
    for command, said in (
        (
            [sys.executable, "-c", script],
            [f"{tmp_path}/{name}/__init__.py" for name in ("jaxpack", "torch_bridge")] + ["500"],
        ),
        ([str(tmp_path / "bin" / "jaxpack"), "--version"], [f"jaxpack {jaxpack.__version__}"]),
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr


def sources() -> set[str]:
    folders = (ROOT / "jaxpack", ROOT / "torch_bridge")
    return {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")}
