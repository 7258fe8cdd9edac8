"""Tests that `verify` reports correct folders in one line and refuses folders that torch reads differently."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers_for_tests import small_tokenizer
from transformers import Gemma2PreTrainedModel

import torch_bridge
from jaxpack import InputError, LoraConfig, add_lora
from jaxpack.errors import not_installed
from jaxpack.model.lora import adapters
from tests.torch_bridge import hf

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def save_adapter(folder: Path, base: str) -> str:
    model = add_lora(torch_bridge.from_pretrained(base, dtype="float32")[0], LoraConfig(r=4, target_modules="q_proj"))
    factors = adapters(model)["q_proj"]
    factors.lora_b.set_value(np.random.default_rng(0).normal(0, 0.1, factors.lora_b.shape).astype(np.float32))
    torch_bridge.save_adapter(model, str(folder))
    return str(folder)


def the_line(capsys: pytest.CaptureFixture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "differ by at most" in line]
    assert len(lines) == 1
    return lines[0]


def test_a_model_means_the_same_to_transformers(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, folder = hf.save_model(tmp_path, "llama3-untied")
    assert torch_bridge.verify(folder) < 1e-4
    assert "the same at 100% of 64 places" in the_line(capsys)


def test_soft_caps_are_compared_whatever_attention_transformers_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, folder = hf.save_model(tmp_path, "gemma2-tied")
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as in transformers 5.17
    assert torch_bridge.verify(folder) < 1e-4


def test_an_adapter_means_the_same_to_peft(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, base = hf.save_model(tmp_path / "base", "qwen3-tied")
    adapter = save_adapter(tmp_path / "adapter", base)
    assert torch_bridge.verify(adapter) < 1e-4
    assert "logits of PEFT and jaxpack" in the_line(capsys)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert torch_bridge.verify(adapter, base=str(tmp_path / "moved")) < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="`base_model_name_or_path`"):
        torch_bridge.verify(adapter)


def test_a_prompt_is_read_by_the_folder_s_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture):
    hf.save_model(tmp_path, "qwen3-tied")
    with pytest.raises(InputError, match=r"`prompt` must be None, because .* has no tokenizer, got"):
        torch_bridge.verify(str(tmp_path), prompt="ab")
    small_tokenizer().save_pretrained(tmp_path)
    assert max(small_tokenizer()("#$%").input_ids) < hf.VOCAB_SIZE
    assert torch_bridge.verify(str(tmp_path), prompt="#$%") < 1e-4
    assert "of 3 places" in the_line(capsys)


def test_logits_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The logits are those of a PEFT that read another scaling."""
    _, base = hf.save_model(tmp_path / "base", "qwen3-tied")
    adapter = save_adapter(tmp_path / "adapter", base)
    read = peft.PeftModel.from_pretrained

    def scaled(*arguments: object) -> peft.PeftModel:
        model = read(*arguments)
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 1.1
        return model

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", scaled)
    with pytest.raises(InputError, match=r"must give the same logits in torch and in jaxpack.*differ by at most"):
        torch_bridge.verify(adapter)


def test_a_folder_that_transformers_does_not_read_whole_is_an_error(tmp_path: Path):
    _, folder = hf.save_model(tmp_path, "llama-untied")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.extra.weight": np.ones(2, np.float32)}, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError,
        match=r"must hold exactly the tensors that transformers expects.*unexpected_keys.*model.extra.weight",
    ):
        torch_bridge.verify(folder)


def test_a_folder_that_only_transformers_refuses_is_one_clear_error(tmp_path: Path):
    _, folder = hf.save_model(tmp_path, "llama-untied")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": "a tenth"}))
    with pytest.raises(
        InputError, match=r"must be a folder that transformers and PEFT can read.*attention_dropout.*'a tenth'"
    ) as refused:
        torch_bridge.verify(folder)
    assert "\n" not in str(refused.value)
    assert folder in str(refused.value)


@pytest.mark.parametrize("folder", ["nowhere", "a-file", "x" * 5000])
def test_what_is_no_folder_is_refused_by_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("{}")
    with pytest.raises(InputError, match="`folder` must be an existing folder, got") as refused:
        torch_bridge.verify(folder)
    assert len(str(refused.value)) < 300


def test_without_torch_the_error_says_what_is_missing():
    code = "import sys; sys.modules['torch'] = None; import torch_bridge; torch_bridge.verify('x')"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError" in last
    assert str(not_installed("`verify`", "torch", "hf,torch")) in last
