"""Reads and writes folders of safetensors files, one tensor at a time. Needs no torch."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from safetensors.numpy import save

from jaxpack.errors import InputError
from jaxpack.utils.files import is_regular_file
from jaxpack.utils.json_file import read_json
from torch_bridge.io.experts import split_experts
from torch_bridge.io.safetensors_file import Tensor, TensorPart, header_bytes, read_header

Found = TypeVar("Found")

WEIGHTS, TORCH_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_FILE_NAME = re.compile(r"\w[\w.-]{0,200}", re.ASCII)  # a plain name, without a path to another folder
_SHARD_BYTES = 2 << 30
_SHOWN = 4  # names shown in one message


class SafetensorsFolder:
    """Provides the tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`.

    Raises:
      InputError: as in `tensors_of` and `read_header`.
    """

    def __init__(self, folder: Path):
        self.description = str(folder)
        tensors: Mapping[str, Any] = tensors_of(folder, WEIGHTS, read_header)
        self._tensors: dict[str, Tensor | TensorPart] = split_experts(tensors, Tensor.cut)
        self.unreadable = {
            name: f"dtype {tensor.code:.20}" for name, tensor in self._tensors.items() if tensor.dtype is None
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> np.ndarray:
        """Returns rows `first` to `last` (exclusive) of a tensor, see `TensorSource.read`."""
        return self._tensors[name].read(first, last, buffer)

    def stored(self, name: str) -> tuple[str, int]:
        """Returns the dtype of a tensor and the number of its bytes, see `ByteSource.stored`."""
        tensor = self._tensors[name]
        return ("uint8" if tensor.code == "U8" else str(tensor.dtype or tensor.code)), tensor.nbytes

    def read_bytes(self, name: str, buffer: np.ndarray) -> None:
        """Fills `buffer` with all bytes of a tensor, see `ByteSource.read_bytes`."""
        self._tensors[name].read_bytes(buffer)


def read_ahead(folder: Path) -> None:
    """Asks the system to read the weight files of a folder into its cache, while the caller does something else."""
    if not hasattr(os, "posix_fadvise"):  # not Linux
        return
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def tensors_of(folder: Path, one_file: str, read: Callable[[Path], dict[str, Found]]) -> dict[str, Found]:
    """Returns what `read` finds in a folder's weight files: in `one_file`, or in the shards that its index lists.

    Raises:
      InputError: a file or a shard is missing, a shard lacks a tensor of the index, or two files hold the same tensor.
    """
    tensors: dict[str, Found] = {}
    for path, listed in _weight_files(folder, one_file).items():
        found = read(path)
        if missing := [name for name in listed if name not in found]:
            raise InputError(
                f"{path} must hold the tensors that the index lists for it, got a file without {len(missing)} of them"
                f" ({some(missing)}). Copy or download it again."
            )
        for name, tensor in found.items():
            if name in tensors:
                raise InputError(f"{folder} must hold each tensor once, got {name:.80} in two files.")
            tensors[name] = tensor
    return tensors


def has_weights(folder: Path, one_file: str) -> bool:
    """Returns whether a folder has this file of weights, or an index of its shards.

    Raises:
      InputError: one of them is no regular file.
    """
    return any(is_regular_file(folder / name) for name in (one_file, _index_of(one_file)))


def _index_of(one_file: str) -> str:
    return f"{one_file}.index.json"


def _weight_files(folder: Path, one_file: str) -> dict[Path, list[str]]:
    """Returns the weight files, each with the tensors that the index lists for it (none without an index)."""
    if is_regular_file(folder / one_file):
        return {folder / one_file: []}
    index = folder / _index_of(one_file)
    if not is_regular_file(index):
        raise InputError(f"{folder} must hold {one_file} or {index.name}, got neither.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index} must have a `weight_map` from the names of tensors to the names of files, got {weight_map!r:.80}."
        )
    files: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise InputError(f"{index} must list only names of files in its own folder, got {name!r:.80}.")
        files.setdefault(folder / name, []).append(tensor)
    for path in files:
        if not is_regular_file(path):
            raise InputError(
                f"{folder} must hold every file that its index lists, got no file {path.name!r}. Copy or download it."
            )
    return dict(sorted(files.items()))


def mismatches(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describes missing tensors and wrong shapes, in at most two phrases."""
    missing = [name for name in expected if name not in found]
    wrong = [
        f"{name} is {list(found[name])} and must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return ([f"{tensor_count(missing, 'missing ')} ({some(missing)})"] if missing else []) + (
        [f"{tensor_count(wrong)} of the wrong shape ({some(wrong)})"] if wrong else []
    )


def tensor_count(names: Sequence[str], kind: str = "") -> str:
    """Returns the number of tensors in words, such as "1 missing tensor"."""
    return f"{len(names)} {kind}tensor{'s' * (len(names) != 1)}"


def some(names: Sequence[str], *, length: int = 120) -> str:
    """Joins the first few of many names, each cut off after `length` characters."""
    return ", ".join(name[:length] for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterable[tuple[str, ArrayLike]],
) -> None:
    """Writes tensors as they come, in files of about 2 GiB, with an index if there is more than one file.

    Holds one tensor at a time, because each header is written first: `tensors` must have the names, order and shapes
    of `shapes`, and be of `dtype`.
    """
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = jnp.dtype(dtype).itemsize * math.prod(shape)
        if shards[-1] and sum(shards[-1].values()) + size > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(size for shard in shards for size in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _index_of(WEIGHTS)).write_text(json.dumps(index, indent=2))
    coming = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("xb") as written:
            written.write(header_bytes({name: shapes[name] for name in shard}, dtype))
            for name in shard:
                given, tensor = next(coming)
                array = np.ascontiguousarray(tensor)
                assert (given, array.shape, array.dtype) == (name, shapes[name], jnp.dtype(dtype)), name
                written.write(array.reshape(-1).view(np.uint8).data)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file, marked as Hugging Face readers expect."""
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
