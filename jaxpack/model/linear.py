"""Holds projections of the same input in one matrix, and computes their LoRA adapters within its matmuls.

Weights keep the orientation of a checkpoint, `[out, in]`: reading and writing one copies rows and transposes nothing.
Projections that read the same input (query, key and value; gate and up) are rows of one matrix, so that they need one
matmul instead of two or three.
"""

from typing import NamedTuple, TypeGuard, TypeVar

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
from jaxpack.kernels.magnitude import row_norms, scale_channels
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
      magnitude: with DoRA, the norms to which the rows of the adapted weight are scaled, float32; None without DoRA.
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
        magnitude: Float[Array, "*L O"] | None = None,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.dropout = dropout
        self.layers = layers
        self.magnitude = None if magnitude is None else nnx.LoRAParam(magnitude)

    def at(self, layer: int) -> "AdapterArrays | None":
        """Returns the arrays of one layer, or None if that layer has no adapter."""
        if self.layers is not None and layer not in self.layers:
            return None
        place = layer if self.layers is None else self.layers.index(layer)
        lora_a, lora_b, magnitude = self.arrays
        return AdapterArrays(lora_a[place], lora_b[place], None if magnitude is None else magnitude[place])

    @property
    def arrays(self) -> "AdapterArrays":
        """Returns the arrays of all layers that have the adapter."""
        magnitude = None if self.magnitude is None else self.magnitude[...]
        return AdapterArrays(self.lora_a[...], self.lora_b[...], magnitude)


class AdapterArrays(NamedTuple):
    """Holds the arrays of an adapter, of one layer or stacked over layers. See `LoraAdapter`."""

    lora_a: Float[Array, "*E R I"]
    lora_b: Float[Array, "*E O R"]
    magnitude: Float[Array, "*E O"] | None


NO_MAGNITUDE = np.inf  # of the rows in layers without a DoRA adapter: they stay as they are


def row_scales(magnitude: Float[Array, "*E O"], norms: Float[Array, "*E O"]) -> Float[Array, "*E O"]:
    """Returns what gives rows of these norms their magnitudes, float32; 1 where the magnitude is `NO_MAGNITUDE`."""
    return jnp.where(jnp.isinf(magnitude), 1.0, magnitude / norms)


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
        for name, some in adapter.arrays._asdict().items():
            if some is None:
                continue
            filled = jnp.full((num_layers, *some.shape[1:]), NO_MAGNITUDE if name == "magnitude" else 0, some.dtype)
            every = filled.at[places].set(some, indices_are_sorted=True, unique_indices=True)
            setattr(adapter, name, nnx.LoRAParam(every))
        adapter.layers = None
    return view


