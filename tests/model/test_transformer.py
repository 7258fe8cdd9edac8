"""In packed rows, the model treats each document as if it were alone: causally, and blind to all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernels.cuda_lowering import lower_for_cuda, triton_modules
from models import random_documents, small_config, small_model
from programs import equations

from jaxpack.data.packing import Rows, fill_batch
from jaxpack.model.context import RowContext
from jaxpack.model.transformer import Transformer, segment_positions
from jaxpack.settings import LoraConfig

LENGTHS = [17, 1, 40, 3, 22]


def packed(lengths: list[int], row_length: int = 128, seed: int = 0):
    """Makes documents, and a batch `[1, T]` with all of them in one row."""
    documents = random_documents(lengths, seed=seed)
    rows = Rows.grouped(np.arange(len(lengths))[None], documents.lengths)
    return documents, fill_batch(documents.tokens, documents.labels, documents.starts, rows, np.array([0]), row_length)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("family", ["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_packed_document_has_the_logits_that_it_has_alone(family, seed):
    model = small_model(family, lora=LoraConfig(r=4))
    lengths = np.random.default_rng(seed).integers(1, 40, 5).tolist()
    documents, batch = packed(lengths, row_length=256, seed=seed)
    logits = np.asarray(model.logits(jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)))[0]
    for start, length in zip(documents.starts, documents.lengths, strict=True):
        here = slice(start, start + length)
        alone = model.logits(jnp.asarray(documents.tokens[None, here]))
        np.testing.assert_allclose(logits[here], alone[0], atol=1e-5)


@pytest.fixture(params=["qwen3", "llama", "qwen2", "gemma3", "qwen3_moe"])
def any_family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_changing_a_document_changes_no_other_in_the_last_bit(any_family):
    model = small_model(any_family, lora=LoraConfig(r=4))
    documents, batch = packed(LENGTHS)
    run = jax.jit(lambda tokens: model.logits(tokens, jnp.asarray(batch.segment_ids)))
    before = np.asarray(run(jnp.asarray(batch.tokens)))[0]
    for d, (start, length) in enumerate(zip(documents.starts, documents.lengths, strict=True)):
        for place in {0, length // 2, length - 1}:
            tokens = batch.tokens.copy()
            tokens[0, start + place] = (tokens[0, start + place] + 1) % 97
            after = np.asarray(run(jnp.asarray(tokens)))[0]
            others = (batch.segment_ids[0] != d + 1) & (batch.segment_ids[0] > 0)
            np.testing.assert_array_equal(after[others], before[others])
            np.testing.assert_array_equal(after[start : start + place], before[start : start + place])  # causal
            reached = [length if window is None else place + window for window in model.config.windows]
            seen = slice(start + place, start + min(max(reached), length))
            assert (after[seen] != before[seen]).all(axis=-1).all()


def test_cases_a_document_that_is_not_finite_changes_no_other_in_the_last_bit():
    model = small_model("qwen3", lora=LoraConfig(r=4))
    documents, batch = packed(LENGTHS)
    tokens = np.where(batch.tokens == 96, 95, batch.tokens)
    tokens[0, documents.starts[1]] = 96
    ids = jnp.asarray(batch.segment_ids)

    def logits_with(value):
        model.embedding.set_value(model.embedding[...].at[96].set(value))
        return np.asarray(model.logits(jnp.asarray(tokens), ids))[0, :, :96]

    before, after = logits_with(0.01), logits_with(jnp.nan)
    others = (batch.segment_ids[0] != 2) & (batch.segment_ids[0] > 0)
    np.testing.assert_array_equal(after[others], before[others])
    assert np.isnan(after[batch.segment_ids[0] == 2]).all()


def test_a_window_ends_what_a_layer_sees():
    """With a window of W in each of two layers, a token sees the 2 (W - 1) tokens before it and none beyond."""
    config = small_config("llama", sliding_window=7, local_layers=None)
    model = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = random_documents([40]).tokens[None]
    before = np.asarray(model.logits(jnp.asarray(tokens)))[0]
    tokens[0, 5] += 1
    changed = (np.asarray(model.logits(jnp.asarray(tokens)))[0] != before).any(axis=-1)
    assert np.flatnonzero(changed).tolist() == list(range(5, 5 + 13))


def test_a_window_that_spans_the_rows_costs_nothing(any_family):
    """A window as long as the rows gives the same program as no window, in the layers and in their per-layer tables."""

    def program(window: int | None) -> str:
        config = small_config(any_family, sliding_window=window)
        model = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
        tokens = jnp.zeros((1, 128), jnp.int32)
        return str(jax.make_jaxpr(lambda t: model(t, t + 1, t, max_segments=1))(tokens))

    assert program(128) == program(None) != program(127)


def test_bounds_that_a_window_narrows_are_never_taken_for_segments(monkeypatch):
    """cuDNN would take bounds for whole segments if it were given the number of segments."""
    given = []

    def recorded(*context, **more):
        given.append(context[2])
        return RowContext(*context, **more)

    monkeypatch.setattr("jaxpack.model.transformer.RowContext", recorded)
    model = small_model("qwen2")
    for T, expected in ((128, None), (7, 1)):
        tokens = jnp.zeros((1, T), jnp.int32)
        jax.eval_shape(lambda tokens: model(tokens, tokens + 1, tokens, max_segments=1), tokens)
        assert set(given) == {expected}
        given.clear()


def test_positions_restart_where_the_segment_changes():
    segments = jnp.array([[1, 1, 2, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_compile_time_does_not_grow_with_depth(any_family):
    """The program has one block in it, however many layers there are."""

    def program_size(num_layers: int) -> int:
        model = Transformer(small_config(any_family, num_layers=num_layers), dtype=jnp.float32, rngs=nnx.Rngs(0))
        tokens = jnp.zeros((1, 128), jnp.int32)
        return len(list(equations(jax.make_jaxpr(lambda t: model(t, t + 1, t))(tokens).jaxpr)))

    assert program_size(2) == program_size(12)


@pytest.mark.parametrize(
    ("hidden_size", "r", "fits"),
    [(40, 4, set()), (48, 100, {"out", "gate_up", "down"})],  # three ranks of 100 are above 256
)
def test_pallas_is_taken_for_the_projections_that_it_has_kernels_for(hidden_size, r, fits):
    model = small_model("llama", hidden_size=hidden_size, lora=LoraConfig(r=r))
    graph, state = nnx.split(model)
    row = 3 * [jnp.ones((1, 128), jnp.int32)]
    lowered = lower_for_cuda(lambda state: nnx.merge(graph, state)(*row, implementation="pallas"), state)
    names = [module.name for module in triton_modules(lowered)]
    assert names.count("jaxpack_norm_append_lora_input") == len(fits & {"qkv", "gate_up"})
    assert names.count("jaxpack_add_extended") == len(fits & {"out", "down"})
    assert "jaxpack_attention" in names
