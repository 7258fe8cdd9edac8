"""Tests that a folder is loaded in pieces, of which the host holds only a few at a time. Needs no torch."""

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects
from models import small_config, small_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from simulated_devices import on_simulated_devices

import torch_bridge
import torch_bridge.tensors
from jaxpack.errors import InputError
from jaxpack.model.transformer import Transformer
from torch_bridge.config_json import config_to_hf
from torch_bridge.io.folder import SafetensorsFolder
from torch_bridge.tensors import build_model, model_tensors

WEIGHTS = "model.safetensors"


def parameters(model: Transformer) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("piece", [7, 50 * 48, 1 << 30])
def test_a_model_does_not_depend_on_its_pieces(
    family: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The pieces are single rows, several rows with a shorter last piece, or whole tensors."""
    expected = small_model(family)
    torch_bridge.save_pretrained(expected, str(tmp_path / "model"))
    monkeypatch.setattr(torch_bridge.tensors, "_PIECE", piece)
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32")
    for actual, wanted in zip(parameters(model), parameters(expected), strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("shape", [(1,), (97,), (128, 48), (97, 48), (151936, 4096), (50257, 4096), (4096, 12288)])
def test_pieces_are_all_rows_and_of_few_sizes(shape: tuple[int, ...]):
    pieces = list(torch_bridge.tensors._pieces(shape))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == shape[0]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
    sizes = [last - first for first, last in pieces]
    assert max(sizes) * np.prod(shape[1:]) <= torch_bridge.tensors._PIECE
    assert len(set(sizes)) <= (2 if shape[0] == 50257 else 1)


def test_the_host_holds_a_few_pieces_and_not_the_largest_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small_config("llama", vocab_size=40_000, hidden_size=64, num_layers=3)
    torch_bridge.save_pretrained(Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), str(tmp_path / "model"))
    piece = 1 << 16
    monkeypatch.setattr(torch_bridge.tensors, "_PIECE", piece)
    torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32")  # compiles first: not measured
    tracemalloc.start()  # counts NumPy's arrays, not the device's
    torch_bridge.from_pretrained(str(tmp_path / "model"), dtype="float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 4 * config.vocab_size * config.hidden_size
    assert 4 * 4 * piece < peak < 4 * 4 * piece + (1 << 20) < largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_what_safetensors_reads(dtype: str, tmp_path: Path):
    model = small_model("qwen3", dtype=jnp.dtype(dtype))
    torch_bridge.save_pretrained(model, str(tmp_path / "model"))
    read = load_file(tmp_path / "model" / WEIGHTS)
    expected = dict(model_tensors(model))
    assert list(SafetensorsFolder(tmp_path / "model").shapes()) == list(expected)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)
    with safe_open(tmp_path / "model" / WEIGHTS, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_host_holds_one_tensor_while_it_writes(tmp_path: Path):
    config = small_config("llama", vocab_size=10_000, hidden_size=64, num_layers=12)
    model = Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # NumPy must copy bfloat16 to write it
    torch_bridge.save_pretrained(model, str(tmp_path / "first"))
    tracemalloc.start()
    torch_bridge.save_pretrained(model, str(tmp_path / "model"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "model" / WEIGHTS).stat().st_size > 2 * 2 * 10_000 * 64
    assert peak < 2 * 10_000 * 64 + (1 << 20)


def test_a_file_cut_after_it_was_checked_gives_no_model(tmp_path: Path):
    torch_bridge.save_pretrained(small_model("llama"), str(tmp_path / "model"))
    source = SafetensorsFolder(tmp_path / "model")
    file = tmp_path / "model" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="it ends before byte"):
        build_model(small_config("llama"), source, "float32")


def test_a_large_tied_head_is_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The comparison finds a difference in the last number alone."""
    torch_bridge.save_pretrained(small_model("qwen3"), str(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model" / WEIGHTS)
    monkeypatch.setattr(torch_bridge.tensors, "_PIECE", 10 * 48)
    torch_bridge.from_pretrained(str(tmp_path / "model"))
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model" / WEIGHTS)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        torch_bridge.from_pretrained(str(tmp_path / "model"))


def test_sizes_that_the_files_do_not_have_are_refused_before_they_are_made(tmp_path: Path):
    """A config of a few bytes can ask for a billion layers or channels."""
    torch_bridge.save_pretrained(small_model("llama"), str(tmp_path / "model"))
    source = SafetensorsFolder(tmp_path / "model")
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim"]
    for field in fields:
        with pytest.raises(InputError, match="must be at most"):
            build_model(dataclasses.replace(small_config("llama"), **{field: 10**9}), source, "float32")


def test_shards_are_read_in_the_order_in_which_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch_bridge.io.folder._SHARD_BYTES", 20_000)
    model = small_model("qwen3")
    torch_bridge.save_pretrained(model, str(tmp_path / "model"))
    source = SafetensorsFolder(tmp_path / "model")
    places = [(tensor.path.name, tensor.offset) for tensor in source._tensors.values()]
    assert len({name for name, _ in places}) > 3
    assert places == sorted(places)
    assert source.shapes().keys() == dict(model_tensors(model)).keys()
    index = json.loads((tmp_path / "model" / f"{WEIGHTS}.index.json").read_text())
    assert index["weight_map"] == {name: tensor.path.name for name, tensor in source._tensors.items()}


@pytest.mark.parametrize("name", ["nowhere", "", "~/model", "x" * 5000, "a\0b", "a-file", "folder/a-file"])
def test_what_is_neither_a_folder_nor_of_the_hub_is_refused_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in (Path("a-file"), Path("folder/a-file"), Path("config.json")):
        file.write_text("{}")
    with pytest.raises(InputError, match="`model` must be an existing folder or the id") as refused:
        torch_bridge.from_pretrained(name)
    assert len(str(refused.value)) < 400


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Root may read any folder, so the test raises the error that other users get."""
    torch_bridge.save_pretrained(small_model("llama"), str(tmp_path / "model"))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="`model` must be a folder that may be read"):
        torch_bridge.from_pretrained(str(tmp_path / "model"))


DESCRIBING = {
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "merges.txt",
}
DESCRIBING |= {"vocab.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"}
DESCRIBING |= {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
SHARDS = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
PICKLES = {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
OTHERS = {"README.md", "consolidated.safetensors", "original/consolidated.00.pth", "original/params.json"}


def from_pretrained_in_gptq(name: str):
    with pytest.raises(InputError, match=r"got GPTQ.*probably 'owner/name'"):
        torch_bridge.from_pretrained(f"{name}-GPTQ")
    raise InputError


@pytest.mark.parametrize(
    ("read", "weights", "endings"),
    [
        (torch_bridge.from_pretrained, SHARDS | PICKLES, (".json", ".safetensors")),
        (torch_bridge.from_pretrained, PICKLES, (".json", ".bin")),
        (torch_bridge.read_config, SHARDS | PICKLES, (".json",)),
        (from_pretrained_in_gptq, SHARDS | PICKLES, (".json",)),
    ],
    ids=["safetensors", "nothing but pickles", "no weights", "a format that is refused"],
)
def test_cases_of_the_hub_only_what_is_read_or_copied_is_downloaded(
    read: Callable, weights: set[str], endings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def download(name: str, **patterns: list[str]) -> str:
        quantisation = {"quantization_config": {"quant_method": "gptq"}} if name.endswith("GPTQ") else {}
        for file in filter_repo_objects(DESCRIBING | weights | OTHERS, **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(small_config("qwen3")) | quantisation))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError):  # the files are empty
        read("owner/name")
    downloaded = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert downloaded == DESCRIBING | {file for file in weights if file.endswith(endings)}


def test_weights_are_read_into_shards_with_the_same_bits(tmp_path: Path):
    torch_bridge.save_pretrained(small_model("qwen3", vocab_size=96), tmp_path / "model")
    script = Path(__file__).with_name("meshes.py")
    found = json.loads(on_simulated_devices(script, str(tmp_path / "model"), count=4))
    # Four matrices of the layers and, where all weights are trained, the embedding. A matrix in 4 bits has codes and
    # magnitudes; those that four devices cannot share evenly are whole on each.
    assert found["whole"] == {"in_shards": 5, "same": True}
    assert found["4 bits"]["same"]
    assert found["4 bits"]["in_shards"] >= 4
