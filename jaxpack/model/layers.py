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

from jaxpack.constants import Activation, Implementation
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.attention import SegmentBounds
from jaxpack.kernels.extended import refusal
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.normed_linear import normed_linear
from jaxpack.kernels.residual_linear import gated_residual_linear, residual_linear
from jaxpack.kernels.rms_norm import rms_norm
from jaxpack.kernels.rope import Angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention
from jaxpack.model.config import ModelConfig


class RowContext(NamedTuple):
    """What a layer needs to know of the batch, computed once for all that need the same; and which kernels it runs."""

    bounds: SegmentBounds
    angles: Angles
    max_segments: int | None
    implementation: Implementation | None


_NoKeys = tuple[None, None]  # no dropout


class LoraAdapter(nnx.Module):
    """`scaling * lora_b @ lora_a`, added to one projection's weight; float32 factors, applied in the input's dtype."""

    def __init__(self, lora_a: Float[Array, "*L R I"], lora_b: Float[Array, "*L O R"], scaling: float, dropout: float):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.dropout = dropout


class Linear(nnx.Module):
    """One or more projections of the same input, side by side in one `weight` `[sum(out), in]`, with a bias or not.

    `projections` names them, with their output sizes, in the order of the rows. `lora` holds an adapter for each
    that has one.
    """

    def __init__(
        self, in_features: int, projections: dict[str, int], *, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        shape = (sum(projections.values()), in_features)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape[0], dtype)) if bias else None
        self.projections = tuple(projections.items())
        self.lora = nnx.Dict()

    def __call__(self, x: Float[Array, "B T I"], dropout_key: Key[Array, ""] | None = None) -> Float[Array, "B T O"]:
        """All projections of `x`, side by side, in plain jnp. Dropout acts on what the adapters read, with a key."""
        out = self._biased(x @ self.weight[...].astype(x.dtype).T)
        if not self.lora:
            return out
        if self.drops(dropout_key):
            keep = jax.random.bernoulli(dropout_key, 1 - self._dropout, x.shape)
            kept = (x.astype(jnp.float32) / (1 - self._dropout)).astype(x.dtype)  # bfloat16 has no 0.9
            x = jnp.where(keep, kept, 0)
        lora_a, lora_b = (factor.astype(x.dtype) for factor in self.factors())
        return out + x @ lora_a.T @ lora_b.T

    def after_norm(
        self, norm: "RMSNorm", x: Float[Array, "B T I"], context: RowContext, dropout_key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "B T I"], Float[Array, "B T O"]]:
        """`x` for the residual connection, and all projections of the normed `x`, side by side."""
        if self.drops(dropout_key):
            return x, self(norm(x), dropout_key)
        weights = norm.weight, self.weight[...], *self.factors()
        implementation = self._fitting(context.implementation, x)
        x, out = normed_linear(x, *weights, eps=norm.eps, implementation=implementation)
        return x, self._biased(out)

    def onto(
        self,
        residual: Float[Array, "B T O"],
        x: Float[Array, "B T I"],
        context: RowContext,
        dropout_key: Key[Array, ""] | None,
        *,
        gated: Activation | None = None,
        post_norm: "RMSNorm | None" = None,
    ) -> Float[Array, "B T O"]:
        """`residual` and the projection of `x`, added; normed before that where there is a `post_norm`.

        What is projected is `x`, or, with `gated`, `act(gate) * up` of the two that `x` holds side by side.
        """
        implementation = context.implementation
        base = residual if post_norm is None else None
        if self.drops(dropout_key):
            if gated is not None:  # dropout comes between the product and the adapter
                x = gated_activation(checkpoint_name(x, "gate_up"), activation=gated, implementation=implementation)
            out = self(x, dropout_key)
            out = out if base is None else base + out
        else:
            weights = self.weight[...], *self.factors()
            implementation = self._fitting(implementation, residual)
            if gated is None:
                out = residual_linear(base, x, *weights, implementation=implementation)
            else:
                out = gated_residual_linear(base, x, *weights, activation=gated, implementation=implementation)
            out = self._biased(out)
        return out if post_norm is None else residual + post_norm(checkpoint_name(out, "branch"))

    def factors(self) -> tuple[Float[Array, "R I"], Float[Array, "O R"]] | tuple[None, None]:
        """Those of all adapters as one, scaled: the A factors side by side, the B factors as blocks on a diagonal."""
        if not self.lora:
            return None, None
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

    @property
    def rank(self) -> int:
        """Of all adapters together, made up to what kernels take; 0 without."""
        rank = sum(adapter.lora_a.shape[-2] for adapter in self.lora.values())
        return padded_rank(rank) if rank else 0

    def drops(self, dropout_key: Key[Array, ""] | None) -> bool:
        """Whether the adapters read something else than the projection: their input after dropout."""
        return bool(self.lora) and dropout_key is not None and self._dropout > 0

    def _fitting(self, implementation: Implementation | None, residual: Float[Array, "B T D"]) -> Implementation | None:
        """That of a model, but XLA where "pallas" has no kernel for projections from, or onto, this residual stream."""
        B, T, D = residual.shape
        return "xla" if implementation == "pallas" and refusal(B * T, D, self.rank) else implementation

    def _biased(self, out: Float[Array, "B T O"]) -> Float[Array, "B T O"]:
        if self.bias is None:
            return out
        # Its gradient is a sum over all tokens: bfloat16 adds nothing to 256 that is below 1.
        return (out.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None, :]).astype(out.dtype)

    @property
    def _dropout(self) -> float:
        return next(iter(self.lora.values())).dropout


