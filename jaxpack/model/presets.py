"""Names the shapes of models that are measured and planned without a checkpoint."""

from jaxpack.model.config import ModelConfig, RopeConfig


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


SHAPES = {
    "tiny": qwen3(64, 128, 2, 8, tied=True),  # to try things on a CPU
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, tied=False),
}
