"""Defines one layer: attention, then feed-forward. `transformer.py` stacks and scans the layers."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxpack.model.attention import Attention
from jaxpack.model.cache import CacheSlot
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import RowContext
from jaxpack.model.cost import CostContext, PartCost
from jaxpack.model.feed_forward import FeedForward
from jaxpack.model.moe import MoE, RouterSums
from jaxpack.model.norm import make_norm


class Block(nnx.Module):
    """Computes `x + attention(norm(x))`, then `x + feed_forward(norm(x))`; the feed-forward may consist of experts.

    The projections compute the norms and the sums along with their matmuls. With `post_norms`, each branch's output is
    normed before it is added.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config, dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = make_norm(config, dtype)
        self.feed_forward = (MoE if config.num_experts else FeedForward)(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: RowContext,
        dropout_keys: Key[Array, " B"] | None,
        slot: CacheSlot | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None, CacheSlot | None]:
        """Returns the layer's output, how its experts were used if it has any, and in generation its cache slot.

        The slot has these tokens' keys and values written to it. With a dropout key for each row, dropout is on.
        """
        keys = (None, None), (None, None)
        if dropout_keys is not None:
            keys = jax.vmap(lambda key: jax.random.split(key, (2, 2)), out_axes=2)(dropout_keys)
        x, slot = self.attention(self.attention_norm, x, context, keys[0], slot)
        x = checkpoint_name(x, "residual")
        x, sums = self.feed_forward(self.feed_forward_norm, x, context, keys[1])
        return x, sums, slot

    def cost(self, context: CostContext) -> PartCost:
        """Returns the cost of one layer, in which "residual" names the residual stream between the layer's halves."""
        size = self.feed_forward_norm.scale.shape[-1] * context.itemsize
        attention = self.attention.cost(self.attention_norm, context).name_output("residual", size)
        return attention + self.feed_forward.cost(self.feed_forward_norm, context).starting_from("residual")