def spread_size(adapter: LoraAdapter, num_layers: int) -> int:
    """Returns the elements of the factors that `spread_adapters` makes for an adapter, whose arrays may be abstract."""
    if adapter.layers is None:
        return 0
    arrays = [array for array in (adapter.lora_a, adapter.lora_b, adapter.magnitude) if array is not None]
    return num_layers * sum(array.size // array.shape[0] for array in arrays)


def _adapters_in(module: nnx.Module) -> list[LoraAdapter]:
    return [one for _, one in nnx.iter_modules(module) if isinstance(one, LoraAdapter)]


def dropped(x: Float[Array, "B T I"], keys: Key[Array, " B"], rate: float) -> Float[Array, "B T I"]:
    """Returns what dropout leaves of the input of adapters, with a key for each row."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    kept = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)  # bfloat16 cannot hold 0.9
    return jnp.where(keep, kept, 0)


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
        if self.has_magnitudes:
            return self._with_magnitudes(x, dropout_keys)
        out = self._biased(weight_of(self.weight).matmul(x))
        lora_a, lora_b = self.factors()
        if lora_a is None or lora_b is None:
            return out
        if self.has_dropout(dropout_keys):
            x = self._dropped(x, dropout_keys)
        return out + x @ lora_a.astype(x.dtype).T @ lora_b.astype(x.dtype).T

    def _dropped(self, x: Float[Array, "B T I"], dropout_keys: Key[Array, " B"]) -> Float[Array, "B T I"]:
        """Returns what dropout leaves of the input of the adapters."""
        return dropped(x, dropout_keys, self._dropout)

    def _with_magnitudes(
        self, x: Float[Array, "B T I"], dropout_keys: Key[Array, " B"] | None
    ) -> Float[Array, "B T O"]:
        """Returns all projections of `x` with DoRA, in plain jnp.

        With dropout, the change of the rows' norms acts on what dropout leaves of `x`, too, as in PEFT.
        """
        weight, (lora_a, lora_b) = weight_of(self.weight), self.factors()
        if lora_a is None or lora_b is None:
            raise AssertionError("magnitudes belong to adapters")
        dropped = self._dropped(x, dropout_keys) if self.has_dropout(dropout_keys) else x
        base = weight.matmul(dropped)
        adapted = base + dropped @ lora_a.astype(x.dtype).T @ lora_b.astype(x.dtype).T
        out = self._scaled(adapted, x)
        if dropped is not x:
            out += weight.matmul(x) - base
        return self._biased(out)

    def norm_project(
        self,
        norm: "RMSNorm",
        x: Float[Array, "B T I"],
        context: RowContext,
        dropout_keys: Key[Array, " B"] | None,
        *,
        name: str,
    ) -> tuple[Float[Array, "B T I"], Float[Array, "B T O"]]:
        """Returns `x` for the residual connection, and all projections of `norm(x)`, concatenated.

        The projections have this name for the choices of `remat`.
        """
        if context.apart or self.has_dropout(dropout_keys):
            return x, checkpoint_name(self(norm(x), dropout_keys), name)
        weights = norm.weight, weight_of(self.weight), *self.factors()
        implementation = self._fitting(context.implementation, x)
        x, out = normed_linear(x, *weights, eps=norm.eps, implementation=implementation)
        if self.has_magnitudes:
            return x, self._biased(self._scaled(out, x, name))
        return x, checkpoint_name(self._biased(out), name)

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
        # With DoRA, the projection is scaled before it is added.
        base = residual if post_norm is None and not self.has_magnitudes else None
        is_named = False
        if context.apart or self.has_dropout(dropout_keys):
            if gated is not None:  # the adapter needs the product as an array, perhaps for dropout
                x = gated_activation(x, activation=gated, implementation=implementation)
            out = self(x, dropout_keys)
            out = out if base is None else base + out
        else:
            weights = weight_of(self.weight), *self.factors()
            implementation = self._fitting(implementation, residual)
            if gated is None:
                out = residual_linear(base, x, *weights, implementation=implementation)
            else:
                out = gated_residual_linear(base, x, *weights, activation=gated, implementation=implementation)
            if self.has_magnitudes:
                out, is_named = self._scaled(out, residual, "branch"), True
            out = self._biased(out)
        if base is not None:
            return out
        out = out if is_named else checkpoint_name(out, "branch")
        return residual + (out if post_norm is None else post_norm(out))

    @property
    def has_magnitudes(self) -> bool:
        """Returns whether a projection has a DoRA adapter."""
        return any(adapter.magnitude is not None for adapter in self.lora.values())

    def _scaled(
        self, out: Float[Array, "*B O"], after: Float[Array, "*B F"], name: str | None = None
    ) -> Float[Array, "*B O"]:
        """Returns adapted projections with the rows of their weight scaled to the magnitudes of DoRA."""
        lora_a, lora_b = self.factors()
        if lora_a is None or lora_b is None:
            raise AssertionError("magnitudes belong to adapters")
        # Every choice of `remat` keeps the norms, which are small: no second pass over the weight computes them again.
        norms = checkpoint_name(row_norms(weight_of(self.weight), lora_a, lora_b, after), "lora")
        given = [(size, self.lora.get(projection)) for projection, size in self.projections]
        magnitudes = [
            jnp.full(size, NO_MAGNITUDE, jnp.float32)
            if adapter is None or adapter.magnitude is None
            else adapter.magnitude[...]
            for size, adapter in given
        ]
        magnitude = jnp.concatenate(magnitudes)
        return scale_channels(out, row_scales(magnitude, norms), name)

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
        scaled = self._magnitude_cost(context)
        return norm.cost(context) + rows + scaled + PartCost(backward=self._gradient_cost(matrix, context))

    def project_residual_cost(
        self, context: CostContext, *, gated: bool = False, post_norm: RMSNorm | None = None
    ) -> PartCost:
        """Returns the cost of `project_residual`, whose output is the residual stream.

        The cost names "lora", the product of the input with the adapters' A factors, which is so small that every
        choice of `remat` keeps it. With a `post_norm`, whose input it is, and with DoRA, whose derivative reads it, the
        cost also names "branch", the projection before it is added. The input of the projection is counted by the part
        that names it.
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
        part += self._magnitude_cost(context)
        if post_norm is not None or self.has_magnitudes:
            part = part.name_output("branch", O * size)
        if post_norm is not None:
            part += post_norm.cost(context, adds_residual=True)
        return PartCost(named={"lora": NamedActivation(R * size)}) + part

    def _magnitude_cost(self, context: CostContext) -> PartCost:
        """Returns the work that DoRA adds: the norms, from two passes over the weight, and scaled channels."""
        if not self.has_magnitudes:
            return PartCost()
        (O, I), size = self._shape, context.itemsize  # noqa: E741
        norms = self._copy_cost(O * I, context) + Cost(weight_bytes=2 * O * I * size)
        return PartCost(output=Cost(bytes=2 * O * size) + norms, backward=Cost(bytes=3 * O * size))

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
