"""RMSNorm, whose scale may be stored as what it is above 1."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpack.kernels.rms_norm import rms_norm
from jaxpack.model.config import ModelConfig
from jaxpack.model.cost import Cost, CostContext, PartCost


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

    def cost(self, context: CostContext, *, adds_residual: bool = False) -> PartCost:
        """Returns the cost of a norm in front of a branch or, with `adds_residual`, of the one behind it.

        In front, its result is what the projection behind it keeps (`Linear.after_norm_cost`), and its backward
        kernel adds the gradient that goes past the branch. Behind, the norm adds the residual stream to its result.
        """
        row = self.scale.shape[-1] * context.itemsize  # bytes a token
        if adds_residual:
            return PartCost(output=Cost(bytes=3 * row), backward=Cost(bytes=4 * row))
        return PartCost(unnamed=Cost(bytes=2 * row), backward=Cost(bytes=5 * row))


def make_norm(config: ModelConfig, dtype: DTypeLike, features: int | None = None) -> RMSNorm:
    """The norm of a model: of `hidden_size` features, or of so many."""
    features = config.hidden_size if features is None else features
    return RMSNorm(features, config.rms_norm_eps, unit_offset=config.unit_offset_norms, dtype=dtype)
