"""Tests of fields of `config.json` that some programs write, leave out, or read in another way than others do."""

import json
from pathlib import Path
from typing import Any

import pytest

import torch_bridge
from jaxpack import InputError
from tests.torch_bridge import hf
from torch_bridge.config_json import config_from_hf, config_to_hf


def edited(folder: Path, change: dict[str, Any], drop: tuple[str, ...] = ()) -> str:
    """Changes fields of a folder's `config.json`, and returns the folder's path."""
    fields = json.loads((folder / "config.json").read_text()) | change
    fields = {name: value for name, value in fields.items() if name not in drop}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


# Fields of transformers 4 beside those of version 5.


@pytest.mark.parametrize("family", sorted(set(hf.FAMILIES) - {"llama_longrope"}))
def test_the_fields_of_both_versions_say_the_same(family: str):
    """A Llama with LongRoPE is left out: version 4 passes over its factor."""
    model = hf.make_model(f"{family}-untied")
    config = config_from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
    fields = config_to_hf(config)
    without = {name: value for name, value in fields.items() if name != "rope_parameters"}
    assert config_from_hf(without) == config_from_hf(fields) == config


FOLDERS = ("qwen3-untied", "llama3-untied", "gemma3-tied", "phi4_mini-tied")


@pytest.fixture(scope="module", params=FOLDERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that we wrote, with the fields of both versions. Tests restore its `config.json`."""
    folder = tmp_path_factory.mktemp("saved")
    model, _ = torch_bridge.from_pretrained(hf.save_model(folder / "base", request.param)[1], dtype="float32")
    torch_bridge.save_pretrained(model, folder / "model")
    return folder / "model"


@pytest.fixture
def config(saved: Path):
    text = (saved / "config.json").read_text()
    yield json.loads(text)
    (saved / "config.json").write_text(text)


def test_verify_accepts_a_folder_that_both_versions_read(saved: Path, capsys: pytest.CaptureFixture):
    assert torch_bridge.verify(str(saved)) < 1e-4
    assert "transformers 4" not in capsys.readouterr().err


def test_verify_refuses_another_theta_or_none(saved: Path, config: dict[str, Any]):
    message = (
        r"must describe the same RoPE to transformers 4 and 5, got .*takes .*theta=.*theta=.*Write the folder again"
    )
    with pytest.raises(InputError, match=message):
        torch_bridge.verify(edited(saved, {"rope_theta": 3e4}))
    if config["rope_theta"] not in (1e4, 1e6):  # the defaults of the families
        with pytest.raises(InputError, match=message):
            torch_bridge.verify(edited(saved, config, drop=("rope_theta",)))


def test_verify_refuses_another_scaling_or_none(saved: Path, config: dict[str, Any]):
    if config["rope_scaling"] is None:
        pytest.skip("a model without a scaling")
    with pytest.raises(InputError, match="must describe the same RoPE to transformers 4 and 5"):
        torch_bridge.verify(edited(saved, {}, drop=("rope_scaling",)))
    with pytest.raises(InputError, match=r"must describe the same RoPE|must agree with `rope_parameters`"):
        torch_bridge.verify(edited(saved, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))


def test_verify_refuses_two_dtypes(saved: Path, config: dict[str, Any]):
    with pytest.raises(InputError, match=r"`torch_dtype` and `dtype` .* must be the same.*'float16' and 'float32'"):
        torch_bridge.verify(edited(saved, {"torch_dtype": "float16"}))
    assert torch_bridge.verify(edited(saved, {"torch_dtype": "torch.float32"})) < 1e-4


def test_verify_warns_of_a_folder_for_transformers_5_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, folder = hf.save_model(tmp_path, "qwen3-tied")
    edited(tmp_path, {}, drop=("rope_theta", "rope_scaling", "torch_dtype"))
    assert torch_bridge.verify(folder) < 1e-4
    said = " ".join(capsys.readouterr().err.split())
    assert "only transformers 5 reads config.json as it is meant: transformers 4 takes" in said
    assert "theta=10000" in said
    assert "theta=1000000" in said
