"""Reads matrices that bitsandbytes quantised to 4 bits (NF4), in the form in which they are stored.

The codes of a matrix `P.weight` lie in a tensor of this name, typed as bytes or as wider numbers. Beside it lie
`P.weight.absmax`, the magnitudes of its blocks; `P.weight.quant_map`, the values of the codes; and
`P.weight.quant_state.bitsandbytes__nf4`, the bytes of a JSON object. If the magnitudes are codes themselves ("nested"),
`P.weight.nested_absmax` holds their scales and `P.weight.nested_quant_map` the values of their codes.

A weight with such tensors is in 4 bits and any other is not, whatever `config.json` says.

GPT-OSS' experts are in another format, MXFP4. After `io.experts` has split their tensors, each projection of an expert
has `P.weight_blocks`, the codes, and `P.weight_scales`.
"""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxpack.errors import reason
from jaxpack.kernels.dequantize import CODES_PER_WORD, GROUP, NF4_VALUES, NF4Arrays, NF4Places, dequantize_nf4
from jaxpack.kernels.dynamic_map import dynamic_map
from jaxpack.kernels.mxfp4 import BLOCK
from jaxpack.kernels.weight import DenseWeight, Weight
from jaxpack.model.mxfp4 import MXFP4Weight
from jaxpack.model.nf4 import BLOCK_SIZE, NF4Weight, quantize_nf4
from jaxpack.model.weights import MixedWeight
from jaxpack.utils.json_file import parse_json
from torch_bridge.sixteen_bit import MXFP4

_STATE, _ABSMAX = ".quant_state.bitsandbytes__nf4", ".absmax"
_FP4_STATE = ".quant_state.bitsandbytes__fp4"
_BESIDE = (_STATE, _ABSMAX, ".quant_map", ".nested_absmax", ".nested_quant_map")
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_MXFP4_NAME = re.compile(r".*\.experts\.\d+\.\w+\.weight_blocks")
_BLOCK_SIZES = [2**i for i in range(5, 13)]
_STORED = ("bfloat16", "float16", "float32")
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_MAX_STATE_BYTES = 4096


class TensorSource(Protocol):
    """Provides named tensors, which are read a few rows at a time."""

    description: str  # what error messages call the source
    unreadable: dict[str, str]  # the forms of tensors that `read` would refuse, by name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by name, in the order in which the tensors are best read."""
        ...

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> Any:
        """Returns rows `first` to `last` (exclusive) of a tensor, in a form that `jax.device_put` takes.

        The dtype is float32, bfloat16 or float16. May be called in a thread. The result may lie in `buffer`, which is
        uint8 with four bytes for each element.
        """
        ...


class ByteSource(TensorSource, Protocol):
    """Provides tensors whose bytes can be read whatever their dtype is."""

    def stored(self, name: str) -> tuple[str, int]:
        """Returns the dtype of a tensor, such as "uint8" or "float32", and the number of its bytes."""
        ...

    def read_bytes(self, name: str, buffer: np.ndarray) -> None:
        """Fills `buffer`, uint8, with all bytes of a tensor. May be called in a thread."""
        ...


class NF4Form(NamedTuple):
    """Describes how a matrix is quantised; matrices of one form can be layers of one stack.

    Attributes:
      block_size: the elements of a block.
      stored: the dtype that the matrix had before it was quantised.
      table: the bytes of the values of the magnitudes' codes, float32 [256]; None if magnitudes are not nested.
    """

    block_size: int
    stored: str
    table: bytes | None


# Says how a matrix is quantised: by an `NF4Form`, or by `MXFP4`, which has no parameters.
Form = NF4Form | str


def default_form(stored: str) -> NF4Form:
    """Returns the form in which matrices of this dtype are quantised by default: that of bitsandbytes, nested."""
    return NF4Form(BLOCK_SIZE, stored, dynamic_map().tobytes())


class _Matrix(NamedTuple):
    """Describes one quantised matrix: its shape, its form, and the mean of its magnitudes (0 if not nested)."""

    shape: tuple[int, int]
    form: NF4Form
    mean: float


