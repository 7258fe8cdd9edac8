"""The parts of a transformer block. One layer's worth each: `transformer.py` stacks and scans them.

Weights keep the orientation of a checkpoint, `[out, in]`: reading and writing one copies rows and transposes nothing.
Projections that read the same input are one matrix (query, key and value; gate and up): one matmul instead of three.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxpack.config import Implementation, ModelConfig
from jaxpack.kernels.attention import SegmentBounds
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.gated_linear import gated_linear
from jaxpack.kernels.lora_linear import lora_linear
from jaxpack.kernels.rms_norm import rms_norm
from jaxpack.kernels.rope import Angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention


class RowContext(NamedTuple):
    """What every layer needs to know of the batch, computed once; and which kernels it runs."""

    bounds: SegmentBounds
    angles: Angles
    max_segments: int | None
    implementation: Implementation | None


class LoraAdapter(nnx.Module):
    """`scaling * lora_b @ lora_a`, added to one projection's weight; float32 factors, applied in the input's dtype."""

    def __init__(self, lora_a: Float[Array, "*L R I"], lora_b: Float[Array, "*L O R"], scaling: float, dropout: float):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.dropout = dropout


class Linear(nnx.Module):
    """One or more projections of the same input, side by side in one `weight` `[sum(out), in]`, no bias.

    `projections` names them, with their output sizes, in the order of the rows. `lora` holds an adapter for each
    that has one.
    """

    def __init__(self, in_features: int, projections: dict[str, int], *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (sum(projections.values()), in_features)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype))
        self.projections = tuple(projections.items())
        self.lora = nnx.Dict()

    def __call__(self, x: Float[Array, "B T I"], dropout_key: Key[Array, ""] | None = None) -> Float[Array, "B T O"]:
        """All projections of `x`, side by side. Dropout acts on the input of the adapters, where there is a key."""
        if not self.lora:
            return jnp.einsum("BTI,OI->BTO", x, self.weight[...].astype(x.dtype))
        return lora_linear(x, self.weight[...], *self.factors(), self._dropped(x, dropout_key))

    def factors(self) -> tuple[Float[Array, "R I"], Float[Array, "O R"]]:
        """Those of all adapters as one, scaled: the A factors side by side, the B factors as blocks on a diagonal."""
        adapters = [(size, self.lora.get(name)) for name, size in self.projections]
        lora_a = jnp.concatenate([adapter.lora_a[...] for _, adapter in adapters if adapter is not None])
        lora_b = jnp.zeros((self.weight.shape[-2], lora_a.shape[0]), lora_a.dtype)
        row = column = 0
        for size, adapter in adapters:
            if adapter is not None:
                rank = adapter.lora_b.shape[-1]
                lora_b = lora_b.at[row : row + size, column : column + rank].set(adapter.scaling * adapter.lora_b[...])
                column += rank
            row += size
        return lora_a, lora_b

    def _dropped(self, x: Float[Array, "B T I"], key: Key[Array, ""] | None) -> Float[Array, "B T I"] | None:
        """What the adapters read where that is not `x`."""
        dropout = next(iter(self.lora.values())).dropout
        if not dropout or key is None:
            return None
        keep = jax.random.bernoulli(key, 1 - dropout, x.shape)
        return jnp.where(keep, x / (1 - dropout), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, in float32, returned in the dtype of `x`."""

    def __init__(self, features: int, eps: float, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(features, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, in Qwen3, a norm of every query and key head."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"q_proj": N * H, "k_proj": K * H, "v_proj": K * H}
        self.qkv = Linear(config.hidden_size, sizes, dtype=dtype, rngs=rngs)
        self.out = Linear(N * H, {"o_proj": config.hidden_size}, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2"] | None
    ) -> Float[Array, "B T D"]:
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = self.qkv(x, None if keys is None else keys[0]).reshape(*x.shape[:2], N + 2 * K, H)
        mixed = rotary_attention(
            heads,
            context.angles,
            context.bounds,
            num_heads=N,
            norms=HeadNorms(self.q_norm.scale[...], self.k_norm.scale[...]) if self.config.qk_norm else None,
            eps=self.config.rms_norm_eps,
            max_segments=context.max_segments,
            implementation=context.implementation,
        )
        return self.out(mixed.reshape(*x.shape[:2], N * H), None if keys is None else keys[1])


class FeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(D, {"gate_proj": F, "up_proj": F}, dtype=dtype, rngs=rngs)
        self.down = Linear(F, {"down_proj": D}, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2"] | None
    ) -> Float[Array, "B T D"]:
        gate_up = self.gate_up(x, None if keys is None else keys[0])
        if keys is not None and self.down.lora:  # dropout comes between the product and the adapter
            gate_up = checkpoint_name(gate_up, "gate_up")
            return self.down(gated_activation(gate_up, implementation=context.implementation), keys[1])
        factors = self.down.factors() if self.down.lora else ()
        return gated_linear(gate_up, self.down.weight[...], *factors, implementation=context.implementation)


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: RowContext, dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key, (2, 2))
        x = checkpoint_name(x + self.attention(self.attention_norm(x), context, keys[0]), "residual")
        return x + self.feed_forward(self.feed_forward_norm(x), context, keys[1])
