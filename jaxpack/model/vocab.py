"""Gives a model rows for more tokens, or for fewer, in its embedding and in its head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, check_type
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.kernels.weight import DenseWeight, Weight
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import weight_of
from jaxpack.parallel.host_memory import pinned_zeros


def resize_vocab(
    model: Transformer, size: int, *, tokenizer: Tokenizer | None = None, pad_to_multiple_of: int | None = None
) -> Transformer:
    """Gives the embedding and the head of a model `size` rows, in place, and returns the model.

    Call it after `tokenizer.add_tokens`, and before a `Trainer` is made. Rows that were there stay as they are, to the
    bit. Each new row is the mean of the old ones, computed in float32 and rounded to the dtype of the matrix. That is
    what `resize_token_embeddings` of transformers does, too, except that it adds noise of about 3e-5 of the rows' own
    spread, so that two calls differ. A head that is not tied to the embedding gets the mean of its own rows.

    New rows are only trained if the matrices are: name them in `modules_to_save`, or train all weights. In both cases,
    and also if they are not trained, `torch_bridge.save_adapter` writes the embedding and the head beside the adapters.

    Args:
      model: with or without adapters, and in 4 bits, too: the embedding and the head are not in 4 bits. Weights that
        are still in their files are read first.
      size: the number of rows, usually `len(tokenizer)`.
      tokenizer: if it is given, `size` must have a row for each of its tokens, and may be smaller than before. Without
        it, `size` must be at least the number of rows that the model has. Many models have more rows than their
        tokenizer has tokens, and need no resizing for a few new ones.
      pad_to_multiple_of: rounds `size` up to a multiple of this number. Matmuls with the head are faster if its rows
        are a multiple of 64.

    Raises:
      InputError: `size` or `pad_to_multiple_of` is no whole number of at least 1, `size` leaves a token of the
        tokenizer without a row, or it is smaller than before and no tokenizer is given.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> number = tokenizer.add_tokens(["<tool>", "</tool>"])
      >>> model = jaxpack.resize_vocab(model, len(tokenizer), tokenizer=tokenizer)
      >>> model.config.vocab_size == len(tokenizer)
      True
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(modules_to_save="embed_tokens,lm_head"))
    """
    check_type("model", model, Transformer)
    for name, value in (("size", size), ("pad_to_multiple_of", pad_to_multiple_of)):
        if (value is not None or name == "size") and (type(value) is not int or value < 1):
            raise InputError(f"`{name}` must be a whole number of at least 1, got {value!r:.80}.")
    rows = size if pad_to_multiple_of is None else -(-size // pad_to_multiple_of) * pad_to_multiple_of
    before = model.config.vocab_size
    if tokenizer is not None and rows < (needed := rows_for(tokenizer)):
        raise InputError(
            f"`size` must be at least {needed:,}, so that each token of the tokenizer has a row, got {size:,}. Pass"
            f" {needed}."
        )
    if tokenizer is None and rows < before:
        raise InputError(
            f"`size` must be at least {before:,}, the rows that the model has, unless `tokenizer` is given, got"
            f" {size:,}. The model has rows for that many tokens already, so leave the call out; or pass `tokenizer`,"
            " too, to drop the rows that it does not need."
        )
    model.read_weights()
    set_rows(model, rows)
    return model


def rows_for(tokenizer: Tokenizer) -> int:
    """Returns the number of rows that an embedding needs for all tokens of a tokenizer: the largest id plus one."""
    known: dict[str, int] = getattr(tokenizer, "get_vocab", tokenizer.get_added_vocab)()
    return max(known.values(), default=-1) + 1


def set_rows(model: Transformer, size: int) -> None:
    """Gives the embedding and the head of a model `size` rows, in place, as `resize_vocab` does, without its checks."""
    before = model.config.vocab_size
    if size == before:
        return
    for name in {"embedding", model.head_name}:
        variable: nnx.Variable = getattr(model, name)
        variable.set_value(_resized(variable.get_value(), size))
    for adapter in model.lora.values():  # New rows begin without a change.
        lora_b = adapter.lora_b[:, :size]
        adapter.lora_b.set_value(jnp.pad(lora_b, ((0, 0), (0, size - lora_b.shape[1]), (0, 0))))
    model.config = dataclasses.replace(model.config, vocab_size=size)
    model.rows_of_base = min(size, before if model.rows_of_base is None else model.rows_of_base)


def replace_new_rows(model: Transformer, name: str, matrix: np.ndarray) -> None:
    """Writes the rows of `matrix` `[V, D]` that the base model does not have into the embedding or head, in place.

    Args:
      name: "embedding" or "lm_head", the attribute of the model.
      matrix: all rows, of which the first ones are not read.
    """
    first = model.config.vocab_size if model.rows_of_base is None else model.rows_of_base
    if first < len(matrix):
        variable: nnx.Variable = getattr(model, name)
        is_weight = isinstance(variable.get_value(), Weight)
        written = weight_of(variable).write((first,), jnp.asarray(matrix[first:]))
        variable.set_value(written if is_weight else written.dense(written.dtype))


def _resized(value: Weight | Array, size: int) -> Weight | Array:
    """Returns a matrix `[V, D]` with `size` rows, in the form in which it was."""
    if isinstance(value, HostMatrix):
        like = HostMatrix.of(DenseWeight(jax.ShapeDtypeStruct((size, value.shape[1]), value.dtype)))
        made = HostMatrix(pinned_zeros(like.pieces), size)
        made.table[:] = np.concatenate([value.table[:size], _new_rows(value.table, size)])
        return made
    matrix = value.dense(value.dtype) if isinstance(value, Weight) else value
    resized = jnp.concatenate([matrix[:size], jnp.asarray(_new_rows(matrix, size))])
    return DenseWeight(resized) if isinstance(value, Weight) else resized


def _new_rows(matrix: Float[Array, "V D"] | np.ndarray, size: int) -> np.ndarray:
    """Returns the rows that a matrix gets in addition: the mean of its rows, as often as needed, in its dtype."""
    mean = np.asarray(matrix.mean(axis=0, dtype=np.float32)).astype(matrix.dtype)
    return np.repeat(mean[None], max(0, size - len(matrix)), axis=0)
