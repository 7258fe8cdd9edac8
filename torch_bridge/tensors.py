"""Applies a name table in both directions: checkpoint tensors to a model's stacked arrays, and back."""

import contextlib
import functools
import math
import operator
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpack.errors import InputError, is_out_of_memory, reason
from jaxpack.kernels.weight import Weight, write_rows
from jaxpack.model.config import ModelConfig
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.utils.console import console, progress_bar
from jaxpack.utils.host import available_host_bytes
from jaxpack.utils.prefetch import prefetched
from torch_bridge.families import FAMILIES
from torch_bridge.families.base import Entry
from torch_bridge.io.folder import mismatches, some, tensor_count
from torch_bridge.sixteen_bit import is_quantised, quantised_hint

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE = 16 << 20  # elements: 32 MiB of bfloat16, enough for the full speed of a disk and of the link to a GPU
_AHEAD = 2


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


def build_model(config: ModelConfig, source: TensorSource, dtype: str | None) -> Transformer:
    """Builds a model with the tensors of `source`.

    Args:
      dtype: the dtype of the weights and of the computation, "bfloat16", "float16" or "float32"; None is bfloat16 on a
        GPU and float32 on a CPU, where bfloat16 is slow.

    Raises:
      InputError: tensors are missing or of the wrong shape; all are reported at once, before anything is allocated. Or
        the device or the host has too little memory for the model.
    """
    if dtype is None:
        dtype = "float32" if current_device().platform == "cpu" else "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")
    _check_sizes(config, source)
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    _check_shapes(model, source)
    _check_tied(config, source)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    with _room_for(leaves, dtype, source):
        model = nnx.merge(graph, tree.unflatten(_zeros(tuple(leaves))))
        fill(model, source)
    return model


@contextlib.contextmanager
def _room_for(leaves: list[jax.ShapeDtypeStruct], dtype: str, source: TensorSource) -> Iterator[None]:
    """Makes an `InputError` of too little memory for the weights, before they are read or while they are."""
    device = current_device()
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    free = available_host_bytes() if device.platform == "cpu" else free_device_bytes(device)

    def refused(got: str) -> InputError:
        half = " `dtype` bfloat16 needs half of that." if dtype == "float32" else ""
        return InputError(
            f"`model` must fit into the memory of {device.device_kind}: the weights of {source.description} need"
            f" {needed / 2**30:.2f} GiB in {dtype}, got {got}.{half} Use a smaller model or a device with more memory,"
            " or end other programs that use this one."
        )

    if free is not None and needed > free:
        raise refused(f"{free / 2**30:.2f} GiB that are free")
    try:
        yield
    except Exception as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        left = "" if free is None else f", with {free / 2**30:.2f} GiB free at the start"
        raise refused(f"no more memory while they were read{left} ({reason(error):.200})") from error


def fill(model: Transformer, source: TensorSource) -> None:
    """Reads the tensors of `source` into the model's parameters, in place on the device.

    `source` must hold all of them. A thread reads pieces of `_PIECE` elements, a few pieces ahead; the host holds no
    more than these pieces. A tensor that is quantised while it is read is one piece.
    """
    table = tensor_table(model.config)
    shapes = {name: shape for name, shape in source.shapes().items() if name in table}
    pieces = [
        (name, first, last)
        for name, shape in shapes.items()
        for first, last in ([(0, shape[0])] if _is_written_whole(model, table[name][0]) else _pieces(shape))
    ]
    size = max((last - first) * math.prod(shapes[name][1:]) for name, first, last in pieces)
    # There is one buffer for each piece ahead, one for the piece in use, and one for the piece before, which the device
    # may still read.
    buffers = [np.empty(4 * size, np.uint8) for _ in range(_AHEAD + 2)]

    def read(index: int) -> Any:
        name, first, last = pieces[index]
        return source.read(name, first, last, buffers[index % len(buffers)])

    placed: jax.Array | None = None
    with progress_bar("loading") as progress, contextlib.closing(prefetched(read, len(pieces), _AHEAD)) as parts:
        bar = progress.add_task("", total=len(pieces), note="")
        for (name, first, _), part in zip(pieces, parts, strict=True):
            entry, layer = table[name]
            parameter = _parameter(model, entry)
            first += _rows(model, entry)[0]
            start = np.array([first] if layer is None else [layer, first], np.int32)
            before = placed
            whole, placed = _place(parameter.get_value(), jax.device_put(part), start)
            parameter.set_value(whole)
            if before is not None:
                before.block_until_ready()  # the next read overwrites its buffer
            progress.advance(bar)
        jax.block_until_ready(placed)


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields the (first, last) rows of each piece of a tensor.

    If possible, all pieces have the same size, so that one program places all of them.
    """
    least = max(1, math.ceil(math.prod(shape) / _PIECE))
    count = next((count for count in range(least, 2 * least) if shape[0] % count == 0), least)
    rows = max(1, math.ceil(shape[0] / count))
    return ((first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))


def tensor_table(config: ModelConfig) -> dict[str, tuple[Entry, int | None]]:
    """Maps the name of every checkpoint tensor to its entry and its layer (None outside the layers)."""
    has = {
        "lm_head": not config.tie_word_embeddings,
        "blocks.attention.qkv.bias": config.qkv_bias,
        "blocks.attention.out.bias": config.out_bias,
        "blocks.feed_forward.gate_up.bias": config.mlp_bias,
        "blocks.feed_forward.down.bias": config.mlp_bias,
    }
    table: dict[str, tuple[Entry, int | None]] = {}
    for name, entry in FAMILIES[config.architecture].tensors.items():
        if not has.get(entry.path, True):
            continue
        if "{i}" in name:
            table |= {name.format(i=layer): (entry, layer) for layer in range(config.num_layers)}
        else:
            table[name] = (entry, None)
    return table


def tensor_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's tensors by name; the arrays of `model` may be abstract."""
    return {
        name: (_rows(model, entry)[1], *_parameter(model, entry).shape[1 if layer is None else 2 :])
        for name, (entry, layer) in tensor_table(model.config).items()
    }


