"""A part of a layer declares in these types what it costs: the activations that it names, their bytes, and its work.

Attention, the feed-forward and others have a method `cost`, beside the `__call__` that it describes. `planning/` adds
the parts up and knows none of them: a new part needs no line there. The choices of `remat` are sets of the names.

Figures are for one layer. Those of activations and of work are for each token; those of weights, which are read, copied
or cast once for all tokens, are for each micro-batch. They are for the kernels of a GPU.
"""

import dataclasses
from collections.abc import Collection, Iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostContext:
    """The settings of a step that the cost of a part depends on, beside the part itself.

    Attributes:
      itemsize: bytes of an element of the activations.
      keys_per_token: how many tokens a token attends to, on average over layers, too.
      has_adapters: whether any projection of the model has a LoRA adapter. The others are then counted as if they had.
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
    """The work of kernels, which adds up with `+`.

    >>> (Cost(matmul=2, bytes=3) + Cost(bytes=1, weight_bytes=10)).for_tokens(100)
    Cost(matmul=200, attention=0, bytes=400, weight_bytes=10)

    Attributes:
      matmul: floating-point operations of matmuls, a token.
      attention: floating-point operations within attention kernels, a token.
      bytes: what all other kernels read and write, a token.
      weight_bytes: what they read and write once, however many tokens there are.
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
        """Returns the cost of a micro-batch: what is for each token `tokens` times, and what is once as it is."""
        return Cost(self.matmul * tokens, self.attention * tokens, self.bytes * tokens, self.weight_bytes)


NO_COST = Cost()


@dataclasses.dataclass(frozen=True)
class NamedActivation:
    """An activation that the forward pass names (`jax.ad_checkpoint.checkpoint_name`).

    Attributes:
      bytes: its size, a token.
      cost: the work to compute it from what comes before it.
      only_for: the one named activation that is made from it, in its place, if nothing else reads it. Derivatives then
        do not read it, and it is computed again only if the other one is.
    """

    bytes: int
    cost: Cost = NO_COST
    only_for: str | None = None

    def __add__(self, other: "NamedActivation") -> "NamedActivation":
        assert self.only_for == other.only_for
        return NamedActivation(self.bytes + other.bytes, self.cost + other.cost, self.only_for)


@dataclasses.dataclass(frozen=True)
class BackwardPeak:
    """A moment of the backward pass of a part at which a layer may hold the most, beside what is kept.

    Attributes:
      bytes: gradients and temporary arrays, a token.
      weight_bytes: the copies of weights that are there.
      rerun_bytes: what is there, a token, when the part alone was computed again, from its input.
      starts_from: the name of that input; None where the whole layer is computed again before.
    """

    bytes: int
    weight_bytes: int
    rerun_bytes: int
    starts_from: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
    """The cost of a part of a layer, or of a whole layer. `+` adds parts up that run one after another.

    >>> branch = PartCost(output=Cost(matmul=6)).name_output("residual", 4)
    >>> layer = branch + PartCost(unnamed_bytes=8, unnamed=Cost(bytes=5), output=Cost(matmul=3))
    >>> layer.read_bytes, layer.forward.matmul, layer.recomputed({"residual"})
    (12, 9, Cost(matmul=0, attention=0, bytes=5, weight_bytes=0))

    Attributes:
      named: the activations with a name, in the order of the forward pass. Where parts give the same name, they add up.
      unnamed_bytes: what derivatives read beside those and the layer's input, a token.
      shared_bytes: what is kept beside all that derivatives read where nothing is computed again, a token: XLA then
        sees that both passes compute the same.
      cast_weight_bytes: weights that are cast once and kept, for both passes to read.
      unnamed: the work behind `unnamed_bytes`.
      output: the work between the last name and the output of the part. The backward pass never repeats it.
      backward: the work of the backward pass, without what it computes again.
      peaks: where the backward pass may hold the most; a part that never does declares none.
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
        """Returns the cost of the same part when its output has a name, and `size` bytes a token."""
        output = PartCost(named={name: NamedActivation(size, self.output, only_for)})
        return dataclasses.replace(self, output=NO_COST) + output

    def starting_from(self, name: str) -> "PartCost":
        """Returns the cost of the same part when its input has a name, from which it can be computed again."""
        return dataclasses.replace(
            self, peaks=tuple(dataclasses.replace(peak, starts_from=name) for peak in self.peaks)
        )

    @property
    def read_bytes(self) -> int:
        """All that derivatives read except the layer's input and weights, in bytes a token."""
        return self.unnamed_bytes + sum(each.bytes for each in self.named.values() if each.only_for is None)

    @property
    def forward(self) -> Cost:
        """The work of the forward pass."""
        return sum((each.cost for each in self.named.values()), start=self.unnamed + self.output)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Returns the bytes a token of the activations with these names; a name that no part gives counts nothing."""
        return sum(self.named[name].bytes for name in names if name in self.named)

    def recomputed(self, there: Collection[str]) -> Cost:
        """Returns the work of the forward pass that is done again in a backward pass that finds these names `there`."""

        def is_again(name: str) -> bool:
            only_for = self.named[name].only_for
            return name not in there and (only_for is None or is_again(only_for))

        return sum((each.cost for name, each in self.named.items() if is_again(name)), start=self.unnamed)
