"""Tests that a folder is uploaded to the hub as it is, but for the names of folders, and that failures lose nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import running_hub

import torch_bridge
from jaxpack.errors import InputError
from torch_bridge.hub import check_hub

FILES = {
    "README.md": b"---\ntags: [lora]\n---\n# Adapter\n",
    "adapter_model.safetensors": bytes(range(256)) * 100,
    "tokenizer.json": b"{}",
    "more/notes.txt": b"kept",
    "adapter_config.json": b'{"base_model_name_or_path": "org/base", "r": 4}',
}

# huggingface_hub uploads with an argument that httpx calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "adapter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "adapter"


def test_every_byte_of_a_folder_is_uploaded_in_one_commit(hub, folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    url = torch_bridge.push_to_hub(folder, "team/mine", private=True)
    assert url == f"{hub.url}/team/mine"
    assert hub.repos == {"team/mine": FILES}
    assert hub.commits == 1
    (made,) = hub.created
    assert made.get("private") or made.get("visibility") == "private"
    (folder / "tokenizer.json").write_text("[]")
    torch_bridge.push_to_hub(str(folder), "team/mine")  # The repository is there already.
    assert hub.repos["team/mine"] == FILES | {"tokenizer.json": b"[]"}


def test_a_name_alone_belongs_to_the_user_of_the_token(hub, folder: Path) -> None:
    assert torch_bridge.push_to_hub(folder, "mine") == f"{hub.url}/somebody/mine"
    assert set(hub.repos) == {"somebody/mine"}
    assert not {"private", "visibility"} & hub.created[0].keys()


def test_no_uploaded_file_names_a_folder_of_the_machine(hub, folder: Path, capfd) -> None:
    config = {"base_model_name_or_path": str(folder.parent / "models" / "base"), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch_bridge.push_to_hub(folder, "mine")
    uploaded = hub.repos["somebody/mine"]
    assert json.loads(uploaded["adapter_config.json"]) == config | {"base_model_name_or_path": "base"}
    assert not any(str(folder.parent).encode() in content for content in uploaded.values())
    assert json.loads((folder / "adapter_config.json").read_text()) == config
    assert "is uploaded with 'base' as its base_model_name_or_path" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("repo_id", ["a/b/c", "some one/mine", "mine..too", "", "-mine"])
def test_an_id_that_is_not_well_formed_is_refused_without_the_hub(repo_id: str, folder: Path) -> None:
    for refused in (lambda: check_hub(repo_id), lambda: torch_bridge.push_to_hub(folder, repo_id)):
        with pytest.raises(InputError, match="`repo_id` must be the name of a repository, such as 'user/adapter', got"):
            refused()


def test_a_hub_that_does_not_take_the_token_is_refused(hub, monkeypatch, tmp_path: Path) -> None:
    hub.role = "read"
    with pytest.raises(InputError, match=r"a token that may write, got one that may only read\. Log in with"):
        check_hub("mine")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=f"needs a hub that knows its token, got this answer of {hub.url}: Invalid"):
        check_hub("mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"needs a token, got none\. Log in with `hf auth login`, or set HF_TOKEN"):
        check_hub("mine")


@pytest.mark.parametrize("fails", ["/commit/main", "/repos/create", "/objects/batch"])
def test_an_upload_that_fails_says_how_to_repeat_it(hub, folder: Path, fails: str) -> None:
    hub.fails = fails
    with pytest.raises(
        InputError, match="`repo_id` must be a repository that can be uploaded to, got 'mine':"
    ) as failed:
        torch_bridge.push_to_hub(folder, "mine", private=False)
    again = f"torch_bridge.push_to_hub({str(folder)!r}, 'mine', private=False)"
    assert f"the files lie in {str(folder)!r}, and `{again}` uploads them again." in str(failed.value)
    assert all((folder / name).read_bytes() == content for name, content in FILES.items())
    hub.fails = None
    eval(again, {"torch_bridge": torch_bridge})
    assert hub.repos == {"somebody/mine": FILES}


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="`folder` must be a folder with files to upload, got"):
            torch_bridge.push_to_hub(folder, "mine")


def test_without_the_library_an_upload_says_how_to_install_it(monkeypatch) -> None:
    for name in ("huggingface_hub", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="An upload to the hub needs the Python package huggingface_hub"):
        check_hub("mine")


def test_importing_torch_bridge_does_not_load_the_library() -> None:
    code = "import sys, jaxpack, torch_bridge; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
