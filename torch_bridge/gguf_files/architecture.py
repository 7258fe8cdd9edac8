"""Describes each architecture as llama.cpp knows it: which one it is, its metadata, and the layout of its tensors.

llama.cpp computes some parts of a model in one way only. A model that has such a part in another form is refused, since
llama.cpp would read its file, and compute something else.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxpack.errors import InputError
from jaxpack.model.config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeConfig,
    YarnRopeScaling,
)
from jaxpack.model.rope import attention_factor, rope_frequencies
from jaxpack.utils.console import console

OTHER_WAY = (
    "Write the model as a folder instead (`save_merged` or `save_pretrained`; `--merged` of `jaxpack export`), and"
    " convert that with llama.cpp's convert_hf_to_gguf.py."
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes what llama.cpp expects of an architecture.

    Attributes:
      name: its name in `general.architecture`.
      interleaves_rope: whether RoPE pairs neighbouring channels, so that rows of queries and keys change places.
      allows_bias: which of attention's biases ("qkv", "out") and the feed-forward's ("mlp") are read.
      is_square: whether the heads together must be as wide as the model.
      adds_one_to_norms: whether norms are stored as 1 + weight.
      activation: the activation of the feed-forward.
      local_period: one layer in so many attends to whole texts, and the others to a window; 0: no layer has a window.
      can_untie: whether the head may differ from the embedding.
      huge: the number of layers of the 27B model, whose queries are scaled by `hidden_size / num_heads` instead of
        `head_dim`; llama.cpp knows it by that number.
    """

    name: str
    interleaves_rope: bool = False
    allows_bias: tuple[str, ...] = ()
    is_square: bool = False
    adds_one_to_norms: bool = False
    activation: str = "silu"
    local_period: int = 0
    can_untie: bool = True
    huge: int | None = None


_LLAMA = Architecture("llama", interleaves_rope=True, allows_bias=("qkv", "out", "mlp"))
_GEMMA2 = Architecture(
    "gemma2", adds_one_to_norms=True, activation="gelu_tanh", local_period=2, can_untie=False, huge=46
)
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", allows_bias=("qkv",), is_square=True),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": dataclasses.replace(_GEMMA2, name="gemma3", local_period=6, can_untie=True, huge=62),
}


def architecture_of(config: ModelConfig) -> Architecture:
    """Returns the architecture as llama.cpp knows it.

    Raises:
      InputError: this architecture is not written as GGUF, or llama.cpp computes some part of it in another way.
    """
    if config.architecture not in ARCHITECTURES:
        raise InputError(
            f"`model` must have one of the architectures that are written as GGUF ({', '.join(sorted(ARCHITECTURES))}),"
            f" got {config.architecture}. {OTHER_WAY}"
        )
    architecture = ARCHITECTURES[config.architecture]
    differences = list(_differences(config, architecture))
    if differences:
        raise InputError(
            f"`model` must be a {config.architecture} that llama.cpp computes as jaxpack does, got one with"
            f" {'; '.join(differences)}. llama.cpp would compute other logits from the file, so none is written. Serve"
            " the model with transformers or vLLM instead, from a folder that `save_merged` or `save_pretrained` wrote."
        )
    return architecture


def _differences(config: ModelConfig, architecture: Architecture) -> Iterator[str]:
    """Yields the settings of a model that its architecture in llama.cpp has not."""
    for kind, field in (("qkv", "qkv_bias"), ("out", "out_bias"), ("mlp", "mlp_bias")):
        if getattr(config, field) and kind not in architecture.allows_bias:
            yield f"biases (`{field}`)"
    if architecture.is_square and config.num_heads * config.head_dim != config.hidden_size:
        yield (
            f"heads of together {config.num_heads * config.head_dim} channels beside a `hidden_size` of"
            f" {config.hidden_size}"
        )
    if config.activation != architecture.activation:
        yield f"the activation {config.activation!r}"
    if not (architecture.can_untie or config.tie_word_embeddings):
        yield "a head that is not the embedding (`tie_word_embeddings`)"
    yield from _differences_of_rope(config)
    if architecture.local_period:
        yield from _differences_of_gemma(config, architecture)
    elif config.query_pre_attn_scalar or config.attn_logit_softcapping or config.final_logit_softcapping:
        yield "scaled queries or soft-caps"


