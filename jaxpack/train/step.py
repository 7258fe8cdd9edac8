"""One optimizer step: loss, gradient, update, metrics. Pure functions on pytrees, compiled once per batch shape."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jaxpack.constants import IGNORE, Implementation, Remat
from jaxpack.data.packing import BatchLimits, PackedBatch
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.model.remat import compiler_options
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import TRAINED
from jaxpack.parallel.mesh import make_mesh
from jaxpack.parallel.shard import shard_key, sum_over_shards
from jaxpack.settings import TrainConfig


class TrainState(NamedTuple):
    """What a step changes, and donates: float32 trainable parameters, the optimizer's state, the number of the step."""

    trainable: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Of one step: mean loss over its targets, and the gradient's norm before clipping. float32."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def split_trainable(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model's structure, what is trained and what is frozen.

    Trained parameters come out as float32 copies: an update is often too small for bfloat16 to see, and the step
    donates them.
    """
    graph, trainable, frozen = nnx.split(model, TRAINED, ...)
    return graph, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable), frozen


def make_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """The learning rate by step, as transformers has it: linear warm-up from 0, then decay to 0, or none."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * num_steps
    warmup = math.ceil(warmup)
    decay_steps = max(1, num_steps - warmup)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "constant_with_warmup": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay_steps),
    }[config.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), after], [warmup])


def make_optimizer(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Norm scales and biases do not decay."""

    def decays(parameters: nnx.State) -> nnx.State:
        def is_matrix(path: tuple, _: jax.Array) -> bool:
            return all(getattr(key, "key", None) not in ("scale", "bias") for key in path)

        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        schedule,
        config.adam_beta1,
        config.adam_beta2,
        config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(clip, adamw)


def summed_loss(
    model: Transformer,
    batch: PackedBatch,
    *,
    remat: Remat = "full",
    implementation: Implementation | None = None,
    limits: BatchLimits = BatchLimits(),  # noqa: B008
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The loss of a batch `[B, T]`, summed over its targets, in float32."""
    hidden = model(
        batch.tokens,
        batch.segment_ids,
        batch.positions,
        remat=remat,
        max_segments=limits.max_segments,
        implementation=implementation,
        dropout_key=dropout_key,
    )
    return linear_cross_entropy(
        hidden,
        model.head,
        batch.targets,
        softcap=model.config.final_logit_softcapping,
        max_targets=limits.max_targets,
        implementation=implementation,
    )


def loss_and_gradients(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: PackedBatch,
    *,
    remat: Remat = "full",
    implementation: Implementation | None = None,
    limits: BatchLimits = BatchLimits(),  # noqa: B008
    dropout_key: Key[Array, ""] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], nnx.State]:
    """Returns the mean loss over all targets of a batch `[A, B, T]`, and its gradient.

    Each device of the mesh takes its own of the B rows, and the A micro-batches one after another. The loss is divided
    by the number of targets of the whole batch, so it does not depend on how the documents are cut into devices,
    micro-batches and rows. Without any target, loss and gradients are 0.

    Args:
      remat, implementation: see `Transformer`.
      limits: of the rows of one device.
      mesh: the devices; None is the one that arrays are made on.
    """
    mesh = make_mesh() if mesh is None else mesh

    def local_sums(batch: PackedBatch, trainable: nnx.State, frozen: nnx.State, key: Key[Array, ""] | None):
        options = {"remat": remat, "implementation": implementation, "limits": limits}
        return _local_sums(graph, trainable, frozen, batch, dropout_key=shard_key(key, mesh), **options)

    num_targets, total = sum_over_shards(local_sums, mesh)(batch, trainable, frozen, dropout_key)
    # Divided only here, in float32: before the backward pass, 1 / num_targets would push float16 gradients to zero.
    return jax.tree.map(lambda x: x / jnp.maximum(1, num_targets), total)


def _local_sums(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: PackedBatch,
    *,
    dropout_key: Key[Array, ""] | None,
    **options: Any,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], nnx.State]]:
    """The number of targets of these rows, and the sum of their losses with its gradient."""

    def micro_loss(trainable: nnx.State, micro: PackedBatch, key: Key[Array, ""] | None) -> Float[Array, ""]:
        model = nnx.merge(graph, trainable, frozen)
        return summed_loss(model, micro, dropout_key=key, **options)

    gradient_of = jax.value_and_grad(micro_loss)
    num_micro = batch.tokens.shape[0]
    keys = None if dropout_key is None else jax.random.split(dropout_key, num_micro)
    if num_micro == 1:
        total = gradient_of(trainable, *jax.tree.map(lambda x: x[0], (batch, keys)))
    else:

        def accumulate(total, micro):
            return jax.tree.map(jnp.add, total, gradient_of(trainable, *micro)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
        total, _ = jax.lax.scan(accumulate, zero, (batch, keys))
    # As a float, so that devices add up numbers of one dtype, all in one go: exact up to 2^24 targets.
    return jnp.sum(batch.targets != IGNORE).astype(jnp.float32), total


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    remat: Remat = "full",
    implementation: Implementation | None = None,
    dropout_seed: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted step: `step(state, frozen, batch, limits=BatchLimits()) -> (state, metrics)`.

    `state` is donated, `frozen` is not; `limits` are static. `dropout_seed` turns dropout on; each step draws anew from
    it. On a mesh of several devices, state and frozen weights lie whole on each of them (`replicate`), and the rows of
    a batch are dealt to them (`batch_sharding`).
    """
    mesh = make_mesh() if mesh is None else mesh

    def step(
        state: TrainState,
        frozen: nnx.State,
        batch: PackedBatch,
        limits: BatchLimits = BatchLimits(),  # noqa: B008
    ) -> tuple[TrainState, Metrics]:
        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        loss, gradients = loss_and_gradients(
            graph,
            state.trainable,
            frozen,
            batch,
            remat=remat,
            implementation=implementation,
            limits=limits,
            dropout_key=key,
            mesh=mesh,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(loss, optax.tree.norm(gradients))
        return TrainState(trainable, optimizer_state, state.step + 1), metrics

    options = compiler_options(remat)
    return jax.jit(step, donate_argnums=0, static_argnames="limits", compiler_options=options)


def make_eval_step(
    graph: nnx.GraphDef, *, implementation: Implementation | None = None, mesh: Mesh | None = None
) -> Callable[..., Float[Array, ""]]:
    """Returns the jitted evaluation: `evaluate(trainable, frozen, batch, limits=BatchLimits()) -> loss`.

    The loss of a batch `[1, B, T]` is summed over its targets, as training has it, without dropout. Nothing is donated.
    """
    mesh = make_mesh() if mesh is None else mesh

    def evaluate(
        trainable: nnx.State,
        frozen: nnx.State,
        batch: PackedBatch,
        limits: BatchLimits = BatchLimits(),  # noqa: B008
    ) -> Float[Array, ""]:
        def local_loss(batch: PackedBatch, trainable: nnx.State, frozen: nnx.State) -> Float[Array, ""]:
            micro = jax.tree.map(lambda x: x.squeeze(0), batch)
            return summed_loss(nnx.merge(graph, trainable, frozen), micro, implementation=implementation, limits=limits)

        return sum_over_shards(local_loss, mesh)(batch, trainable, frozen)

    return jax.jit(evaluate, static_argnames="limits")
