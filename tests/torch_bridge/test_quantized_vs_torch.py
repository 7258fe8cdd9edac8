"""Tests that folders in 4 bits mean to jaxpack what they mean to bitsandbytes, transformers and PEFT."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file

import torch_bridge
from jaxpack import Batches, Documents, LoraConfig, TrainConfig, Trainer, add_lora
from jaxpack.errors import InputError
from jaxpack.kernels.weight import DenseWeight
from jaxpack.model.lora import adapters
from jaxpack.model.nf4 import NF4Weight
from jaxpack.model.weights import TRAINED, Frozen, MixedWeight, weight_of
from jaxpack.train.step import loss_and_gradients, split_trainable
from tests.kernels.oracles import quick_jit
from tests.torch_bridge import hf, nf4
from torch_bridge.adapter import adapter_tensors
from torch_bridge.io.folder import SafetensorsFolder
from torch_bridge.quantized import NF4Source, dense_nf4
from torch_bridge.tensors import model_tensors

# PEFT calls deprecated functions of transformers; bitsandbytes warns of a CPU.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama-untied", "gemma3-tied")]
FAMILIES = ["qwen3-tied", "phi3-untied", *SLOW]
STATE = "quant_state.bitsandbytes__nf4"
UP = "model.layers.1.mlp.up_proj.weight"

SHAPES = [(8, 8), (20, 48), (96, 80), (33, 40), (7, 9), (1, 1), (260, 256), (12, 4100)]
FORMS = [
    (bs, nested, dtype)
    for bs, dtype in ((32, "float32"), (64, "bfloat16"), (128, "float16"), (512, "bfloat16"), (4096, "float32"))
    for nested in (False, True)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cases_of_stored_matrices_are_decoded_to_bitsandbytes_bits(shape: tuple[int, int], tmp_path: Path):
    """Each shape takes a third of the forms, and each form two shapes or more; three types hold the bytes."""
    generator = torch.Generator().manual_seed(1)
    tensors, wanted = {}, {}
    for block_size, nested, dtype in FORMS[SHAPES.index(shape) % 3 :: 3]:
        matrix = (torch.randn(shape, generator=generator) * 3).to(getattr(torch, dtype))
        name = f"{block_size}-{nested}.weight"
        stored = nf4.tensors_of(name, matrix, blocksize=block_size, compress_statistics=nested)
        wanted[name] = nf4.dense_of(name, dict(stored))
        if shape[0] * shape[1] % 8 == 0 and block_size > 64:  # as `bnb_4bit_quant_storage` types them
            stored[name] = stored[name].view(-1).view(torch.bfloat16 if nested else torch.float32)[:, None]
        tensors |= stored
    save_file(tensors, tmp_path / nf4.WEIGHTS)
    source = NF4Source(SafetensorsFolder(tmp_path))
    assert source.shapes() == dict.fromkeys(wanted, shape)
    assert not source.unreadable.keys() & wanted.keys()
    buffer = np.full(4 * shape[0] * shape[1] + 3, 255, np.uint8)[: 4 * shape[0] * shape[1]]
    for name, dense in wanted.items():
        part = jax.device_put(source.read(name, 0, shape[0], buffer))
        assert part.stored == str(dense.dtype).removeprefix("torch.")
        ours = np.asarray(dense_nf4(part, shape, jnp.float32))
        np.testing.assert_array_equal(ours, dense.float().numpy(), err_msg=name)
        if shape[1] % 8 == 0:
            np.testing.assert_array_equal(np.asarray(part.dense(jnp.float32)), ours, err_msg=name)


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_a_folder_of_transformers_has_its_logits_and_gradients(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """LoRA gradients of one batch, too; jaxpack packs the documents, PEFT computes one after another."""
    folder = nf4.save(tmp_path, checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    count = {"gemma3": 21, "phi3": 8}.get(checkpoint.split("-")[0], 14)
    assert f"{count} projections are held in 4 bits" in capsys.readouterr().err
    theirs: Any = nf4.load(folder)
    tokens = hf.random_tokens(2, 70)
    expected = hf.logits(theirs, tokens)
    np.testing.assert_allclose(np.asarray(model.logits(jnp.asarray(tokens))), expected, rtol=0, atol=1e-4)
    assert isinstance(weight_of(model.blocks.attention.qkv.weight), NF4Weight)
    assert not jax.tree.leaves(nnx.state(model, TRAINED))

    add_lora(model, LoraConfig(r=4, lora_alpha=8))
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    documents = hf.random_documents([90, 33, 5, 61])
    loss, gradients = _gradients(model, documents)
    their_loss = _backward(theirs, documents)
    assert abs(loss - their_loss) < 1e-4
    found = {name.replace(".default.", "."): x.grad.numpy() for name, x in theirs.named_parameters() if x.requires_grad}
    assert found.keys() == gradients.keys()
    for name, expected in found.items():
        scale = np.abs(expected).max()
        assert scale > 1e-5
        np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=1e-4 * max(scale, 1), err_msg=name)


def _batch(documents: list[hf.Document]) -> Batches:
    tokens, labels = (np.concatenate(x).astype(np.int32) for x in zip(*documents, strict=True))
    lengths = np.array([len(document.tokens) for document in documents])
    config = TrainConfig(max_length=128, packing=True, per_device_train_batch_size=2, num_train_epochs=1)
    return Batches(Documents(tokens, labels, np.cumsum(lengths) - lengths, lengths), config)


def _gradients(model, documents: list[hf.Document]) -> tuple[float, dict[str, np.ndarray]]:
    (batch,) = _batch(documents)
    graph, trained, frozen = split_trainable(model)
    loss, gradients = quick_jit(functools.partial(loss_and_gradients, graph))(trained, frozen, batch)
    return float(loss), adapter_tensors(nnx.merge(graph, gradients, frozen))


def _backward(model: torch.nn.Module, documents: list[hf.Document]) -> float:
    count = sum(label != -100 for document in documents for label in document.labels[1:])
    total = 0.0
    for document in documents:
        loss = model(**hf.padded([document]), num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total


def test_a_loss_curve_is_that_of_peft(tmp_path: Path):
    """20 steps of AdamW with one fixed batch."""
    folder = nf4.save(tmp_path, "qwen3-tied")
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    add_lora(model, LoraConfig(r=4, lora_alpha=8))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    theirs: Any = peft.PeftModel.from_pretrained(nf4.load(folder), tmp_path / "adapter", is_trainable=True)
    documents = hf.random_documents([60, 33, 5, 29])
    tokens, labels = (np.concatenate(x).astype(np.int32) for x in zip(*documents, strict=True))
    lengths = np.array([len(document.tokens) for document in documents])
    config = TrainConfig(
        max_length=128,
        packing=True,
        per_device_train_batch_size=1,
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    data = Documents(tokens, labels, np.cumsum(lengths) - lengths, lengths)
    losses = Trainer(model, None, data, config).train().losses
    optimizer = torch.optim.AdamW([x for x in theirs.parameters() if x.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = []
    for _ in range(20):
        optimizer.zero_grad()
        expected.append(_backward(theirs, documents))
        optimizer.step()
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantising_gives_bitsandbytes_codes(dtype: str, tmp_path: Path):
    """The 8-bit codes of magnitudes may differ by one near a midpoint, where bitsandbytes on a CPU is approximate."""
    folder = nf4.save(tmp_path, "llama-untied", dtype=getattr(torch, dtype))
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "base"), dtype=dtype, load_in_4bit=True)
    other, _ = torch_bridge.from_pretrained(folder, dtype=dtype)
    kinds = [nnx.to_flat_state(nnx.state(one, Frozen)) for one in (model, other)]
    differ = 0
    for (path, ours), (_, theirs) in zip(*kinds, strict=True):
        ours, theirs = ours.get_value(), theirs.get_value()
        if not isinstance(ours, NF4Weight):
            np.testing.assert_array_equal(*(np.asarray(jax.tree.leaves(x)[0]) for x in (ours, theirs)))
            continue
        assert (ours.places, ours.stored) == (theirs.places, theirs.stored) == (ours.places, dtype)
        np.testing.assert_array_equal(ours.arrays.codes, theirs.arrays.codes, err_msg=str(path))
        np.testing.assert_array_equal(ours.arrays.table, theirs.arrays.table)
        for name in ("scales", "means"):
            mine, wanted = (np.asarray(getattr(x.arrays, name)) for x in (ours, theirs))
            np.testing.assert_allclose(mine, wanted, rtol=1e-6)
        steps = np.abs(np.asarray(ours.arrays.absmax).astype(int) - np.asarray(theirs.arrays.absmax).astype(int))
        assert steps.max() <= 1
        differ += np.mean(steps > 0)
    assert differ < 0.2


DYNAMIC = {
    # Layer 0 has one projection of each fused matrix in 16 bits; layer 1 has all in 4, in blocks of another size.
    "model.layers.0.self_attn.q_proj.weight": {},
    "model.layers.0.self_attn.k_proj.weight": {},
    "model.layers.0.self_attn.o_proj.weight": {"compress_statistics": True},
    "model.layers.0.mlp.down_proj.weight": {"compress_statistics": True},
    "model.layers.1.self_attn.q_proj.weight": {"blocksize": 128},
    "model.layers.1.self_attn.k_proj.weight": {"blocksize": 128},
    "model.layers.1.self_attn.v_proj.weight": {"blocksize": 128},
    "model.layers.1.self_attn.o_proj.weight": {"blocksize": 32, "compress_statistics": True},
    "model.layers.1.mlp.gate_proj.weight": {},
    UP: {"compress_statistics": True},
    "lm_head.weight": {},
    "model.embed_tokens.weight": {"compress_statistics": True},
}


def test_single_layers_in_other_forms_are_read_exactly(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, folder = hf.save_model(tmp_path, "llama-untied")
    dense = nf4.quantise(tmp_path, DYNAMIC)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    assert "6 of 14 projections are held in 4 bits" in capsys.readouterr().err
    kinds = {
        "attention.qkv": (MixedWeight, [DenseWeight, NF4Weight]),
        "attention.out": (MixedWeight, [NF4Weight, NF4Weight]),
        "feed_forward.gate_up": (DenseWeight, []),
        "feed_forward.down": (MixedWeight, [NF4Weight, DenseWeight]),
    }
    for path, (kind, parts) in kinds.items():
        part, name = path.split(".")
        weight = weight_of(getattr(getattr(model.blocks, part), name).weight)
        assert type(weight) is kind
        assert [type(one) for one in getattr(weight, "parts", ())] == parts
    read = dict(model_tensors(model))
    assert read.keys() == dense.keys()
    for name, expected in dense.items():
        np.testing.assert_array_equal(np.asarray(read[name]), expected, err_msg=name)

    torch_bridge.save_pretrained(model, tmp_path / "dense")
    again, _ = torch_bridge.from_pretrained(str(tmp_path / "dense"), dtype="float32")
    written, read = load_file(tmp_path / "dense" / nf4.WEIGHTS), dict(model_tensors(again))
    for name, expected in dense.items():
        np.testing.assert_array_equal(written[name], expected, err_msg=name)
        np.testing.assert_array_equal(np.asarray(read[name]), expected, err_msg=name)


def test_skipped_modules_are_found_by_their_tensors(tmp_path: Path):
    """transformers lists the modules; jaxpack does not look at the list."""
    skipped = ["model.layers.0.mlp", "model.layers.1.self_attn.k_proj", "lm_head"]
    folder = nf4.save(tmp_path, "llama-untied", llm_int8_skip_modules=skipped)
    tokens = hf.random_tokens(2, 40)
    expected = hf.logits(nf4.load(folder), tokens)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    np.testing.assert_allclose(np.asarray(model.logits(jnp.asarray(tokens))), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    for quantisation in (config["quantization_config"] | {"llm_int8_skip_modules": ["lm_head"]}, None):
        changed = config | {"quantization_config": quantisation}
        (tmp_path / "nf4" / "config.json").write_text(json.dumps(changed))
        again, _ = torch_bridge.from_pretrained(folder, dtype="float32")
        kinds = [jax.tree.leaves(nnx.state(one, Frozen)) for one in (model, again)]
        for before, after in zip(*kinds, strict=True):
            np.testing.assert_array_equal(before, after)


def test_maps_that_differ_become_parts(tmp_path: Path):
    """A nested table of one layer that is not bitsandbytes' usual one is used for that layer, and for no other."""
    _, folder = hf.save_model(tmp_path, "llama-untied")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    nf4.quantise(tmp_path, {name: {"compress_statistics": True} for name in names})
    tensors = load_torch_file(tmp_path / nf4.WEIGHTS)
    tensors[f"{names[1]}.nested_quant_map"] = tensors[f"{names[1]}.nested_quant_map"] ** 3
    save_file(tensors, tmp_path / nf4.WEIGHTS)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    read = dict(model_tensors(model))
    assert isinstance(weight_of(model.blocks.feed_forward.down.weight), MixedWeight)
    for name in names:
        expected = nf4.dense_of(name, dict(tensors)).numpy()
        np.testing.assert_array_equal(np.asarray(read[name]), expected, err_msg=name)


