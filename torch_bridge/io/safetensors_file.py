"""Reads rows of tensors from one safetensors file, after a check of its header. Needs no torch.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little endian; the header,
a JSON object; then the tensors' bytes, one after another, without a gap. The `safetensors` package makes the same
checks, but does not tell the offset of a tensor, and reads through a memory map.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpack.errors import InputError, reason
from jaxpack.utils.json_file import parse_json
from torch_bridge.io.experts import Cut

DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
_MAX_HEADER_BYTES = 16 << 20  # enough for 100,000 tensors; the format allows 100 MB, gigabytes in Python


class Tensor(NamedTuple):
    """Locates a tensor in a file: its rows begin at byte `offset`.

    Attributes:
      dtype: the dtype of the values; None if it is none of `DTYPES`, so that the tensor cannot be read.
      code: the dtype as the file calls it, such as "BF16".
      nbytes: the bytes of all rows.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    path: Path
    offset: int
    code: str
    nbytes: int

    def read(self, first: int, last: int, buffer: np.ndarray) -> np.ndarray:
        """Returns rows `first` to `last` (exclusive) as a view of `buffer`, which is uint8 and large enough.

        Raises:
          InputError: the file has become shorter, or cannot be read, or the dtype is none of `DTYPES`.
        """
        if self.dtype is None:
            raise InputError(
                f"{self.path} must hold tensors of dtype {', '.join(DTYPES)}, got one of {self.code!r:.20}."
            )
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        wanted = buffer[: (last - first) * row_bytes]
        read_at(self.path, self.offset + first * row_bytes, wanted)
        return wanted.view(self.dtype).reshape(last - first, *self.shape[1:])

    def read_bytes(self, buffer: np.ndarray) -> None:
        """Fills `buffer`, uint8, with all bytes of the tensor."""
        read_at(self.path, self.offset, buffer)

    def cut(self, cut: Cut) -> "Tensor | TensorPart":
        """Returns a part of a tensor of all experts."""
        nbytes = self.nbytes // self.shape[0]
        one = self._replace(shape=self.shape[1:], offset=self.offset + cut.expert * nbytes, nbytes=nbytes)
        first, last, step = cut.rows.indices(one.shape[-1 if cut.is_transposed else 0])
        if cut.is_transposed or step != 1:
            return TensorPart(one, cut)
        row_bytes = nbytes // one.shape[0]
        rows = last - first
        return one._replace(
            shape=(rows, *one.shape[1:]), offset=one.offset + first * row_bytes, nbytes=rows * row_bytes
        )


class TensorPart(NamedTuple):
    """Locates rows that are not contiguous in their file; each read reads the expert's whole tensor.

    Attributes:
      tensor: the tensor, the matrix or vector of one expert.
      cut: the rows, and whether the matrix is stored transposed.
    """

    tensor: Tensor
    cut: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the part."""
        shape = self.tensor.shape[::-1] if self.cut.is_transposed else self.tensor.shape
        return len(range(*self.cut.rows.indices(shape[0]))), *shape[1:]

    @property
    def dtype(self) -> np.dtype | None:
        """Returns the dtype of the values, see `Tensor`."""
        return self.tensor.dtype

    @property
    def code(self) -> str:
        """Returns the dtype as the file calls it."""
        return self.tensor.code

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the part."""
        return self.tensor.nbytes // math.prod(self.tensor.shape) * math.prod(self.shape)

    def read(self, first: int, last: int, buffer: np.ndarray) -> np.ndarray:
        """Returns rows `first` to `last` (exclusive) of the part, see `Tensor.read`."""
        del buffer  # it is as large as the rows alone
        whole = self.tensor.read(0, self.tensor.shape[0], np.empty(self.tensor.nbytes, np.uint8))
        return np.ascontiguousarray((whole.T if self.cut.is_transposed else whole)[self.cut.rows][first:last])

    def read_bytes(self, buffer: np.ndarray) -> None:
        """Fills `buffer`, uint8, with all bytes of the part."""
        whole = np.empty(self.tensor.nbytes, np.uint8)
        self.tensor.read_bytes(whole)
        assert not self.cut.is_transposed, "bytes are read of matrices in the order of their rows"
        buffer[:] = whole.reshape(self.tensor.shape[0], -1)[self.cut.rows].reshape(-1)


