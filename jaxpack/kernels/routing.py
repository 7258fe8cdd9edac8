"""Sorts the tokens of a mixture of experts by expert, once per layer, and adds up what the experts computed.

Each token goes to C experts, so it has C copies. The copies of one expert lie in consecutive rows, in blocks that
belong to one expert each, so that a kernel reads one expert's matrix for each block. A block's last rows may be empty.
All shapes depend on the number of tokens alone: nothing waits for the host, whichever experts the tokens choose.

The functions only gather: each token looks up the rows of its copies, in the forward and the backward pass. So sums
have a fixed order, and two runs have the same bits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpack.errors import InputError

_LEAST_ROWS, _MOST_ROWS = 16, 128  # of a block: a kernel's tile has at least 16 rows, and more than 128 are no faster


class Routing(NamedTuple):
    """Maps M rows, in G equal blocks that each belong to one of E experts, to the tokens' copies.

    Attributes:
      copies: the copy `C * token + choice` in each row; -1 for an empty row.
      rows: the row of each copy; -1 for the copies of padding, which no expert computes.
      experts: the expert of each block; E for a block without tokens. These come last.
      starts: the first block of each expert, and the number of blocks that hold tokens.
      counts: the number of copies of each expert.
    """

    copies: Int[Array, " M"]
    rows: Int[Array, "N C"]
    experts: Int[Array, " G"]
    starts: Int[Array, " E1"]
    counts: Int[Array, " E"]

    @property
    def tokens(self) -> Int[Array, " M"]:
        """Returns the token in each row; -1 for an empty row."""
        return self.copies // self.rows.shape[1]  # rounds down: -1 stays -1

    @property
    def num_experts(self) -> int:
        """Returns E."""
        return self.counts.shape[0]


def block_rows(copies: int, num_experts: int) -> int:
    """Returns the rows of a block: as many as an expert has on average, as a power of two from 16 to 128."""
    rows = _LEAST_ROWS
    while rows < _MOST_ROWS and rows * num_experts < copies:
        rows *= 2
    return rows


def num_blocks(copies: int, num_experts: int) -> int:
    """Returns the number of blocks that hold `copies` in any distribution over the experts."""
    return copies // block_rows(copies, num_experts) + min(copies, num_experts)


def route(choices: Int[Array, "N C"], num_experts: int, real: Bool[Array, " N"] | None = None) -> Routing:
    """Sorts the copies of N tokens by expert; the copies of one expert keep the order of the tokens.

    Args:
      choices: the C experts of each token, from 0 to E - 1, each at most once.
      num_experts: E.
      real: which tokens are no padding; None if all are.

    Raises:
      InputError: there are more choices than experts.
    """
    N, C = choices.shape
    if num_experts < C:
        raise InputError(f"`num_experts` must be at least the number of choices of a token, {C}, got {num_experts}.")
    size, count = block_rows(N * C, num_experts), num_blocks(N * C, num_experts)
    if real is not None:
        choices = jnp.where(real[:, None], choices, num_experts)
    expert_of_copy = choices.reshape(-1).astype(jnp.int32)
    number = jnp.arange(N * C, dtype=jnp.int32)
    _, order = jax.lax.sort((expert_of_copy, number), num_keys=1, is_stable=True)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    counts = jnp.sum(expert_of_copy[:, None] == experts[None, :], axis=0, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts  # the place in `order` of each expert's first copy
    ends = jnp.cumsum(-(-counts // size))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    block = jnp.arange(count, dtype=jnp.int32)
    expert_of_block = jnp.sum(ends[None, :] <= block[:, None], axis=1, dtype=jnp.int32)

    row = jnp.arange(count * size, dtype=jnp.int32)
    expert = jnp.minimum(expert_of_block[row // size], num_experts - 1)
    place = row - starts[expert] * size
    filled = (place < counts[expert]) & (expert_of_block[row // size] < num_experts)
    copies = jnp.where(filled, order[jnp.where(filled, first[expert] + place, 0)], -1)

    # The inverse of `order`: the place of each copy among the sorted ones.
    _, sorted_place = jax.lax.sort((order, number), num_keys=1, is_stable=False)
    chosen = jnp.minimum(expert_of_copy, num_experts - 1)
    rows = jnp.where(expert_of_copy < num_experts, starts[chosen] * size + sorted_place - first[chosen], -1)
    return Routing(copies, rows.reshape(N, C), expert_of_block, starts, counts)


def spread(shares: Float[Array, "N C"], routing: Routing) -> Float[Array, " M"]:
    """Returns the value of the copy in each row, and 0 for empty rows. It has no derivative."""
    return jnp.where(routing.copies < 0, 0, shares.reshape(-1)[jnp.maximum(routing.copies, 0)])


def gather_copies(values: Float[Array, " M"], routing: Routing) -> Float[Array, "N C"]:
    """Returns the value of each copy among the values of all rows, and 0 for padding: the inverse of `spread`."""
    return jnp.where(routing.rows < 0, 0, values[jnp.maximum(routing.rows, 0)])


def combine(
    values: Float[Array, "M D"], routing: Routing, shares: Float[Array, "N C"] | None = None
) -> Float[Array, "N D"]:
    """Returns for each token the sum over its copies' rows, each times its share, in float32. It has no derivative."""
    parts = []
    for choice in range(routing.rows.shape[1]):
        row = routing.rows[:, choice]
        part = values[jnp.maximum(row, 0)].astype(jnp.float32)
        part = part if shares is None else part * shares[:, choice, None].astype(jnp.float32)
        parts.append(jnp.where(row[:, None] < 0, 0, part))
    return functools.reduce(jnp.add, parts)
