"""Makes small random models and random documents for the tests of everything above the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxpack.data.documents import Documents
from jaxpack.model.config import Llama3RopeScaling, ModelConfig, RopeConfig
from jaxpack.model.lora import adapters, add_lora
from jaxpack.model.transformer import Transformer
from jaxpack.settings import LoraConfig

_LLAMA3 = Llama3RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)


_FAMILIES = {
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "rope": RopeConfig(theta=1e6),
        "qk_norm": True,
        "tie_word_embeddings": True,
    },
    "llama": {"architecture": "LlamaForCausalLM", "rope": RopeConfig(theta=5e5, scaling=_LLAMA3)},
    # Has every feature of Gemma 2 and 3.
    "gemma3": {
        "architecture": "Gemma3ForCausalLM",
        "num_layers": 3,
        "activation": "gelu_tanh",
        "qk_norm": True,
        "sliding_window": 7,
        "local_rope": RopeConfig(theta=1e2),
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 7.0,
        "scale_embeddings": True,
        "unit_offset_norms": True,
        "post_norms": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "rope": RopeConfig(theta=1e6),
        "qk_norm": True,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    # Has every feature of GPT-OSS.
    "gpt_oss": {
        "architecture": "GptOssForCausalLM",
        "activation": "clamped_silu",
        "intermediate_size": 32,
        "qkv_bias": True,
        "out_bias": True,
        "sliding_window": 7,
        "attention_sinks": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "router_bias": True,
        "experts_bias": True,
    },
    # Has biases, and a window in every other layer.
    "qwen2": {"architecture": "Qwen2ForCausalLM", "num_layers": 3, "qkv_bias": True, "sliding_window": 7},
}


def small_config(family: str, **changes: object) -> ModelConfig:
    """Returns a config with grouped heads and a head_dim that is not hidden_size / num_heads.

    Between them, the families have both kinds of head and both kinds of RoPE.
    """
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 20,
        "rms_norm_eps": 1e-6,
        "rope": RopeConfig(theta=1e4),
        "tie_word_embeddings": False,
    }
    settings |= _FAMILIES[family] | changes
    if "sliding_window" in _FAMILIES[family]:
        settings.setdefault("local_layers", tuple(i % 2 == 1 for i in range(settings["num_layers"])))
    return ModelConfig(**settings)


def small_model(
    family: str, *, lora: LoraConfig | None = None, dtype: DTypeLike = jnp.float32, **changes: object
) -> Transformer:
    """Makes a random model whose every part matters, with adapters that are not zero if `lora` is given.

    The weights (0.05) are large enough for that, and small enough that float32 rounding does not grow from layer to
    layer.
    """
    model = Transformer(small_config(family, **changes), dtype=dtype, rngs=nnx.Rngs(0))
    key = jax.random.key(1)
    for i, (_, parameter) in enumerate(nnx.iter_graph(model)):
        if isinstance(parameter, nnx.Param):
            noise = 0.05 * jax.random.normal(jax.random.fold_in(key, i), parameter.shape, jnp.float32)
            is_vector = parameter.ndim == 1 or parameter.shape[-1] == parameter.size // model.config.num_layers
            parameter.set_value((noise + (parameter[...] if is_vector else 0)).astype(parameter.dtype))
    if lora is not None:
        add_lora(model, lora)
        for i, adapter in enumerate(adapters(model).values()):
            noise = 0.05 * jax.random.normal(jax.random.fold_in(key, 100 + i), adapter.lora_b.shape)
            adapter.lora_b.set_value(noise)
    return model


def random_documents(lengths: list[int], vocab_size: int = 97, seed: int = 0, masked: float = 0.3) -> Documents:
    """Draws documents of the given lengths; the share `masked` of their tokens is not trained on."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, sum(lengths)).astype(np.int32)
    labels = np.where(rng.random(len(tokens)) < masked, -100, tokens).astype(np.int32)
    ends = np.cumsum(lengths)
    return Documents(tokens, labels, ends - lengths, np.asarray(lengths, np.int64))
