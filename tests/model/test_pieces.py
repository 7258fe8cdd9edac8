"""A feed-forward in pieces has the same values and gradients, computes nothing a third time, and takes less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_documents, small_model

from jaxpack.data.batching import Batches
from jaxpack.model import pieces
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.step import loss_and_gradients, split_trainable

LENGTHS = [17, 2, 40, 3, 22, 31, 9, 28, 5, 64, 300, 200]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 128)
    monkeypatch.setattr(pieces, "_UNIT", 8)


def test_pieces_are_few_equal_and_of_whole_units():
    for tokens in (1, 1024, 16_384, 32_768):
        assert (pieces.num_pieces(tokens), pieces.piece_of(tokens)) == (1, tokens)
    for tokens in (32_769, 65_536, 131_072, 100_096, 524_288):
        count, size = pieces.num_pieces(tokens), pieces.piece_of(tokens)
        assert size % 128 == 0
        assert size <= 16_384 <= 2 * size
        assert tokens <= count * size < tokens + count * 128


def batch():
    config = TrainConfig(max_length=512, packing=True, per_device_train_batch_size=2, max_steps=1)
    return jax.tree.map(jnp.asarray, Batches(random_documents(LENGTHS), config)[0])


def compiled(family: str, remat: str, lora: LoraConfig | None, **changes: int):
    graph, trainable, frozen = split_trainable(small_model(family, lora=lora, **changes))
    compute = functools.partial(loss_and_gradients, graph, remat=remat)
    return jax.jit(compute), (trainable, frozen, batch())


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("lora", [LoraConfig(r=8), LoraConfig(r=8, use_dora=True), None], ids=["lora", "dora", "all"])
@pytest.mark.parametrize("remat", ["full", "offload", "keep_attention"])
def test_losses_and_gradients_are_those_of_the_whole(family, lora, remat, monkeypatch):
    step, arguments = compiled(family, remat, lora)
    loss, gradients = step(*arguments)
    whole = step.lower(*arguments).as_text()
    monkeypatch.setattr(pieces, "PIECE", 128)
    monkeypatch.setattr(pieces, "_UNIT", 8)
    step, arguments = compiled(family, remat, lora)
    assert step.lower(*arguments).as_text() != whole
    loss_in_pieces, in_pieces = step(*arguments)
    np.testing.assert_allclose(loss_in_pieces, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(in_pieces), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


def test_a_feed_forward_is_computed_twice_in_a_step(small_pieces):
    """Once forward, and once for its gradients; the backward pass of the layer does not compute its output again."""
    step, arguments = compiled("qwen3", "full", LoraConfig(r=8), intermediate_size=176)
    text = str(jax.make_jaxpr(step)(*arguments))
    projections = re.findall(r"f32\[1,\d+,352\] = dot_general", text)
    # To gate and up: forward, and again. Their gradients are those of the input, not of the frozen matrix.
    assert len(projections) == 2


def test_a_feed_forward_in_pieces_takes_less_memory(monkeypatch):
    sizes = {"intermediate_size": 2048}
    peaks = []
    for piece in (2**30, 128):
        monkeypatch.setattr(pieces, "PIECE", piece)
        step, arguments = compiled("qwen3", "full", LoraConfig(r=8), **sizes)
        peaks.append(step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
    tokens = batch().tokens.size
    assert peaks[0] - peaks[1] > 0.5 * 3 * 2048 * 4 * tokens


def test_dropout_masks_are_those_of_whole_rows(monkeypatch):
    graph, trainable, frozen = split_trainable(small_model("qwen3", lora=LoraConfig(r=8, lora_dropout=0.5)))
    programs = []
    for piece in (2**30, 128):
        monkeypatch.setattr(pieces, "PIECE", piece)
        compute = functools.partial(loss_and_gradients, graph, dropout_key=jax.random.key(0))
        programs.append(str(jax.make_jaxpr(compute)(trainable, frozen, batch())))
    assert programs[0] == programs[1]  # They are drawn for whole rows, so nothing is cut into pieces.
