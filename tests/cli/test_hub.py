"""Tests that `jaxpack train` and `jaxpack export` upload what they have written, and refuse early what cannot be."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer, running_hub

# huggingface_hub uploads with an argument that httpx calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture
def command(base: Path, tmp_path: Path) -> list[object]:
    rows = [{"prompt": f"the cab {row}", "completion": f" ab {row}"} for row in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = ["--max-length", 64, "--per-device-train-batch-size", 2, "--lora-r", 4, "--target-modules", "q_proj"]
    course = ["--max-steps", 1, "--save-steps", 0, "--output", tmp_path / "run"]
    return ["train", "--model", base, "--data", tmp_path / "rows.jsonl", *shape, *course]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_written_folders_are_uploaded(
    hub: HubServer, command: list[object], exit_status: Callable, base: Path, tmp_path: Path, capfd: Any
) -> None:
    assert exit_status(*command, "--push-to-hub", "--hub-model-id", "team/mine", "--hub-private-repo") == 0
    written, uploaded = files_of(tmp_path / "run" / "adapter"), hub.repos["team/mine"]
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= written.keys()
    assert uploaded.keys() == written.keys()
    assert {name for name in written if uploaded[name] != written[name]} == {"adapter_config.json"}
    for content in uploaded.values():
        assert str(base.parent).encode() not in content
        assert str(tmp_path).encode() not in content
    assert f"uploaded {tmp_path}/run/adapter to {hub.url}/team/mine" in " ".join(capfd.readouterr().err.split())
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    names = ("push_to_hub", "hub_model_id", "hub_private_repo")
    assert [settings[name] for name in names] == [True, "team/mine", True]

    export = ["export", "--adapter", tmp_path / "run" / "adapter", "--merged", tmp_path / "merged", "--push-to-hub"]
    assert exit_status(*export) == 0
    merged = files_of(tmp_path / "merged")
    assert hub.repos["somebody/merged"] == merged
    assert "model.safetensors" in merged


def test_a_failed_upload_leaves_the_adapter_and_says_how_to_repeat_it(
    hub: HubServer, command: list[object], exit_status: Callable, tmp_path: Path, capfd: Any
) -> None:
    hub.fails = "/commit/main"
    assert exit_status(*command, "--push-to-hub") == 2
    error = "error: " + capfd.readouterr().err.splitlines()[-1].rpartition("error: ")[2]  # A bar may stand before it.
    adapter = tmp_path / "run" / "adapter"
    assert error.startswith("error: `hub_model_id` must be a repository that can be uploaded to, got 'somebody/run'")
    assert f"`torch_bridge.push_to_hub({str(adapter)!r}, 'somebody/run')` uploads them again." in error
    assert (adapter / "adapter_model.safetensors").is_file()


def test_an_upload_that_cannot_be_is_refused_before_anything_is_read(
    hub: HubServer, tmp_path: Path, assert_refused: Callable
) -> None:
    train = ["train", "--model", "nowhere", "--data", "nowhere.jsonl", "--output", tmp_path / "run"]
    assert_refused([*train, "--push-to-hub", "--hub-model-id", "a b"], ["`hub_model_id` must be the name of a rep"])
    assert_refused([*train, "--hub-model-id", "mine"], ["`hub_model_id` must be left out without `push_to_hub`"])
    assert_refused([*train, "--no-hub-private-repo"], ["`hub_private_repo` must be left out without `push_to_hub`"])
    hub.role = "read"
    assert_refused([*train, "--push-to-hub"], ["needs a token that may write, got one that may only read"])