def model_tensors(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """Yields the name and the value of each checkpoint tensor of the model, without its adapters."""
    for name, (entry, layer) in tensor_table(model.config).items():
        value = _parameter(model, entry).get_value()
        first, size = _rows(model, entry)
        if isinstance(value, Weight):
            one = value if layer is None else value.at(layer)
            yield name, one.dense_rows(first, size, value.dtype)
        else:
            array = value if layer is None else value[layer]
            yield name, jax.lax.slice_in_dim(array, first, first + size)


def parameter_tensors(model: Transformer) -> dict[str, list[list[str]]]:
    """Returns the tensors of each parameter by its path: for each layer their names, in the order of their rows.

    A parameter outside the layers counts as one layer.
    """
    found: dict[str, list[dict[int, str]]] = {}
    for name, (entry, layer) in tensor_table(model.config).items():
        layers = found.setdefault(entry.path, [{} for _ in range(1 if layer is None else model.config.num_layers)])
        layers[layer or 0][_rows(model, entry)[0]] = name
    return {path: [[names[row] for row in sorted(names)] for names in layers] for path, layers in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.Array]:
    return [jnp.zeros(one.shape, one.dtype) for one in shapes]


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: Weight | jax.Array, part: jax.Array, start: jax.Array) -> tuple[Weight | jax.Array, jax.Array]:
    """Returns `whole` with `part` written into it, and a small array that is there once the write is done.

    The caller waits for this array, because the next call donates `whole`.
    """
    placed = whole.write(tuple(start), part) if isinstance(whole, Weight) else write_rows(whole, tuple(start), part)
    return placed, start[0]


def _parameter(model: Transformer, entry: Entry) -> nnx.Variable:
    return operator.attrgetter(entry.path)(model)


def _is_written_whole(model: Transformer, entry: Entry) -> bool:
    value = _parameter(model, entry).get_value()
    return isinstance(value, Weight) and value.is_written_whole


def _rows(model: Transformer, entry: Entry) -> tuple[int, int]:
    """Returns the first row and the number of rows of a tensor within one layer of its parameter."""
    parameter = _parameter(model, entry)
    if entry.projection is None:
        return 0, parameter.shape[1 if entry.path.startswith("blocks.") else 0]
    first = 0
    for name, size in operator.attrgetter(entry.path.rpartition(".")[0])(model).projections:
        if name == entry.projection:
            return first, size
        first += size
    raise AssertionError(f"{entry} names no projection")


def _check_sizes(config: ModelConfig, source: TensorSource) -> None:
    """Refuses sizes larger than any tensor of the source, before anything is made with them, even a list of layers."""
    shapes = source.shapes()
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if config.num_layers > len(shapes):
        raise InputError(
            f"`num_hidden_layers` must be at most {len(shapes)}, the number of tensors in {source.description}, got"
            f" {config.num_layers:.10g}. The config and the weights do not belong together."
        )
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    for name, size in (sizes | {"num_attention_heads * head_dim": config.num_heads * config.head_dim}).items():
        if size > largest:
            raise InputError(
                f"`{name}` must be at most {largest}, the largest dimension of a tensor in {source.description}, got"
                f" {size:.10g}. The config and the weights do not belong together."
            )


def _check_shapes(model: Transformer, source: TensorSource) -> None:
    found, expected = source.shapes(), tensor_shapes(model)
    problems = mismatches(found, expected)
    if refused := [f"{name:.120} of {form}" for name, form in source.unreadable.items() if name in expected]:
        problems.append(f"{tensor_count(refused)} that cannot be read ({some(refused)})")
    if problems:
        hint = f" {quantised_hint(model.config.name_or_path, {})}" if is_quantised(found) else ""
        raise InputError(
            f"{source.description} must hold the tensors that its `config.json` describes, in F32, BF16 or F16, got"
            f" {'; '.join(problems)}.{hint}"
        )
    known = {*expected, _HEAD}  # a checkpoint may or may not store a tied head
    extra = [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        console.print(
            f"{source.description}: {tensor_count(extra)} ignored, because the model has no such part ({some(extra)})"
        )


def _check_tied(config: ModelConfig, source: TensorSource) -> None:
    """Refuses a head that differs from the embedding if the config says that they are tied."""
    shapes = source.shapes()
    if not config.tie_word_embeddings or _HEAD not in shapes:
        return
    pieces = list(_pieces(shapes[_EMBEDDING]))
    size = pieces[0][1] * math.prod(shapes[_EMBEDDING][1:])
    both = [(name, np.empty(4 * size, np.uint8)) for name in (_HEAD, _EMBEDDING)]

    def same(piece: tuple[int, int]) -> bool:
        head, embedding = (source.read(name, *piece, buffer) for name, buffer in both)
        return np.array_equal(np.asarray(head), np.asarray(embedding))

    if shapes[_HEAD] != shapes[_EMBEDDING] or not all(map(same, pieces)):
        raise InputError(
            f"`tie_word_embeddings` of {source.description} must be false, because {_HEAD} differs from {_EMBEDDING},"
            " got true."
        )
