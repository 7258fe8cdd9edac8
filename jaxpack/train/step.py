"""One optimizer step (objective, gradient, update, metrics) as pure functions on pytrees, compiled per batch shape."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxpack.constants import Implementation, Remat
from jaxpack.data.packing import AnyBatch, BatchLimits
from jaxpack.errors import InputError
from jaxpack.kernels.logits import CHUNK
from jaxpack.model.config import ModelConfig
from jaxpack.model.remat import compiler_options
from jaxpack.model.shards import gathering, specs
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.objectives.forward import Forward
from jaxpack.objectives.objective import Objective, Sums
from jaxpack.objectives.sft import SFT
from jaxpack.optimizers.placement import state_specs
from jaxpack.parallel.mesh import DeviceMesh, make_mesh
from jaxpack.parallel.placement import WHOLE, keep_placed
from jaxpack.parallel.shard import sum_over_shards

# A user's function that computes metrics of an evaluation: `(losses, predictions, batch) -> {name: (sum, weight)}`.
ComputeMetrics = Callable[..., dict[str, tuple[Any, Any]]]


class TrainState(NamedTuple):
    """Holds the arrays that a step changes: float32 trained parameters, optimizer state, and the number of steps.

    A step donates these arrays: they can be used only once.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxpack, optax, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> graph, trainable, frozen = jaxpack.split_trainable(model)
      >>> state = jaxpack.TrainState(trainable, optax.adamw(1e-4).init(trainable), step=jnp.int32(0))
    """

    trainable: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Holds a step's float32 metrics: loss, gradient norm before clipping, and `more`: the objective's own metrics."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    more: dict[str, Float[Array, ""]] | None = None


class EvalSums(NamedTuple):
    """Holds the sums over one evaluation batch: those of the objective, and (sum, weight) of each user metric."""

    objective: Sums
    computed: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def split_trainable(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the model's structure, its trained parameters and its frozen weights.

    Trained parameters are float32, because many updates are too small for bfloat16 to represent. They are copies,
    because the step donates the arrays that it is given. After the last step, `nnx.update(model, state.trainable)` puts
    them into the model.

    Example:
      >>> import jax, jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=8, target_modules="q_proj,v_proj"))
      >>> graph, trainable, frozen = jaxpack.split_trainable(model)
      >>> len(jax.tree.leaves(trainable))  # A and B of each projection, stacked over layers
      4
    """
    model.read_weights()
    graph, trainable, frozen = split_trained(model)
    return graph, float32_copies(trainable), frozen


