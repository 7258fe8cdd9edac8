"""Computes the loss of a model on evaluation sets, and its other metrics, within a run or alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.evaluation_sets import (
    UNNAMED,
    EvalDataset,
    by_name,
    check_public_names,
    errors_name_set,
    public_metrics,
)
from jaxpack.data.formatting import FormattingFunc
from jaxpack.data.reading import Dataset, load_for_run
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, check_type
from jaxpack.kernels.host_weight import HostMatrix, HostWeight
from jaxpack.kernels.weight import Weight
from jaxpack.model.shards import deal
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.objectives.objective import Objective, check_objective
from jaxpack.objectives.sft import SFT
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.parallel.mesh import DeviceMesh
from jaxpack.planning.mesh import mesh_of
from jaxpack.settings import TrainConfig
from jaxpack.train.callbacks import check_function
from jaxpack.train.feed import Feed
from jaxpack.train.step import ComputeMetrics, EvalSums, make_eval_step, temporary_bytes
from jaxpack.utils.compilation_cache import ProgramCache

Shape = tuple[int, int, int]  # (A, B, T)


class Evaluation:
    """Evaluates a model on one or several sets of batches, with one compiled program for each row length.

    Args:
      batches: the batches of each set by its name, see `evaluation_batches`.

    Attributes:
      programs: the compiled programs by row length T; empty before `take`.
    """

    def __init__(
        self,
        model: Transformer,
        batches: Mapping[str, Batches],
        *,
        objective: Objective,
        compute_metrics: ComputeMetrics | None,
        implementation: str | None,
        mesh: DeviceMesh,
    ):
        self.batches = batches
        self.programs: dict[int, jax.stages.Compiled] = {}
        self._model, self._mesh = model, mesh
        self._is_cross_entropy = isinstance(objective, SFT)  # Only the exponential of a cross entropy is a perplexity.
        # The plain cross entropy: what is added in training, such as smoothed labels, would hide it.
        objective = SFT() if isinstance(objective, SFT) else objective
        self._options: dict[str, Any] = {"objective": objective, "compute_metrics": compute_metrics, "mesh": mesh}
        self._options |= {"implementation": implementation}

    def lower(
        self, feed: Feed, trainable: nnx.State, frozen: nnx.State, **fetches: Any
    ) -> dict[Shape, jax.stages.Lowered]:
        """Lowers the programs, by the shapes of their batches.

        Args:
          fetches: `fetches_layers` and `fetches_head`, as for `make_eval_step`.

        Raises:
          InputError: two metrics would have the same name.
        """
        self.programs = {}
        graph, _, _ = split_trained(self._model)
        evaluate = make_eval_step(graph, **self._options, **fetches)
        # Sets have the same limits for a shape, so that one program is for all of them.
        limits = {shape: batches.limits[shape[-1]] for batches in self.batches.values() for shape in batches.shapes}
        programs = {}
        for shape in sorted(limits):
            lowered = evaluate.lower(trainable, frozen, feed.abstract(shape), limits=limits[shape])
            sums, computed = lowered.out_info
            own = ["loss", "perplexity"] if self._is_cross_entropy else ["loss"]
            check_public_names(self.batches, list(dict.fromkeys([*own, *sums.metrics, *computed])))
            programs[shape] = lowered
        return programs

    def take(self, programs: Mapping[Shape, jax.stages.Compiled]) -> None:
        """Takes the programs that were compiled of those that `lower` returned.

        Raises:
          InputError: one needs more memory than the device has.
        """
        for shape, program in programs.items():
            _check_room(program, shape)
        self.programs = {shape[-1]: program for shape, program in programs.items()}

    def run(self, feed: Feed, trainable: nnx.State, frozen: nnx.State) -> dict[str, dict[str, float]]:
        """Returns the metrics of each set by its name, and under the name "" those of all sets together.

        Metrics are means over the targets: "loss", for a cross entropy "perplexity", the objective's metrics, and the
        user's metrics. Waits for the device once, at the end.
        """
        sums = {}
        for name, batches in self.batches.items():
            with feed.batches(batches) as on_device:
                sums[name] = [self.programs[batch.tokens.shape[-1]](trainable, frozen, batch) for batch in on_device]
        sums = jax.device_get(sums)
        together = [one for of_set in sums.values() for one in of_set]
        return {name: self._means(of_set) for name, of_set in {UNNAMED: together, **sums}.items()}

    def _means(self, sums: list[EvalSums]) -> dict[str, float]:
        objective, computed = jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *sums)
        loss, weight = objective.loss, objective.weight or 1
        means = {"loss": float(loss / weight)}
        if self._is_cross_entropy:
            means["perplexity"] = math.exp(min(means["loss"], 700.0))  # capped to stay within float64
        means |= {name: float(total / weight) for name, total in objective.metrics.items()}
        return means | {name: float(total / (weight or 1)) for name, (total, weight) in computed.items()}


def evaluation_batches(
    documents: Mapping[str, Documents], config: TrainConfig, objective: Objective, num_devices: int
) -> dict[str, Batches]:
    """Returns batches of each set that hold each of its documents once. Several sets share their few shapes."""
    once = {"num_train_epochs": 1.0, "max_steps": -1, "streaming": False, "gradient_accumulation_steps": 1}
    config = dataclasses.replace(config, **once)
    sets = {}
    for name, of_set in documents.items():
        with errors_name_set(name):
            sets[name] = Batches(of_set, config, objective.documents_together, num_devices=num_devices)
    if len(sets) > 1:
        Batches.share_shapes(list(sets.values()))
    return sets


def load_sets(dataset: EvalDataset, load: Callable[[Dataset | Documents], Documents]) -> dict[str, Documents]:
    """Reads each evaluation set with `load`, and returns them by their names; errors name the set."""
    sets = {}
    for name, of_set in by_name(dataset).items():
        with errors_name_set(name):
            sets[name] = load(of_set)
    return sets


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer | None,
    dataset: EvalDataset,
    config: TrainConfig | None = None,
    *,
    objective: Objective | None = None,
    compute_metrics: ComputeMetrics | None = None,
    formatting_func: FormattingFunc | None = None,
) -> dict[str, float]:
    """Returns the loss of a model on a dataset or on several, and its other metrics. The model may be trained, or not.

    The documents lie in batches as in training, but nothing is dropped out.

    Args:
      tokenizer: as for `Trainer`.
      dataset: as `eval_dataset` of `Trainer`: one dataset, or a mapping of names to several.
      config: the settings of the data and of the batches; None takes the defaults. Those of steps are not used.
      objective: as for `Trainer`.
      compute_metrics: as for `Trainer`.
      formatting_func: as for `Trainer`.

    Returns:
      "eval_loss", for a cross entropy "eval_perplexity", and every other metric as "eval_<name>". With several sets
      these are of all sets together, and beside them is each as "eval_<set>_<name>", such as "eval_math_loss".

    Raises:
      InputError: the model cannot be evaluated on this input; the message says what is wrong and where.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> metrics = jaxpack.evaluate(model, tokenizer, "train.jsonl", jaxpack.TrainConfig(max_length=128))
      >>> sorted(metrics)
      ['eval_loss', 'eval_perplexity']
    """
    return public_metrics(
        evaluate_sets(
            model,
            tokenizer,
            dataset,
            config,
            objective=objective,
            compute_metrics=compute_metrics,
            formatting_func=formatting_func,
        )
    )


def evaluate_sets(
    model: Transformer,
    tokenizer: Tokenizer | None,
    dataset: EvalDataset,
    config: TrainConfig | None = None,
    *,
    objective: Objective | None = None,
    compute_metrics: ComputeMetrics | None = None,
    formatting_func: FormattingFunc | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates as `evaluate` does, and returns the metrics by set, see `Evaluation.run`."""
    config = TrainConfig() if config is None else config
    check_type("model", model, Transformer)
    check_type("config", config, TrainConfig)
    objective = SFT() if objective is None else check_objective(objective)
    check_function("compute_metrics", compute_metrics)
    load = functools.partial(
        load_for_run,
        config,
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        documents_together=objective.documents_together,
        formatting_func=formatting_func,
    )
    documents = load_sets(dataset, load)
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
    kinds = {type(leaf) for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, Weight))}
    with cache.in_use():
        fetches = {"fetches_layers": HostWeight in kinds, "fetches_head": HostMatrix in kinds}
        lowered = evaluation.lower(feed, trainable, frozen, **fetches)
        evaluation.take({shape: cache.compile(program) for shape, program in lowered.items()})
    return evaluation.run(feed, trainable, frozen)


def _check_room(program: jax.stages.Compiled, shape: Shape) -> None:
    """Raises InputError if an evaluation does not fit on the device; its documents may be longer than in training."""
    needed, free = temporary_bytes(program), free_device_bytes(current_device())
    if free is not None and needed > free:
        raise InputError(
            f"`eval_dataset` must fit on the device: a batch of {' x '.join(map(str, shape))} tokens needs"
            f" {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free. A smaller `max_length` or"
            " `per_device_train_batch_size` needs less."
        )
