"""Tests the noise on embeddings (NEFTune): its size by document, whose draws differ, and that only training has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import random_documents, small_model
from scipy import stats

from jaxpack import Batches, InputError, LoraConfig, TrainConfig, Trainer, make_train_step
from jaxpack.data.packing import EmbeddedBatch
from jaxpack.kernels.attention import segment_bounds
from jaxpack.model.noise import add_noise
from jaxpack.model.weights import weight_of
from jaxpack.train.step import loss_and_gradients, split_trainable

ALPHA, D = 5.0, 64
# Two rows of 128 tokens: three documents and padding; one document.
SEGMENTS = np.array([[1] * 50 + [2] * 8 + [3] * 32 + [0] * 38, [1] * 128], np.int32)


def noise(rows: list[int], key: int = 0, segments: np.ndarray = SEGMENTS) -> np.ndarray:
    bounds = segment_bounds(jnp.asarray(segments))
    x, numbers = jnp.zeros((*segments.shape, D)), jnp.array(rows, jnp.uint32)
    return np.asarray(add_noise(x, bounds.last - bounds.first, numbers, jax.random.key(key), alpha=ALPHA))


def test_each_document_of_a_row_has_the_noise_of_its_own_length():
    drawn = noise([3, 4])
    assert not drawn[SEGMENTS == 0].any()
    for row, segment, length in ((0, 1, 50), (0, 2, 8), (0, 3, 32), (1, 1, 128)):
        here = drawn[row][SEGMENTS[row] == segment].ravel()
        size = ALPHA / np.sqrt(length * D)
        # Uniform over the whole interval: with other keys, one such comparison in 10,000 would fail.
        assert stats.kstest(here, stats.uniform(-size, 2 * size).cdf).pvalue > 1e-4


def test_a_packed_document_has_the_noise_that_it_has_alone_in_distribution():
    alone = [noise([row], segments=np.array([[1] * 8 + [0] * 120], np.int32))[0, :8] for row in range(20)]
    packed = [noise([row], segments=SEGMENTS[:1])[0, 50:58] for row in range(20, 40)]
    assert stats.ks_2samp(np.ravel(alone), np.ravel(packed)).pvalue > 1e-4


def test_draws_follow_from_the_key_and_the_row():
    both = noise([3, 4])
    np.testing.assert_array_equal(both[::-1], noise([4, 3], segments=SEGMENTS[::-1]))  # whatever row lies beside it
    assert (noise([3, 4], key=1) != both)[SEGMENTS > 0].mean() > 0.99
    assert (noise([4, 4])[0] != both[0])[SEGMENTS[0] > 0].mean() > 0.99


@functools.cache
def step():
    """Returns a function of alpha, key and batch that gives the loss of a step of a small model, and a batch."""
    graph, trainable, frozen = split_trainable(small_model("gemma3", lora=LoraConfig(r=4)))
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=1)
    batch = jax.tree.map(jnp.asarray, Batches(random_documents([17, 40, 3, 31]), config)[0])
    run = jax.jit(functools.partial(loss_and_gradients, graph), static_argnames="neftune_noise_alpha")

    def loss(alpha: float | None, key: int | None, batch=batch) -> float:
        key = None if key is None else jax.random.key(key)
        return float(run(trainable, frozen, batch, dropout_key=key, neftune_noise_alpha=alpha)[0])

    return loss, batch


def test_noise_changes_the_loss_only_with_a_key():
    loss, _ = step()
    plain = loss(None, 0)
    assert loss(ALPHA, None) == plain
    assert loss(ALPHA, 0) == loss(ALPHA, 0) != plain
    assert loss(ALPHA, 1) != loss(ALPHA, 0)


def test_rows_that_the_host_has_taken_get_the_same_noise():
    loss, batch = step()
    table = np.asarray(weight_of(small_model("gemma3").embedding).dense(jnp.float32))
    embedded = EmbeddedBatch(*batch, jnp.asarray(table[np.asarray(batch.tokens)]))
    assert loss(ALPHA, 0, embedded) == pytest.approx(loss(ALPHA, 0), rel=1e-6)


def test_a_run_draws_new_noise_in_each_step_and_evaluates_without():
    documents = random_documents([17, 40, 3, 31])
    options = {"max_length": 128, "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-30}

    def train(alpha: float | None):
        config = TrainConfig(**options, neftune_noise_alpha=alpha, eval_steps=1)
        return Trainer(small_model("qwen3", lora=LoraConfig(r=4)), None, documents, config, documents).train()

    noisy, plain = train(ALPHA), train(None)
    assert plain.losses[0] == pytest.approx(plain.losses[1], rel=1e-6)
    assert abs(noisy.losses[0] - noisy.losses[1]) > 1e-4
    assert noisy.evaluations == pytest.approx(plain.evaluations, rel=1e-6)


def test_values_that_cannot_be_are_refused():
    assert TrainConfig(neftune_noise_alpha=0).neftune_noise_alpha is None
    for wrong in (-1, float("nan"), True, "5"):
        with pytest.raises(InputError, match="`neftune_noise_alpha` must be 0 or a positive number, or None"):
            TrainConfig(neftune_noise_alpha=wrong)
    graph, _, _ = split_trainable(small_model("qwen3", lora=LoraConfig(r=4)))
    with pytest.raises(InputError, match="`dropout_seed` must be a number with `neftune_noise_alpha` 5"):
        make_train_step(graph, optax.sgd(1.0), neftune_noise_alpha=5.0)
