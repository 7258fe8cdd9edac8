"""Writes merged checkpoints: adapters are added to the weights once, in float32, and the logits are compared."""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, is_out_of_memory, reason
from jaxpack.kernels.weight import NumberedWeight, Weight
from jaxpack.model.linear import AdapterArrays, Linear, LoraAdapter, row_scales, spread_adapters
from jaxpack.model.lora import adapters, untie, without_adapters
from jaxpack.model.moe import Experts, experts_of
from jaxpack.model.mxfp4 import MXFP4Weight
from jaxpack.model.nf4 import holds_4bit
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import MATRICES, Frozen, weight_of
from jaxpack.parallel.device import on_host
from jaxpack.utils.console import console
from torch_bridge.config_json import CONFIG_FILE
from torch_bridge.families.base import Entry
from torch_bridge.original import original_folder, with_original_weights
from torch_bridge.pretrained import write_folder, written_by_first
from torch_bridge.rounding import dtype_of, rounded
from torch_bridge.sixteen_bit import sixteen_bit_sibling
from torch_bridge.tensors import model_tensors, tensor_table

_PROMPT = 64  # tokens


def save_merged(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str | None = None,
    base: str | None = None,
) -> float:
    """Writes a model with its adapters merged as a Hugging Face folder that `AutoModelForCausalLM` reads.

    Each weight is merged in float32 and rounded once, one tensor at a time: the device never holds a second model.
    The logits of the merged weights are compared with those of the model on a prompt of random tokens, and the
    difference is printed.

    A model whose weights are in 4 bits can be merged in two ways. By default, the adapters are added to the dequantised
    weights, with which they were trained, so the merged model computes what the trained model does. With `base`, they
    are added to the weights from which the 4-bit weights were made. These are nearer to the model that its authors
    published, but the adapters have never seen them. The difference of the other way is printed, too, if the files of
    the 16-bit weights are known.

    Args:
      dtype: the dtype of the weights that are written, "bfloat16", "float16" or "float32"; None is float16 for a model
        in float16, and bfloat16 for others.
      base: for a model in 4 bits, the folder of its 16-bit base, or the id of the base on the hub. The weights that are
        not trained are read from its files, one at a time. None merges into the model's own weights.

    Returns:
      The largest absolute difference between two logits; NaN if the device has too little memory to compute them, which
      is printed.

    Raises:
      InputError: the model has no adapters, merging changes no weight or makes the logits infinite, `base` is not the
        model that the 4-bit weights were made from, `path` is not empty, or the disk refused a write.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=16, lora_alpha=32))
      >>> config = jaxpack.TrainConfig(packing=True, max_length=128, max_steps=2, learning_rate=2e-4)
      >>> result = jaxpack.Trainer(model, tokenizer, "train.jsonl", config).train()
      >>> difference = torch_bridge.save_merged(model, "out/merged", tokenizer, dtype="float32")
    """
    if not adapters(model):
        raise InputError(
            "`model` must have LoRA adapters to merge, got a model without any. Write it with `save_pretrained`."
        )
    if dtype is None:
        dtype = "float16" if model.dtype == jnp.float16 else "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {dtype!r}.")
    merging = Merging.of(model, dtype, base)
    with written_by_first(path) as folder:
        changed: list[bool] = []
        write_folder(folder, merging.model, merging.tensors(changed), dtype, tokenizer)
        merging.require_change(changed)
    merging.report(changed)
    return merging.compared.difference


