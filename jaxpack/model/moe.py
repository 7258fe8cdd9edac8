"""Defines a mixture of experts: a router chooses a few gated feed-forwards for each token, and their sum is the output.

The experts' matrices of a layer are one matrix, one expert below the other, so that they are read, quantised, moved and
written like every other projection's.
"""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpack.constants import Activation, Implementation
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.gated_experts import ExpertLinear, gated_experts
from jaxpack.kernels.grouped_matmul import unsupported_reason
from jaxpack.kernels.host_weight import HostWeight
from jaxpack.kernels.routing import Routing, route
from jaxpack.kernels.weight import DenseStack
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import NoKeys, RowContext
from jaxpack.model.cost import BackwardPeak, Cost, CostContext, NamedActivation, PartCost
from jaxpack.model.linear import LoraAdapter
from jaxpack.model.norm import RMSNorm
from jaxpack.model.weights import is_trained, weight_of


class Experts(nnx.Module):
    """Holds the matrices of E experts as one `weight` `[E * O, I]`, with or without a bias for each row.

    Attributes:
      projections: for each expert, the names and output sizes of its projections, in the order of the rows.
      name: the name of the matrices of all experts together within a layer, which is also that of their adapter.
      lora: the adapter of all experts, if they have one; its factors have an axis for the experts.
    """

    reads_in_place: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        in_features: int,
        projections: dict[str, int],
        num_experts: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (num_experts * sum(projections.values()), in_features)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape[0], dtype)) if bias else None
        self.projections = tuple(
            (f"{expert}.{projection}", size)
            for expert in range(num_experts)
            for projection, size in projections.items()
        )
        self.name = name
        self.num_experts = num_experts
        self.lora = nnx.Dict()

    def adapter_of(self, projection: str) -> LoraAdapter | None:
        """Returns the part of the adapter that changes one projection of one expert, or None."""
        adapter: LoraAdapter | None = self.lora.get(self.name)
        if adapter is None:
            return None
        per_expert = len(self.projections) // self.num_experts
        expert, name = projection.split(".")
        expert, sizes = int(expert), [size for _, size in self.projections[:per_expert]]
        number = [one.split(".")[1] for one, _ in self.projections[:per_expert]].index(name)
        first = sum(sizes[:number])
        lora_b = adapter.lora_b[:, expert, first : first + sizes[number]]
        return LoraAdapter(adapter.lora_a[:, expert], lora_b, adapter.scaling, adapter.dropout, adapter.layers)

    def linear(self) -> ExpertLinear:
        """Returns matrices, biases and factors as `gated_experts` takes them."""
        adapter: LoraAdapter | None = self.lora.get(self.name)
        factors = None if adapter is None else (adapter.lora_a[...], adapter.scaling * adapter.lora_b[...])
        bias = None if self.bias is None else self.bias[...].reshape(self.num_experts, -1)
        return ExpertLinear(weight_of(self.weight), bias, factors)

    @property
    def rank(self) -> int:
        """Returns the rank of the adapter, padded to a rank that the kernels take; 0 without an adapter."""
        return sum(padded_rank(adapter.lora_a.shape[-2]) for adapter in self.lora.values())

    def cost(self, context: CostContext) -> "MatmulCost":
        """Returns the cost of the experts' matmuls for one row.

        A frozen dense stack is read in place. Any other form is copied to a dense one for each pass.
        """
        weight, size, R = weight_of(self.weight), context.itemsize, self.rank
        *layers, rows, I = weight.shape  # noqa: E741
        O, layers = rows // self.num_experts, math.prod(layers)  # noqa: E741
        matmul, narrow = 2 * O * I, 2 * R * (O + I)
        in_place = isinstance(weight.stack if isinstance(weight, HostWeight) else weight, DenseStack)
        stored = weight.nbytes // layers
        copied = 0 if in_place else rows * I * size
        each_way = Cost(
            matmul=matmul + narrow, bytes=I * size if R else 0, weight_bytes=0 if in_place else stored + copied
        )
        outer = matmul if is_trained(self.weight) else 0
        backward = Cost(matmul=outer + narrow, bytes=2 * (I + O) * size if R else 0)
        return MatmulCost(each_way, each_way + backward, copied)


def experts_of(model: nnx.Module) -> list[Experts]:
    """Returns the modules that hold experts' matrices, in the order of the computation; empty for a dense model."""
    found = [module for _, module in nnx.iter_modules(model) if isinstance(module, Experts)]
    return sorted(found, key=lambda module: module.name, reverse=True)  # "gate_up_proj", then "down_proj"


