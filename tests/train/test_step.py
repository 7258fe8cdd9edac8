"""Tests that a step's loss and gradient do not depend on the layout of documents, and what a step changes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import random_documents, small_model

from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.packing import PackedBatch, Rows, fill_batch
from jaxpack.model.linear import Linear, LoraAdapter
from jaxpack.optimizers.optimizer import make_optimizer, make_schedule
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.step import TrainState, loss_and_gradients, make_train_step, split_trainable

LENGTHS = [17, 2, 40, 3, 22, 31, 9, 28, 5, 64, 11, 8, 19, 33, 26, 14]
LORA = LoraConfig(r=4)


def batch_of(documents: Documents, groups: list[list[list[int]]], row_length: int) -> PackedBatch:
    """Builds a batch `[A, B, T]` from micro-batches of rows of documents."""
    widest = max(len(row) for micro in groups for row in micro)
    table = np.array([[[*row, *[-1] * (widest - len(row))] for row in micro] for micro in groups])
    rows = Rows.grouped(table.reshape(-1, widest), documents.lengths)
    which = np.arange(len(rows)).reshape(table.shape[:2])
    batch = fill_batch(documents.tokens, documents.labels, documents.starts, rows, which, row_length)
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def _compiled(graph: nnx.GraphDef) -> Callable:
    return jax.jit(functools.partial(loss_and_gradients, graph))


def evaluate(parts: tuple, batch: PackedBatch) -> tuple:
    """Calls `loss_and_gradients`, compiled once for each model and shape."""
    graph, trainable, frozen = parts
    return _compiled(graph)(trainable, frozen, batch)


def flat(tree: object) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.fixture(params=["qwen3", pytest.param("llama", marks=pytest.mark.slow)])  # no QK norm
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def relative(a: object, b: object) -> float:
    a, b = flat(a), flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_packed_row_has_the_loss_and_gradient_of_its_documents_alone(family, lora):
    parts = split_trainable(small_model(family, lora=lora))
    documents = random_documents(LENGTHS[:6])
    loss, gradients = evaluate(parts, batch_of(documents, [[list(range(6))]], 128))
    targets = documents.num_targets
    alone = [
        jax.tree.map(lambda x, n=n: x * n / targets.sum(), evaluate(parts, batch_of(documents, [[[d]]], 128)))
        for d, n in enumerate(targets)
    ]
    expected_loss, expected_gradients = jax.tree.map(lambda *terms: sum(terms), *alone)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert relative(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([[list(range(16))]], id="padding-free"),
        pytest.param([[[d] for d in range(16)]], id="padded"),
        pytest.param(
            [[[d] for d in range(8)], [[d] for d in range(8, 16)]], id="2 micro-batches", marks=pytest.mark.slow
        ),
        pytest.param([[[d, d + 8] for d in range(8)], [[]] * 8], id="beside an empty micro-batch"),
        pytest.param([[list(range(4 * m, 4 * m + 4))] for m in range(4)], id="4 micro-batches", marks=pytest.mark.slow),
        pytest.param([[list(range(2 * m, 2 * m + 2))] for m in range(8)], id="8 micro-batches", marks=pytest.mark.slow),
        pytest.param([[[9, 0, 3], [5, 4, 1, 2, 11]], [[15, 14, 13], [12, 10, 8, 7, 6]]], id="another order"),
    ],
)
@pytest.mark.parametrize("lora", [pytest.param(LORA, id="lora"), pytest.param(None, id="full", marks=pytest.mark.slow)])
def test_loss_and_gradient_do_not_depend_on_the_cut(family, lora, groups):
    parts = split_trainable(small_model(family, lora=lora))
    documents = random_documents(LENGTHS)
    reference = evaluate(parts, batch_of(documents, [[list(range(8)), list(range(8, 16))]], 256))
    loss, gradients = evaluate(parts, batch_of(documents, groups, 384))
    assert abs(loss - reference[0]) <= 1e-6 * reference[0]
    assert relative(gradients, reference[1]) <= 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_targets_loss_and_gradient_are_exactly_zero(family, accumulation):
    parts = split_trainable(small_model(family, lora=LORA))
    documents = random_documents([20, 30], masked=1.1)
    groups = [[[0]], [[1]]] if accumulation == 2 else [[[0], [1]]]
    loss, gradients = evaluate(parts, batch_of(documents, groups, 128))
    assert loss == 0
    assert np.all(flat(gradients) == 0)


def one_step(model, config: TrainConfig, batch: PackedBatch, dropout_seed: int | None = None):
    graph, trainable, frozen = split_trainable(model)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    step = make_train_step(graph, optimizer, remat="full", dropout_seed=dropout_seed)
    state = TrainState(jax.tree.map(jnp.copy, trainable), optimizer.init(trainable), jnp.int32(0))
    before = flat(trainable)
    state, metrics = step(state, frozen, batch)
    return before, state, metrics, step


def test_the_gradient_of_a_bias_is_summed_in_float32():
    linear = Linear(4, {"o_proj": 3}, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 2048, 4), jnp.bfloat16)
    d_out = jnp.asarray(np.random.default_rng(0).normal(1, 0.3, (2, 2048, 3)), jnp.bfloat16)

    def loss(linear: Linear) -> jax.Array:
        return jnp.vdot(linear(x).astype(jnp.float32), d_out.astype(jnp.float32))

    gradient = nnx.jit(nnx.grad(loss))(linear).bias[...]
    np.testing.assert_allclose(gradient, np.asarray(d_out, np.float64).sum((0, 1)), rtol=1e-5)


def test_what_dropout_leaves_is_scaled_as_in_float32():
    linear = Linear(64, {"o_proj": 64}, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    linear.weight.set_value(jnp.zeros((64, 64), jnp.bfloat16))
    linear.lora["o_proj"] = LoraAdapter(jnp.eye(64), jnp.eye(64), scaling=1.0, dropout=0.1)
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (1, 50, 64)), jnp.bfloat16)
    out = np.asarray(linear(x, jax.random.split(jax.random.key(0), 1)), np.float32)
    expected = np.asarray((x.astype(jnp.float32) / 0.9).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(out, np.where(out == 0, 0, expected))
    assert 0 < (out == 0).mean() < 0.2


def test_a_step_is_the_written_out_adamw():
    model = small_model("qwen3", lora=LORA)
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, lr_scheduler_type="constant")
    batch = batch_of(random_documents(LENGTHS), [[list(range(16))]], 384)
    _, gradients = evaluate(split_trainable(model), batch)
    before, state, metrics, _ = one_step(model, config, batch)
    g = flat(gradients)
    norm = np.linalg.norm(g)
    assert norm > 0.5
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    g *= 0.5 / norm
    # In Adam's first step both moments, corrected for bias, are those of this gradient alone.
    expected = before - 1e-2 * (g / (np.abs(g) + 1e-8) + 0.1 * before)
    np.testing.assert_allclose(flat(state.trainable), expected, atol=2e-6)


def test_norm_scales_do_not_decay():
    model = small_model("qwen3")
    config = TrainConfig(learning_rate=1.0, weight_decay=0.5, lr_scheduler_type="constant")
    nothing = batch_of(random_documents([20], masked=1.1), [[[0]]], 128)  # without gradient, only decay acts
    _, trainable, _ = split_trainable(model)
    _, state, *_ = one_step(model, config, nothing)
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(trainable), jax.tree.leaves(state.trainable), strict=True
    ):
        is_scale = any(getattr(key, "key", None) == "scale" for key in path)
        np.testing.assert_allclose(after, before if is_scale else 0.5 * before, rtol=1e-6)


@pytest.fixture(scope="module")
def compiled_step():
    """Returns a compiled step's memory use, and the bytes of its state and of the frozen weights."""
    batch = batch_of(random_documents(LENGTHS), [[list(range(16))]], 384)
    graph, trainable, frozen = split_trainable(small_model("qwen3", lora=LORA))
    optimizer = optax.adamw(1e-3)
    step = make_train_step(graph, optimizer, remat="full", dropout_seed=None)
    state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
    memory = step.lower(state, frozen, batch).compile().memory_analysis()
    return memory, *(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state, frozen))