class Merging(NamedTuple):
    """Holds a merge that is checked and may be written.

    Attributes:
      model: the model with adapters, untied if adapters change its head and its embedding apart.
      source: the model into whose weights the adapters are merged, which is `model` unless `base` is given.
      written: the dtype of the merged weights in the file, or "q8_0", see `rounded`.
      base: the 16-bit base of a model in 4 bits, or None.
      compared: how far the logits of the merged model differ.
    """

    model: Transformer
    source: Transformer
    written: str
    base: str | None
    compared: "_Compared"

    @classmethod
    def of(cls, model: Transformer, written: str, base: str | None) -> "Merging":
        """Checks a merge, and compares the logits of the merged model with those of the trained one.

        Raises:
          InputError: as in `save_merged`.
        """
        is_4bit = holds_4bit(nnx.state(model))
        if base is not None and not is_4bit:
            raise InputError(
                "`base` must be None for a model without weights in 4 bits (NF4), whose adapters are merged into its"
                f" own weights, got {base!r:.200}."
            )
        if base is not None and _has_mxfp4(model):
            raise InputError(
                "`base` must be None for a model whose experts are in MXFP4, because that is the form in which they"
                f" were published, got {base!r:.200}."
            )
        model.read_weights()
        if model.lora and model.config.tie_word_embeddings:
            console.print(
                "the adapters change the head and the embedding apart, although the base model ties them"
                " (`tie_word_embeddings`): the merged model is untied",
                style="yellow",
            )
            model = nnx.merge(*nnx.split(model))  # the same arrays
            untie(model)
        source = model if base is None else with_original_weights(model, base)
        return cls(model, source, written, base, _compare(model, source, written))

    def tensors(self, changed: list[bool], *, casts_all: bool = True) -> Iterator[tuple[str, jax.Array]]:
        """Yields the tensors of the merged model; appends to `changed` whether each adapter changed its tensor.

        Args:
          casts_all: whether tensors without an adapter get the written dtype, too, instead of keeping their own.
        """
        return _tensors(self.source, dtype_of(self.written), changed, casts_all=casts_all)

    def require_change(self, changed: list[bool]) -> None:
        """Refuses adapters that have changed no tensor."""
        if not any(changed):
            raise InputError(
                f"`model` must have adapters that change a weight, got adapters that change none in {self.written}."
                " Either they are all zero, as before training, or their changes are smaller than the rounding to this"
                " dtype: train the adapters first, or choose a more precise `dtype`."
            )

    def report(self, changed: list[bool]) -> None:
        """Prints what was merged, and how far the logits differ."""
        base, written, compared = self.base, self.written, self.compared
        is_4bit = holds_4bit(nnx.state(self.model))
        target = f" into the 16-bit weights of {base:.200}" if base is not None else ""
        if base is None and is_4bit:
            target = " into the dequantised 4-bit weights, with which the adapters were trained"
        console.print(
            f"merged in {written}{target}: {sum(changed)} of {len(changed)} adapted tensors changed; {compared}"
        )
        if compared.difference > compared.effect:
            why, remedy = f"rounding to {written}", "a more precise `dtype` keeps"
            if base is not None:
                why = "the change to other weights"
                remedy = "a merge into the dequantised weights (without `base`) keeps"
            console.print(
                f"{why} changes the logits by more than the adapters do: {remedy} more of the training", style="yellow"
            )
        if is_4bit and not _has_mxfp4(self.model):
            console.print(_other_way(self.model, written, base))


def _has_mxfp4(model: Transformer) -> bool:
    return any(isinstance(weight_of(x.weight), MXFP4Weight) for x in experts_of(model))


class _Compared(NamedTuple):
    """Holds differences between logits; NaN where the device has too little memory.

    Attributes:
      difference: the largest between the merged and the trained model.
      mean: the mean between these two.
      effect: the largest between the trained model and the model without its adapters.
    """

    difference: float
    mean: float
    effect: float

    def __str__(self) -> str:
        if np.isnan(self.difference):
            return "the device has too little memory to compare the merged model's logits with the trained model's"
        return (
            f"the merged model's logits differ from the trained model's by at most {self.difference:.2e}"
            f" ({self.mean:.2e} on average); the adapters changed the base model's logits by up to {self.effect:.2e}"
        )


