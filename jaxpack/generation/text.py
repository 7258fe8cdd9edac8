"""Generates text from a model, greedy or sampled, with or without adapters: enough to see what it has learned.

Prompts and caches are padded to a power of two of tokens, so that few programs serve all of them: one program reads
prompts, and one writes until every row has ended. Where a rope's angles depend on the length of the document (see
`model.rope`), the text so far is read again as soon as the angles change, so that each token follows from a forward
pass over all tokens before it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.conversation import Conversation, read_conversation
from jaxpack.data.tokenizer import Tokenizer, tokenize
from jaxpack.errors import InputError, check_type
from jaxpack.generation.decode import decode_step, prefill
from jaxpack.generation.sampling import DecodeState, SamplingParams, rounded_length
from jaxpack.model.cache import Cache
from jaxpack.model.config import DynamicRopeScaling
from jaxpack.model.lora import adapters, require_finite
from jaxpack.model.rope import last_length_alike
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.settings import GenerateConfig
from jaxpack.utils.console import progress_bar
from jaxpack.utils.host import available_host_bytes

Prompt = str | Sequence[Mapping[str, Any]] | Conversation  # text to continue, or messages to answer


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, stop_tokens: Iterable[int] = (), **options: Any
) -> list[list[int]]:
    """Continues prompts of token ids, and returns the new token ids; `generate_text` does the same for text.

    The continuation of a prompt does not depend on the other prompts, except for the order of float sums.

    Args:
      model: the model, with or without adapters.
      prompts: one list of token ids for each prompt.
      stop_tokens: a text ends before any of these.
      options: the fields of `GenerateConfig`: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `batch_size`.

    Returns:
      The new tokens of each prompt: `max_new_tokens`, or fewer where a stop token would be next.

    Raises:
      InputError: an option is unknown or out of range, the adapters hold NaN or infinity, a prompt is empty or has ids
        outside the vocabulary, or there are more tokens than fit into memory or than the model's
        `max_position_embeddings`, beyond which only dynamic NTK is made to go.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> (text,) = jaxpack.generate(model, [[5, 6, 7]], max_new_tokens=4)
      >>> len(text)
      4
    """
    allowed = [field.name for field in dataclasses.fields(GenerateConfig)]
    if unknown := [name for name in options if name not in allowed]:
        raise InputError(f"Options must be among {', '.join(allowed)}, got {unknown[0]!r}.")
    config = GenerateConfig(**options)
    check_type("model", model, Transformer)
    if not isinstance(prompts, Iterable):
        raise InputError(f"`prompts` must be a list of lists of token ids, got {prompts!r:.80}.")
    listed: Any = [list(one) if isinstance(one, Iterable) and type(one) is not str else one for one in prompts]
    prompts = cast(list[list[int]], listed)
    _check_prompts(model, prompts, config)
    model.read_weights()
    if adapters(model):
        require_finite(model)
    params = SamplingParams.of(config, _stops(stop_tokens))
    graph, state = nnx.split(model)
    written: dict[int, list[int]] = {}
    # Prompts of similar lengths run together, which saves padding and shapes.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    num_rows = min(config.batch_size, len(prompts))
    with progress_bar("generating") as progress:
        bar = progress.add_task("", total=len(prompts), note="")
        for begin in range(0, len(order), config.batch_size):
            here = order[begin : begin + config.batch_size]
            rows = DecodeState.of([prompts[i] for i in here], here, num_rows, config)
            while (np.asarray(rows.lengths) < np.asarray(rows.limits)).any():
                read = rounded_length(int(rows.lengths.max()))
                rows, cache = _read(graph, state, rows, params, num_tokens=read)
                rows, _ = _write(graph, state, rows, cache, params)
            tokens, lengths = np.asarray(rows.tokens), np.asarray(rows.lengths)
            written |= {i: tokens[row, len(prompts[i]) : lengths[row]].tolist() for row, i in enumerate(here)}
            progress.advance(bar, len(here))
    return [written[i] for i in range(len(prompts))]


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    stop_tokens: Iterable[int] | None = None,
    **options: Any,
) -> list[str]:
    """Continues texts, and answers lists of messages through the tokenizer's chat template; returns the new texts.

    Args:
      stop_tokens: a text ends before any of these. None takes the end tokens of the tokenizer, of the model's
        `config.json` and `generation_config.json` and, for messages, of the chat template.
      options: the options of `generate`.

    Raises:
      InputError: `generate` raises it, or messages come without a chat template, or the template refuses them.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> (answer,) = jaxpack.generate_text(model, tokenizer, ["two and two"], max_new_tokens=4)
    """
    check_type("model", model, Transformer)
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"`prompts` must be a list, of texts or of lists of messages, got {prompts!r:.80}.")
    if tokenizer is None:
        raise InputError("`tokenizer` must come with the model for texts, got None; `generate` takes token ids.")
    prompts = list(prompts)
    ids = [_encode(prompt, tokenizer, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    if stop_tokens is None:
        answers = any(not isinstance(prompt, str) for prompt in prompts)
        stop_tokens = _stop_tokens(model, tokenizer, ChatTemplate(tokenizer) if answers else None)
    return [tokenizer.decode(tokens) for tokens in generate(model, ids, stop_tokens=stop_tokens, **options)]


def _check_prompts(model: Transformer, prompts: Sequence[Sequence[int]], config: GenerateConfig) -> None:
    vocab_size, longest = model.config.vocab_size, model.config.max_position_embeddings
    if any(isinstance(rope.scaling, DynamicRopeScaling) for rope in model.config.ropes):
        longest = None
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, list) or not all(isinstance(token, int | np.integer) for token in prompt):
            raise InputError(f"`prompts` must be lists of token ids, got {prompt!r:.80} for prompt {number}.")
        if not len(prompt):
            raise InputError(f"`prompts` must have at least one token each, got none in prompt {number}.")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise InputError(
                f"`prompts` must be of token ids in [0, {vocab_size}), the model's vocabulary, got {wrong[0]} in"
                f" prompt {number}."
            )
        if longest is not None and len(prompt) + config.max_new_tokens > longest:
            raise InputError(
                f"`prompts` and `max_new_tokens` must come to at most {longest:,} tokens, the model's"
                f" `max_position_embeddings`, got {len(prompt):,} in prompt {number} and {config.max_new_tokens:,}."
            )
    num_rows = min(config.batch_size, len(prompts))
    size = rounded_length(max(map(len, prompts), default=0) + config.max_new_tokens)
    needed, free = Cache.bytes_of(model.config, model.dtype, num_rows, size), _free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"`max_new_tokens` must leave room for the keys and values of {num_rows:,} prompts at once, got"
            f" {config.max_new_tokens:,}, which needs {needed / 2**30:,.1f} GiB of {free / 2**30:,.1f} GiB free. A"
            " smaller `batch_size` needs less."
        )


def _stops(stop_tokens: Any) -> list[int]:
    stops = list(stop_tokens) if isinstance(stop_tokens, Iterable) else None
    if stops is None or not all(isinstance(i, int | np.integer) and -(2**31) <= i < 2**31 for i in stops):
        raise InputError(f"`stop_tokens` must be a list of token ids, got {stop_tokens!r:.80}.")
    return stops


def _free_bytes() -> int | None:
    """Returns the free bytes where arrays are made, on the GPU or else the host; None where that is unknown."""
    free = free_device_bytes(current_device())
    return available_host_bytes() if free is None else free


# Programs over token ids.


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_tokens")
def _read(
    graph: nnx.GraphDef, state: nnx.State, rows: DecodeState, params: SamplingParams, *, num_tokens: int
) -> tuple[DecodeState, Cache]:
    """Reads all rows, none of which is longer than `num_tokens`, and appends one token to each."""
    model = nnx.merge(graph, state)
    logits, cache = prefill(model, rows.tokens[:, :num_tokens], rows.lengths, size=rows.tokens.shape[1])
    return rows.append(logits, params), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _write(
    graph: nnx.GraphDef, state: nnx.State, rows: DecodeState, cache: Cache, params: SamplingParams
) -> tuple[DecodeState, Cache]:
    """Appends tokens until all rows have ended, or one has to be read again; the last token is not in the cache."""
    model = nnx.merge(graph, state)
    alike = functools.reduce(
        jnp.minimum, [last_length_alike(rope, rows.lengths - 1) for rope in dict.fromkeys(model.config.ropes)]
    )

    def goes_on(carried: tuple[DecodeState, Cache]) -> Bool[Array, ""]:
        rows, _ = carried
        return rows.open.any() & ~(rows.open & (rows.lengths > alike)).any()

    def step(carried: tuple[DecodeState, Cache]) -> tuple[DecodeState, Cache]:
        rows, cache = carried
        positions = rows.lengths - 1
        last = jnp.take_along_axis(rows.tokens, positions[:, None], axis=1)[:, 0]
        logits, cache = decode_step(model, last, positions, cache)
        return rows.append(logits, params), cache

    return jax.lax.while_loop(goes_on, step, (rows, cache))  # the loop carries the cache, to update it in place


# Prompts as text and messages.


def _encode(prompt: Prompt, tokenizer: Tokenizer, where: str) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenize([prompt], tokenizer, lambda _: where)["input_ids"][0]
        eos = tokenizer.eos_token_id
        # Some tokenizers append an end token to every text. A text that has ended cannot be continued.
        if ids and eos is not None and ids[-1] == eos and not prompt.endswith(tokenizer.decode([eos])):
            ids = ids[:-1]
    else:
        if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable | Conversation):
            raise InputError(f"`prompts` must be texts or lists of messages, got {prompt!r:.80} for {where}.")
        conversation = prompt if isinstance(prompt, Conversation) else read_conversation({}, list(prompt), where)
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError(f"`tokenizer` must have a chat template for messages, got one without for {where}.")
        text = ChatTemplate(tokenizer).write_question(conversation, where)
        # The template has already written the special tokens.
        ids = tokenize([text], tokenizer, lambda _: where, add_special_tokens=False)["input_ids"][0]
    if not ids:
        raise InputError(f"`prompts` must have at least one token each, got {prompt!r:.80} for {where}.")
    return ids


def _stop_tokens(model: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None) -> set[int]:
    stops = {tokenizer.eos_token_id}
    for _, text in model.source_files:
        ends = json.loads(text).get("eos_token_id")
        stops |= set(ends) if isinstance(ends, list) else {ends}
    if template is not None:
        stops.add(tokenizer.get_added_vocab().get(template.answer_end() or ""))
    return {token for token in stops if type(token) is int}