def read_at(path: Path, offset: int, buffer: np.ndarray) -> None:
    """Fills `buffer`, uint8, with the bytes of a file that begin at `offset`."""
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [memoryview(buffer)[done:]], offset + done)
                if count == 0:
                    raise OSError(f"it ends before byte {offset + len(buffer):,}")
                done += count
    except OSError as error:
        raise _broken(path, reason(error)) from error


def read_header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, in the order of their bytes in the file.

    Reads only the header, and allocates no more than the file's size allows. Tensors of other dtypes than F32, BF16 and
    F16 are listed, too, and refused only when they are read: a checkpoint may have some that no model needs.

    Raises:
      InputError: the file is missing or cut off, or its tensors overlap, leave gaps or lie beyond its end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a file, got a path that cannot be read: {reason(error)}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} must be a file, got a folder, a device or another kind of entry.")
    if status.st_size < 8:
        raise _broken(path, f"it has {status.st_size} bytes, and the length of its header alone takes 8")
    head = np.empty(8, np.uint8)
    read_at(path, 0, head)
    if head.tobytes() == b"version ":
        raise _broken(path, "it is a pointer of Git LFS to the file, which `git lfs pull` downloads")
    length = int(head.view("<u8")[0])
    if length > min(_MAX_HEADER_BYTES, status.st_size - 8):
        raise _broken(path, f"it has {status.st_size:,} bytes, but says that its header has {length:,}")
    header = np.empty(length, np.uint8)
    read_at(path, 8, header)
    try:
        described = parse_json(header.tobytes())
    except ValueError as error:
        raise _broken(path, f"its header is not valid JSON: {reason(error)}") from error
    if not isinstance(described, dict):
        raise _broken(path, "its header is not a JSON object")
    described.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in described.items()}
    end = 8 + length
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    for name, tensor in tensors.items():
        if tensor.offset != end:
            raise _broken(path, f"{name:.80} begins at byte {tensor.offset:,} and must begin at byte {end:,}")
        end += tensor.nbytes
    if end != status.st_size:
        raise _broken(path, f"its tensors end at byte {end:,}, but the file ends at byte {status.st_size:,}")
    return tensors


def header_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Returns the length and header of a file of these tensors, in their order, marked as other readers expect."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    code = next(code for code, kind in DTYPES.items() if kind == dtype)
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + DTYPES[code].itemsize * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"its header describes {name:.80} by {entry!r:.80}, not by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_is_whole(shape) and _is_whole(offsets) and len(offsets) == 2):
        raise _broken(path, f"its header describes {name:.80} by {entry!r:.80}, with a wrong shape or data_offsets")
    if not isinstance(dtype, str) or offsets[1] < offsets[0]:
        raise _broken(path, f"its header describes {name:.80} by {entry!r:.80}, with a wrong dtype or data_offsets")
    size = DTYPES[dtype].itemsize * math.prod(shape) if dtype in DTYPES else offsets[1] - offsets[0]
    if offsets[1] - offsets[0] != size:
        raise _broken(path, f"{name:.80} of shape {shape!r:.80} needs {size:.10g} bytes, but lies at {offsets!r:.80}")
    return Tensor(tuple(shape), DTYPES.get(dtype), path, data + offsets[0], dtype, size)


def _is_whole(values: Any) -> bool:
    """Returns whether `values` is a list of at most 8 integers below 2**63; the limit bounds their product."""
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path} must be a complete safetensors file, got one that cannot be read: {why}.")