class MatmulCost(NamedTuple):
    """Holds the cost of experts' matmuls for one row.

    Attributes:
      each_way: the work of the forward pass, which is also that of the input's gradient.
      backward: the work of the backward pass.
      copied_bytes: the bytes of the dense copy of a layer's matrices.
    """

    each_way: Cost
    backward: Cost
    copied_bytes: int


class RouterSums(NamedTuple):
    """Holds sums over the layers of a mixture, from which follows how its experts are used. All are float32.

    Attributes:
      counts: how many tokens chose each expert, without padding; a token counts once for each of its C experts.
      tokens: the number of tokens.
      busiest: the count of the busiest expert over the mean count.
      unused: the share of experts that no token chose.
      probabilities: the sum of each expert's probability over the tokens; None if nothing balances the load. Only this
        has a gradient.
    """

    counts: Float[Array, " E"]
    tokens: Float[Array, ""]
    busiest: Float[Array, ""]
    unused: Float[Array, ""]
    probabilities: Float[Array, " E"] | None

    @classmethod
    def zeros(cls, num_experts: int, *, balances: bool) -> "RouterSums":
        """Returns the sums over no layers."""
        per_expert, zero = jnp.zeros(num_experts, jnp.float32), jnp.float32(0)
        return cls(per_expert, zero, zero, zero, per_expert if balances else None)

    @property
    def load_balancing_loss(self) -> Float[Array, ""]:
        """Returns the loss of the Switch Transformer (https://arxiv.org/abs/2101.03961), for all layers as one.

        It is E times the sum over experts of the share of tokens that chose the expert times its mean probability. It
        is least, C, where all experts are chosen equally often.
        """
        assert self.probabilities is not None, "nothing balances the load"
        tokens = jnp.maximum(self.tokens, 1)
        return len(self.counts) * jnp.sum(self.counts / tokens * (self.probabilities / tokens))


