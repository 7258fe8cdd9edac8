"""Tests that PEFT's adapters give the same logits and rewrite to the same bytes; all else is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from models import small_config
from safetensors.torch import load_file, save_file

import torch_bridge
from jaxpack import InputError, LoraConfig, TrainConfig, Trainer, Transformer, add_lora
from jaxpack.model.lora import adapters
from jaxpack.model.weights import TRAINED, Frozen
from tests.torch_bridge import hf
from torch_bridge.io.safetensors_file import Tensor, read_header

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LOGITS_TOLERANCE = 1e-4  # for float32 rounding, as between the base models
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

SOME = ["q_proj", "v_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "some": {"target_modules": SOME},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": SOME, "use_rslora": True},
    "a pattern of modules": {"target_modules": r".*\.self_attn\.[qk]_proj"},
    "ranks": {"target_modules": SOME, "rank_pattern": {"q_proj": 2, r"^model.layers.\d+.mlp.down_proj": 6}},
    "alphas": {"target_modules": SOME, "alpha_pattern": {"self_attn.v_proj": 3}, "rank_pattern": {"v_proj": 8}},
    "first match": {"target_modules": SOME, "rank_pattern": {"[qv]_proj": 2, "q_proj": 8}, "use_rslora": True},
    "dropout": {"target_modules": SOME, "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    "a layer": {"target_modules": SOME, "layers_to_transform": [1], "rank_pattern": {"v_proj": 2}},
    "layers of a pattern": {"target_modules": r"model\.layers\.(0\.self_attn\.[qk]_proj|1\..*\.(up|o)_proj)"},
    "head": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "head and embedding": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
TIED_SETTINGS = {
    "tied": {"target_modules": SOME, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
CASES = [("llama3-untied", name) for name in SETTINGS]
CASES += [("qwen3-tied", name) for name in ("all-linear", "ranks", "tied")]


def save_peft(folder: Path, checkpoint: str, settings: dict[str, Any]) -> tuple[torch.nn.Module, str, str]:
    """Makes a PEFT model with adapters that change it. Returns it and the folders of its base and of its adapter."""
    base, base_folder = hf.save_model(folder / "base", checkpoint)
    model = peft.get_peft_model(base, _config(settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(folder / "adapter")
    return model, base_folder, str(folder / "adapter")


def _config(settings: dict[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("checkpoint", "name"), CASES)
def test_the_logits_are_those_of_peft_and_the_bytes_come_out_again(checkpoint: str, name: str, tmp_path: Path):
    theirs, base, adapter = save_peft(tmp_path, checkpoint, (SETTINGS | TIED_SETTINGS)[name])
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    tokens = hf.random_tokens(2, 40)
    assert torch_bridge.load_adapter(model, adapter) is model
    actual, expected = np.asarray(model.logits(jnp.asarray(tokens))), hf.logits(theirs, tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=LOGITS_TOLERANCE)
    with theirs.disable_adapter():
        without = hf.logits(theirs, tokens)
    assert np.abs(actual - without).max() > 100 * LOGITS_TOLERANCE, "the adapter does nothing"

    torch_bridge.save_adapter(model, str(tmp_path / "again"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == Path(adapter, WEIGHTS).read_bytes()
    fresh, _ = hf.save_model(tmp_path / "fresh", checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reread = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    np.testing.assert_allclose(hf.logits(reread, tokens), expected, rtol=0, atol=1e-6)  # code and numbers are the same


def test_training_goes_on_from_it(tmp_path: Path):
    """Training changes the adapters and the head only, and the saved adapter holds the trained values."""
    settings = {"target_modules": SOME, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    _, base, adapter = save_peft(tmp_path, "llama-untied", settings)
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    torch_bridge.load_adapter(model, adapter)
    frozen = [np.array(x) for x in jax.tree.leaves(nnx.state(model, Frozen))]
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(model, TRAINED))]
    rows = [{"input_ids": document.tokens, "labels": document.labels} for document in hf.random_documents([20] * 8)]
    config = TrainConfig(max_steps=3, learning_rate=1e-2, max_length=32, per_device_train_batch_size=4)
    result = Trainer(model, None, rows, config).train()
    assert np.isfinite(result.losses).all()
    assert len(set(result.losses)) == 3
    after = jax.tree.leaves(nnx.state(model, TRAINED))
    assert len(after) == 7  # two factors of three projections, and the head
    assert all((np.asarray(new) != old).any() for new, old in zip(after, before, strict=True))
    still = jax.tree.leaves(nnx.state(model, Frozen))
    assert len(still) == 8  # the embedding, the last norm, and, stacked, two norms and four matrices
    assert all((np.asarray(new) == old).all() for new, old in zip(still, frozen, strict=True))

    torch_bridge.save_adapter(model, str(tmp_path / "trained"))
    reread, _ = torch_bridge.from_pretrained(base, dtype="float32")
    torch_bridge.load_adapter(reread, str(tmp_path / "trained"))
    assert reread.lora_config == model.lora_config
    for new, old in zip(jax.tree.leaves(nnx.state(reread, TRAINED)), after, strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_bfloat16_adapter_is_read_as_float32(tmp_path: Path):
    _, base, adapter = save_peft(tmp_path, "qwen3-tied", SETTINGS["some"])
    file = Path(adapter, WEIGHTS)
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rounded, file)
    model, _ = torch_bridge.from_pretrained(base, dtype="float32")
    torch_bridge.load_adapter(model, adapter)
    lora_b = adapters(model)["q_proj"].lora_b
    assert lora_b.dtype == jnp.float32
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(lora_b[1], rounded[name].float().numpy())


# Changes to PEFT's config, and the field that the error names.
REFUSED: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "IA3"},
    "task_type": {"task_type": "SEQ_CLS"},
    "bias": {"bias": "all"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "lora_bias": {"lora_bias": True},
    "layers_to_transform": {"layers_to_transform": [0]},
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "target_parameters": {"target_parameters": ["mlp.experts.down_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "use_qalora": {"use_qalora": True},
    "megatron_config": {"megatron_config": {"a": 1}},
    "what_is_to_come": {"what_is_to_come": {"a": 1}},
    "rank_pattern": {"rank_pattern": {r"layers.0.self_attn.q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r"layers.0.self_attn.q_proj": 2}},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "target_modules": {"target_modules": ["c_attn"]},
}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    """Returns a model and an adapter for it. Tests share the model, as refused adapters leave it unchanged."""
    _, base, adapter = save_peft(tmp_path_factory.mktemp("some"), "llama-untied", SETTINGS["some"])
    return torch_bridge.from_pretrained(base, dtype="float32")[0], Path(adapter)


def with_config(adapter: Path, folder: Path, change: dict[str, Any]) -> str:
    """Copies an adapter and changes fields of its config."""
    shutil.copytree(adapter, folder / "changed")
    config = json.loads((adapter / CONFIG).read_text())
    (folder / "changed" / CONFIG).write_text(json.dumps(config | change))
    return str(folder / "changed")


@pytest.mark.parametrize(("field", "change"), REFUSED.items())
def test_what_is_not_supported_is_refused_by_name(
    field: str, change: dict[str, Any], some: tuple[Transformer, Path], tmp_path: Path
):
    model, adapter = some
    with pytest.raises(InputError, match=f"`{field}`"):
        torch_bridge.load_adapter(model, with_config(adapter, tmp_path, change))
    assert adapters(model) == {}


WRONG = [
    {"r": 8},
    {"r": "4"},
    {"r": True},
    {"r": 10**12},
    {"lora_alpha": 0},
    {"lora_alpha": None},
    {"lora_dropout": 1.5},
    {"lora_dropout": "no"},
    {"use_rslora": "yes"},
    {"rank_pattern": [1]},
    {"rank_pattern": {"q_proj": 2.5}},
    {"rank_pattern": {"(": 2}},
    {"target_modules": None},
    {"target_modules": []},
    {"target_modules": ["q_proj", 7]},
    {"target_modules": ["q_proj", "query"]},
    {"target_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": "nothing"},
    {"target_modules": "["},
    {"target_modules": ["q_proj"]},  # fewer modules than in the file
    {"target_modules": [*SOME, "o_proj"]},  # more modules than in the file
    {"modules_to_save": "lm_head"},
    {"modules_to_save": ["lm_head"]},  # not in the file
    {"init_lora_weights": 7},
    {"peft_type": []},
    {"task_type": {}},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_wrong_config_is_one_clear_error(change: dict[str, Any], some: tuple[Transformer, Path], tmp_path: Path):
    model, adapter = some
    with pytest.raises(InputError, match="changed/adapter_") as refused:  # the error names the file
        torch_bridge.load_adapter(model, with_config(adapter, tmp_path, change))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 640
    assert adapters(model) == {}


def test_all_keys_that_are_wrong_are_reported_at_once(some: tuple[Transformer, Path], tmp_path: Path):
    model, adapter = some
    adapter = with_config(adapter, tmp_path, {})
    tensors = load_file(Path(adapter, WEIGHTS))
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (0, 1)]
    tensors[names[0].replace("lora_A", "lora_A.default")] = tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]].T.contiguous()
    save_file(tensors, Path(adapter, WEIGHTS))
    with pytest.raises(InputError) as refused:
        torch_bridge.load_adapter(model, adapter)
    message = str(refused.value)
    assert f"1 missing tensor ({names[0]})" in message
    assert f"1 tensor of the wrong shape ({names[1]} is [48, 4] and must be [4, 48])" in message
    assert "1 tensor that the config does not describe" in message
    assert "lora_A.default" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / CONFIG).unlink(),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / CONFIG).write_text("{"),
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    damage: Callable[[Path], object], some: tuple[Transformer, Path], tmp_path: Path
):
    model, adapter = some
    damage(Path(changed := with_config(adapter, tmp_path, {})))
    with pytest.raises(InputError, match="adapter"):
        torch_bridge.load_adapter(model, changed)


def test_a_file_cut_after_it_was_checked_leaves_the_model_as_it_was(
    some: tuple[Transformer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, adapter = some
    changed = Path(with_config(adapter, tmp_path, {}))

    def cut(path: Path) -> dict[str, Tensor]:
        tensors = read_header(path)
        path.write_bytes(path.read_bytes()[:-1])
        return tensors

    monkeypatch.setattr("torch_bridge.adapter.read_header", cut)
    with pytest.raises(InputError, match="it ends before byte"):
        torch_bridge.load_adapter(model, str(changed))
    assert adapters(model) == {}
    assert model.lora_config is None


def test_a_model_with_adapters_and_an_adapter_of_another_model_are_refused(some: tuple[Transformer, Path]):
    model = add_lora(torch_bridge.from_torch(hf.make_model("llama-untied")), LoraConfig())
    with pytest.raises(InputError, match="`model` must be without LoRA adapters"):
        torch_bridge.load_adapter(model, str(some[1]))
    config = small_config("llama", hidden_size=32)
    with pytest.raises(InputError, match="6 tensors of the wrong shape"):
        torch_bridge.load_adapter(Transformer(config, rngs=nnx.Rngs(0)), str(some[1]))


@pytest.mark.parametrize("checkpoint", ["qwen3-tied", "llama-untied"])
def test_peft_reads_ranks_alphas_and_whole_matrices_that_were_trained_here(checkpoint: str, tmp_path: Path):
    base, folder = hf.save_model(tmp_path / "base", checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern="q_proj=2, up_proj=6",
        alpha_pattern={"up_proj": 3},
        modules_to_save="lm_head,embed_tokens",
    )
    add_lora(model, lora)
    rng = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.LoRAParam):
            parameter.set_value(parameter[...] + rng.normal(0, 0.1, parameter.shape).astype(np.float32))
    torch_bridge.save_adapter(model, str(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = hf.random_tokens(2, 40)
    np.testing.assert_allclose(
        model.logits(jnp.asarray(tokens)), hf.logits(theirs, tokens), rtol=0, atol=LOGITS_TOLERANCE
    )
