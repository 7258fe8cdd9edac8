"""Tests that 200 seeded ways to break a good folder each give one clear error and never a model. Needs no torch.

The damage leaves out what cannot be noticed: a flipped bit in a tensor's own bytes, and 16-bit numbers declared as the
other 16-bit dtype. Nothing in the format says what the numbers should be.
"""

import functools
import json
import os
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import small_model

import torch_bridge
from jaxpack.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILY = "qwen3"


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file and the bytes behind the header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def some_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def some_tensor(rng: random.Random, header: dict[str, Any]) -> str:
    return rng.choice(sorted(header.keys() - {"__metadata__"}))


def cut_file(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 7, 8, 9, rng.randrange(len(content)), len(content) - 1])])


def longer_file(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 1000)))


def flip_header(rng: random.Random, folder: Path) -> None:
    """Flips one bit of the header's length or of its tensor entries, not of its metadata or trailing spaces."""
    path = some_file(rng, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = bytes(content[8 : 8 + length])
    metadata = header.index(b'"__metadata__"')
    skipped = range(8 + metadata, 8 + header.index(b"}", metadata) + 2)
    places = [place for place in range(8 + len(header.rstrip())) if place not in skipped]
    content[rng.choice(places)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def huge_header(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    header, data = read(path)
    write(path, header, data, rng.choice([2**64 - 1, 2**63, 2**40, 100_000_000, len(data) + 10**6]))


def no_header(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    _, data = read(path)
    text = rng.choice(
        [
            b"",
            b"[]",
            b"null",
            b"7",
            b"{",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            rng.randbytes(200),
            b"9" * 10_000,
            b"\xff\xfe{}",
        ]
    )
    write(path, text, data)


def wrong_entry(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    header, data = read(path)
    entry = header[some_tensor(rng, header)]
    key = rng.choice(sorted(entry))
    values = [None, 7, "x", {}, [], [-1, 2], [2.5, 1], ["1"], [True], [10**30, 1], [[1]], list(range(100))]
    entry[key] = rng.choice(values)
    if rng.random() < 0.2:
        del entry[key]
    write(path, header, data)


def wrong_shape(rng: random.Random, folder: Path) -> None:
    """Declares a wrong shape: one of the same or another size, one with a zero, or a product beyond 64 bits."""
    path = some_file(rng, folder)
    header, data = read(path)
    entry = header[some_tensor(rng, header)]
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        [[*shape, 1], [1, *shape], [*shape, 2], [0, *shape], [2**62, 4], [2**32, 2**32], [10**18, 10**18, 0], shape[1:]]
    )
    write(path, header, data)


def wrong_dtype(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    header, data = read(path)
    entry = header[some_tensor(rng, header)]
    entry["dtype"] = rng.choice(["I32", "U8", "F64", "BOOL", "F8_E4M3", "F16", "BF16", "f32", "", "F32 "])
    write(path, header, data)


def offset_table(rng: random.Random, folder: Path) -> None:
    """Moves a tensor, at its right size, onto another tensor, onto the header, or beyond the end of the file."""
    path = some_file(rng, folder)
    header, data = read(path)
    entry = header[some_tensor(rng, header)]
    begin, end = entry["data_offsets"]
    move = rng.choice([-end, -4, 4, end - begin, len(data), 2**40, 2**62, -begin - 8])
    entry["data_offsets"] = [begin + move, end + move]
    write(path, header, data)


def same_place(rng: random.Random, folder: Path) -> None:
    """Gives two tensors of one shape the same offsets; the file keeps its length or loses one tensor's bytes."""
    path = folder / WEIGHTS
    gather(folder)
    header, data = read(path)
    names = [f"model.layers.{layer}.mlp.{rng.choice(['gate', 'up'])}_proj.weight" for layer in (0, 1)]
    begin, end = header[names[0]]["data_offsets"]
    header[names[1]]["data_offsets"] = [begin, end]
    write(path, header, data[:begin] + data[end:] if rng.random() < 0.5 else data)


def missing_tensor(rng: random.Random, folder: Path) -> None:
    """Removes a tensor and closes the gap that it leaves."""
    path = some_file(rng, folder)
    header, data = read(path)
    begin, end = header.pop(some_tensor(rng, header))["data_offsets"]
    for name in header.keys() - {"__metadata__"}:
        if header[name]["data_offsets"][0] >= end:
            header[name]["data_offsets"] = [offset - (end - begin) for offset in header[name]["data_offsets"]]
    write(path, header, data[:begin] + data[end:])


def renamed_tensor(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    header, data = read(path)
    name = some_tensor(rng, header)
    header[rng.choice([f"{name} ", name.upper(), name.replace("model", "models"), "\0", "x" * 100_000])] = header.pop(
        name
    )
    write(path, header, data)


def doubled_tensor(rng: random.Random, folder: Path) -> None:
    """Writes one tensor's name twice in a header; the second entry is a copy or empty and comes first or last."""
    path = some_file(rng, folder)
    header, data = read(path)
    name = some_tensor(rng, header)
    texts = [json.dumps({name: rng.choice([header[name], {}])})[1:-1], json.dumps(header)[1:-1]]
    rng.shuffle(texts)
    write(path, f"{{{', '.join(texts)}}}".encode(), data)


def doubled_shard(rng: random.Random, folder: Path) -> None:
    """Stores the tensors of one shard in a second file that the index lists, too."""
    path = some_file(rng, folder)
    shutil.copy(path, folder / "again.safetensors")
    name = some_tensor(rng, read(path)[0])
    change_index(folder, lambda weights: weights | {name: "again.safetensors"})


def index_entry(rng: random.Random, folder: Path) -> None:
    """Replaces a file name in the index by a path out of the folder, a missing or other file, or by no name."""
    outside = folder.parent / "outside.safetensors"
    names = ["../outside.safetensors", str(outside), "./../outside.safetensors", "..", ".", "", "/etc/passwd", "a\0b"]
    names += ["x" * 5000, "a/b", "C:\\x", None, 7, [], {}, "\ud800", "missing.safetensors", "config.json"]
    changed = rng.choice(names)

    def change(weights: dict[str, Any]) -> dict[str, Any]:
        name = rng.choice(sorted(weights))
        shutil.copy(folder / weights[name], outside)
        return weights | {name: changed}

    change_index(folder, change)


def index_that_disagrees(rng: random.Random, folder: Path) -> None:
    """Makes the index name another shard for a tensor than the one that holds it."""

    def change(weights: dict[str, str]) -> dict[str, str]:
        name = rng.choice(sorted(weights))
        return weights | {name: rng.choice(sorted(set(weights.values()) - {weights[name]}))}

    change_index(folder, change)


def broken_index(rng: random.Random, folder: Path) -> None:
    texts = [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000, rng.randbytes(99)]
    (folder / INDEX).write_bytes(rng.choice(texts))


def special_file(rng: random.Random, folder: Path) -> None:
    """Replaces a shard by a folder, a link to nothing or to itself, an endless device, or a pipe without a writer."""
    path = some_file(rng, folder)
    path.unlink()
    kind = rng.choice(["folder", "dangling", "loop", "zero", "pipe"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "zero": "/dev/zero"}[kind])


WRONG = [None, "48", 2.5, -1, 0, [], {}, [1], {"a": 1}, 10**9, 10**30, -(10**30), 1e308, float("nan")]
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
NUMBERS = ["rms_norm_eps", "rope_theta"]


def config_size(rng: random.Random, folder: Path) -> None:
    change_config(folder, {rng.choice(SIZES): rng.choice(WRONG)})


def config_number(rng: random.Random, folder: Path) -> None:
    wrong = ["48", -1, [], [1], {"a": 1}, -(10**30), float("nan"), float("inf")]
    name = rng.choice(NUMBERS)
    value = rng.choice(wrong if name == "rms_norm_eps" else [v for v in wrong if v != []])
    change_config(folder, {name: value} if name == "rms_norm_eps" else {"rope_parameters": {name: value}})


def config_option(rng: random.Random, folder: Path) -> None:
    changes = [
        {"architectures": rng.choice(["", ["", ""], "Qwen3ForCausalLM", ["GPT2LMHeadModel"], [None], [[]], {}, 7])},
        {"layer_types": rng.choice([7, [{}], ["x"], [None], {"a": 1}])},
        {
            "rope_parameters": rng.choice(
                [7, "x", [1], {"rope_type": 7}, {"rope_type": "yarn"}, {"rope_type": "llama3"}]
            )
        },
        {"hidden_act": rng.choice(["relu", ["silu"], 7])},
        {"attention_bias": rng.choice([True, "no", [1], 7])},
        {"quantization_config": rng.choice([{"quant_method": "fp8"}, 7, [1]])},
        {"num_key_value_heads": rng.choice([3, "2", 0, 2.5, [], 10**30, 4])},
    ]
    change_config(folder, rng.choice(changes))


def broken_config(rng: random.Random, folder: Path) -> None:
    name = rng.choice(["config.json", "generation_config.json"])
    texts = [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a": ' * 100_000, rng.randbytes(99), b"9" * 10_000]
    (folder / name).write_bytes(rng.choice(texts))


def gather(folder: Path) -> None:
    """Merges all shards into one file and removes the index."""
    header, data = {}, b""
    for path in sorted(folder.glob("*.safetensors")):
        tensors, more = read(path)
        tensors.pop("__metadata__", None)
        for name, entry in tensors.items():
            header[name] = entry | {"data_offsets": [offset + len(data) for offset in entry["data_offsets"]]}
        data += more
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    write(folder / WEIGHTS, header, data)


def change_index(folder: Path, change: Callable[[dict[str, str]], dict[str, Any]]) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


IN_ANY = [
    cut_file,
    longer_file,
    flip_header,
    huge_header,
    no_header,
    wrong_entry,
    wrong_shape,
    wrong_dtype,
    offset_table,
]
IN_ANY += [missing_tensor, renamed_tensor, doubled_tensor, special_file, config_size, config_number, config_option]
IN_ANY += [broken_config, same_place]
IN_SHARDS = [doubled_shard, index_entry, index_that_disagrees, broken_index]
CASES = 200


@functools.cache
def cases() -> list[tuple[bool, Callable, int]]:
    """Draws the cases: whether the folder is sharded, the damage (each kind about as often), and the damage's seed."""
    rng = random.Random(0)
    drawn = []
    for case in range(CASES):
        damage = (IN_ANY + IN_SHARDS)[case % (len(IN_ANY) + len(IN_SHARDS))]
        drawn.append((damage in IN_SHARDS or rng.random() < 0.5, damage, rng.randrange(2**32)))
    return drawn


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Writes one model as a single file and as shards, and checks that both folders are read."""
    folders = {}
    for shards in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if shards:
                patch.setattr("torch_bridge.io.folder._SHARD_BYTES", 100_000)
            folders[shards] = tmp_path_factory.mktemp("good") / "model"
            torch_bridge.save_pretrained(small_model(FAMILY), str(folders[shards]))
        (folders[shards] / "generation_config.json").write_text("{}")
        torch_bridge.from_pretrained(str(folders[shards]))
    assert len(list(folders[True].glob("*.safetensors"))) > 1
    return folders


@pytest.mark.parametrize("case", range(CASES))
def test_each_is_one_clear_error(case: int, good: dict[bool, Path], tmp_path: Path):
    shards, damage, seed = cases()[case]
    folder = shutil.copytree(good[shards], tmp_path / "model")
    damage(random.Random(seed), folder)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refused:
            torch_bridge.from_pretrained(str(folder), dtype="float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(refused.value)
    assert len(message) < 1000, message
    assert message.endswith("."), message
    assert "\n" not in message, message
    assert peak < 16 << 20, f"{peak:,} bytes for a folder of 300,000"
