"""One optimizer step: objective, gradient, update, metrics. Pure functions on pytrees, compiled per batch shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxpack.constants import Implementation, Remat
from jaxpack.data.packing import BatchLimits, PackedBatch
from jaxpack.model.remat import compiler_options
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.objectives.forward import Forward
from jaxpack.objectives.objective import Objective, Sums
from jaxpack.objectives.sft import SFT
from jaxpack.parallel.mesh import DeviceMesh, make_mesh
from jaxpack.parallel.shard import shard_key, sum_over_shards

# A user's function of an evaluation: `(losses, predictions, batch) -> {name: (sum, weight)}`.
ComputeMetrics = Callable[..., dict[str, tuple[Any, Any]]]


class TrainState(NamedTuple):
    """What a step changes, and donates: float32 trainable parameters, the optimizer's state, the number of the step."""

    trainable: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """What a step measures, float32: its loss, the gradient's norm before clipping, and an objective's own metrics."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    more: dict[str, Float[Array, ""]] | None = None


class EvalSums(NamedTuple):
    """Sums of one batch of an evaluation: those of the objective, and (sum, weight) of each of a user's metrics."""

    objective: Sums
    computed: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def split_trainable(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the model's structure, what is trained and what is frozen.

    Trained parameters come out as float32 copies: an update is often too small for bfloat16 to see, and the step
    donates them.
    """
    graph, trainable, frozen = split_trained(model)
    return graph, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable), frozen


def loss_and_gradients(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: PackedBatch,
    **options: Any,
) -> tuple[Float[Array, ""], nnx.State]:
    """Returns the loss of `objective_and_gradients`, and its gradient."""
    sums, gradients = objective_and_gradients(graph, trainable, frozen, batch, **options)
    return sums.loss, gradients


def objective_and_gradients(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: PackedBatch,
    *,
    objective: Objective = SFT(),  # noqa: B008
    remat: Remat = "full",
    implementation: Implementation | None = None,
    limits: BatchLimits = BatchLimits(),  # noqa: B008
    dropout_key: Key[Array, ""] | None = None,
    mesh: DeviceMesh | None = None,
) -> tuple[Sums, nnx.State]:
    """Returns the objective over a batch `[A, B, T]`, its metrics, and the gradient of its loss.

    Each device of the mesh takes its own of the B rows, and the A micro-batches one after another. The loss is divided
    by the weight of the whole batch (for SFT its number of targets), so it does not depend on how the documents are cut
    into devices, micro-batches and rows. Where the weight is 0, loss and gradients are 0.

    Args:
      objective: what is minimised.
      remat, implementation: see `Transformer`.
      limits: how many documents and targets the rows of one device have at most.
      dropout_key: turns the dropout of adapters on.
      mesh: the devices; None is the one that arrays are made on.
    """
    mesh = make_mesh() if mesh is None else mesh

    def local_sums(
        batch: PackedBatch, trainable: nnx.State, frozen: nnx.State, key: Key[Array, ""] | None
    ) -> tuple[Sums, nnx.State]:
        def micro_sums(trainable: nnx.State, micro: PackedBatch, key: Key[Array, ""] | None) -> tuple[Array, Sums]:
            model = nnx.merge(graph, trainable, frozen)
            options = {"remat": remat, "implementation": implementation, "limits": limits}
            sums = objective(Forward(model, micro, dropout_key=key, **options))
            return sums.loss, sums

        return _accumulated(jax.value_and_grad(micro_sums, has_aux=True), trainable, batch, shard_key(key, mesh))

    sums, gradients = sum_over_shards(local_sums, mesh)(batch, trainable, frozen, dropout_key)
    # Divided only here, in float32: before the backward pass, 1 / weight would push float16 gradients to zero.
    weight = jnp.where(sums.weight == 0, 1.0, sums.weight)
    loss, metrics, gradients = jax.tree.map(lambda x: x / weight, (sums.loss, sums.metrics, gradients))
    return Sums(loss, sums.weight, metrics), gradients


def _accumulated(
    gradient_of: Callable[..., Any], trainable: nnx.State, batch: PackedBatch, key: Key[Array, ""] | None
) -> tuple[Sums, nnx.State]:
    """The sums and gradients of all micro-batches, one after another."""

    def of_micro(micro: PackedBatch, key: Key[Array, ""] | None) -> tuple[Sums, nnx.State]:
        (_, sums), gradients = gradient_of(trainable, micro, key)
        return sums, gradients

    num_micro = batch.tokens.shape[0]
    keys = None if key is None else jax.random.split(key, num_micro)
    first = jax.tree.map(lambda x: x[0], (batch, keys))
    if num_micro == 1:
        return of_micro(*first)

    def accumulate(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_micro(*micro)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_micro, *first))
    return jax.lax.scan(accumulate, zero, (batch, keys))[0]


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective = SFT(),  # noqa: B008
    remat: Remat = "full",
    implementation: Implementation | None = None,
    dropout_seed: int | None = None,
    mesh: DeviceMesh | None = None,
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
        sums, gradients = objective_and_gradients(
            graph,
            state.trainable,
            frozen,
            batch,
            objective=objective,
            remat=remat,
            implementation=implementation,
            limits=limits,
            dropout_key=key,
            mesh=mesh,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(sums.loss, optax.tree.norm(gradients), sums.metrics)
        return TrainState(trainable, optimizer_state, state.step + 1), metrics

    options = compiler_options(remat)
    return jax.jit(step, donate_argnums=0, static_argnames="limits", compiler_options=options)


def make_eval_step(
    graph: nnx.GraphDef,
    *,
    objective: Objective = SFT(),  # noqa: B008
    compute_metrics: ComputeMetrics | None = None,
    implementation: Implementation | None = None,
    mesh: DeviceMesh | None = None,
) -> Callable[..., EvalSums]:
    """Returns the jitted evaluation: `evaluate(trainable, frozen, batch, limits=BatchLimits()) -> sums`.

    The objective of a batch `[1, B, T]` is summed as in training, without dropout. Nothing is donated.

    Args:
      compute_metrics: see `Trainer`.
    """
    mesh = make_mesh() if mesh is None else mesh

    def evaluate(
        trainable: nnx.State,
        frozen: nnx.State,
        batch: PackedBatch,
        limits: BatchLimits = BatchLimits(),  # noqa: B008
    ) -> EvalSums:
        def local_sums(batch: PackedBatch, trainable: nnx.State, frozen: nnx.State) -> EvalSums:
            micro = jax.tree.map(lambda x: x.squeeze(0), batch)
            model = nnx.merge(graph, trainable, frozen)
            forward = Forward(model, micro, implementation=implementation, limits=limits)
            computed = {} if compute_metrics is None else compute_metrics(*forward.scores, micro)
            return EvalSums(objective(forward), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), computed))

        return sum_over_shards(local_sums, mesh)(batch, trainable, frozen)

    return jax.jit(evaluate, static_argnames="limits")