@pytest.mark.parametrize("stored", ["bin", "sharded", "module"])
def test_other_sources_hold_the_same_model(stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = nf4.save(tmp_path, "llama-untied", bnb_4bit_quant_storage=torch.bfloat16)
    expected, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    if stored == "module":
        model = torch_bridge.from_torch(nf4.load(folder), dtype="float32")
    else:
        tensors = load_torch_file(tmp_path / "nf4" / nf4.WEIGHTS)
        (tmp_path / "nf4" / nf4.WEIGHTS).unlink()
        if stored == "bin":
            torch.save(tensors, tmp_path / "nf4" / "pytorch_model.bin")
        else:  # a matrix and the tensors beside it may lie in different files
            files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
            for file in set(files.values()):
                save_file({name: x for name, x in tensors.items() if files[name] == file}, tmp_path / "nf4" / file)
            (tmp_path / "nf4" / f"{nf4.WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
        model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    kinds = [jax.tree.leaves(nnx.state(one, Frozen)) for one in (model, expected)]
    for ours, theirs in zip(*kinds, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_verify_compares_a_folder_in_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = nf4.save(tmp_path, "llama-untied", bnb_4bit_compute_dtype=torch.bfloat16)
    assert torch_bridge.verify(folder) < 1e-4
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the Python packages bitsandbytes and accelerate"):
        torch_bridge.verify(folder)


def test_fp4_and_int8_of_bitsandbytes_are_refused_by_name(tmp_path: Path):
    folder = nf4.save(tmp_path, "llama-untied", bnb_4bit_quant_type="fp4")
    with pytest.raises(InputError, match=r"`quantization_config` must be null or .* got bitsandbytes' fp4"):
        torch_bridge.from_pretrained(folder)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    for field in ({"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}, {"load_in_8bit": True}):
        changed = config | {"quantization_config": config["quantization_config"] | field}
        (tmp_path / "nf4" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="got bitsandbytes' int8"):
            torch_bridge.from_pretrained(folder)
    del config["quantization_config"]
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"in bitsandbytes' fp4\. Use the 16-bit model"):
        torch_bridge.from_pretrained(folder)
