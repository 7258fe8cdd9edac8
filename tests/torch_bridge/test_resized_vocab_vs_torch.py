"""Tests that models with a resized vocabulary go to transformers and PEFT, and come back, with the same logits."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora, resize_vocab
from jaxpack.model.lora import adapters
from jaxpack.model.weights import weight_of
from tests.torch_bridge import hf

# PEFT calls deprecated functions of transformers, and warns that it saves the embedding.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-4  # for float32 rounding, as between the base models
SIZE = 101
KINDS = ("llama-untied", "qwen3-tied")
SETTINGS: dict[str, dict[str, Any]] = {"frozen": {}, "trained": {"modules_to_save": ("embed_tokens", "lm_head")}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: hf.save_model(folder / name, name)[1] for name in KINDS}


def tokens() -> np.ndarray:
    """Returns rows that have old and new tokens."""
    ids = hf.random_tokens(2, 24)
    ids[:, ::5] = np.arange(97, 102)[: len(ids[0, ::5])] % SIZE
    return ids


def ours(base: str, lora: LoraConfig) -> Transformer:
    """Makes a resized model whose adapters, and whose matrices if they are trained, are not those of the start."""
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    add_lora(resize_vocab(model, SIZE), lora)
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    for name in {"embedding", model.head_name} if lora.modules_to_save else ():
        matrix = getattr(model, name)
        matrix.set_value(matrix[...] + 0.05 * jax.random.normal(jax.random.key(len(name)), matrix.shape))
    return model


def resized(base: str) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(SIZE)
    return model


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_a_resized_base_the_same_logits(kind: str, settings: str, bases: dict[str, str], tmp_path: Path):
    model = ours(bases[kind], LoraConfig(r=4, lora_alpha=8, target_modules="q_proj,up_proj", **SETTINGS[settings]))
    expected = np.asarray(model.logits(jnp.asarray(tokens())))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(resized(bases[kind]), tmp_path / "adapter").eval()
    np.testing.assert_allclose(hf.logits(loaded, tokens()), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(hf.logits(loaded.merge_and_unload(), tokens()), expected, rtol=0, atol=TOLERANCE)

    back, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    torch_bridge.load_adapter(back, str(tmp_path / "adapter"))
    np.testing.assert_array_equal(back.logits(jnp.asarray(tokens())), expected)
    assert torch_bridge.verify(str(tmp_path / "adapter"), base=bases[kind]) < TOLERANCE


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_has_resized_is_read(kind: str, settings: str, bases: dict[str, str], tmp_path: Path):
    """Its new rows, which transformers draws at random, are those of the file."""
    module = resized(bases[kind])
    whole = list(SETTINGS[settings].get("modules_to_save", ())) or None
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], modules_to_save=whole)
    theirs = peft.get_peft_model(module, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    torch_bridge.load_adapter(model, str(tmp_path / "adapter"))
    assert model.lora_config is not None
    assert bool(model.lora_config.modules_to_save) == bool(whole)
    expected = hf.logits(theirs, tokens())
    np.testing.assert_allclose(model.logits(jnp.asarray(tokens())), expected, rtol=0, atol=TOLERANCE)
    torch_bridge.save_adapter(model, tmp_path / "again")
    again, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    twice = {name for name in before if ".modules_to_save." in name or ".original_module." in name}
    assert again.keys() == before.keys() - twice
    assert all(torch.equal(again[name], before[name]) for name in again)


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_those_of_transformers_but_for_its_noise(kind: str, bases: dict[str, str]):
    model, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    resize_vocab(model, SIZE)
    module = resized(bases[kind])
    for weight, theirs in (
        (weight_of(model.embedding), module.get_input_embeddings()),
        (model.head, module.get_output_embeddings()),
    ):
        rows = theirs.weight.detach().numpy()
        np.testing.assert_array_equal(weight.dense(jnp.float32)[:97], rows[:97])
        spread = rows[:97].std()
        np.testing.assert_allclose(weight.dense(jnp.float32)[97:], rows[97:], rtol=0, atol=5e-4 * spread)


@pytest.mark.parametrize("kind", KINDS)
def test_written_folders_have_the_new_size(kind: str, bases: dict[str, str], tmp_path: Path):
    model, _ = torch_bridge.from_pretrained(bases[kind], dtype="float32")
    torch_bridge.save_pretrained(resize_vocab(model, SIZE), tmp_path / "whole")
    adapted = ours(bases[kind], LoraConfig(r=4, lora_alpha=8, **SETTINGS["trained"]))
    torch_bridge.save_merged(adapted, tmp_path / "merged", dtype="float32")
    for name, written in (("whole", model), ("merged", adapted)):
        module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert module.config.vocab_size == SIZE
        expected = written.logits(jnp.asarray(tokens()))
        np.testing.assert_allclose(hf.logits(module, tokens()), expected, rtol=0, atol=TOLERANCE)


def test_the_card_runs_against_a_base_of_the_old_size(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    lora = LoraConfig(r=4, lora_alpha=8)
    model = ours(bases["llama-untied"], lora)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    assert f"base.resize_token_embeddings({SIZE})" in " ".join(capsys.readouterr().err.split())
    card = (tmp_path / "adapter" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "adapter"))
    code = "\n".join(line for line in code.splitlines() if "okenizer = " not in line)
    monkeypatch.chdir(Path(bases["llama-untied"]).parent)  # the card names the last part of the base's path
    names: dict[str, Any] = {}
    exec(code, names)
    expected = model.logits(jnp.asarray(tokens()))
    np.testing.assert_allclose(hf.logits(names["model"].eval(), tokens()), expected, rtol=0, atol=TOLERANCE)
    torch_bridge.save_adapter(add_lora(torch_bridge.from_pretrained(bases["llama-untied"])[0], lora), tmp_path / "old")
    assert "resize" not in (tmp_path / "old" / "README.md").read_text()


def test_files_whose_matrices_disagree_are_refused(bases: dict[str, str], tmp_path: Path):
    torch_bridge.save_adapter(ours(bases["llama-untied"], LoraConfig(r=4)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:99].contiguous()
    save_file(tensors, path)
    model, _ = torch_bridge.from_pretrained(bases["llama-untied"], dtype="float32")
    with pytest.raises(InputError, match=r"must hold the tensors .* got .*lm_head"):
        torch_bridge.load_adapter(model, str(tmp_path / "adapter"))
    assert model.config.vocab_size == 97


@pytest.mark.parametrize("lazy", [False, True])
def test_copies_of_the_embedding_are_compared_with_weights_that_are_still_in_files(
    lazy: bool, bases: dict[str, str], tmp_path: Path
):
    torch_bridge.save_adapter(ours(bases["llama-untied"], LoraConfig(r=4)), tmp_path / "adapter")
    model, _ = torch_bridge.from_pretrained(bases["llama-untied"], dtype="float32", lazy=lazy)
    torch_bridge.load_adapter(model, str(tmp_path / "adapter"))
    assert model.config.vocab_size == SIZE
    assert np.isfinite(model.logits(jnp.asarray(tokens()))).all()