class Router(nnx.Module):
    """Chooses C of E experts for each token, and the share of each in the sum, in float32.

    Attributes:
      norm_topk_prob: whether the shares are a softmax over the logits of the chosen experts, so that a token's shares
        add up to 1. Otherwise they are those of a softmax over all experts.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (config.num_experts, config.hidden_size)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(config.num_experts, dtype)) if config.router_bias else None
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def __call__(
        self, x: Float[Array, "N D"], real: Bool[Array, " N"] | None, *, balances: bool = False
    ) -> tuple[Float[Array, "N C"], Routing, RouterSums]:
        """Returns the shares of each token's experts, the rows of the experts, and how they are used.

        Args:
          real: which tokens are no padding; None if all are.
          balances: whether to sum the probabilities, too.
        """
        matrix = weight_of(self.weight).dense(x.dtype)
        logits = jnp.einsum("ND,ED->NE", x, matrix, preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)[None, :]
        choices = jax.lax.top_k(jax.lax.stop_gradient(logits), self.num_experts_per_tok)[1]
        # The backward pass must route as the forward pass did, which it would not where logits that it computes again
        # differ in the last bit. So the choices are kept, and the shares follow from them.
        routing = jax.tree.map(lambda array: checkpoint_name(array, "routing"), route(choices, matrix.shape[0], real))
        choices = checkpoint_name(choices, "routing")
        # A sum over one-hot rows instead of a lookup, whose derivative would scatter.
        is_chosen = choices[:, :, None] == jnp.arange(matrix.shape[0])[None, None, :]
        chosen = jnp.sum(jnp.where(is_chosen, logits[:, None, :], 0), axis=-1)
        sums = self._sums(logits, routing.counts, real, balances)
        if self.norm_topk_prob:
            return jax.nn.softmax(chosen), routing, sums
        return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), routing, sums

    def _sums(
        self, logits: Float[Array, "N E"], counts: Int[Array, " E"], real: Bool[Array, " N"] | None, balances: bool
    ) -> RouterSums:
        total = jnp.sum(counts)
        busiest = jnp.max(counts) * len(counts) / jnp.maximum(total, 1)
        probabilities = None
        if balances:
            of_tokens = jax.nn.softmax(logits)
            of_tokens = of_tokens if real is None else jnp.where(real[:, None], of_tokens, 0)
            probabilities = jnp.sum(of_tokens, axis=0)
        return RouterSums(
            counts=counts.astype(jnp.float32),
            tokens=total / self.num_experts_per_tok,
            busiest=busiest,
            unused=jnp.mean(counts == 0, dtype=jnp.float32),
            probabilities=probabilities,
        )


class MoE(nnx.Module):
    """Computes the sum over a token's C experts of the expert's share times its gated feed-forward.

    Padding goes to no expert. Adapters of experts have no dropout: `LoraConfig` refuses both together.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.router = Router(config, dtype=dtype, rngs=rngs)
        options = {"bias": config.experts_bias, "dtype": dtype, "rngs": rngs}
        self.gate_up = Experts("mlp.experts.gate_up_proj", D, {"gate_proj": F, "up_proj": F}, E, **options)
        self.down = Experts("mlp.experts.down_proj", F, {"down_proj": D}, E, **options)
        self.activation: Activation = config.activation

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T D"], context: RowContext, keys: Key[Array, "2 B"] | NoKeys
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        """Returns `x` plus the sum of the experts for `norm(x)`, and how the experts are used."""
        del keys
        B, T, D = x.shape
        residual, tokens = (array.reshape(B * T, D) for array in (x, norm(x)))
        shares, routing, sums = self.router(tokens, _real_tokens(context, T), balances=context.balances)
        out = gated_experts(
            residual,
            tokens,
            shares,
            routing,
            self.gate_up.linear(),
            self.down.linear(),
            activation=self.activation,
            keeps_gate_up=context.keeps_gate_up,
            implementation=self._fitting(context, D, weight_of(self.down.weight).shape[-1]),
        )
        return out.reshape(B, T, D), sums

    def cost(self, norm: RMSNorm, context: CostContext) -> PartCost:
        """Returns the cost of the part, whose output is the residual stream.

        The cost names "gate_up" and "lora" as a dense feed-forward does, each for all of a token's experts, and
        "routing". It leaves out the empty rows of blocks, about 6 % of the rows if an expert has a thousand tokens. In
        the forward pass, the projection to gate and up applies the activation, too, which then moves no bytes. The
        backward pass holds the most memory when it computes the gradient of the rows, together with gate and up (their
        gradient overwrites them) and the gated activation.
        """
        size, C = context.itemsize, self.router.num_experts_per_tok
        (E, D), F = weight_of(self.router.weight).shape[-2:], weight_of(self.down.weight).shape[-1]
        gate_up, down = self.gate_up.cost(context), self.down.cost(context)
        routed = PartCost(
            named={"routing": NamedActivation(3 * 4 * C)},
            unnamed_bytes=D * size + 4 * (E + C),
            unnamed=Cost(matmul=2 * E * D, bytes=4 * E),
            backward=Cost(matmul=2 * E * D, bytes=3 * 4 * E),
        )
        projected = PartCost(output=gate_up.each_way.for_tokens(C)).name_output("gate_up", C * 2 * F * size)
        lora = (self.gate_up.rank + self.down.rank) * C * size
        summed = PartCost(
            named={"lora": NamedActivation(lora)},
            output=Cost(bytes=C * D * size + 2 * D * size) + down.each_way.for_tokens(C),
            backward=Cost(bytes=14 * C * F * size + C * D * size + D * size)
            + gate_up.backward.for_tokens(C)
            + down.backward.for_tokens(C),
        )
        peak = BackwardPeak(
            bytes=C * (D + F) * size + D * size,
            weight_bytes=max(gate_up.copied_bytes, down.copied_bytes),
            rerun_bytes=D * size + C * 2 * F * size,
        )
        return norm.cost(context) + routed + projected + summed + PartCost(peaks=(peak,))

    def _fitting(self, context: RowContext, D: int, F: int) -> Implementation | None:
        """Returns the implementation of the experts' kernels.

        In generation they are chosen automatically, because plain jnp would copy an expert's matrix for each block.
        """
        if context.apart:
            return None
        return "xla" if context.implementation == "pallas" and unsupported_reason(D, F) else context.implementation


def _real_tokens(context: RowContext, T: int) -> Bool[Array, " BT"] | None:
    """Returns which tokens are no padding, or None in a decoding step, which computes no padding."""
    if context.bounds is None:
        return None
    # Padding attends to nothing: the first key of its bounds lies after the token itself.
    return (context.bounds.first <= jnp.arange(T, dtype=jnp.int32)[None, :]).reshape(-1)
