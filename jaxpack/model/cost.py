"""Defines the types in which a part of a layer declares its cost: named activations, their bytes, and its work.

Attention, the feed-forward and other parts have a method `cost`, beside the `__call__` that it describes. `planning/`
adds up the costs without knowing the parts: a new part needs no line there. The choices of `remat` are sets of
these names.

All figures are for one layer and for GPU kernels. Activations and work are counted for each token. Weights, which are
read, copied or cast once for all tokens, are counted for each micro-batch.
"""

import dataclasses
from collections.abc import Collection, Iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostContext:
    """Holds the settings of a step that the cost of a part depends on, beside the part itself.

    Attributes:
      itemsize: bytes of an element of the activations.
      keys_per_token: how many tokens a token attends to, on average over tokens and layers.
      has_adapters: whether any projection of the model has a LoRA adapter. If so, all are counted as if they had one.
      has_dropout: whether adapters read their input after dropout.
      casts_weights: whether weights are trained, in float32, and cast to the dtype of the activations.
    """

    itemsize: int
    keys_per_token: float
    has_adapters: bool = False
    has_dropout: bool = False
    casts_weights: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds the work of kernels; `+` adds up the work of several.

    >>> (Cost(matmul=2, bytes=3) + Cost(bytes=1, weight_bytes=10)).for_tokens(100)
    Cost(matmul=200, attention=0, bytes=400, weight_bytes=10)

    Attributes:
      matmul: floating-point operations of matmuls, per token.
      attention: floating-point operations within attention kernels, per token.
      bytes: bytes that all other kernels read and write, per token.
      weight_bytes: bytes that these other kernels read and write once, however many tokens there are.
    """

    matmul: float = 0
    attention: float = 0
    bytes: float = 0
    weight_bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.bytes + other.bytes,
            self.weight_bytes + other.weight_bytes,
        )

    def for_tokens(self, tokens: int) -> "Cost":
        """Returns the cost of a micro-batch: the figures per token times `tokens`, and `weight_bytes` once."""
        return Cost(self.matmul * tokens, self.attention * tokens, self.bytes * tokens, self.weight_bytes)


NO_COST = Cost()


@dataclasses.dataclass(frozen=True)
class NamedActivation:
    """Describes an activation that the forward pass names (`jax.ad_checkpoint.checkpoint_name`).

    Attributes:
      bytes: its size per token.
      cost: the work to compute it from the activation before it.
      only_for: the name of another activation, if this one is needed only to compute that one. The derivatives then do
        not read this one, and it is computed again only if the other one is.
    """

    bytes: int
    cost: Cost = NO_COST
    only_for: str | None = None

    def __add__(self, other: "NamedActivation") -> "NamedActivation":
        assert self.only_for == other.only_for
        return NamedActivation(self.bytes + other.bytes, self.cost + other.cost, self.only_for)


@dataclasses.dataclass(frozen=True)
class BackwardPeak:
    """Describes a moment of a part's backward pass at which a layer may hold the most memory beside its residuals.

    Attributes:
      bytes: bytes per token of gradients and temporary arrays.
      weight_bytes: bytes of the copies of weights that exist at this moment.
      rerun_bytes: bytes per token of recomputed activations, if only this part was computed again, from its input.
      starts_from: the name of this input; None if the whole layer is computed again before its backward pass.
      within: the names of a first part's activations. When its backward pass runs, that of the rest of the layer is
        done, so that only these were computed again; None for a part at whose backward pass the whole layer is there.
      whole_bytes: bytes per token of gradients that exist for all tokens if the part is computed in pieces
        (`model.pieces`), whose tokens alone then have the other bytes; None for a part that is always computed whole.
    """

    bytes: int
    weight_bytes: int
    rerun_bytes: int
    starts_from: str | None = None
    within: frozenset[str] | None = None
    whole_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
    """Holds the cost of a part of a layer, or of a whole layer; `+` adds up parts that run one after another.

    >>> branch = PartCost(output=Cost(matmul=6)).name_output("residual", 4)
    >>> layer = branch + PartCost(unnamed_bytes=8, unnamed=Cost(bytes=5), output=Cost(matmul=3))
    >>> layer.read_bytes, layer.forward.matmul, layer.recomputed({"residual"})
    (12, 9, Cost(matmul=0, attention=0, bytes=5, weight_bytes=0))

    Attributes:
      named: the named activations, in the order of the forward pass. Activations of the same name in several parts are
        added up.
      unnamed_bytes: bytes per token that derivatives read in addition to the named activations and the layer's input.
      shared_bytes: further bytes per token that are kept if no activation is recomputed: XLA then recognises a value
        that both passes compute, computes it once and keeps it.
      cast_weight_bytes: bytes of weights that are cast once and kept for both passes.
      unnamed: the work to compute what `unnamed_bytes` counts.
      output: the work between the last named activation and the output of the part. The backward pass never repeats it.
      backward: the work of the backward pass, without recomputation.
      peaks: the moments at which the backward pass may hold the most memory; empty for a part that never does.
    """

    named: dict[str, NamedActivation] = dataclasses.field(default_factory=dict)
    unnamed_bytes: int = 0
    shared_bytes: int = 0
    cast_weight_bytes: int = 0
    unnamed: Cost = NO_COST
    output: Cost = NO_COST
    backward: Cost = NO_COST
    peaks: tuple[BackwardPeak, ...] = ()

    def __add__(self, other: "PartCost") -> "PartCost":
        named = dict(self.named)
        for name, activation in other.named.items():
            named[name] = named[name] + activation if name in named else activation
        others = (field.name for field in dataclasses.fields(self) if field.name != "named")
        return PartCost(named=named, **{name: getattr(self, name) + getattr(other, name) for name in others})

    def name_output(self, name: str, size: int, *, only_for: str | None = None) -> "PartCost":
        """Returns the cost of the same part with its output named, at `size` bytes per token."""
        output = PartCost(named={name: NamedActivation(size, self.output, only_for)})
        return dataclasses.replace(self, output=NO_COST) + output

    def starting_from(self, name: str) -> "PartCost":
        """Returns the cost of the same part with its input named, so that the part can be computed again from it."""
        return dataclasses.replace(
            self, peaks=tuple(dataclasses.replace(peak, starts_from=name) for peak in self.peaks)
        )

    @property
    def read_bytes(self) -> int:
        """Returns the bytes per token that derivatives read, without the layer's input and weights."""
        return self.unnamed_bytes + sum(each.bytes for each in self.named.values() if each.only_for is None)

    @property
    def forward(self) -> Cost:
        """Returns the work of the forward pass."""
        return sum((each.cost for each in self.named.values()), start=self.unnamed + self.output)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Returns the bytes per token of the activations with these names; unknown names count as 0."""
        return sum(self.named[name].bytes for name in names if name in self.named)

    def recomputed(self, there: Collection[str]) -> Cost:
        """Returns the work of the forward pass that a backward pass repeats if the names in `there` are kept."""

        def is_again(name: str) -> bool:
            only_for = self.named[name].only_for
            return name not in there and (only_for is None or is_again(only_for))

        return sum((each.cost for name, each in self.named.items() if is_again(name)), start=self.unnamed)
