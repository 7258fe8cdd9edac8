"""Merged checkpoints out: the adapters added to the weights, once, in float32, and what that does to the logits."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError
from jaxpack.model.layers import Linear, LoraAdapter
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.utils.console import console
from jaxpack.utils.files import whole_folder
from torch_bridge.convert import model_tensors
from torch_bridge.names import tensor_table
from torch_bridge.pretrained import write_folder

_PROMPT = 64  # tokens


def save_merged(
    model: Transformer, path: str, tokenizer: Tokenizer | None = None, *, dtype: str | None = None
) -> float:
    """Writes a model with its adapters merged as a Hugging Face folder that `AutoModelForCausalLM` reads.

    Each weight is added up in float32 and rounded once, one tensor at a time: the device never holds a second model.
    What the folder will compute is compared with the model as it is, over a prompt of random tokens, and printed.

    Args:
      dtype: "bfloat16", "float16" or "float32", of the weights that are written; None is float16 for a model in
        float16, and bfloat16 for others.

    Returns:
      The largest difference of a logit.

    Raises:
      InputError: the model has no adapters, merging them changes no weight, or makes one infinite; `path` holds
        something, or the disk refused a write.
    """
    if not adapters(model):
        raise InputError("`model` must have LoRA adapters to merge (`save_pretrained` writes others), got one without.")
    if dtype is None:
        dtype = "float16" if model.dtype == jnp.float16 else "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, _PROMPT)).astype(np.int32)
    expected, plain, actual = (
        np.asarray(one.logits(jnp.asarray(tokens))) for one in (model, _without_adapters(model), _merged(model, dtype))
    )
    if not np.isfinite(expected).all():
        raise InputError("`model` must have weights that are finite, got logits that are not.")
    difference, effect = (float(np.abs(logits - expected).max()) for logits in (actual, plain))
    if not np.isfinite(difference):
        raise InputError(f"`dtype` must be one that the merged weights fit in, got {dtype!r}: logits are not finite.")
    with whole_folder(Path(path), "path") as folder:
        changed: list[bool] = []
        write_folder(folder, model, _tensors(model, dtype, changed), dtype, tokenizer)
        if not any(changed):
            raise InputError(f"`model` must have adapters that change a weight in {dtype}, got some that change none.")
    console.print(
        f"merged in {dtype}: {sum(changed)} of {len(changed)} adapted tensors changed; logits are within"
        f" {difference:.2e} of the unmerged model's, which its adapters changed by {effect:.2e}"
    )
    if difference > effect:
        console.print(f"rounding to {dtype} changes the logits by more than the adapters do", style="yellow")
    return difference


def _tensors(model: Transformer, dtype: str, changed: list[bool]) -> Iterator[tuple[str, jax.Array]]:
    """Those of the merged checkpoint; and for each with an adapter whether that changes it, in `changed`."""
    found, table = adapters(model), tensor_table(model.config)
    for name, tensor in model_tensors(model):
        entry, layer = table[name]
        if entry.projection in found and entry.path.endswith(".weight"):
            adapter = found[entry.projection]
            factors = adapter.lora_a[layer], adapter.lora_b[layer]
            merged, differs = _merge_and_compare(tensor, *factors, scaling=adapter.scaling, dtype=dtype)
            changed.append(bool(differs))
            yield name, merged
        else:
            yield name, tensor.astype(dtype)


def merge(
    weight: Float[Array, "O I"],
    lora_a: Float[Array, "R I"],
    lora_b: Float[Array, "O R"],
    scaling: float,
    dtype: DTypeLike,
) -> Float[Array, "O I"]:
    """`weight + scaling * lora_b @ lora_a`, all in float32, rounded to `dtype` at the end."""
    product = jnp.matmul(lora_b, lora_a, precision="highest", preferred_element_type=jnp.float32)
    return (weight.astype(jnp.float32) + scaling * product).astype(dtype)


@functools.partial(jax.jit, static_argnames=("scaling", "dtype"))
def _merge_and_compare(weight, lora_a, lora_b, *, scaling, dtype):
    merged = merge(weight, lora_a, lora_b, scaling, dtype)
    return merged, jnp.any(merged != weight.astype(dtype))


# The model as the folder will have it, and the model without adapters: other structures around the same arrays.


def _without_adapters(model: Transformer) -> Transformer:
    view = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(view):
        if isinstance(module, Linear):
            module.lora = nnx.Dict()
    return view


def _merged(model: Transformer, dtype: str) -> Transformer:
    view = nnx.merge(*nnx.split(model))
    for _, module in list(nnx.iter_modules(view)):
        if isinstance(module, LoraAdapter):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                merges = isinstance(module, Linear) and name == "weight"
                setattr(module, name, _Rounded(value, module.lora if merges else {}, module, dtype))
        if isinstance(module, Linear):
            module.lora = nnx.Dict()
    return view


class _Rounded(nnx.Module):
    """In place of a parameter: its value as it is written, made anew of one layer wherever that is read."""

    def __init__(self, parameter: nnx.Param, lora: dict[str, LoraAdapter], module: nnx.Module, dtype: str):
        self.parameter = parameter
        self.lora = nnx.Dict(dict(lora))
        self.projections = module.projections if isinstance(module, Linear) else ()
        self.dtype = dtype

    def __getitem__(self, index: Any) -> jax.Array:
        weight = self.parameter[...]
        if not self.lora:
            return weight.astype(self.dtype).astype(weight.dtype)[index]
        rows, first = [], 0
        for name, size in self.projections:
            part, adapter = jax.lax.slice_in_dim(weight, first, first + size), self.lora.get(name)
            if adapter is not None:
                part = merge(part, adapter.lora_a[...], adapter.lora_b[...], adapter.scaling, self.dtype)
            rows.append(part.astype(self.dtype))
            first += size
        return jnp.concatenate(rows).astype(weight.dtype)[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape
