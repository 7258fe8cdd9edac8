"""Gives a 4-bit model the 16-bit weights that it was made from, which stay in their files until they are read.

Neither the host nor the device ever holds this second model: a layer is read when a computation needs it.
"""

import dataclasses
import functools
import json
import math
import operator
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.errors import InputError, errors_name
from jaxpack.kernels.host_weight import HostWeight
from jaxpack.kernels.weight import NumberedWeight, Weight
from jaxpack.model.nf4 import NF4Weight, quantize_nf4
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import MATRICES, Frozen, MixedWeight, is_trained
from jaxpack.utils.console import console
from torch_bridge.config_json import CONFIG_FILE
from torch_bridge.io.folder import mismatches, some, tensor_count
from torch_bridge.pretrained import read_tensors
from torch_bridge.quantized import TensorSource
from torch_bridge.sixteen_bit import quantisation_of, quantised_hint
from torch_bridge.tensors import parameter_tensors, tensor_shapes

# The distance between the model's 4-bit weights and those that the original weights give, relative to their size. It is
# 0 if both were quantised alike, 0.02 after a rounding to bfloat16 in between, and 1.4 for unrelated weights.
_SUSPICIOUS, _TOO_FAR = 0.05, 0.2


def original_folder(model: Transformer) -> str | None:
    """Returns the folder of the 16-bit weights that were quantised when the model was read; None if it is not known."""
    name = model.config.name_or_path
    is_quantised = quantisation_of(json.loads(dict(model.source_files).get(CONFIG_FILE, "{}"))) is not None
    return name if name and not is_quantised and os.path.isdir(name) else None


def with_original_weights(model: Transformer, base: str) -> Transformer:
    """Returns a view of a 4-bit model, with its adapters, whose frozen weights are those of its 16-bit base.

    Matrices are `StoredWeight`s. What is trained, the adapters and `modules_to_save`, stays as it is.

    Args:
      base: the folder of the 16-bit base, or its id on the hub.

    Raises:
      InputError: `base` cannot be read, lacks a tensor, or is not the model from which the 4-bit weights were made.
    """
    with errors_name(model="base"):
        hf, config, source = read_tensors(base)
    if quantisation_of(hf) is not None:
        raise InputError(
            f"`base` must be a model whose weights are in 16 or 32 bits, got {base!r:.200}, which is quantised."
            f" {quantised_hint(base, hf)}"
        )
    if config.architecture != model.config.architecture:
        raise InputError(
            f"`base` must be a {model.config.architecture}, as the model is, got {base!r:.200}, a"
            f" {config.architecture}."
        )
    shapes = tensor_shapes(model)
    # The files of the base know nothing of a resized vocabulary. Embedding and head are not in 4 bits in any case.
    resized = {"embedding", "lm_head"} if model.rows_of_base is not None else set()
    frozen = {
        path: layers
        for path, layers in parameter_tensors(model).items()
        if path not in resized and not is_trained(operator.attrgetter(path)(model))
    }
    wanted = {name: shapes[name] for layers in frozen.values() for names in layers for name in names}
    problems = mismatches(source.shapes(), wanted)
    if refused := [f"{name:.120} of {form}" for name, form in source.unreadable.items() if name in wanted]:
        problems.append(f"{tensor_count(refused)} that cannot be read ({some(refused)})")
    if problems:
        raise InputError(
            f"`base` must hold the tensors that the model was made from, got {base!r:.200} with {'; '.join(problems)}."
        )
    view = nnx.merge(*nnx.split(model))
    for path, layers in frozen.items():
        *module, attribute = path.split(".")
        stack = LayersInFiles(source, layers, path.startswith("blocks."))
        weight = StoredWeight(stack, layer=None if stack.is_stack else jnp.int32(0))
        value = weight if attribute in MATRICES else jnp.asarray(stack.all())
        setattr(operator.attrgetter(".".join(module))(view) if module else view, attribute, Frozen(value))
    _check_origin(model, view, base)
    return view


def _check_origin(model: Transformer, view: Transformer, base: str) -> None:
    """Refuses original weights that do not give the model's 4-bit weights. Compares two layers of each matrix."""
    worst, where = 0.0, ""
    for path, layers in parameter_tensors(model).items():
        for layer in sorted({0, len(layers) - 1}):
            weight, number = operator.attrgetter(path)(model).get_value(), layer
            if isinstance(weight, MixedWeight):
                kind, number = weight.places[layer]
                weight = weight.parts[kind]
            if isinstance(weight, HostWeight):
                weight, number = weight.fetch(number), 0
            if not isinstance(weight, NF4Weight):
                continue
            size, original = weight.places.rows[0], operator.attrgetter(path)(view).get_value()
            rows = original.at(layer).dense_rows(0, size, weight.dtype)
            distance = float(_distance(weight.at(number), rows))
            if not distance <= worst:
                worst, where = distance, layers[layer][0]
    if worst <= _SUSPICIOUS:
        return
    found = (
        f"{where} of {base:.200}, quantised to 4 bits, differs from the model's 4-bit weights by {worst:.0%} of their"
        " size"
    )
    if not worst <= _TOO_FAR:
        raise InputError(
            f"`base` must be the model from which the 4-bit weights were made, got another model: {found}. Use the"
            " 16-bit version of the model that the adapters were trained with."
        )
    console.print(
        f"{found}. It is probably a relative of the model that the 4-bit weights were made from, for example the"
        " pretrained model instead of the chat model: compare the logits",
        style="yellow",
    )


