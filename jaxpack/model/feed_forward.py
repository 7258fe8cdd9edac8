"""Defines the gated feed-forward part of a block."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxpack.constants import Activation
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import NoKeys, RowContext
from jaxpack.model.cost import BackwardPeak, CostContext, PartCost
from jaxpack.model.linear import Linear
from jaxpack.model.norm import RMSNorm, make_norm
from jaxpack.model.pieces import in_pieces
from jaxpack.model.weights import weight_of


class FeedForward(nnx.Module):
    """Computes the gated feed-forward `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        sizes = {"gate_up_proj": 2 * F} if config.fused_projections else {"gate_proj": F, "up_proj": F}
        self.gate_up = Linear(D, sizes, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.down = Linear(F, {"down_proj": D}, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.post_norm = make_norm(config, dtype) if config.post_norms else None
        self.activation: Activation = config.activation

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2 B"] | NoKeys
    ) -> tuple[Float[Array, "B T D"], None]:
        """Returns `x + down(act(gate(n)) * up(n))` with `n = norm(x)`, and None, as it has no router."""

        def part(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            x, gate_up = self.gate_up.norm_project(norm, x, context, keys[0], name="gate_up")
            options = {"gated": self.activation, "post_norm": self.post_norm}
            return self.down.project_residual(x, gate_up, context, keys[1], **options)

        # A mask of dropout is drawn for a whole row.
        has_dropout = any(linear.has_dropout(key) for linear, key in zip((self.gate_up, self.down), keys, strict=True))
        return in_pieces(part, x) if context.in_pieces and not has_dropout else part(x), None

    def cost(self, norm: RMSNorm, context: CostContext) -> PartCost:
        """Returns the cost of the part, whose output is the residual stream.

        The cost names "gate_up", both projections, concatenated. A layer's backward pass holds the most memory at the
        gated activation: the gradients of the product and of the layer's output, a copy of the latter extended for the
        adapter, and a copy of the `down` matrix. By then the normed tokens and "gate_up" were computed again. In
        pieces, the gradients of input and output are whole, and a copy of the latter, which is cut into pieces.
        """
        size, (D, F) = context.itemsize, weight_of(self.down.weight).shape[-2:]
        gate_up = self.gate_up.norm_project_cost(norm, context).name_output("gate_up", 2 * F * size)
        peak = BackwardPeak(
            bytes=(F + 2 * D + self.down.rank) * size,
            weight_bytes=F * (D + self.down.rank) * size,
            rerun_bytes=(D + self.gate_up.rank + 2 * F) * size,
            whole_bytes=None if context.has_dropout else 3 * D * size,
        )
        return (
            gate_up
            + self.down.project_residual_cost(context, gated=True, post_norm=self.post_norm)
            + PartCost(peaks=(peak,))
        )