def test_the_state_is_donated(compiled_step):
    memory, state_bytes, _ = compiled_step
    assert memory.alias_size_in_bytes >= state_bytes


def test_frozen_weights_are_an_argument_and_no_constant(compiled_step):
    # If the step closed over the frozen weights, they would be constants of the program.
    memory, state_bytes, frozen_bytes = compiled_step
    assert memory.argument_size_in_bytes >= state_bytes + frozen_bytes


def test_trained_parameters_are_float32_and_frozen_ones_as_they_were():
    _, trainable, frozen = split_trainable(small_model("qwen3", lora=LORA, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    _, trainable, frozen = split_trainable(small_model("qwen3", dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert not jax.tree.leaves(frozen)


@pytest.mark.slow
def test_dropout_draws_every_mask_anew_and_the_same_from_the_same_seed(monkeypatch):
    drawn, bernoulli = set(), jax.random.bernoulli

    def recorded(*args):
        mask = bernoulli(*args)
        jax.debug.callback(lambda mask: drawn.add(mask.tobytes()), mask)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", recorded)
    batch = batch_of(random_documents(LENGTHS), [[list(range(8))], [list(range(8, 16))]], 256)
    model = small_model("qwen3", lora=LoraConfig(r=4, lora_dropout=0.5))
    config = TrainConfig(learning_rate=1e-30)  # changes no parameter
    frozen = split_trainable(model)[2]

    def masks() -> set[bytes]:
        jax.effects_barrier()
        found = set(drawn)
        drawn.clear()
        return found

    _, state, first, step = one_step(model, config, batch, dropout_seed=1)
    of_first = masks()
    state, second = step(state, frozen, batch)
    of_second = masks()
    _, again = step(state._replace(step=jnp.int32(0)), frozen, batch)
    each = 2 * 2 * 4  # micro-batches, layers, projections; recomputation repeats the draws
    assert len(of_first) == len(of_second) == each
    assert masks() == of_first
    assert not of_first & of_second
    _, _, off, _ = one_step(model, config, batch)
    assert first.loss == again.loss
    assert not masks()
    assert len({float(metrics.loss) for metrics in (first, second, off)}) == 3


@pytest.mark.parametrize("warmup", [0, 4, 0.4])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedule_is_that_of_transformers(kind, warmup):
    config = TrainConfig(learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=warmup)
    schedule = make_schedule(config, 10)
    warm = 4 if warmup else 0
    for step in range(10):
        share = (step - warm) / (10 - warm)
        decay = {"linear": 1 - share, "cosine": 0.5 * (1 + np.cos(np.pi * share)), "constant_with_warmup": 1}[kind]
        np.testing.assert_allclose(schedule(step), 2.0 * (step / warm if step < warm else decay), atol=1e-6)


def test_padding_free_batches_have_the_losses_of_padded_ones(family):
    documents = random_documents(LENGTHS)
    parts = split_trainable(small_model(family, lora=LORA))
    free, padded = (
        Batches(documents, TrainConfig(padding_free=choice, per_device_train_batch_size=4, max_length=48))
        for choice in (True, False)
    )
    for step in range(4):
        losses = [evaluate(parts, jax.tree.map(jnp.asarray, b[step]))[0] for b in (free, padded)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
