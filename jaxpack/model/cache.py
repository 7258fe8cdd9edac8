"""Stores the keys and values of earlier tokens, for text that is generated token by token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxpack.model.config import ModelConfig


class Cache(NamedTuple):
    """Holds the rotated keys and the values of all layers for S tokens a row, each token at its position."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]

    @classmethod
    def empty(cls, config: ModelConfig, dtype: DTypeLike, num_rows: int, size: int) -> "Cache":
        """Makes a cache with room for `size` tokens in each of `num_rows` rows."""
        shape = config.num_layers, num_rows, size, config.num_kv_heads, config.head_dim
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @classmethod
    def bytes_of(cls, config: ModelConfig, dtype: DTypeLike, num_rows: int, size: int) -> int:
        """Returns the bytes of a cache that `empty` makes from these arguments, without allocating it."""
        shapes = jax.eval_shape(lambda: cls.empty(config, dtype, num_rows, size))
        return sum(x.size * x.dtype.itemsize for x in shapes)


class CacheSlot(NamedTuple):
    """Gives one layer its place in the cache, for the tokens that the layer reads.

    Attributes:
      cache: the cache of all layers.
      layer: the number of the layer.
      positions: the positions of the tokens in their rows.
      seen: which tokens of the cache each row attends to; None while a prompt is read, whose tokens attend to each
        other.
    """

    cache: Cache
    layer: Int[Array, ""]
    positions: Int[Array, "B T"]
    seen: Bool[Array, "B S"] | None

    def put(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "CacheSlot":
        """Returns the slot with keys and values written: in place, if the cache is carried by a loop."""
        here = self.layer, jnp.arange(len(k))[:, None], self.positions
        return self._replace(cache=Cache(self.cache.k.at[here].set(k), self.cache.v.at[here].set(v)))

    def get(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns the keys and values of the layer."""
        return tuple(jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False) for array in self.cache)