def _differences_of_rope(config: ModelConfig) -> Iterator[str]:
    scaling = config.rope.scaling
    if config.rope.partial_rotary_factor != 1:
        yield f"a `partial_rotary_factor` of {config.rope.partial_rotary_factor}"
    if isinstance(scaling, YarnRopeScaling):
        if (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32, 1, True):
            yield "a YaRN RoPE whose `beta_fast`, `beta_slow` and `truncate` are not 32, 1 and true"
    elif isinstance(scaling, Llama3RopeScaling):
        if ARCHITECTURES[config.architecture].name != "llama":
            yield "Llama 3's RoPE scaling"
    elif scaling is not None and not isinstance(scaling, LinearRopeScaling):
        yield f"RoPE scaling of the kind {type(scaling).__name__.removesuffix('RopeScaling').lower()!r}"


def _differences_of_gemma(config: ModelConfig, architecture: Architecture) -> Iterator[str]:
    is_gemma2 = architecture.name == "gemma2"
    pattern = tuple(bool((i + 1) % architecture.local_period) for i in range(config.num_layers))
    if config.sliding_window is None or config.local_layers != pattern:
        yield f"other layers with a window than all but each {architecture.local_period}th"
    usual = config.head_dim
    if config.num_layers == architecture.huge:
        usual = config.hidden_size // config.num_heads
    if (config.query_pre_attn_scalar or config.head_dim) != usual:
        yield f"a `query_pre_attn_scalar` of {config.query_pre_attn_scalar} instead of {usual}"
    if is_gemma2 and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        yield "no soft-caps"
    if is_gemma2 and config.rope.scaling is not None:
        yield "a scaled RoPE"
    local = config.local_rope
    if local is not None and local != RopeConfig(theta=10_000.0):
        yield f"{local} in layers with a window, instead of a plain one with `rope_theta` 10,000"


def describe(writer: Any, config: ModelConfig, architecture: Architecture) -> None:
    """Writes the metadata of a model's architecture.

    Args:
      writer: a `gguf.GGUFWriter`.
    """
    import gguf

    length = config.max_position_embeddings
    if not architecture.local_period and config.sliding_window is not None:
        # llama.cpp has no windows here. Texts that fit into the window are computed alike.
        length = min(length or config.sliding_window, config.sliding_window)
        if length != config.max_position_embeddings:
            console.print(
                f"llama.cpp has no sliding window for {config.architecture}: the file says that texts may have"
                f" {length:,} tokens, the model's window, up to which both compute the same",
                style="yellow",
            )
    if length is not None:
        writer.add_context_length(length)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if architecture.local_period and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    scaling = config.rope.scaling
    if isinstance(scaling, LinearRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif isinstance(scaling, YarnRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(int(scaling.original_max_position_embeddings))
        # llama.cpp computes the factor of the paper itself, and multiplies it by this one.
        plain = dataclasses.replace(scaling, attention_factor=None, mscale=None, mscale_all_dim=None)
        usual = attention_factor(dataclasses.replace(config.rope, scaling=plain))
        if attention_factor(config.rope) != usual:
            writer.add_rope_scaling_attn_factors(attention_factor(config.rope) / usual)


def extra_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the tensors that only a GGUF file has: the divisors of Llama 3's frequencies."""
    if not isinstance(config.rope.scaling, Llama3RopeScaling):
        return {}
    plain = dataclasses.replace(config.rope, scaling=None)
    divisors = rope_frequencies(plain, config.head_dim) / rope_frequencies(config.rope, config.head_dim)
    return {"rope_freqs.weight": divisors.astype(np.float32)}


def gguf_names(names: Iterable[str], config: ModelConfig, architecture: Architecture) -> dict[str, str]:
    """Returns the names of a checkpoint's tensors in the file."""
    import gguf

    (known,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(known, config.num_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    missing = [name for name, new in found.items() if new is None]
    assert not missing, f"gguf has no names for {missing}"
    return {name: new for name, new in found.items() if new is not None}


def laid_out(name: str, tensor: ArrayLike, config: ModelConfig, architecture: Architecture) -> np.ndarray:
    """Returns the values of a checkpoint's tensor in the layout of the file.

    Args:
      name: the name of the tensor in the checkpoint.
    """
    array = np.asarray(tensor)
    if architecture.adds_one_to_norms and name.endswith("norm.weight"):
        return array.astype(np.float32) + 1
    if architecture.interleaves_rope and ".self_attn.q_proj." in name:
        return _interleaved(array, config.num_heads)
    if architecture.interleaves_rope and ".self_attn.k_proj." in name:
        return _interleaved(array, config.num_kv_heads)
    return array


def _interleaved(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of each head from (first halves, second halves) to pairs that are rotated together."""
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
