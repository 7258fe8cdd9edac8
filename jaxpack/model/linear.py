"""Projections of one input, side by side in one matrix, with LoRA adapters that ride in its matmuls.

Weights keep the orientation of a checkpoint, `[out, in]`: reading and writing one copies rows and transposes nothing.
Projections that read the same input are one matrix (query, key and value; gate and up): one matmul instead of three.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxpack.constants import Activation, Implementation
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.extended import refusal
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.normed_linear import normed_linear
from jaxpack.kernels.residual_linear import gated_residual_linear, residual_linear
from jaxpack.model.context import RowContext
from jaxpack.model.cost import NO_COST, Cost, CostContext, NamedActivation, PartCost
from jaxpack.model.norm import RMSNorm
from jaxpack.model.weights import is_trained, weight_of


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
        out = self._biased(weight_of(self.weight).matmul(x))
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
        if context.apart or self.drops(dropout_key):
            return x, self(norm(x), dropout_key)
        weights = norm.weight, weight_of(self.weight), *self.factors()
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
        if context.apart or self.drops(dropout_key):
            if gated is not None:  # the adapter reads the product, perhaps after dropout
                x = gated_activation(checkpoint_name(x, "gate_up"), activation=gated, implementation=implementation)
            out = self(x, dropout_key)
            out = out if base is None else base + out
        else:
            weights = weight_of(self.weight), *self.factors()
            implementation = self._fitting(implementation, residual)
            if gated is None:
                out = residual_linear(base, x, *weights, implementation=implementation)
            else:
                out = gated_residual_linear(base, x, *weights, activation=gated, implementation=implementation)
            out = self._biased(out)
        return out if post_norm is None else residual + post_norm(checkpoint_name(out, "branch"))

    def after_norm_cost(self, norm: RMSNorm, context: CostContext) -> PartCost:
        """Returns the cost of `after_norm`, whose output is the projections.

        Derivatives read the normed tokens with what the adapters' first factor makes of them behind their channels; or,
        with dropout, what it lets through, and its mask. A weight that is cast is kept as it was cast.
        """
        (O, I), R, size = self._shape, self.rank, context.itemsize  # noqa: E741
        matrix = O * (I + R)  # elements of the weight with the adapters' second factor behind its columns
        copied = Cost(weight_bytes=2 * matrix * size)
        rows = PartCost(
            unnamed_bytes=self._dropout_bytes(context) if context.has_dropout else (I + R) * size,
            cast_weight_bytes=matrix * size if context.casts_weights else 0,
            unnamed=Cost(bytes=R * size) + copied,
            output=Cost(matmul=2 * matrix),
            backward=Cost(bytes=2 * R * size) + (NO_COST if context.casts_weights else copied),
        )
        return norm.cost(context) + rows + PartCost(backward=self._gradient_cost(matrix, context))

    def onto_cost(self, context: CostContext, *, gated: bool = False, post_norm: RMSNorm | None = None) -> PartCost:
        """Returns the cost of `onto`, whose output is the residual stream.

        It names "lora", what the adapters pass between their factors: so small that every choice keeps it. With a
        `post_norm` it also names "branch", what the norm reads. Its input is counted where that is named.
        """
        (O, I), R, size = self._shape, self.rank, context.itemsize  # noqa: E741
        matrix = (O + R) * I  # elements of the weight with the adapters' first factor behind its rows
        copied = Cost(weight_bytes=2 * matrix * size)
        part = PartCost(
            unnamed_bytes=self._dropout_bytes(context) if context.has_dropout else 0,
            output=Cost(matmul=2 * matrix, bytes=(3 * O + R) * size) + copied,
            backward=self._gradient_cost(matrix, context) + copied,
        )
        if context.has_adapters:  # extends the gradient of the output
            part += PartCost(backward=Cost(bytes=2 * O * size))
        if gated:  # the activation, and its gradient with its product again
            part += PartCost(output=Cost(bytes=3 * I * size), backward=Cost(bytes=6 * I * size))
        if post_norm is not None:
            part = part.name_output("branch", O * size) + post_norm.cost(context, adds_residual=True)
        return PartCost(named={"lora": NamedActivation(R * size)}) + part

    def _gradient_cost(self, matrix: int, context: CostContext) -> Cost:
        """Returns the work of the gradients: of the input, of a trained weight, and of the adapters' factors."""
        matmul = 2 * matrix * (2 if is_trained(self.weight) else 1)
        return Cost(matmul=matmul, bytes=sum(self._shape) * context.itemsize if context.has_adapters else 0)

    def _dropout_bytes(self, context: CostContext) -> int:
        """Returns the bytes a token of what dropout lets through, its mask, and what is between the factors."""
        _, I = self._shape  # noqa: E741
        return I * (context.itemsize + 1) + self.rank * context.itemsize

    @property
    def _shape(self) -> tuple[int, int]:
        """Output and input channels of all projections together."""
        rows, columns = weight_of(self.weight).shape[-2:]
        return rows, columns

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
