"""Computes the loss of a model on a dataset, and its other metrics, within a run or alone."""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx

from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.formatting import FormattingFunc
from jaxpack.data.reading import Dataset, load_for_run
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, check_type
from jaxpack.model.shards import deal
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.objectives.objective import Objective, check_objective
from jaxpack.objectives.sft import SFT
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.parallel.host_memory import is_pinned
from jaxpack.parallel.mesh import DeviceMesh
from jaxpack.planning.mesh import mesh_of
from jaxpack.settings import TrainConfig
from jaxpack.train.callbacks import check_function
from jaxpack.train.feed import Feed
from jaxpack.train.step import ComputeMetrics, make_eval_step, temporary_bytes
from jaxpack.utils.compilation_cache import ProgramCache


class Evaluation:
    """Evaluates a model on batches, with one compiled program for each row length.

    Attributes:
      programs: the compiled programs by row length T; empty before `compile`.
    """

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        *,
        objective: Objective,
        compute_metrics: ComputeMetrics | None,
        implementation: str | None,
        mesh: DeviceMesh,
    ):
        self.batches = batches
        self.programs: dict[int, jax.stages.Compiled] = {}
        self._model, self._mesh = model, mesh
        # The plain cross entropy: what is added in training, such as smoothed labels, would hide it.
        objective = SFT() if isinstance(objective, SFT) else objective
        self._options = {"objective": objective, "compute_metrics": compute_metrics, "mesh": mesh}
        self._options |= {"implementation": implementation}

    def compile(
        self, feed: Feed, trainable: nnx.State, frozen: nnx.State, cache: ProgramCache, *, fetches: bool
    ) -> None:
        """Compiles the programs, or finds them in the cache.

        Args:
          fetches: whether weights lie in the host's memory, see `make_eval_step`.

        Raises:
          InputError: one needs more memory than the device has.
        """
        graph, _, _ = split_trained(self._model)
        evaluate = make_eval_step(graph, fetches=fetches, **self._options)
        for shape in self.batches.shapes:
            limits = self.batches.limits[shape[-1]]
            lowered = evaluate.lower(trainable, frozen, feed.abstract(shape), limits=limits)
            program = self.programs[shape[-1]] = cache.compile(lowered)
            _check_room(program, shape)

    def run(self, feed: Feed, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Returns means over the batches: "loss", the objective's metrics, and the user's metrics.

        Waits for the device once, at the end.
        """
        with feed.batches(self.batches) as batches_on_device:
            sums = [self.programs[batch.tokens.shape[-1]](trainable, frozen, batch) for batch in batches_on_device]
        objective, computed = jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *jax.device_get(sums))
        means = {"loss": objective.loss, **objective.metrics}
        means = {name: float(total / (objective.weight or 1)) for name, total in means.items()}
        return means | {name: float(total / (weight or 1)) for name, (total, weight) in computed.items()}


def evaluation_batches(documents: Documents, config: TrainConfig, objective: Objective, num_devices: int) -> Batches:
    """Returns batches that hold each document once."""
    once = {"num_train_epochs": 1.0, "max_steps": -1, "streaming": False, "gradient_accumulation_steps": 1}
    config = dataclasses.replace(config, **once)
    return Batches(documents, config, objective.documents_together, num_devices=num_devices)


def evaluation_metrics(means: dict[str, float], *, is_cross_entropy: bool) -> dict[str, float]:
    """Returns the metrics of an evaluation by their public names: "eval_loss", and for a cross entropy its perplexity.

    Args:
      means: what `Evaluation.run` returns.
    """
    loss, others = means["loss"], {name: value for name, value in means.items() if name != "loss"}
    if is_cross_entropy:
        others = {"perplexity": math.exp(min(loss, 700.0)), **others}  # capped to stay within float64
    return {"eval_loss": loss} | {f"eval_{name}": value for name, value in others.items()}


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer | None,
    dataset: Dataset | Documents,
    config: TrainConfig | None = None,
    *,
    objective: Objective | None = None,
    compute_metrics: ComputeMetrics | None = None,
    formatting_func: FormattingFunc | None = None,
) -> dict[str, float]:
    """Returns the loss of a model on a dataset, and its other metrics. The model may be trained, or not.

    The documents lie in batches as in training, but nothing is dropped out.

    Args:
      tokenizer, dataset, objective, compute_metrics, formatting_func: as for `Trainer` and its `eval_dataset`.
      config: the settings of the data and of the batches; None takes the defaults. Those of steps are not used.

    Returns:
      "eval_loss", for a cross entropy "eval_perplexity", and every other metric as "eval_<name>".

    Raises:
      InputError: the model cannot be evaluated on this input; the message says what is wrong and where.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> metrics = jaxpack.evaluate(model, tokenizer, "train.jsonl", jaxpack.TrainConfig(max_length=128))
      >>> sorted(metrics)
      ['eval_loss', 'eval_perplexity']
    """
    config = TrainConfig() if config is None else config
    check_type("model", model, Transformer)
    check_type("config", config, TrainConfig)
    objective = SFT() if objective is None else check_objective(objective)
    check_function("compute_metrics", compute_metrics)
    documents = load_for_run(
        config,
        dataset,
        tokenizer,
        vocab_size=model.config.vocab_size,
        documents_together=objective.documents_together,
        formatting_func=formatting_func,
    )
    mesh = mesh_of(config, model)
    batches = evaluation_batches(documents, config, objective, mesh.size)
    model.read_weights()
    _, *parameters = split_trained(model)
    trainable, frozen = (deal(state, mesh) for state in parameters)
    evaluation = Evaluation(
        model,
        batches,
        objective=objective,
        compute_metrics=compute_metrics,
        implementation=config.implementation,
        mesh=mesh,
    )
    feed, cache = Feed.of(model, mesh), ProgramCache(config.compilation_cache_dir)
    fetches = feed.embedding is not None or any(map(is_pinned, jax.tree.leaves(frozen)))
    with cache.in_use():
        evaluation.compile(feed, trainable, frozen, cache, fetches=fetches)
    means = evaluation.run(feed, trainable, frozen)
    return evaluation_metrics(means, is_cross_entropy=isinstance(objective, SFT))


def _check_room(program: jax.stages.Compiled, shape: tuple[int, ...]) -> None:
    """Raises InputError if an evaluation does not fit on the device; its documents may be longer than in training."""
    needed, free = temporary_bytes(program), free_device_bytes(current_device())
    if free is not None and needed > free:
        raise InputError(
            f"`eval_dataset` must fit on the device: a batch of {' x '.join(map(str, shape))} tokens needs"
            f" {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free. A smaller `max_length` or"
            " `per_device_train_batch_size` needs less."
        )