@jax.jit
def _distance(weight: NF4Weight, rows: Float[Array, "O I"]) -> Float[Array, ""]:
    """Returns |quantised rows - weight| / |weight| over the first projection of one layer."""
    here = weight.dense(jnp.float32)[: len(rows)]
    quantised = quantize_nf4(rows, (len(rows),), weight.places.block_size, weight.is_nested).dense(jnp.float32)
    return jnp.linalg.norm(quantised - here) / jnp.linalg.norm(here)


class LayersInFiles:
    """Reads the layers of one parameter from files.

    Attributes:
      shape: the shape of the parameter; a stack begins with the number of layers.
      dtype: the dtype that the stored dtypes promote to.
    """

    def __init__(self, source: TensorSource, layers: list[list[str]], is_stack: bool):
        self._source, self._layers = source, layers
        shapes = source.shapes()
        self._sizes = [shapes[name][0] for name in layers[0]]
        self._row = shapes[layers[0][0]][1:]
        self.is_stack = is_stack
        self.shape = (*(len(layers),) * is_stack, sum(self._sizes), *self._row)
        first_rows = [self._read(name, 0, 1) for names in layers for name in names]
        self.dtype = jnp.result_type(*(row.dtype for row in first_rows))

    def read(self, layer: int, first: int, last: int) -> np.ndarray:
        """Returns rows `first` to `last` (exclusive) of one layer, in `dtype`."""
        parts, start = [], 0
        for name, size in zip(self._layers[layer], self._sizes, strict=True):
            low, high = max(first, start), min(last, start + size)
            if low < high:
                parts.append(self._read(name, low - start, high - start).astype(self.dtype, copy=False))
            start += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows of a single matrix."""
        taken = [self.read(0, row, row + 1) for row in map(int, np.asarray(rows).reshape(-1))]
        return np.concatenate(taken).reshape(*rows.shape, *self._row)

    def all(self) -> np.ndarray:
        """Returns the whole parameter."""
        layers = [self.read(layer, 0, sum(self._sizes)) for layer in range(len(self._layers))]
        return np.stack(layers) if self.is_stack else layers[0]

    def _read(self, name: str, first: int, last: int) -> np.ndarray:
        buffer = np.empty(4 * (last - first) * math.prod(self._row), np.uint8)
        return np.asarray(self._source.read(name, first, last, buffer))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredWeight(NumberedWeight):
    """Stands for a matrix, or a stack of matrices, that stays in its files: each use reads one layer.

    Attributes:
      stack: reads the layers. `layer` is an array also for a single matrix: the matrix would become a constant of a
        compiled program if the program had nothing to tell it when to read.
    """

    stack: LayersInFiles = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one matrix, or of the stack of all layers."""
        return self.stack.shape if self.layer is None else self.stack.shape[-2:]

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the stored matrices."""
        return self.stack.dtype

    def dense(self, dtype: DTypeLike) -> Float[Array, "*L O I"]:
        """Returns the layer that is read, or the whole stack, as an array."""
        if self.layer is None:
            return self.dense_stack(dtype)
        return self.dense_rows(0, self.shape[0], dtype)

    def dense_rows(self, first: int, size: int, dtype: DTypeLike) -> Float[Array, "N I"]:
        """Returns some rows of the layer that is read, without reading the others.

        In a compiled program the host reads them while the program runs.
        """
        read = functools.partial(self.stack.read, first=first, last=first + size)
        if isinstance(self.layer, Tracer):
            rows = jax.ShapeDtypeStruct((size, self.shape[-1]), self.dtype)
            return jax.pure_callback(lambda layer: read(int(layer)), rows, self.layer).astype(dtype)
        return jnp.asarray(read(int(self.layer))).astype(dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of a single matrix, which are read one by one."""
        taken = jax.ShapeDtypeStruct((*rows.shape, self.shape[-1]), self.dtype)
        return jax.pure_callback(self.stack.take, taken, rows).astype(dtype)

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> Weight:
        """Raises TypeError, since the files are read only."""
        raise TypeError("a weight in files is read only")
