"""Applies a name table in both directions: checkpoint tensors to a model's stacked arrays, and back."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpack.errors import InputError, is_out_of_memory, reason
from jaxpack.kernels.host_weight import HostMatrix, HostWeight
from jaxpack.kernels.weight import DenseWeight, Weight, write_rows
from jaxpack.model.config import ModelConfig
from jaxpack.model.mxfp4 import MXFP4Weight
from jaxpack.model.nf4 import NF4Weight
from jaxpack.model.shards import in_shards, one_of, put_in_shards
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import Frozen, MixedWeight, freeze, projection_rows, store_dense, weight_of
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.parallel.host_memory import is_pinned, pinned_zeros
from jaxpack.parallel.placement import bytes_on_device, zeros_at
from jaxpack.utils.console import console, progress_bar
from jaxpack.utils.host import available_host_bytes
from jaxpack.utils.prefetch import prefetched
from torch_bridge.families import FAMILIES
from torch_bridge.families.base import Entry
from torch_bridge.io.folder import mismatches, some, tensor_count
from torch_bridge.quantized import (
    ByteSource,
    Form,
    NF4Form,
    NF4Source,
    TensorSource,
    abstract_weight,
    default_form,
    dense_nf4,
)
from torch_bridge.sixteen_bit import format_of_tensors, quantised_hint

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE = 16 << 20  # elements: 32 MiB of bfloat16, enough for the full speed of a disk and of the link to a GPU
_AHEAD = 2


def build_model(
    config: ModelConfig, source: ByteSource, dtype: str | None, *, load_in_4bit: bool = False
) -> Transformer:
    """Builds a model with the tensors of `source`, see `lazy_model`."""
    model = lazy_model(config, source, dtype, load_in_4bit=load_in_4bit)
    model.read_weights()
    return model


def lazy_model(
    config: ModelConfig, source: ByteSource, dtype: str | None, *, load_in_4bit: bool = False
) -> Transformer:
    """Builds a model for the tensors of `source`, which `Transformer.read_weights` then reads.

    If some of them are in 4 bits (NF4 or MXFP4), all parameters of the model are frozen, and these stay in 4 bits.

    Args:
      dtype: the dtype of the weights and of the computation, "bfloat16", "float16" or "float32"; None is bfloat16 on a
        GPU and float32 on a CPU, where bfloat16 is slow.
      load_in_4bit: whether projections are quantised while they are read, one at a time, if none is in 4 bits yet.

    Raises:
      InputError: tensors are missing or of the wrong shape; all are reported at once. `read_weights` raises one if the
        device or the host has too little memory for the model.
    """
    if dtype is None:
        dtype = "float32" if current_device().platform == "cpu" else "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")
    tensors = NF4Source(source)
    _check_sizes(config, tensors)
    in_4bit = load_in_4bit or bool(tensors.forms)

    def make() -> Transformer:
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))
        if in_4bit:
            freeze(model)
        return model

    model = nnx.eval_shape(make)
    _check_shapes(model, tensors, source.shapes().keys())
    _check_tied(config, tensors)
    if in_4bit:
        forms: dict[str, Form] = dict.fromkeys(tensor_table(config), default_form(dtype)) if load_in_4bit else {}
        in_nf4 = any(isinstance(form, NF4Form) for form in tensors.forms.values())
        _hold_in_4bit(model, tensors.forms if in_nf4 else forms | tensors.forms)

    def read(model: Transformer) -> None:
        leaves, tree = jax.tree.flatten(nnx.state(model))  # Those of adapters are arrays already.
        abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
        with _room_for(abstract, dtype, tensors, in_4bit=in_4bit):
            on_device = iter(zeros_at([leaf for leaf in abstract if not is_pinned(leaf)]))
            zeros = iter([pinned_zeros(leaf) if is_pinned(leaf) else next(on_device) for leaf in abstract])
            filled = [next(zeros) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
            nnx.update(model, tree.unflatten(filled))
            fill(model, tensors)

    model.pending = read
    return model


def _hold_in_4bit(model: Transformer, forms: Mapping[str, Form]) -> None:
    """Gives the projections of an abstract, frozen model the forms of their tensors, in place. Prints the result."""
    stacks: dict[str, list[set[Form | None]]] = {}
    for name, (entry, layer) in tensor_table(model.config).items():
        if layer is not None and entry.projection is not None and entry.path.endswith(".weight"):
            layers = stacks.setdefault(entry.path, [set() for _ in range(model.config.num_layers)])
            layers[layer].add(forms.get(name))
    kinds = sorted({form if isinstance(form, str) else "NF4" for form in forms.values()})
    dense = nbytes = held = count = 0
    for path, layers in stacks.items():
        linear = operator.attrgetter(path.rpartition(".")[0])(model)
        rows = projection_rows(linear)
        assert rows is not None, "a tensor of a projection belongs to a module with projections"
        before = weight_of(linear.weight)
        weight = abstract_weight(layers, rows, before.shape[-1], model.dtype)
        linear.weight = Frozen(store_dense(weight.value, linear) if isinstance(weight, DenseWeight) else weight)
        parts = weight.parts if isinstance(weight, MixedWeight) else (weight,)
        held += len(rows) * sum(part.shape[0] for part in parts if isinstance(part, NF4Weight | MXFP4Weight))
        count += len(rows) * len(layers)
        dense, nbytes = dense + before.nbytes, nbytes + weight.nbytes
    which = str(held) if held == count else f"{held} of {count}"
    rest = "" if held == count else f". The other {count - held} stay in {model.dtype.name}"
    unit, scale = ("GiB", 2**30) if dense >= 2**30 else ("MiB", 2**20)
    name = model.config.name_or_path or model.config.architecture
    console.print(
        f"{name}: {which} projections are held in 4 bits ({', '.join(kinds)})."
        f" All projections take {nbytes / scale:.2f} {unit} instead of {dense / scale:.2f}{rest}"
    )


@contextlib.contextmanager
def _room_for(leaves: list[jax.ShapeDtypeStruct], dtype: str, source: NF4Source, *, in_4bit: bool) -> Iterator[None]:
    """Makes an `InputError` of too little memory for the weights, before they are read or while they are."""
    device = current_device()
    needed = sum(bytes_on_device(leaf) for leaf in leaves if not is_pinned(leaf))
    free = available_host_bytes() if device.platform == "cpu" else free_device_bytes(device)

    def refused(got: str) -> InputError:
        less = " `dtype` bfloat16 needs half of that." if dtype == "float32" and not in_4bit else ""
        less += "" if in_4bit else " `load_in_4bit` needs less than a third of bfloat16 for the projections."
        return InputError(
            f"`model` must fit into the memory of {device.device_kind}: the weights of {source.description} need"
            f" {needed / 2**30:.2f} GiB in {'4 bits and ' if in_4bit else ''}{dtype}, got {got}.{less} Use a smaller"
            " model or a device with more memory, or end other programs that use this one."
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
    more than these pieces. A tensor that is quantised, or is to be quantised, is one piece.
    """
    table = tensor_table(model.config)
    shapes = {name: shape for name, shape in source.shapes().items() if name in table}
    forms = source.forms if isinstance(source, NF4Source) else {}
    pieces = [
        (name, first, last)
        for name, shape in shapes.items()
        for first, last in (
            [(0, shape[0])] if name in forms or _is_written_whole(model, *table[name]) else _pieces(shape)
        )
    ]
    size = max((last - first) * math.prod(shapes[name][1:]) for name, first, last in pieces)
    # There is one buffer for each piece ahead, one for the piece in use, and one for the piece before, which the device
    # may still read.
    buffers = [np.empty(4 * size, np.uint8) for _ in range(_AHEAD + 2)]

    def read(index: int) -> Any:
        name, first, last = pieces[index]
        return source.read(name, first, last, buffers[index % len(buffers)])

    staged = _Staged(collections.Counter(table[name] for name, _, _ in pieces))
    placed: jax.Array | None = None
    with progress_bar("loading") as progress, contextlib.closing(prefetched(read, len(pieces), _AHEAD)) as parts:
        bar = progress.add_task("", total=len(pieces), note="")
        for (name, first, _), part in zip(pieces, parts, strict=True):
            entry, layer = table[name]
            parameter = _parameter(model, entry)
            first += _rows(model, entry)[0]
            whole = parameter.get_value()
            if isinstance(whole, HostMatrix | HostWeight) or in_shards(whole):
                parameter.set_value(staged.place(whole, entry, layer, first, part, shapes[name]))
                progress.advance(bar)
                continue
            kind, layer = whole.places[layer] if isinstance(whole, MixedWeight) and layer is not None else (None, layer)
            start = np.array([first] if layer is None else [layer, first], np.int32)
            before = placed
            target = whole if kind is None else whole.parts[kind]
            target, placed = _place(target, jax.device_put(part), start, shapes[name])
            parameter.set_value(target if kind is None else whole.with_part(kind, target))
            if before is not None:
                before.block_until_ready()  # the next read overwrites its buffer
            progress.advance(bar)
        jax.block_until_ready(placed)