def float32_copies(parameters: nnx.State) -> nnx.State:
    """Returns float32 copies of parameters."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), parameters)


def loss_and_gradients(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: AnyBatch,
    **options: Any,
) -> tuple[Float[Array, ""], nnx.State]:
    """Returns only the loss and the gradients of `objective_and_gradients`."""
    sums, gradients = objective_and_gradients(graph, trainable, frozen, batch, **options)
    return sums.loss, gradients


def objective_and_gradients(
    graph: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: AnyBatch,
    *,
    objective: Objective = SFT(),  # noqa: B008
    remat: Remat = "full",
    implementation: Implementation | None = None,
    limits: BatchLimits = BatchLimits(),  # noqa: B008
    dropout_key: Key[Array, ""] | None = None,
    neftune_noise_alpha: float | None = None,
    loss_chunk: int = CHUNK,
    router_aux_loss_coef: float = 0.0,
    mesh: DeviceMesh | None = None,
) -> tuple[Sums, nnx.State]:
    """Returns the objective over a batch `[A, B, T]` with its metrics, and the gradient of its loss.

    Each device of the mesh takes its share of the B rows and works through the A micro-batches one after another. Loss,
    metrics and gradients are divided by the weight of the whole batch (for SFT its number of targets), so they do not
    depend on how the documents are spread over devices, micro-batches and rows. The load-balancing loss of a mixture of
    experts does, and so do the figures of how its experts are used. With a weight of 0 nothing is divided (the loss and
    the gradients of SFT are then 0).

    Args:
      objective: the objective to minimise.
      remat, implementation: see `Transformer`.
      limits: upper limits for the documents in a row, and for the targets in a micro-batch on one device.
      dropout_key: turns the dropout of adapters, and the noise on embeddings, on; None turns them off.
      neftune_noise_alpha: as in `TrainConfig`.
      loss_chunk: the number of tokens whose logits exist at a time.
      router_aux_loss_coef: the coefficient of the load-balancing loss of a mixture of experts, which is added to the
        loss. Each micro-batch has its own, and counts by its weight.
      mesh: the devices; None is the one device that arrays are made on.
    """
    mesh = make_mesh() if mesh is None else mesh
    whole = trainable, frozen

    def local_sums(
        batch: AnyBatch, trainable: nnx.State, frozen: nnx.State, key: Key[Array, ""] | None
    ) -> tuple[Sums, nnx.State]:
        def micro_sums(trainable: nnx.State, micro: AnyBatch) -> tuple[Array, Sums]:
            model = nnx.merge(graph, *gathering((trainable, frozen), whole, mesh))
            options = {"remat": remat, "implementation": implementation, "limits": limits, "loss_chunk": loss_chunk}
            check_router_aux_loss_coef(router_aux_loss_coef, model.config)
            options |= {"dropout_key": key, "neftune_noise_alpha": neftune_noise_alpha}
            forward = Forward(model, micro, balances=router_aux_loss_coef > 0, **options)
            sums = _with_router(objective(forward), forward, router_aux_loss_coef)
            return sums.loss, sums

        return _accumulated(jax.value_and_grad(micro_sums, has_aux=True), trainable, batch)

    of_trainable, of_frozen = specs(whole, mesh)
    summed = sum_over_shards(local_sums, mesh, (of_trainable, of_frozen, WHOLE), (WHOLE, of_trainable))
    sums, gradients = summed(batch, trainable, frozen, dropout_key)
    # Divide only here, in float32: before the backward pass, 1 / weight would push float16 gradients to zero.
    weight = jnp.where(sums.weight == 0, 1.0, sums.weight)
    loss, metrics, gradients = jax.tree.map(lambda x: x / weight, (sums.loss, sums.metrics, gradients))
    return Sums(loss, sums.weight, metrics), gradients


def check_router_aux_loss_coef(value: float, config: ModelConfig) -> None:
    """Raises InputError if the coefficient is negative, or not 0 for a model without experts."""
    if value < 0:
        raise InputError(f"`router_aux_loss_coef` must be 0 or a positive number, got {value}.")
    if value and not config.num_experts:
        raise InputError(
            f"`router_aux_loss_coef` must be 0 for a model without experts, got {value}: there is no router."
        )


def _with_router(sums: Sums, forward: Forward, router_aux_loss_coef: float) -> Sums:
    """Adds to the metrics how evenly a mixture's experts are used, and to the loss the load-balancing loss.

    If the objective has a metric of the same name, that one is kept.
    """
    router = forward.router_sums
    if router is None:
        return sums
    num_layers, weight = forward.model.config.num_layers, jax.lax.stop_gradient(sums.weight)
    metrics = {"busiest_expert": router.busiest / num_layers, "unused_experts": router.unused / num_layers}
    loss = sums.loss
    if router_aux_loss_coef > 0:
        metrics["router_aux_loss"] = router.load_balancing_loss
        loss += router_aux_loss_coef * metrics["router_aux_loss"] * weight
    return Sums(loss, sums.weight, {name: weight * value for name, value in metrics.items()} | sums.metrics)


def _accumulated(gradient_of: Callable[..., Any], trainable: nnx.State, batch: AnyBatch) -> tuple[Sums, nnx.State]:
    """Returns the sums and gradients of all micro-batches, which are computed one after another and added up."""

    def of_micro(micro: AnyBatch) -> tuple[Sums, nnx.State]:
        (_, sums), gradients = gradient_of(trainable, micro)
        return sums, gradients

    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return of_micro(first)

    def accumulate(total: Any, micro: AnyBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_micro(micro)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_micro, first))
    return jax.lax.scan(accumulate, zero, batch)[0]


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective = SFT(),  # noqa: B008
    remat: Remat = "full",
    implementation: Implementation | None = None,
    dropout_seed: int | None = None,
    neftune_noise_alpha: float | None = None,
    loss_chunk: int = CHUNK,
    router_aux_loss_coef: float = 0.0,
    mesh: DeviceMesh | None = None,
    fetches_layers: bool = False,
    fetches_head: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted step: `step(state, frozen, batch, limits=BatchLimits()) -> (state, metrics)`.

    `state` is a `TrainState`, whose arrays are donated; `frozen` is not donated. `limits`, a static argument, holds
    upper limits for the documents in a row and the targets in a micro-batch on one device; it may be left out.
    `metrics` has the float32 scalars `loss` and `grad_norm`, and `more`: a dict of the objective's own metrics, and of
    how evenly a mixture's experts are used (`docs/experts.md`). On a mesh of several devices, state and frozen weights
    lie as `model.shards` says, and each device gets its share of a batch's rows (`parallel.placement`).

    Args:
      graph: the model's structure, from `split_trainable`.
      optimizer: any optax transformation; gradients reach it unclipped.
      objective: the objective to minimise, see `Objective`.
      remat: the choice of activations that the backward pass recomputes, as in `TrainConfig`, but not "auto".
      implementation: the implementation of all kernels, as in `TrainConfig`.
      dropout_seed: turns dropout and the noise on embeddings on; each step draws new ones from the seed and the number
        of the step.
      neftune_noise_alpha: as in `TrainConfig`. Needs a `dropout_seed`.
      loss_chunk: the number of tokens whose logits exist at a time. Fewer take less memory, and more time.
      router_aux_loss_coef: as in `TrainConfig`.
      mesh: the devices; None is the current device alone.
      fetches_layers: whether frozen matrices of the layers lie in the host's memory. The program is then compiled
        without CUDA graphs, so that copies overlap with computation.
      fetches_head: whether the head does.

    Raises:
      InputError: there is a `neftune_noise_alpha`, but no `dropout_seed`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxpack, optax, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> graph, trainable, frozen = jaxpack.split_trainable(jaxpack.add_lora(model, jaxpack.LoraConfig(r=8)))
      >>> optimizer = optax.adamw(1e-4)
      >>> state = jaxpack.TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
      >>> step = jaxpack.make_train_step(graph, optimizer)
      >>> batch = next(jaxpack.Packer([{"input_ids": [5, 6, 7]}], max_length=128, rows_per_batch=1))
      >>> state, metrics = step(state, frozen, batch)
      >>> int(state.step)
      1
    """
    if neftune_noise_alpha is not None and dropout_seed is None:
        raise InputError(
            f"`dropout_seed` must be a number with `neftune_noise_alpha` {neftune_noise_alpha}, got None: the noise is"
            " drawn from it."
        )
    mesh = make_mesh() if mesh is None else mesh

    def step(
        state: TrainState,
        frozen: nnx.State,
        batch: AnyBatch,
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
            neftune_noise_alpha=neftune_noise_alpha,
            loss_chunk=loss_chunk,
            router_aux_loss_coef=router_aux_loss_coef,
            mesh=mesh,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = cast(nnx.State, optax.apply_updates(state.trainable, updates))
        trainable = keep_placed(trainable, specs(trainable, mesh), mesh)
        optimizer_state = keep_placed(optimizer_state, state_specs(optimizer_state, trainable, mesh), mesh)
        metrics = Metrics(sums.loss, optax.tree.norm(gradients), sums.metrics)
        return TrainState(trainable, optimizer_state, state.step + 1), metrics

    options = compiler_options(remat, fetches_layers=fetches_layers, fetches_head=fetches_head)
    return jax.jit(step, donate_argnums=0, static_argnames="limits", compiler_options=options)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled program takes on the device in addition to its arguments and results."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def make_eval_step(
    graph: nnx.GraphDef,
    *,
    objective: Objective = SFT(),  # noqa: B008
    compute_metrics: ComputeMetrics | None = None,
    implementation: Implementation | None = None,
    loss_chunk: int = CHUNK,
    mesh: DeviceMesh | None = None,
    fetches_layers: bool = False,
    fetches_head: bool = False,
) -> Callable[..., EvalSums]:
    """Returns the jitted evaluation: `evaluate(trainable, frozen, batch, limits=BatchLimits()) -> sums`.

    It sums the objective over a batch `[1, B, T]` as in training, but without dropout. Nothing is donated.

    Args:
      compute_metrics: a user's function, see `Trainer`.
      loss_chunk: the number of tokens whose logits exist at a time.
      fetches_layers, fetches_head: as in `make_train_step`.
    """
    mesh = make_mesh() if mesh is None else mesh

    def evaluate(
        trainable: nnx.State,
        frozen: nnx.State,
        batch: AnyBatch,
        limits: BatchLimits = BatchLimits(),  # noqa: B008
    ) -> EvalSums:
        whole = trainable, frozen

        def local_sums(batch: AnyBatch, trainable: nnx.State, frozen: nnx.State) -> EvalSums:
            micro = jax.tree.map(lambda x: x.squeeze(0), batch)
            model = nnx.merge(graph, *gathering((trainable, frozen), whole, mesh))
            options = {"implementation": implementation, "limits": limits, "loss_chunk": loss_chunk}
            forward = Forward(model, micro, **options)
            computed = {} if compute_metrics is None else compute_metrics(*forward.scores, forward.batch)
            return EvalSums(objective(forward), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), computed))

        return sum_over_shards(local_sums, mesh, specs(whole, mesh))(batch, trainable, frozen)

    options = compiler_options("full", fetches_layers=fetches_layers, fetches_head=fetches_head)
    return jax.jit(evaluate, static_argnames="limits", compiler_options=options)
