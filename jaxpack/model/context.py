"""What every layer is told of a batch, computed once, and which kernels it runs."""

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
    """What a layer needs to know of the batch, computed once for all that need the same; and which kernels it runs."""

    bounds: SegmentBounds | None  # None where text is written: tokens attend to what is in a cache
    angles: Angles
    max_segments: int | None
    implementation: Implementation | None
    # Whether adapters multiply apart from their matrix. Together they cost a copy of the matrix, which is most of the
    # time where there are few tokens: that of text being written.
    apart: bool = False


NoKeys = tuple[None, None]  # no dropout


class PerLayer(NamedTuple):
    """Per-layer values (attention bounds, RoPE tables), stored once per distinct setting: layer i uses
    `table[index[i]]`.
    """

    table: Any
    index: Int[np.ndarray, " L"] | None  # None where all layers share one value, which is then not stacked

    @classmethod
    def of(cls, settings: Sequence[Hashable], make: Callable[[Any], Any]) -> "PerLayer":
        """Calls `make` once for each distinct setting of the layers."""
        distinct = list(dict.fromkeys(settings))
        made = [make(setting) for setting in distinct]
        if len(made) == 1:
            return cls(made[0], None)
        index = np.array([distinct.index(setting) for setting in settings], np.int32)
        return cls(jax.tree.map(lambda *arrays: jnp.stack(arrays), *made), index)

    def at(self, place: Int[Array, ""] | None) -> Any:
        """Returns the value of a layer: `place` is its slice of `index`, as a scan gives it."""
        if place is None:
            return self.table
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, place, keepdims=False), self.table)