class _Staged:
    """Collects the pieces of each layer on one device, and moves complete layers to where they belong.

    That is the host's memory, or the shards on several devices: a piece that was written to a shard directly would
    gather the whole stack. The device quantises and casts the layers, so that weights are the same wherever they lie.
    For the host's memory, NumPy casts the embedding and the head, to the same bits.
    """

    def __init__(self, pieces: Mapping[tuple[Entry, int | None], int]):
        self._missing: dict[tuple[str, int | None], int] = {}
        for (entry, layer), count in pieces.items():
            key = entry.path, layer
            self._missing[key] = self._missing.get(key, 0) + count
        self._layers: dict[tuple[str, int | None], Any] = {}

    def place(
        self,
        whole: Weight | jax.Array,
        entry: Entry,
        layer: int | None,
        row: int,
        part: Any,
        shape: tuple[int, ...],
    ) -> Weight | jax.Array:
        """Returns the weight with a piece of a tensor in its place, or on its way there; see `_place`."""
        if isinstance(whole, HostMatrix):
            return whole.write((row,), dense_nf4(part, shape, whole.dtype) if isinstance(part, NF4Weight) else part)
        key = entry.path, layer
        if key not in self._layers:
            self._layers[key] = zeros_at(whole.one if isinstance(whole, HostWeight) else one_of(whole, layer))
        start = np.array([row] if layer is None else [0, row], np.int32)
        self._layers[key], done = _place(self._layers[key], jax.device_put(part), start, shape)
        done.block_until_ready()  # the next read may overwrite the piece's buffer
        self._missing[key] -= 1
        if self._missing[key]:
            return whole
        one = self._layers.pop(key)
        if isinstance(whole, HostWeight) and layer is not None:
            return whole.put(layer, one)
        return put_in_shards(whole, layer, one)


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
        "blocks.feed_forward.gate_up.bias": config.mlp_bias or config.experts_bias,
        "blocks.feed_forward.down.bias": config.mlp_bias or config.experts_bias,
    }
    table: dict[str, tuple[Entry, int | None]] = {}
    entries = {name: e for name, e in FAMILIES[config.architecture].tensors.items() if has.get(e.path, True)}
    for (in_layers, of_experts), group in itertools.groupby(entries.items(), lambda item: _levels(item[0])):
        group = list(group)
        experts = range(config.num_experts) if of_experts else (None,)
        numbered = {(name, e): dataclasses.replace(entry, expert=e) for name, entry in group for e in experts}
        # All tensors of one layer's experts come together, because `fuse_experts` joins neighbours.
        layers = range(config.num_layers) if in_layers else (None,)
        order = itertools.product(layers, group) if of_experts else ((i, one) for one in group for i in layers)
        for layer, (name, _) in order:
            table |= {name.format(i=layer, e=e): (numbered[name, e], layer) for e in experts}
    return table


