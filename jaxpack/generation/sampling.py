"""Chooses the next token of each row, and appends it to the row."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpack.settings import GenerateConfig

_LEAST = 32  # the fewest tokens that a program is compiled for
_STOPS = 8  # stop tokens are padded to a multiple of this number
_COLDEST = 1e-30  # the least temperature: a difference of logits divided by it is still finite


def rounded_length(length: int) -> int:
    """Returns `length` rounded up to a power of two (at least 32), so that few programs are compiled."""
    return max(_LEAST, 1 << (length - 1).bit_length())


class SamplingParams(NamedTuple):
    """Holds the settings that choose the next token, and the tokens that end a row.

    A field that is None leaves its computation out of the program. If only one of `top_k` and `top_p` is set, the other
    is infinity. `stop_tokens` are padded with -1.
    """

    stop_tokens: Int[Array, " stops"]
    temperature: Float[Array, ""] | None
    top_k: Float[Array, ""] | None
    top_p: Float[Array, ""] | None

    @classmethod
    def of(cls, config: GenerateConfig, stop_tokens: list[int]) -> "SamplingParams":
        """Returns the settings of `config`; settings that change nothing become None."""
        stops = sorted(stop_tokens)
        stops += -len(stops) % _STOPS * [-1]
        temperature = jnp.float32(max(config.temperature, _COLDEST)) if config.temperature else None
        top_k, top_p = config.top_k or math.inf, config.top_p if config.top_p not in (None, 1) else math.inf
        is_restricted = min(top_k, top_p) < math.inf
        tops = (jnp.float32(top_k), jnp.float32(top_p)) if is_restricted else (None, None)
        return cls(jnp.asarray(stops or _STOPS * [-1], jnp.int32), temperature, *tops)


class DecodeState(NamedTuple):
    """Holds the texts so far: the first `lengths` tokens of each row, which ends when it reaches `limits` tokens.

    Each row draws with its own key.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    limits: Int[Array, " B"]
    keys: Key[Array, " B"]

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], numbers: Sequence[int], num_rows: int, config: GenerateConfig
    ) -> "DecodeState":
        """Makes one row for each prompt, and adds rows that have already ended up to `num_rows`.

        `numbers` are the prompts' numbers, from which their keys are made.
        """
        lengths = np.ones(num_rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        limits = lengths + config.max_new_tokens * (np.arange(num_rows) < len(prompts))
        tokens = np.zeros((num_rows, rounded_length(int(limits.max()))), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        numbered = np.resize(np.asarray(numbers, np.int32), num_rows)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), numbered)
        return cls(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(limits, jnp.int32), keys)

    @property
    def open(self) -> Bool[Array, " B"]:
        """Returns which rows have not ended."""
        return self.lengths < self.limits

    def append(self, logits: Float[Array, "B V"], params: SamplingParams) -> "DecodeState":
        """Appends a token to each open row; a row whose next token is a stop token ends without it."""
        chosen = _choose(logits, jax.vmap(jax.random.fold_in)(self.keys, self.lengths), params)
        stops = (chosen[:, None] == params.stop_tokens[None, :]).any(axis=1)
        grows = self.open & ~stops
        row, place = jnp.arange(len(chosen)), jnp.where(grows, self.lengths, self.tokens.shape[1])
        return self._replace(
            tokens=self.tokens.at[row, place].set(chosen, mode="drop"),
            lengths=self.lengths + grows,
            limits=jnp.where(stops, self.lengths, self.limits),
        )


def _choose(logits: Float[Array, "B V"], keys: Key[Array, " B"], params: SamplingParams) -> Int[Array, " B"]:
    if params.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / params.temperature
    if params.top_k is not None:
        logits = jnp.where(logits >= _least_kept(logits, params), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _least_kept(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B 1"]:
    """Returns the smallest logit that may be drawn: the last of the top k that are needed to reach `top_p`."""
    assert params.top_k is not None
    assert params.top_p is not None
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    first = jnp.arange(logits.shape[1])[None, :] < params.top_k
    share = jax.nn.softmax(ranked, axis=-1, where=first)
    kept = first & (jnp.cumsum(share, axis=-1) - share < params.top_p)
    kept = kept.at[:, 0].set(True)  # the likeliest stays even where `top_p` is 0 in float32
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
