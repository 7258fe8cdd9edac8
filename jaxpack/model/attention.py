"""The attention part of a block."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import NoKeys, RowContext
from jaxpack.model.linear import Linear
from jaxpack.model.norm import RMSNorm, make_norm


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, in some families, a norm of every query and key head."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"q_proj": N * H, "k_proj": K * H, "v_proj": K * H}
        if config.fused_projections:
            sizes = {"qkv_proj": sum(sizes.values())}
        self.qkv = Linear(config.hidden_size, sizes, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(N * H, {"o_proj": config.hidden_size}, bias=config.out_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm, self.k_norm = make_norm(config, dtype, H), make_norm(config, dtype, H)
        self.post_norm = make_norm(config, dtype) if config.post_norms else None
        self.config = config

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2"] | NoKeys
    ) -> Float[Array, "B T D"]:
        """`x + attention(norm(x))`."""
        config = self.config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        x, heads = self.qkv.after_norm(norm, x, context, keys[0])
        heads = checkpoint_name(heads, "heads")
        mixed = rotary_attention(
            heads.reshape(*x.shape[:2], N + 2 * K, H),
            context.angles,
            context.bounds,
            num_heads=N,
            norms=HeadNorms(self.q_norm.weight, self.k_norm.weight) if config.qk_norm else None,
            eps=config.rms_norm_eps,
            scale=config.attention_scale,
            softcap=config.attn_logit_softcapping,
            max_segments=context.max_segments,
            implementation=context.implementation,
        )
        return self.out.onto(x, mixed.reshape(*x.shape[:2], N * H), context, keys[1], post_norm=self.post_norm)
