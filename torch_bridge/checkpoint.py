"""Reads and writes folders of safetensors files, one tensor at a time. Needs no torch."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxpack.errors import InputError, reason

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")
_SHARD_BYTES = 2 << 30


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises:
      InputError: no such file, a missing shard, a file that is cut off or no safetensors, a dtype that is not float.
    """

    def __init__(self, folder: Path):
        self.description = str(folder)
        self._files = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, str] = {}
        for name in _file_names(folder):
            path = folder / name
            if not path.is_file():
                raise InputError(f"{folder} must hold every shard that its index lists, got none named {name!r}.")
            try:
                self._files[name] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path} must be a whole safetensors file, got one that is not: {reason(error)}."
                ) from error
            for tensor in self._files[name].keys():  # noqa: SIM118 - no mapping
                described = self._files[name].get_slice(tensor)
                if described.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{tensor} of {path} must be of dtype {', '.join(_DTYPES)}, got {described.get_dtype()}."
                    )
                self._shapes[tensor] = tuple(described.get_shape())
                self._file_of[tensor] = name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return self._files[self._file_of[name]].get_tensor(name)


def _file_names(folder: Path) -> list[str]:
    if (folder / _ONE_FILE).is_file():
        return [_ONE_FILE]
    index = folder / _INDEX
    if not index.is_file():
        raise InputError(f"{folder} must hold {_ONE_FILE} or {_INDEX}, got neither.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} must have a `weight_map` from tensors to files, got {weight_map!r:.80}.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} must list files of its own folder, got {name!r}.")
    return names


def read_json(path: Path) -> dict:
    """A JSON object from a file; what is none is an `InputError`."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be a readable JSON file: {reason(error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {content!r:.80}.")
    return content


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, jax.Array]]) -> None:
    """Writes tensors as they come, in files of about 2 GiB, and an index where there is more than one."""
    shard: dict[str, np.ndarray] = {}
    shard_of: dict[str, int] = {}
    num_shards = total = held = 0
    for name, tensor in tensors:
        array = np.asarray(tensor)
        if shard and held + array.nbytes > _SHARD_BYTES:
            write_tensors(folder / f"{num_shards}.part", shard)
            shard, held, num_shards = {}, 0, num_shards + 1
        shard[name], shard_of[name] = array, num_shards
        held += array.nbytes
        total += array.nbytes
    write_tensors(folder / f"{num_shards}.part", shard)

    # How many there are is known only now, and their names say it.
    names = [f"model-{i + 1:05}-of-{num_shards + 1:05}.safetensors" for i in range(num_shards + 1)]
    if num_shards == 0:
        names = [_ONE_FILE]
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in shard_of.items()}}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, marked as Hugging Face readers expect."""
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