def _levels(name: str) -> tuple[bool, bool]:
    """Returns whether a name has a `{i}` (layers), and whether it has an `{e}` (experts)."""
    return "{i}" in name, "{e}" in name


def tensor_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's tensors by name; the arrays of `model` may be abstract."""
    return {
        name: (_rows(model, entry)[1], *_parameter(model, entry).shape[1 if layer is None else 2 :])
        for name, (entry, layer) in tensor_table(model.config).items()
    }


def model_tensors(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """Yields the name and the value of each checkpoint tensor of the model, without its adapters."""
    model.read_weights()
    for name, (entry, layer) in tensor_table(model.config).items():
        value = _parameter(model, entry).get_value()
        first, size = _rows(model, entry)
        if isinstance(value, Weight):
            one = value if layer is None else value.at(layer)
            yield name, one.dense_rows(first, size, value.dtype)
        else:
            array = value if layer is None else value[layer]
            yield name, jax.lax.dynamic_slice_in_dim(array, first, size)


def parameter_tensors(model: Transformer) -> dict[str, list[list[str]]]:
    """Returns the tensors of each parameter by its path: for each layer their names, in the order of their rows.

    A parameter outside the layers counts as one layer.
    """
    found: dict[str, list[dict[int, str]]] = {}
    for name, (entry, layer) in tensor_table(model.config).items():
        layers = found.setdefault(entry.path, [{} for _ in range(1 if layer is None else model.config.num_layers)])
        layers[layer or 0][_rows(model, entry)[0]] = name
    return {path: [[names[row] for row in sorted(names)] for names in layers] for path, layers in found.items()}


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(
    whole: Weight | jax.Array, part: NF4Weight | MXFP4Weight | jax.Array, start: jax.Array, shape: tuple[int, ...]
) -> tuple[Weight | jax.Array, jax.Array]:
    """Returns `whole` with `part` written into it, and a small array that is there once the write is done.

    The caller waits for this array, because the next call donates `whole`. `shape` is that of the tensor.
    """
    if isinstance(whole, MXFP4Weight) and isinstance(part, MXFP4Weight):
        return whole.put(tuple(start), part), start[0]
    if isinstance(whole, NF4Weight) and isinstance(part, NF4Weight):
        return whole.put(tuple(start), part), start[0]
    if isinstance(part, MXFP4Weight):
        part = part.at(0).dense(whole.dtype)
    if isinstance(part, NF4Weight):
        part = dense_nf4(part, shape, whole.dtype)
    placed = whole.write(tuple(start), part) if isinstance(whole, Weight) else write_rows(whole, tuple(start), part)
    return placed, start[0]


def _parameter(model: Transformer, entry: Entry) -> nnx.Variable:
    return operator.attrgetter(entry.path)(model)


def _is_written_whole(model: Transformer, entry: Entry, layer: int | None) -> bool:
    value = _parameter(model, entry).get_value()
    if isinstance(value, MixedWeight) and layer is not None:
        value = value.parts[value.places[layer][0]]
    return isinstance(value, Weight) and value.is_written_whole


def _rows(model: Transformer, entry: Entry) -> tuple[int, int]:
    """Returns the first row and the number of rows of a tensor within one layer of its parameter."""
    parameter = _parameter(model, entry)
    if entry.projection is None:
        return 0, parameter.shape[1 if entry.path.startswith("blocks.") else 0]
    first = 0
    for name, size in operator.attrgetter(entry.path.rpartition(".")[0])(model).projections:
        if name == entry.rows:
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
    if config.num_layers * config.num_experts > len(shapes):
        raise InputError(
            f"`num_experts` must be at most {len(shapes) // config.num_layers}, the number of tensors in"
            f" {source.description} for each layer, got {config.num_experts:.10g}. The config and the weights do not"
            " belong together."
        )
    width = "moe_intermediate_size" if config.num_experts else "intermediate_size"
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", width)}
    for name, size in (sizes | {"num_attention_heads * head_dim": config.num_heads * config.head_dim}).items():
        if size > largest:
            raise InputError(
                f"`{name}` must be at most {largest}, the largest dimension of a tensor in {source.description}, got"
                f" {size:.10g}. The config and the weights do not belong together."
            )


def _check_shapes(model: Transformer, source: NF4Source, names: Collection[str]) -> None:
    """Checks the tensors of a source; `names` are those of all stored tensors."""
    found, expected = source.shapes(), tensor_shapes(model)
    whole = {name: shape for name, shape in expected.items() if name not in source.unreadable}
    problems = mismatches(found, whole)
    if refused := [f"{name:.120} of {form:.160}" for name, form in source.unreadable.items() if name in expected]:
        problems.append(f"{tensor_count(refused)} that cannot be read ({some(refused, length=300)})")
    if problems:
        form = format_of_tensors(names)
        hint = f" {quantised_hint(model.config.name_or_path, {})}" if form else ""
        found_in = f", in {form}" if form else ""
        raise InputError(
            f"{source.description} must hold the tensors that its `config.json` describes, in F32, BF16, F16,"
            f" bitsandbytes' NF4 or, for GPT-OSS' experts, MXFP4, got {'; '.join(problems)}{found_in}.{hint}"
        )
    known = {*expected, _HEAD}  # a checkpoint may or may not store a tied head
    extra = [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        console.print(
            f"{source.description}: {tensor_count(extra)} ignored, because the model has no such part ({some(extra)})"
        )


def _check_tied(config: ModelConfig, source: NF4Source) -> None:
    """Refuses a head that differs from the embedding if the config says that they are tied."""
    shapes = source.shapes()
    if not config.tie_word_embeddings or _HEAD not in shapes:
        return
    both = (_HEAD, _EMBEDDING)
    rows = shapes[_EMBEDDING][0]
    pieces = [(0, rows)] if source.forms.keys() & set(both) else list(_pieces(shapes[_EMBEDDING]))
    size = pieces[0][1] * math.prod(shapes[_EMBEDDING][1:])
    buffers = {name: np.empty(4 * size, np.uint8) for name in both}

    def read(name: str, piece: tuple[int, int]) -> np.ndarray:
        part: Any = source.read(name, *piece, buffers[name])
        if isinstance(part, NF4Weight):
            part = dense_nf4(jax.device_put(part), shapes[name], part.dtype)
        return np.asarray(part)

    if shapes[_HEAD] != shapes[_EMBEDDING] or not all(
        np.array_equal(read(_HEAD, piece), read(_EMBEDDING, piece)) for piece in pieces
    ):
        raise InputError(
            f"`tie_word_embeddings` of {source.description} must be false, because {_HEAD} differs from {_EMBEDDING},"
            " got true."
        )
