"""Names the shapes of models that are measured and planned without a checkpoint."""

import dataclasses

from jaxpack.model.config import ModelConfig, RopeConfig, YarnRopeScaling


def qwen3(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, *, tied: bool) -> ModelConfig:
    """Returns a Qwen3 of the given size; all sizes share vocabulary, head_dim, key/value heads and rope."""
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151_936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        qk_norm=True,
        tie_word_embeddings=tied,
    )


def gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
    """Returns a GPT-OSS of the given depth and number of experts."""
    scaling = YarnRopeScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
    return ModelConfig(
        architecture="GptOssForCausalLM",
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=150_000.0, scaling=scaling),
        tie_word_embeddings=False,
        activation="clamped_silu",
        qkv_bias=True,
        out_bias=True,
        sliding_window=128,
        local_layers=tuple(layer % 2 == 0 for layer in range(num_layers)),
        attention_sinks=True,
        num_experts=num_experts,
        num_experts_per_tok=4,
        moe_intermediate_size=2880,
        router_bias=True,
        experts_bias=True,
    )


def llama3_8b() -> ModelConfig:
    """Returns the first Llama 3 with 8 billion weights, whose positions are not scaled."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        tie_word_embeddings=False,
    )


SHAPES = {
    "tiny": qwen3(64, 128, 2, 8, tied=True),  # to try things on a CPU
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, tied=False),
    "Llama-3-8B": llama3_8b(),
    "Qwen3-30B-A3B": dataclasses.replace(
        qwen3(2048, 6144, 48, 32, tied=False),
        architecture="Qwen3MoeForCausalLM",
        num_kv_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "gpt-oss-20b": gpt_oss(24, 32),
}
