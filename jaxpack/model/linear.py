"""Holds projections of the same input in one matrix, and computes their LoRA adapters within its matmuls.

Weights keep the orientation of a checkpoint, `[out, in]`: reading and writing one copies rows and transposes nothing.
Projections that read the same input (query, key and value; gate and up) are rows of one matrix, so that they need one
matmul instead of two or three.
"""

from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxpack.constants import Activation, Implementation
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.extended import unsupported_reason
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.normed_linear import normed_linear
from jaxpack.kernels.residual_linear import gated_residual_linear, residual_linear
from jaxpack.model.context import RowContext
from jaxpack.model.cost import NO_COST, Cost, CostContext, NamedActivation, PartCost
from jaxpack.model.norm import RMSNorm
from jaxpack.model.weights import is_trained, weight_of

Blocks = TypeVar("Blocks", bound=nnx.Module)


class LoraAdapter(nnx.Module):
    """Adds `scaling * lora_b @ lora_a` to one projection's weight: float32 factors, applied in the input's dtype.

    Attributes:
      layers: the layers that have the adapter, in ascending order, over which the factors are then stacked; None if all
        layers have it.
    """

    def __init__(
        self,
        lora_a: Float[Array, "*L R I"],
        lora_b: Float[Array, "*L O R"],
        scaling: float,
        dropout: float,
        layers: tuple[int, ...] | None = None,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.dropout = dropout
        self.layers = layers

    def at(self, layer: int) -> tuple[Float[Array, "*E R I"], Float[Array, "*E O R"]] | None:
        """Returns both factors of one layer, or None if that layer has no adapter."""
        if self.layers is None:
            return self.lora_a[layer], self.lora_b[layer]
        if layer not in self.layers:
            return None
        place = self.layers.index(layer)
        return self.lora_a[place], self.lora_b[place]


def spread_adapters(blocks: Blocks, num_layers: int) -> Blocks:
    """Returns stacked layers whose adapters all have factors for each layer: zeros where a layer has no adapter.

    A scan over layers needs them so. What is trained, and has a place in the optimizer's state, are the factors of the
    chosen layers alone: the derivative takes their gradients out of those of all layers. Blocks without such an adapter
    are returned as they are.
    """
    if all(adapter.layers is None for adapter in _adapters_in(blocks)):
        return blocks
    view = nnx.merge(*nnx.split(blocks))  # the same arrays in modules of their own
    for adapter in _adapters_in(view):
        if adapter.layers is None:
            continue
        places = np.array(adapter.layers)
        for name in ("lora_a", "lora_b"):
            some = getattr(adapter, name)[...]
            zeros = jnp.zeros((num_layers, *some.shape[1:]), some.dtype)
            every = zeros.at[places].set(some, indices_are_sorted=True, unique_indices=True)
            setattr(adapter, name, nnx.LoRAParam(every))
        adapter.layers = None
    return view


def spread_size(adapter: LoraAdapter, num_layers: int) -> int:
    """Returns the elements of the factors that `spread_adapters` makes for an adapter, whose arrays may be abstract."""
    if adapter.layers is None:
        return 0
    return num_layers * sum(factor.size // factor.shape[0] for factor in (adapter.lora_a, adapter.lora_b))


def _adapters_in(module: nnx.Module) -> list[LoraAdapter]:
    return [one for _, one in nnx.iter_modules(module) if isinstance(one, LoraAdapter)]


class Linear(nnx.Module):
    """Holds one or more projections of the same input as one `weight` `[sum(out), in]`, with or without a bias.

    `projections` holds their names and output sizes, in the order of the rows. `lora` maps the name of each projection
    that has an adapter to that adapter.
    """

    def __init__(
        self, in_features: int, projections: dict[str, int], *, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        shape = (sum(projections.values()), in_features)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape[0], dtype)) if bias else None
        self.projections = tuple(projections.items())
        self.lora = nnx.Dict()

    def __call__(self, x: Float[Array, "B T I"], dropout_keys: Key[Array, " B"] | None = None) -> Float[Array, "B T O"]:
        """Returns all projections of `x`, concatenated, in plain jnp.

        With a dropout key for each row, dropout acts on the input of the adapters.
        """
        out = self._biased(weight_of(self.weight).matmul(x))
        lora_a, lora_b = self.factors()
        if lora_a is None or lora_b is None:
            return out
        if self.has_dropout(dropout_keys):
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self._dropout, x.shape[1:]))(dropout_keys)
            kept = (x.astype(jnp.float32) / (1 - self._dropout)).astype(x.dtype)  # bfloat16 cannot hold 0.9
            x = jnp.where(keep, kept, 0)
        return out + x @ lora_a.astype(x.dtype).T @ lora_b.astype(x.dtype).T

    def norm_project(
        self, norm: "RMSNorm", x: Float[Array, "B T I"], context: RowContext, dropout_keys: Key[Array, " B"] | None
    ) -> tuple[Float[Array, "B T I"], Float[Array, "B T O"]]:
        """Returns `x` for the residual connection, and all projections of `norm(x)`, concatenated."""
        if context.apart or self.has_dropout(dropout_keys):
            return x, self(norm(x), dropout_keys)
        weights = norm.weight, weight_of(self.weight), *self.factors()
        implementation = self._fitting(context.implementation, x)
        x, out = normed_linear(x, *weights, eps=norm.eps, implementation=implementation)
        return x, self._biased(out)

    def project_residual(
        self,
        residual: Float[Array, "B T O"],
        x: Float[Array, "B T I"],
        context: RowContext,
        dropout_keys: Key[Array, " B"] | None,
        *,
        gated: Activation | None = None,
        post_norm: "RMSNorm | None" = None,
    ) -> Float[Array, "B T O"]:
        """Returns `residual` plus the projection of `x`; a `post_norm` norms the projection before it is added.

        With `gated`, `x` holds gate and up, concatenated, and `act(gate) * up` is projected instead of `x`.
        """
        implementation = context.implementation
        base = residual if post_norm is None else None
        if context.apart or self.has_dropout(dropout_keys):
            if gated is not None:  # the adapter needs the product as an array, perhaps for dropout
                x = gated_activation(checkpoint_name(x, "gate_up"), activation=gated, implementation=implementation)
            out = self(x, dropout_keys)
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

    def norm_project_cost(self, norm: RMSNorm, context: CostContext) -> PartCost:
        """Returns the cost of `norm_project`, whose output is the projections.

        The derivatives read the normed tokens, with their product with the adapters' A factors appended as further
        channels. With dropout they read the dropped-out input, its mask and that product. A weight that is cast is kept
        in its cast form.
        """
        (O, I), R, size = self._shape, self.rank, context.itemsize  # noqa: E741
        matrix = O * (I + R)  # elements of the weight with the adapters' B factors appended as columns
        copied = self._copy_cost(matrix, context)
        rows = PartCost(
            unnamed_bytes=self._dropout_bytes(context) if context.has_dropout else (I + R) * size,
            cast_weight_bytes=matrix * size if context.casts_weights else 0,
            unnamed=Cost(bytes=R * size) + copied,
            output=Cost(matmul=2 * matrix),
            backward=Cost(bytes=2 * R * size) + (NO_COST if context.casts_weights else copied),
        )
        return norm.cost(context) + rows + PartCost(backward=self._gradient_cost(matrix, context))

    def project_residual_cost(
        self, context: CostContext, *, gated: bool = False, post_norm: RMSNorm | None = None
    ) -> PartCost:
        """Returns the cost of `project_residual`, whose output is the residual stream.

        The cost names "lora", the product of the input with the adapters' A factors, which is so small that every
        choice of `remat` keeps it. With a `post_norm` it also names "branch", the input of that norm. The input of the
        projection is counted by the part that names it.
        """
        (O, I), R, size = self._shape, self.rank, context.itemsize  # noqa: E741
        matrix = (O + R) * I  # elements of the weight with the adapters' A factors appended as rows
        copied = self._copy_cost(matrix, context)
        part = PartCost(
            unnamed_bytes=self._dropout_bytes(context) if context.has_dropout else 0,
            output=Cost(matmul=2 * matrix, bytes=(3 * O + R) * size) + copied,
            backward=self._gradient_cost(matrix, context) + copied,
        )
        if context.has_adapters:  # the backward pass copies the output's gradient to append channels for the adapters
            part += PartCost(backward=Cost(bytes=2 * O * size))
        if gated:  # the gated activation; then its gradient, which also recomputes the product
            part += PartCost(output=Cost(bytes=3 * I * size), backward=Cost(bytes=6 * I * size))
        if post_norm is not None:
            part = part.name_output("branch", O * size) + post_norm.cost(context, adds_residual=True)
        return PartCost(named={"lora": NamedActivation(R * size)}) + part

    def _copy_cost(self, matrix: int, context: CostContext) -> Cost:
        """Returns the work to read the weight as it is stored, and to write the dense matrix that a matmul reads."""
        weight = weight_of(self.weight)
        layers = weight.shape[0] if len(weight.shape) == 3 else 1
        stored = matrix * context.itemsize if weight.is_dense else weight.nbytes // layers
        return Cost(weight_bytes=stored + matrix * context.itemsize)

    def _gradient_cost(self, matrix: int, context: CostContext) -> Cost:
        """Returns the work to compute the gradients of the input, of a trained weight and of the adapters' factors."""
        matmul = 2 * matrix * (2 if is_trained(self.weight) else 1)
        return Cost(matmul=matmul, bytes=sum(self._shape) * context.itemsize if context.has_adapters else 0)

    def _dropout_bytes(self, context: CostContext) -> int:
        """Returns the bytes per token of the dropped-out input, its mask, and its product with the A factors."""
        _, I = self._shape  # noqa: E741
        return I * (context.itemsize + 1) + self.rank * context.itemsize

    @property
    def _shape(self) -> tuple[int, int]:
        """Returns the output and input channels of all projections together."""
        rows, columns = weight_of(self.weight).shape[-2:]
        return rows, columns

    def adapter_of(self, projection: str) -> LoraAdapter | None:
        """Returns the adapter of a projection, or None."""
        return self.lora.get(projection)

    def factors(self) -> tuple[Float[Array, "R I"], Float[Array, "O R"]] | tuple[None, None]:
        """Returns the factors of all adapters as one pair: A factors stacked, scaled B factors on a block diagonal."""
        if not self.lora:
            return None, None
        adapters = [(size, self.lora.get(name)) for name, size in self.projections]
        lora_a = jnp.concatenate([adapter.lora_a[...] for _, adapter in adapters if adapter is not None])
        blocks, before = [], 0
        for size, adapter in adapters:
            if adapter is None:
                blocks.append(jnp.zeros((size, len(lora_a)), lora_a.dtype))
                continue
            after = len(lora_a) - before - adapter.lora_b.shape[-1]
            blocks.append(jnp.pad(adapter.scaling * adapter.lora_b[...], ((0, 0), (before, after))))
            before = len(lora_a) - after
        return lora_a, jnp.concatenate(blocks)

    @property
    def rank(self) -> int:
        """Returns the rank of all adapters together, padded to a rank that the kernels take; 0 without adapters."""
        rank = sum(adapter.lora_a.shape[-2] for adapter in self.lora.values())
        return padded_rank(rank) if rank else 0

    def has_dropout(self, dropout_keys: Key[Array, " B"] | None) -> TypeGuard[Key[Array, " B"]]:
        """Returns whether dropout acts, so that the adapters read another input than the projection."""
        return bool(self.lora) and dropout_keys is not None and self._dropout > 0

    def _fitting(self, implementation: Implementation | None, residual: Float[Array, "B T D"]) -> Implementation | None:
        """Returns `implementation`, or "xla" if "pallas" has no kernel for a residual stream of this shape."""
        B, T, D = residual.shape
        return "xla" if implementation == "pallas" and unsupported_reason(B * T, D, self.rank) else implementation

    def _biased(self, out: Float[Array, "B T O"]) -> Float[Array, "B T O"]:
        if self.bias is None:
            return out
        # The bias is added in float32 because its gradient is a sum over all tokens: in bfloat16, adding less than 1 to
        # 256 changes nothing.
        return (out.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None, :]).astype(out.dtype)

    @property
    def _dropout(self) -> float:
        return next(iter(self.lora.values())).dropout