class MXFP4Source:
    """Provides the tensors of another source; `read` returns rows of a matrix in MXFP4 as an `MXFP4Weight`.

    Its shape is that of the dense matrix, and the two tensors in which it is stored are hidden.

    Attributes:
      forms: `MXFP4` for each such matrix.
    """

    def __init__(self, source: ByteSource):
        self._source, self.description = source, source.description
        shapes = source.shapes()
        self._matrices: dict[str, tuple[int, int]] = {}
        for blocks in filter(_MXFP4_NAME.fullmatch, shapes):
            name = blocks.removesuffix(_MXFP4_BLOCKS)
            if len(shapes[blocks]) != 3:
                continue
            rows, groups, _ = shapes[blocks]
            expected = {blocks: (rows, groups, BLOCK // 2), name + _MXFP4_SCALES: (rows, groups)}
            if all(shapes.get(one) == shape and source.stored(one)[0] == "uint8" for one, shape in expected.items()):
                self._matrices[name] = rows, groups * BLOCK
        self._hidden = {name + end for name in self._matrices for end in (_MXFP4_BLOCKS, _MXFP4_SCALES)}
        self.unreadable = {name: form for name, form in source.unreadable.items() if name not in self._hidden}
        self.forms = dict.fromkeys(self._matrices, MXFP4)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by name, see `TensorSource.shapes`."""
        shapes = {name: shape for name, shape in self._source.shapes().items() if name not in self._hidden}
        return shapes | self._matrices

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> Any:
        """Returns rows of a tensor, see `TensorSource.read`, or a stack of one matrix with rows in MXFP4."""
        if name not in self._matrices:
            return self._source.read(name, first, last, buffer)
        rows, columns = self._matrices[name]
        codes, scales = (_read(self._source, name + end).reshape(rows, -1) for end in (_MXFP4_BLOCKS, _MXFP4_SCALES))
        words = codes.view(np.uint32)
        assert words.shape[1] * CODES_PER_WORD == columns
        return MXFP4Weight(words[None, first:last], scales[None, first:last])

    def stored(self, name: str) -> tuple[str, int]:
        """Returns the dtype of a tensor and the number of its bytes, see `ByteSource.stored`."""
        return self._source.stored(name)

    def read_bytes(self, name: str, buffer: np.ndarray) -> None:
        """Fills `buffer` with all bytes of a tensor, see `ByteSource.read_bytes`."""
        self._source.read_bytes(name, buffer)


class NF4Source:
    """Provides the tensors of another source; `read` returns a matrix in NF4 whole, as an `NF4Weight`.

    Its shape is that of the dense matrix, and the tensors beside it are hidden. A quantised matrix whose description is
    wrong or incomplete is listed in `unreadable`.

    Attributes:
      forms: the form of each quantised matrix by name.
    """

    def __init__(self, source: ByteSource):
        self._source = source = MXFP4Source(source)
        self.description, self.unreadable = source.description, dict(source.unreadable)
        self._matrices: dict[str, _Matrix] = {}
        names = source.shapes().keys()
        for name in [name.removesuffix(_STATE) for name in names if name.endswith(_STATE)]:
            if name in names:
                self.unreadable.pop(name, None)
                try:
                    self._matrices[name] = _described(source, name, names)
                except _WrongError as error:
                    self.unreadable[name] = f"4 bits {error}"
        for name in self.unreadable:
            if name + _ABSMAX in names and not any(name + state in names for state in (_STATE, _FP4_STATE)):
                self.unreadable[name] = f"4 bits without {_STATE}"
        self._hidden = {name + end for name in [*self._matrices, *self.unreadable] for end in _BESIDE}

    @property
    def forms(self) -> dict[str, Form]:
        """Returns the form of each quantised matrix by name."""
        return self._source.forms | {name: matrix.form for name, matrix in self._matrices.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by name, see `TensorSource.shapes`."""
        shapes = {name: shape for name, shape in self._source.shapes().items() if name not in self._hidden}
        return shapes | {name: matrix.shape for name, matrix in self._matrices.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> Any:
        """Returns rows of a tensor, see `TensorSource.read`, or a whole quantised matrix.

        A matrix whose rows are no multiple of 8 elements has rows of 8 elements in the result: `dense_nf4` makes the
        matrix of it.
        """
        if name not in self._matrices:
            return self._source.read(name, first, last, buffer)
        shape, form, mean = self._matrices[name]
        codes = buffer[: 4 * -(-math.prod(shape) // CODES_PER_WORD)]
        codes[-4:] = 0  # the last word may not be full
        self._source.read_bytes(name, codes[: self._source.stored(name)[1]])
        rows, columns = _held_shape(shape)
        places = NF4Places((rows,), columns, form.block_size)
        words = codes.view(np.uint32).reshape(1, rows, columns // CODES_PER_WORD)
        absmax = _read(self._source, name + _ABSMAX)[None]
        arrays: dict[str, Any] = {"codes": words, "absmax": absmax.view(np.float32 if form.table is None else np.uint8)}
        if form.table is not None:
            arrays["scales"] = _read(self._source, f"{name}.nested_absmax").view(np.float32)[None]
            arrays["means"] = np.array([[mean]], np.float32)
            arrays["table"] = np.frombuffer(form.table, np.float32)
        return NF4Weight(NF4Arrays(**arrays), places, form.stored, is_stack=False)


def dense_nf4(matrix: NF4Weight, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns the dense matrix of a result of `NF4Source.read` that lies on the device."""
    settings: Any = {"stored": matrix.stored, "dtype": dtype, "implementation": "xla"}
    dense = dequantize_nf4(matrix.arrays, 0, matrix.places, **settings)
    return dense.reshape(-1)[: math.prod(shape)].reshape(shape)


def abstract_weight(forms: Sequence[set[Form | None]], rows: tuple[int, ...], columns: int, dtype: DTypeLike) -> Weight:
    """Returns a stack of layers without arrays, each layer in the form in which its projections are stored.

    A layer whose projections differ in their forms, or are not quantised, is dense, and so are all layers if a row is
    no multiple of 8 elements.

    Args:
      forms: for each layer, the forms of its projections; None for a projection that is not quantised.
      rows: the rows of each projection.
      dtype: the dtype of dense layers.
    """
    kinds = [next(iter(each)) if len(each) == 1 and columns % CODES_PER_WORD == 0 else None for each in forms]

    def stack(form: Form | None) -> Weight:
        shape = (kinds.count(form), sum(rows), columns)
        if form is None:
            return DenseWeight(jax.ShapeDtypeStruct(shape, dtype))
        if isinstance(form, str):
            return MXFP4Weight.abstract(shape)
        matrices = jax.ShapeDtypeStruct(shape, form.stored)
        return jax.eval_shape(lambda x: quantize_nf4(x, rows, form.block_size, form.table is not None), matrices)

    parts = {form: stack(form) for form in kinds}
    if len(parts) == 1:
        return parts[kinds[0]]
    order = list(parts)
    places = tuple((order.index(form), kinds[:layer].count(form)) for layer, form in enumerate(kinds))
    return MixedWeight(tuple(parts.values()), places)


class _WrongError(Exception):
    """Says what is wrong with the description of a quantised matrix."""


def _held_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the shape of a matrix, or of rows of 8 that hold its elements if its own rows are no multiple of 8."""
    if shape[1] % CODES_PER_WORD == 0:
        return shape
    return -(-math.prod(shape) // CODES_PER_WORD), CODES_PER_WORD


def _described(source: ByteSource, name: str, names: Collection[str]) -> _Matrix:
    """Returns the description of a quantised matrix.

    Raises:
      _WrongError: it is wrong, or does not fit the tensors.
    """
    state = _state(source, name)
    is_nested = f"{name}.nested_absmax" in names
    fields = _FIELDS | (_NESTED_FIELDS if is_nested else set())
    if missing := sorted(fields - state.keys()):
        raise _WrongError(f"whose {_STATE} lacks {', '.join(missing)}")
    if unknown := sorted(state.keys() - fields):
        raise _WrongError(f"whose {_STATE} has {', '.join(unknown):.120}, which jaxpack does not know")
    expected: dict[str, tuple[Any, ...]] = {"quant_type": ("nf4",), "blocksize": (*_BLOCK_SIZES,), "dtype": _STORED}
    if is_nested:
        expected |= {"nested_blocksize": (GROUP,), "nested_dtype": ("float32",)}
    for field, allowed in expected.items():
        if not any(type(state[field]) is type(value) and state[field] == value for value in allowed):
            raise _WrongError(f"whose `{field}` must be {_choice(allowed)}, got {state[field]!r:.40}")
    shape = state["shape"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        raise _WrongError(f"whose `shape` must be two sizes, got {shape!r:.40}")
    mean = state.get("nested_offset", 0.0)
    if type(mean) not in (int, float) or abs(mean) > float(np.finfo(np.float32).max):
        raise _WrongError(f"whose `nested_offset` must be a float32 number, got {mean!r:.40}")

    size = math.prod(shape)
    if (nbytes := source.stored(name)[1]) != -(-size // 2):
        raise _WrongError(f"whose codes must have {-(-size // 2):,} bytes for the shape {shape}, got {nbytes:,}")
    blocks = -(-size // state["blocksize"])
    sizes = {_ABSMAX: ("uint8" if is_nested else "float32", blocks), ".quant_map": ("float32", len(NF4_VALUES))}
    if is_nested:
        sizes |= {".nested_absmax": ("float32", -(-blocks // GROUP)), ".nested_quant_map": ("float32", 256)}
    for end, (dtype, count) in sizes.items():
        if name + end not in names:
            raise _WrongError(f"without {end}")
        got, nbytes = source.stored(name + end)
        if (got, nbytes) != (dtype, count * np.dtype(dtype).itemsize):
            raise _WrongError(f"whose {end} must be {dtype} of {count:,} numbers, got {got} of {nbytes:,} bytes")
    if not np.array_equal(_read(source, f"{name}.quant_map").view(np.float32), NF4_VALUES):
        raise _WrongError("whose .quant_map must hold the 16 values of NF4, got others")
    table = _read(source, f"{name}.nested_quant_map").tobytes() if is_nested else None
    return _Matrix((shape[0], shape[1]), NF4Form(state["blocksize"], state["dtype"], table), float(mean))


def _state(source: ByteSource, name: str) -> dict[str, Any]:
    dtype, nbytes = source.stored(name + _STATE)
    if dtype != "uint8" or nbytes > _MAX_STATE_BYTES:
        raise _WrongError(f"whose {_STATE} must be uint8 of at most {_MAX_STATE_BYTES:,} bytes, got {dtype}")
    content = _read(source, name + _STATE).tobytes()
    try:
        state = parse_json(content)
    except ValueError as error:
        raise _WrongError(f"whose {_STATE} is no JSON: {reason(error):.80}") from error
    if not isinstance(state, dict):
        raise _WrongError(f"whose {_STATE} must be a JSON object, got {state!r:.40}")
    return state


def _read(source: ByteSource, name: str) -> np.ndarray:
    buffer = np.empty(source.stored(name)[1], np.uint8)
    source.read_bytes(name, buffer)
    return buffer


def _choice(values: Sequence[Any]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
