"""Holds the values of a batch that every layer reads, computed once, and the choice of kernels."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxpack.constants import Implementation
from jaxpack.kernels.attention import SegmentBounds
from jaxpack.kernels.rope import Angles


class RowContext(NamedTuple):
    """Holds the values of a batch that a layer reads (segment bounds, rotary angles), and which kernels it runs."""

    bounds: SegmentBounds | None  # None in a decoding step: tokens attend to a cache
    angles: Angles
    max_segments: int | None
    implementation: Implementation | None
    # Whether adapters are multiplied separately from the base weight. One matmul for both needs a copy of the weight,
    # which takes most of the time where there are few tokens, as in text generation.
    apart: bool = False
    # Whether the layers of a mixture of experts sum what the load-balancing loss reads.
    balances: bool = False
    # Whether the activation that is named "gate_up" is kept for the backward pass, and not computed again.
    keeps_gate_up: bool = True
    # Whether a feed-forward computes for some tokens at a time, see `model.pieces`.
    in_pieces: bool = False


NoKeys = tuple[None, None]  # no dropout


class PerLayer(NamedTuple):
    """Holds per-layer values (attention bounds, RoPE tables), stored once per distinct setting.

    Layer i uses `table[index[i]]`.
    """

    table: Any
    index: Int[np.ndarray, " L"] | None  # None where all layers share one value, which is then not stacked

    @classmethod
    def of(cls, settings: Sequence[Hashable], make: Callable[[Any], Any]) -> "PerLayer":
        """Returns the values of layers with these `settings`, calling `make` once for each distinct setting."""
        distinct = list(dict.fromkeys(settings))
        made = [make(setting) for setting in distinct]
        if len(made) == 1:
            return cls(made[0], None)
        index = np.array([distinct.index(setting) for setting in settings], np.int32)
        return cls(jax.tree.map(lambda *arrays: jnp.stack(arrays), *made), index)

    def at(self, place: Int[Array, ""] | None) -> Any:
        """Returns the value of one layer; `place` is the layer's slice of `index`, which a scan over layers gives."""
        if place is None:
            return self.table
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, place, keepdims=False), self.table)
