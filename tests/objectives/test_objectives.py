"""Users can train with their own objective: on hidden states, log-probabilities, or documents that are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import random_documents, small_model

from jaxpack import (
    SFT,
    Batches,
    HiddenObjective,
    InputError,
    LogProbObjective,
    LoraConfig,
    Sums,
    TrainConfig,
    Trainer,
    add_lora,
)
from jaxpack.kernels.token_log_probs import token_log_probs_reference
from jaxpack.model.lora import adapters, without_adapters
from jaxpack.objectives.objective import check_objective
from jaxpack.train.run import Run
from jaxpack.train.step import TrainState, make_train_step, objective_and_gradients, split_trainable

LENGTHS = [17, 2, 40, 3, 22, 31, 9, 28, 5, 64]


@functools.cache
def batch(**changes):
    config = TrainConfig(**{"max_length": 128, "per_device_train_batch_size": 2, "packing": True} | changes)
    return jax.tree.map(jnp.asarray, Batches(random_documents(LENGTHS), config)[0])


@functools.cache
def model(**changes):
    return small_model("qwen3", **{"lora": LoraConfig(r=8)} | changes)


def results(objective, of=None, rows=None):
    graph, trainable, frozen = split_trainable(of or model())
    step = functools.partial(objective_and_gradients, graph, objective=objective)
    return jax.jit(step)(trainable, frozen, rows if rows is not None else batch())


def assert_same(got, want, tolerance=2e-6):
    np.testing.assert_allclose(got[0].loss, want[0].loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def count(batch):
    return jnp.sum(batch.targets != -100)


def cross_entropy(log_probs, batch):
    return -jnp.sum(log_probs), count(batch)


def of_logits(hidden, model, batch):
    log_probs = token_log_probs_reference(
        hidden, model.head, batch.targets, softcap=model.config.final_logit_softcapping
    )
    return -jnp.sum(log_probs), count(batch)


@pytest.mark.parametrize(
    "objective", [LogProbObjective(cross_entropy), pytest.param(HiddenObjective(of_logits), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("changes", [{}, pytest.param({"lora": None}, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_cross_entropy_written_out_is_sft(objective, changes):
    assert_same(results(objective, model(**changes)), results(SFT(), model(**changes)), 5e-6)


def test_micro_batches_add_up_to_the_whole_step():
    def squared(log_probs, batch):
        return jnp.sum(log_probs**2), jnp.sum(batch.segment_ids > 0), {"largest": jnp.sum(log_probs)}

    objective = LogProbObjective(squared)
    whole = results(objective)
    cut = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch())  # [1, 2, T] to [2, 1, T]
    parts = results(objective, rows=cut)
    assert_same(parts, whole)
    np.testing.assert_allclose(parts[0].metrics["largest"], whole[0].metrics["largest"], rtol=1e-6)
    assert parts[0].weight == whole[0].weight == jnp.sum(batch().segment_ids > 0)


def test_without_weight_loss_and_gradients_are_zero():
    sums, gradients = results(LogProbObjective(lambda log_probs, batch: (0 * jnp.sum(log_probs), 0.0)))
    assert sums.loss == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_a_reference_is_the_model_before_training_and_has_no_gradient():
    def drift(log_probs, reference, batch):
        return jnp.sum((log_probs - reference) ** 2), 1.0

    objective = LogProbObjective(drift, with_reference=True)
    fresh = add_lora(small_model("qwen3"), LoraConfig(r=8))
    # Log-probabilities of about 5, whose last bit a CPU may round in two ways, squared.
    assert results(objective, fresh)[0].loss <= 1e-9
    trained = model()
    plain = small_model("qwen3")
    tokens, segments = batch().tokens[0], batch().segment_ids[0]
    np.testing.assert_array_equal(without_adapters(trained).logits(tokens, segments), plain.logits(tokens, segments))

    def by_hand(log_probs, batch):
        hidden = plain(*batch[:3])
        return jnp.sum((log_probs - token_log_probs_reference(hidden, plain.head, batch.targets)) ** 2), 1.0

    assert_same(results(objective, trained), results(LogProbObjective(by_hand), trained), 2e-5)


@pytest.mark.parametrize("changes", [{"lora": None}, {"lora": LoraConfig(r=4, modules_to_save="embed_tokens,lm_head")}])
def test_a_reference_needs_a_model_that_trains_adapters_alone(changes):
    objective = LogProbObjective(lambda *_: (0.0, 1.0), with_reference=True)
    with pytest.raises(InputError, match=r"`objective` must be without a reference, because .* Use `add_lora`"):
        results(objective, model(**changes))


# Direct preference optimisation (https://arxiv.org/abs/2305.18290), as a user would write it.


def dpo(log_probs, reference, batch, beta=0.5):
    T = log_probs.shape[1]

    def of_documents(values):  # [B, T] to sums of each document, [B, T // 2 pairs, chosen and rejected]
        by_row = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=T + 1))(values, batch.segment_ids)
        return by_row[:, 1:].reshape(len(values), T // 2, 2)

    gain = of_documents(log_probs - reference)
    margin = beta * (gain[..., 0] - gain[..., 1])
    there = of_documents(jnp.ones_like(log_probs))[..., 1] > 0
    wins = jnp.sum(there & (margin > 0))
    return -jnp.sum(jnp.where(there, jax.nn.log_sigmoid(margin), 0)), jnp.sum(there), {"accuracy": wins}


DPO = LogProbObjective(dpo, documents_together=2, with_reference=True)


def test_dpo_learns_to_prefer_and_packing_changes_nothing():
    documents = random_documents([9, 12, 20, 7, 15, 15, 30, 4], masked=0.0)
    losses = {}
    for packing in (True, False):
        trained = add_lora(small_model("qwen3"), LoraConfig(r=8))
        size = {"per_device_train_batch_size": 8} if not packing else {"per_device_train_batch_size": 1}
        config = TrainConfig(max_length=128, packing=packing, max_steps=20, learning_rate=2e-2, warmup_steps=0, **size)
        result = Trainer(trained, None, documents, config, objective=DPO).train()
        losses[packing] = result.losses
    np.testing.assert_allclose(losses[True][0], np.log(2), rtol=1e-6)
    assert losses[True][-1] < 0.1
    np.testing.assert_allclose(losses[False][:5], losses[True][:5], rtol=1e-4)


def test_dpo_follows_the_sums_written_out_document_by_document():
    trained = model()
    plain = without_adapters(trained)
    documents = random_documents([12, 12, 12, 12], masked=0.2)  # of one shape: logits compile once
    config = TrainConfig(max_length=128, packing=True, per_device_train_batch_size=1, max_steps=1)
    rows = jax.tree.map(jnp.asarray, Batches(documents, config, documents_together=2)[0])

    def log_prob(of, start, length):
        tokens = jnp.asarray(documents.tokens[start : start + length])[None]
        labels = jnp.asarray(documents.labels[start : start + length])
        found = jax.nn.log_softmax(of.logits(tokens)[0, :-1])[jnp.arange(length - 1), tokens[0, 1:]]
        return jnp.sum(jnp.where(labels[1:] != -100, found, 0))

    pairs = list(zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True))
    gains = [log_prob(trained, *pair) - log_prob(plain, *pair) for pair in pairs]
    margins = 0.5 * jnp.array([gains[0] - gains[1], gains[2] - gains[3]])
    sums, _ = results(DPO, trained, rows)
    np.testing.assert_allclose(sums.loss, -jnp.mean(jax.nn.log_sigmoid(margins)), rtol=2e-5)
    assert sums.weight == 2
    assert sums.metrics["accuracy"] == jnp.mean(margins > 0)


def test_a_step_takes_an_objective_and_reports_its_metrics():
    def f(log_probs, batch):
        return -jnp.sum(log_probs), count(batch), {"seen": count(batch)}

    graph, trainable, frozen = split_trainable(model())
    optimizer = optax.sgd(0.1)
    step = make_train_step(graph, optimizer, objective=LogProbObjective(f))
    state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
    before = jax.tree.leaves(trainable)[0].copy()
    state, metrics = step(state, frozen, batch())
    assert metrics.more == {"seen": 1.0}
    assert metrics.loss > 0
    assert not np.array_equal(jax.tree.leaves(state.trainable)[0], before)


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: (x, x),
        lambda x: (jnp.sum(x), 1.0, {"a": x}),
        lambda x: (jnp.sum(x), 1, 2),
    ],
)
def test_a_function_that_returns_something_else_is_refused(returned):
    objective = LogProbObjective(lambda log_probs, batch: returned(log_probs))
    with pytest.raises(InputError, match=r"`objective` must return \(sum, weight\)"):
        results(objective)


@pytest.mark.parametrize("objective", [cross_entropy, "sft", SFT, 3, LogProbObjective(cross_entropy, 0)])
def test_what_is_no_objective_is_refused(objective):
    with pytest.raises(InputError, match=r"`objective` must be an objective such as|`documents_together` must be"):
        check_objective(objective)
    with pytest.raises(InputError):
        Trainer(model(), None, random_documents([20]), TrainConfig(), objective=objective)


@pytest.mark.slow
def test_an_objective_may_be_a_class_of_its_own():
    class Both:
        documents_together = 1

        def __call__(self, forward):
            sft = SFT()(forward)
            size = jnp.sum(forward.hidden.astype(jnp.float32) ** 2)
            return Sums(sft.loss + 1e-3 * size, sft.weight, {"size": size})

    sums, _ = results(check_objective(Both()))
    assert sums.loss > results(SFT())[0].loss
    assert sums.metrics["size"] > 0
    assert adapters(model())


def test_the_settings_of_the_cross_entropy_change_the_training_loss_and_no_evaluation():
    config = TrainConfig(max_length=128, packing=True, label_smoothing_factor=0.25, z_loss_coef=0.5)
    documents = random_documents(LENGTHS)
    trainer = Trainer(model(), None, documents, config, documents)
    smoothed = SFT(label_smoothing_factor=0.25, z_loss_coef=0.5)
    assert trainer.objective == smoothed
    batches = Batches(documents, config)
    run = Run(trainer.model, batches, config, batches, objective=smoothed)
    assert run._make_step.keywords["objective"] == smoothed
    assert run.evaluation._options["objective"] == SFT()
    plain, changed = (results(objective)[0].loss for objective in (SFT(), smoothed))
    assert changed > plain + 5  # The log-sum-exp of 97 logits is about log(97), 4.6, and half of its square 10.


@pytest.mark.parametrize("name", ["label_smoothing_factor", "z_loss_coef"])
def test_settings_that_an_objective_of_ones_own_would_not_read_are_refused(name):
    with pytest.raises(InputError, match=f"`{name}` must be 0 with an `objective` of your own, which does not read it"):
        Trainer(model(), None, random_documents(LENGTHS), TrainConfig(**{name: 0.5}), objective=SFT())