def _compare(model: Transformer, source: Transformer, dtype: str) -> _Compared:
    """Compares a trained model with the merge into the weights of `source`, on a prompt of random tokens.

    Raises:
      InputError: logits are NaN or infinite.
    """
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, _PROMPT)).astype(np.int32)
    try:
        expected, plain, actual = (
            on_host(one.logits(jnp.asarray(tokens))) for one in (model, without_adapters(model), _merged(source, dtype))
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _Compared(math.nan, math.nan, math.nan)
    if not np.isfinite(expected).all():
        raise InputError(
            "`model` must have finite logits, got NaN or infinite logits before anything was merged. The weights or the"
            " adapters hold such values, or values too large for the model's dtype: check the losses of the training."
        )
    if not np.isfinite(actual).all():
        raise InputError(
            "`model` must have finite logits after merging, got merged weights whose logits are NaN or infinite, from a"
            f" model whose own logits are finite. Either a merged weight is too large for `dtype` {dtype!r} (float16"
            " ends at 65,504, bfloat16 and float32 at 3.4e38), or the adapters are so large that the merge overflows."
        )
    apart = np.abs(actual - expected)
    return _Compared(float(apart.max()), float(apart.mean()), float(np.abs(plain - expected).max()))


def _other_way(model: Transformer, dtype: str, base: str | None) -> str:
    """Returns a sentence about the way that was not chosen to merge a 4-bit model, with its difference if known."""
    if base is not None:
        where, source = "the dequantised 4-bit weights (without `base`)", model
    else:
        folder = original_folder(model)
        if folder is None:
            files = json.loads(dict(model.source_files).get(CONFIG_FILE, "{}"))
            sibling = sixteen_bit_sibling(model.config.name_or_path, files)
            probably = "" if sibling is None else f", probably {sibling!r:.200}"
            return f"`base` merges into 16-bit weights instead: name the model that was quantised{probably}"
        where = f"the 16-bit weights of {folder:.200} (with that as `base`)"
        try:
            source = with_original_weights(model, folder)
        except InputError as error:
            return f"a merge into {where} was not compared: {reason(error)}"
    try:
        compared = _compare(model, source, dtype)
    except InputError as error:
        return f"a merge into {where} was not compared: {reason(error)}"
    if np.isnan(compared.difference):
        return f"a merge into {where} was not compared, because the device has too little memory"
    return (
        f"merged into {where}, the logits would differ by at most {compared.difference:.2e}"
        f" ({compared.mean:.2e} on average)"
    )


def _tensors(
    model: Transformer, dtype: str, changed: list[bool], *, casts_all: bool
) -> Iterator[tuple[str, jax.Array]]:
    table = tensor_table(model.config)
    for name, tensor in model_tensors(model):
        entry, layer = table[name]
        adapter = _adapter_of(model, entry)
        arrays = None if adapter is None else adapter.at(layer or 0)
        if adapter is not None and arrays is not None:
            merged, differs = _merge_and_compare(tensor, *arrays, scaling=adapter.scaling, dtype=dtype)
            changed.append(bool(differs))
            yield name, merged
        else:
            yield name, tensor.astype(dtype) if casts_all else tensor


def _adapter_of(model: Transformer, entry: Entry) -> LoraAdapter | None:
    """Returns the adapter of a tensor, with factors stacked over the layers that have it, or None."""
    if entry.path in ("embedding", "lm_head"):
        return model.lora.get("embed_tokens" if entry.path == "embedding" else "lm_head")
    parent, _, attribute = entry.path.rpartition(".")
    module = operator.attrgetter(parent)(model) if attribute == "weight" else None
    if isinstance(module, Linear | Experts) and entry.rows is not None:
        return module.adapter_of(entry.rows)
    return None


def merge(
    weight: Float[Array, "*E O I"],
    lora_a: Float[Array, "*E R I"],
    lora_b: Float[Array, "*E O R"],
    magnitude: Float[Array, "*E O"] | None,
    scaling: float,
    dtype: DTypeLike,
) -> Float[Array, "*E O I"]:
    """Returns `weight + scaling * lora_b @ lora_a`, computed in float32 and cast to `dtype` at the end.

    Its rows are scaled to the norms that a `magnitude` gives, except those whose magnitude is `NO_MAGNITUDE`.
    """
    product = jnp.matmul(lora_b, lora_a, precision="highest", preferred_element_type=jnp.float32)
    merged = weight.astype(jnp.float32) + scaling * product
    if magnitude is not None:
        norms = jnp.maximum(jnp.linalg.norm(merged, axis=-1), 1e-15)  # as in training, see `row_norms`
        merged *= row_scales(magnitude, norms)[..., None]
    return merged.astype(dtype)


@functools.partial(jax.jit, static_argnames=("scaling", "dtype"))
def _merge_and_compare(weight, lora_a, lora_b, magnitude, *, scaling, dtype):
    merged = merge(weight, lora_a, lora_b, magnitude, scaling, dtype)
    return merged, jnp.any(merged != weight.astype(dtype))


# The model as the folder will hold it: a new module structure around the same arrays.


def _merged(model: Transformer, dtype: str) -> Transformer:
    view = nnx.merge(*nnx.split(model))
    view.blocks = spread_adapters(view.blocks, model.config.num_layers)
    modules = [module for _, module in nnx.iter_modules(view) if not isinstance(module, LoraAdapter)]
    for module in modules:
        for name, variable in list(vars(module).items()):
            if not isinstance(variable, nnx.Variable):
                continue
            if name in MATRICES:
                table = view.lora.get("lm_head" if name == "lm_head" else "embed_tokens") if module is view else None
                setattr(module, name, Frozen(MergedWeight.of(weight_of(variable), module, dtype, table)))
            else:
                value = variable.get_value()
                setattr(module, name, Frozen(value.astype(dtype_of(dtype)).astype(value.dtype)))
        if isinstance(module, Linear | Experts):
            module.lora = nnx.Dict()
    view.lora = nnx.Dict()
    return view


class _Part(NamedTuple):
    """Holds the number of rows of one projection in a merged matrix, and its adapter's scaling (None without one)."""

    size: int
    scaling: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergedWeight(NumberedWeight):
    """Holds a weight and its adapters; each read merges one layer anew, rounded as in the written file."""

    base: Weight
    adapters: list[AdapterArrays | None]  # for each part
    parts: tuple[_Part, ...] = dataclasses.field(metadata={"static": True})
    written: str = dataclasses.field(metadata={"static": True})  # the dtype of the file, or "q8_0"

    @classmethod
    def of(cls, base: Weight, module: nnx.Module, dtype: str, table: LoraAdapter | None = None) -> "MergedWeight":
        """Returns a view of `base` with the adapters of its module merged; with `table`, of an embedding or a head."""
        if table is not None:
            return cls(base, [table.at(0)], (_Part(base.shape[-2], table.scaling),), dtype)
        if isinstance(module, Experts) and module.lora:  # The factors of all experts have an axis for the experts.
            (one,) = module.lora.values()
            part = _Part(base.shape[-2], one.scaling)
            return cls(base, [one.arrays], (part,), dtype)
        if not isinstance(module, Linear):
            return cls(base, [None], (_Part(base.shape[-2], None),), dtype)
        found = [(size, module.lora.get(name)) for name, size in module.projections]
        arrays = [None if one is None else one.arrays for _, one in found]
        parts = tuple(_Part(size, None if one is None else one.scaling) for size, one in found)
        return cls(base, arrays, parts, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the base weight, which merging keeps."""
        return self.base.shape if self.layer is None else self.base.shape[-2:]

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the base weight."""
        return self.base.dtype

    def dense(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        """Returns the merged matrix: rounded as in the file, then cast."""
        base, adapters = self.base, self.adapters
        if self.layer is not None:
            base = base.at(self.layer)
            adapters = jax.tree.map(lambda array: array[self.layer], adapters)
        weight, rows, first = base.dense(base.dtype), [], 0
        for part, arrays in zip(self.parts, adapters, strict=True):
            here = jax.lax.slice_in_dim(weight, first, first + part.size)
            if arrays is not None and part.scaling is not None:
                matrices = here.reshape(*arrays.lora_b.shape[:-1], here.shape[-1])
                here = merge(matrices, *arrays, part.scaling, dtype_of(self.written)).reshape(here.shape)
            rows.append(rounded(here, self.written))
            first += part.size
        return jnp.concatenate(rows).astype(dtype)

    def take(self, rows: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B I"]:
        """Returns rows of an embedding, rounded as in the file."""
        if any(self.adapters):
            return self.dense(dtype)[rows]
        return rounded(self.base.take(rows, self.base.dtype), self.written).astype(dtype)

    def write(self, start: tuple[Int[Array, ""] | int, ...], rows: Array) -> Weight:
        """Raises TypeError, since a merged view of a weight is read only."""
        raise TypeError("a merged view of a weight is read only")
