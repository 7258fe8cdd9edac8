"""Measures how fast a checkpoint loads into a model on the device, beside a plain read and copy of its bytes.

    PYTHONPATH=. python benchmarks/bench_loading.py --model Qwen3-8B --folder /fast/disk

Makes a random bfloat16 folder of the model's shape and measures two ways, each in its own process with the files in the
page cache (`--cold`: none of them). `copy` reads the files piece by piece and puts each piece on the device, one after
the other. `load` is `torch_bridge.from_pretrained`, compilation included. Prints rates, their ratio and the peak host
memory of each beyond what the process held before, then one JSON line.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import torch_bridge
from jaxpack.model.config import ModelConfig
from jaxpack.model.presets import SHAPES
from jaxpack.model.transformer import Transformer
from torch_bridge.config_json import config_to_hf
from torch_bridge.io.folder import write_safetensors
from torch_bridge.tensors import tensor_shapes

_PIECE = 64 << 20


def main() -> None:
    """Makes the folder, measures each way in its own process, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="Qwen3-8B")
    parser.add_argument("--layers", type=int, help="number of layers (default: that of the model)")
    parser.add_argument("--vocab", type=int, help="vocabulary size (default: that of the model)")
    parser.add_argument("--folder", type=Path, help="where the weights are written (default: a temporary folder)")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the files before each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=_WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(_WAYS[options.measure], options.folder, options.cold)))
        return

    config = SHAPES[options.model]
    config = dataclasses.replace(
        config, num_layers=options.layers or config.num_layers, vocab_size=options.vocab or config.vocab_size
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _write_folder(config, Path(folder))
        size = sum(path.stat().st_size for path in _files(Path(folder)))
        result = {"benchmark": "loading", "model": options.model, "bytes": size, "cold": options.cold}
        for way in _WAYS:
            command = [sys.executable, __file__, "--measure", way, "--folder", folder]
            runs = [
                json.loads(subprocess.run(command + options.cold * ["--cold"], check=True, stdout=-1).stdout)
                for _ in range(options.repeats)
            ]
            best = min(runs, key=lambda run: run["seconds"])
            result |= {"device": best.pop("device"), way: best}
            print(
                f"{way:5} {size / best['seconds'] / 1e9:6.2f} GB/s  {best['seconds']:7.2f} s"
                f"  {best['host_bytes'] / 2**30:6.2f} GiB of host memory"
            )
    result["ratio"] = result["copy"]["seconds"] / result["load"]["seconds"]
    print(f"from_pretrained (load) is {result['ratio']:.2f} times as fast as a plain read and copy (copy)")
    print(json.dumps(result))


def _write_folder(config: ModelConfig, folder: Path) -> None:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(jnp.bfloat16)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    shapes = tensor_shapes(model)
    write_safetensors(folder, shapes, "bfloat16", ((name, np.resize(noise, shape)) for name, shape in shapes.items()))
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be dropped from the page cache


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _measure(way: Callable[[Path], object], folder: Path, cold: bool) -> dict[str, object]:
    device = jax.block_until_ready(jax.device_put(np.zeros(1)) + 1).device  # which starts the device, too
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                for _ in _pieces(path):
                    pass
    before = _host_bytes("VmRSS")
    begin = time.perf_counter()
    held = way(folder)
    seconds = time.perf_counter() - begin
    del held
    return {"seconds": seconds, "host_bytes": _host_bytes("VmHWM") - before, "device": device.device_kind}


def _pieces(path: Path) -> Iterator[np.ndarray]:
    buffer = np.empty(_PIECE, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _copy(folder: Path) -> list[jax.Array]:
    """Reads the files and copies every piece to the device, where all pieces stay, as a model would."""
    return [jax.block_until_ready(jnp.array(piece)) for path in _files(folder) for piece in _pieces(path)]


def _load(folder: Path) -> Transformer:
    model, _ = torch_bridge.from_pretrained(str(folder), dtype="bfloat16")
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    return model


def _host_bytes(field: str) -> int:
    """Returns a memory figure of this process: VmRSS (held now) or VmHWM (the most ever held)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


_WAYS = {"copy": _copy, "load": _load}

if __name__ == "__main__":
    main()
