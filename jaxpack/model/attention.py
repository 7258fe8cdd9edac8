"""Defines the attention part of a block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from jaxpack.kernels.attention import attention
from jaxpack.kernels.rope import apply_rope, norm_rope
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention
from jaxpack.model.cache import CacheSlot
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import NoKeys, RowContext
from jaxpack.model.cost import BackwardPeak, Cost, CostContext, PartCost
from jaxpack.model.linear import Linear
from jaxpack.model.norm import RMSNorm, make_norm
from jaxpack.model.weights import weight_of

_TILE_KEYS = 64  # per token, the number of keys whose scores the attention kernels compute and then mask


class Attention(nnx.Module):
    """Computes grouped-query attention with rotary positions; some families also norm every query and key head."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"q_proj": N * H, "k_proj": K * H, "v_proj": K * H}
        if config.fused_projections:
            sizes = {"qkv_proj": sum(sizes.values())}
        self.qkv = Linear(config.hidden_size, sizes, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(N * H, {"o_proj": config.hidden_size}, bias=config.out_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm, self.k_norm = make_norm(config, dtype, H), make_norm(config, dtype, H)
        self.sinks = nnx.Param(jnp.zeros(N, dtype)) if config.attention_sinks else None
        self.post_norm = make_norm(config, dtype) if config.post_norms else None
        self.config = config

    def __call__(
        self,
        norm: RMSNorm,
        x: Float[Array, "B T D"],
        context: RowContext,
        keys: Key[Array, "2 B"] | NoKeys,
        slot: CacheSlot | None = None,
    ) -> tuple[Float[Array, "B T D"], CacheSlot | None]:
        """Returns `x + attention(norm(x))`, and the cache slot with these tokens' keys and values written."""
        config = self.config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        x, heads = self.qkv.norm_project(norm, x, context, keys[0], name="heads")
        heads = heads.reshape(*x.shape[:2], N + 2 * K, H)
        if slot is not None:
            mixed, slot = self._cached(heads, context, slot)
        else:
            assert context.bounds is not None  # bounds are None only in a decoding step, which has a cache
            mixed = rotary_attention(
                heads,
                context.angles,
                context.bounds,
                num_heads=N,
                norms=self._norms,
                eps=config.rms_norm_eps,
                scale=config.attention_scale,
                softcap=config.attn_logit_softcapping,
                sinks=self._sinks,
                max_segments=context.max_segments,
                implementation=context.implementation,
            )
        mixed = mixed.reshape(*x.shape[:2], N * H)
        return self.out.project_residual(x, mixed, context, keys[1], post_norm=self.post_norm), slot

    @property
    def _sinks(self) -> Float[Array, " N"] | None:
        return None if self.sinks is None else self.sinks[...]

    @property
    def _norms(self) -> HeadNorms | None:
        return HeadNorms(self.q_norm.weight, self.k_norm.weight) if self.config.qk_norm else None

    def _cached(
        self, heads: Float[Array, "B T A H"], context: RowContext, slot: CacheSlot
    ) -> tuple[Float[Array, "B T N H"], CacheSlot]:
        """Computes attention between a prompt's tokens, or from one new token per row to the cached tokens."""
        config, norms = self.config, self._norms
        q, k, v = jnp.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)
        if norms is None:
            q, k = apply_rope(q, k, context.angles, implementation="xla")
        else:
            q, k = norm_rope(q, k, *norms, context.angles, eps=config.rms_norm_eps, implementation="xla")
        slot = slot.put(k, v)
        scale, softcap = config.attention_scale, config.attn_logit_softcapping
        if slot.seen is not None:
            return attend(q, *slot.get(), slot.seen, scale=scale, softcap=softcap, sinks=self._sinks), slot
        assert context.bounds is not None  # bounds are None only in a later step, which reads the cache
        # Generation otherwise uses plain jnp, but a long prompt has many scores: the fastest kernel computes them.
        options = {"scale": scale, "softcap": softcap, "sinks": self._sinks, "max_segments": context.max_segments}
        return attention(q, k, v, context.bounds, **options), slot

    def cost(self, norm: RMSNorm, context: CostContext) -> PartCost:
        """Returns the cost of the part, whose output is the residual stream.

        The cost names "heads", the projection of queries, keys and values; "qkv", the same heads in the form that
        attention's backward pass reads; and "attention", the output and the float32 log-sum-exp of the attention
        kernel. If "attention" is kept, the forward kernel does not run again. Without head norms, "qkv" holds the
        rotated heads. With head norms, it holds the heads as projected, and the backward pass norms and rotates them
        again. Only the derivative of DoRA's magnitudes reads "heads".

        In long rows a layer's backward pass holds the most memory here: the heads as projected and as rotated, the
        output of attention, the gradients of the output and of the heads, and those of the residual stream before and
        after.
        """
        config, size = self.config, context.itemsize
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim  # channels; k and v alike
        heads_bytes = (q + 2 * kv) * size
        turn = Cost(bytes=2 * (q + kv) * size)
        only_for = None if self.qkv.has_magnitudes else "qkv"
        heads = self.qkv.norm_project_cost(norm, context).name_output("heads", heads_bytes, only_for=only_for)
        if config.qk_norm:
            turned = PartCost(unnamed=turn, shared_bytes=(q + kv) * size).name_output("qkv", heads_bytes)
        else:
            turned = PartCost(output=turn).name_output("qkv", heads_bytes)
        operations = 4 * q * (context.keys_per_token + _TILE_KEYS)  # two matmuls: scores and output
        mixed = PartCost(
            output=Cost(attention=operations, bytes=(2 * q + 2 * kv) * size),
            unnamed_bytes=self._per_layer_bytes(),
            # The two backward kernels do seven matmuls, the forward kernel two. The bytes include norms and rotation.
            backward=Cost(attention=3.5 * operations, bytes=(6 * q + 4 * kv + 3 * (q + kv)) * size),
        ).name_output("attention", q * size + 4 * config.num_heads)
        D = weight_of(self.out.weight).shape[-2]
        peak = BackwardPeak(
            bytes=(2 * q + 2 * kv + 2 * D) * size,
            weight_bytes=0,
            rerun_bytes=(D + self.qkv.rank + 3 * q + 3 * kv) * size,
            within=frozenset({"heads", "qkv", "attention"}),
        )
        projected = self.out.project_residual_cost(context, post_norm=self.post_norm)
        return heads + turned + mixed + projected + PartCost(peaks=(peak,))

    def _per_layer_bytes(self) -> int:
        """Returns the bytes per token of attention bounds and rotary angles, each only if layers differ in it."""
        config = self.config
        bounds = 2 * 4 if len(set(config.windows)) > 1 else 0
        return bounds + (4 * config.rope.rotary_dim(config.head_dim) if len(set(config.ropes)) > 1 else 0)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "B S"],
    *,
    scale: float,
    softcap: float | None,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Returns the attention of `q` to the keys that `seen` marks; scores and softmax are float32."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = seen[:, None, None, None, :]
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1, where=seen)
    else:  # A sink is one more key, whose value is zero.
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([jnp.where(seen, scores, -jnp.inf), sink], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :-1]
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)
