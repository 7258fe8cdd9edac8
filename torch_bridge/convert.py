"""Applies a name table in either direction: tensors of a checkpoint to a model's stacked arrays, and back."""

import functools
import operator
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpack.config import ModelConfig
from jaxpack.console import console, progress_bar
from jaxpack.errors import InputError
from jaxpack.transformer import Transformer
from torch_bridge.names import Entry, tensor_table

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SHOWN = 4  # tensors named per kind of mismatch


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    description: str  # what an error calls it

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str) -> Any:
        """The tensor, as anything `jnp.asarray` takes: float32, bfloat16 or float16."""


def build_model(config: ModelConfig, source: TensorSource, dtype: str | None) -> Transformer:
    """A model with the tensors of `source`. Holds one tensor at a time besides the model.

    Args:
      dtype: "bfloat16", "float16" or "float32", of the weights and of the computation; None is bfloat16 on a GPU and
        float32 on a CPU, where bfloat16 is slow.

    Raises:
      InputError: tensors are missing or of the wrong shape; all are reported at once, before anything is read.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")
    table = tensor_table(config)
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    _check_shapes(model, table, source)
    _check_tied(config, source)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param):
            parameter.set_value(jnp.zeros(parameter.shape, parameter.dtype))
    with progress_bar("loading") as progress:
        bar = progress.add_task("", total=len(table), note="")
        for name, (entry, layer) in table.items():
            parameter = _parameter(model, entry)
            first, _ = _rows(model, entry)
            start = (first,) if layer is None else (layer, first)
            start += (0,) * (len(parameter.shape) - len(start))
            parameter.set_value(_place(parameter.get_value(), jnp.asarray(source.read(name)), start))
            progress.advance(bar)
    return model


def model_tensors(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """The tensors of a checkpoint of the model, by name, without those of adapters."""
    for name, (entry, layer) in tensor_table(model.config).items():
        array = _parameter(model, entry)[...]
        first, size = _rows(model, entry)
        yield name, jax.lax.slice_in_dim(array if layer is None else array[layer], first, first + size)


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: jax.Array, part: jax.Array, start: tuple[int, ...]) -> jax.Array:
    part = part.astype(whole.dtype).reshape((1,) * (whole.ndim - part.ndim) + part.shape)
    return jax.lax.dynamic_update_slice(whole, part, start)


def _parameter(model: Transformer, entry: Entry) -> nnx.Param:
    return operator.attrgetter(entry.path)(model)


def _rows(model: Transformer, entry: Entry) -> tuple[int, int]:
    """The first row and the number of rows that a tensor takes of one layer of its parameter."""
    parameter = _parameter(model, entry)
    if entry.projection is None:
        return 0, parameter.shape[1 if entry.path.startswith("blocks.") else 0]
    first = 0
    for name, size in operator.attrgetter(entry.path.rpartition(".")[0])(model).projections:
        if name == entry.projection:
            return first, size
        first += size
    raise AssertionError(f"{entry} names no projection")


def _check_shapes(model: Transformer, table: dict[str, tuple[Entry, int | None]], source: TensorSource) -> None:
    found = source.shapes()
    problems = []
    missing = [name for name in table if name not in found]
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    wrong = []
    for name, (entry, layer) in table.items():
        _, rows = _rows(model, entry)
        whole = _parameter(model, entry).shape
        expected = (rows, *whole[1 if layer is None else 2 :])
        if name in found and found[name] != expected:
            wrong.append(f"{name} is {list(found[name])} and must be {list(expected)}")
    if wrong:
        problems.append(f"{len(wrong)} of the wrong shape ({_some(wrong)})")
    if problems:
        raise InputError(f"{source.description} must hold the tensors of its `config.json`, got {'; '.join(problems)}.")
    known = {*table, _HEAD}  # a tied head may be there or not
    extra = [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        console.print(
            f"{source.description}: {len(extra)} tensors are not part of the model and ignored ({_some(extra)})"
        )


def _check_tied(config: ModelConfig, source: TensorSource) -> None:
    """A head that is there, and is not the embedding, belongs to another model than a tied one."""
    if config.tie_word_embeddings and _HEAD in source.shapes():
        head, embedding = (jnp.asarray(source.read(name)) for name in (_HEAD, _EMBEDDING))
        if not jnp.array_equal(head, embedding):
            raise InputError(
                f"`tie_word_embeddings` of {source.description} must be false where {_HEAD} is not the embedding,"
                " got true."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