class RMSNorm(nnx.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, in float32, returned in the dtype of `x`.

    Trained, and in a checkpoint, is `scale`: the weight itself or, with `unit_offset`, what it is above 1.
    """

    def __init__(self, features: int, eps: float, *, unit_offset: bool = False, dtype: DTypeLike):
        self.scale = nnx.Param((jnp.zeros if unit_offset else jnp.ones)(features, dtype))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.weight, eps=self.eps)

    @property
    def weight(self) -> Float[Array, " D"]:
        """In float32, as a norm computes: bfloat16 has a hundredth between 1 and the next.

        A cast also makes a kernel of taking a frozen layer's scale from the stack. A bare copy would wait for what is
        offloaded: two copies to the host at a time leave no copy engine of the GPU free.
        """
        scale = self.scale[...].astype(jnp.float32)
        return 1 + scale if self.unit_offset else scale


def make_norm(config: ModelConfig, dtype: DTypeLike, features: int | None = None) -> RMSNorm:
    """The norm of a model: of `hidden_size` features, or of so many."""
    features = config.hidden_size if features is None else features
    return RMSNorm(features, config.rms_norm_eps, unit_offset=config.unit_offset_norms, dtype=dtype)


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
        self, norm: RMSNorm, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2"] | _NoKeys
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


class FeedForward(nnx.Module):
    """A gated one: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        sizes = {"gate_up_proj": 2 * F} if config.fused_projections else {"gate_proj": F, "up_proj": F}
        self.gate_up = Linear(D, sizes, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.down = Linear(F, {"down_proj": D}, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.post_norm = make_norm(config, dtype) if config.post_norms else None
        self.activation = config.activation

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2"] | _NoKeys
    ) -> Float[Array, "B T D"]:
        """`x + down(act(gate(n)) * up(n))` with `n = norm(x)`."""
        x, gate_up = self.gate_up.after_norm(norm, x, context, keys[0])
        return self.down.onto(x, gate_up, context, keys[1], gated=self.activation, post_norm=self.post_norm)


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`: norms and sums are part of their projections.

    With `post_norms` each branch's output is normed before it is added.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config, dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = make_norm(config, dtype)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: RowContext, dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        none = (None, None)
        keys = (none, none) if dropout_key is None else jax.random.split(dropout_key, (2, 2))
        x = checkpoint_name(self.attention(self.attention_norm, x, context, keys[0]), "residual")
        return self.feed_forward(self.feed_forward_norm, x, context, keys[1])
