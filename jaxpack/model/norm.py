"""Defines RMSNorm, whose scale may be stored as its offset from 1."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpack.kernels.rms_norm import rms_norm
from jaxpack.model.config import ModelConfig
from jaxpack.model.cost import Cost, CostContext, PartCost


class RMSNorm(nnx.Module):
    """Computes `weight * x / sqrt(mean(x^2) + eps)` over the last axis, in float32; returns the dtype of `x`.

    The trained parameter, which is also the one in a checkpoint, is `scale`: the weight or, with `unit_offset`, the
    weight minus 1.
    """

    def __init__(self, features: int, eps: float, *, unit_offset: bool = False, dtype: DTypeLike):
        self.scale = nnx.Param((jnp.zeros if unit_offset else jnp.ones)(features, dtype))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the normed activations."""
        return rms_norm(x, self.weight, eps=self.eps)

    @property
    def weight(self) -> Float[Array, " D"]:
        """Returns the weight in float32, in which norms compute: bfloat16 has steps of about 0.01 above 1.

        The cast has another purpose. Because of it, XLA reads a frozen layer's scale out of the stacked scales with a
        kernel. Without it, XLA would use a copy, which needs a copy engine of the GPU. Two copies of residuals to the
        host can occupy all copy engines, and this copy would then wait for them.
        """
        scale = self.scale[...].astype(jnp.float32)
        return 1 + scale if self.unit_offset else scale

    def cost(self, context: CostContext, *, adds_residual: bool = False) -> PartCost:
        """Returns the cost of a norm before a branch or, with `adds_residual`, of a norm after it.

        A norm before a branch leaves out that its result is kept for the backward pass: the projection that follows
        counts this in `Linear.norm_project_cost`. The backward kernel of this norm also adds the gradient of the
        residual connection. A norm after a branch adds the residual stream to its result.
        """
        row = self.scale.shape[-1] * context.itemsize  # bytes per token
        if adds_residual:
            return PartCost(output=Cost(bytes=3 * row), backward=Cost(bytes=4 * row))
        return PartCost(unnamed=Cost(bytes=2 * row), backward=Cost(bytes=5 * row))


def make_norm(config: ModelConfig, dtype: DTypeLike, features: int | None = None) -> RMSNorm:
    """Returns an RMSNorm over `features` channels (default: `hidden_size`), as `config` defines it."""
    features = config.hidden_size if features is None else features
    return RMSNorm(features, config.rms_norm_eps, unit_offset=config.unit_offset_norms, dtype=dtype)
