"""Predicts, from the lengths of documents, the padding, the lost tokens and the speed of a run in each layout."""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

import numpy as np
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from jaxpack.constants import MEMORY_FRACTION, Layout, Remat
from jaxpack.data.batching import Batches, Truncation
from jaxpack.data.documents import Documents
from jaxpack.data.packing import packed_rows
from jaxpack.errors import InputError, check_type
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.optimizers.optimizer import state_bytes
from jaxpack.parallel.device import current_device
from jaxpack.parallel.mesh import DeviceMesh, num_shards
from jaxpack.planning.cards import JAX_MEMORY_FRACTION, Card, card_named, card_of, cards_called
from jaxpack.planning.choose import choices, gib, predict, usable_bytes
from jaxpack.planning.cost import StepShape
from jaxpack.planning.mesh import mesh_to_inspect, on_mesh, settings_on
from jaxpack.planning.scaling import run_seconds, traffic_of
from jaxpack.settings import TrainConfig
from jaxpack.utils.figures import Line, frame, label_ends, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
ORDINARY = "padded to the longest"  # Other trainers do this: they compile no shapes, so any length will do.
_SAMPLE = 16_384  # The padding by batch size is counted on at most this many documents.
_WORTH = 1.05  # A smaller speed-up is not worth a recommendation.
_LOSS = 0.005  # A smaller share of tokens cut off is not worth a warning.
_TIMES = ("tokens/s", "hours/epoch", "remat", "memory")  # rows that need a model and a device with known rates
_NAMES = {"padded": "padded to one of 4 lengths", "packed": "packed, about as many tokens"}
_COLORS = {ORDINARY: "#D55E00", "padded": "#CC79A7", "padding-free": "#009E73", "packed": "#0072B2"}


# The result.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutEstimate:
    """Holds the predictions for a run in one layout: a value of `Inspection.layouts`.

    Attributes:
      config: the settings of the run. Its trainer will report the same padding share.
      padding_share: the share of padding among the run's positions.
      shapes: the shapes that the run compiles, `(A, B, T)`: micro-batches, rows in a micro-batch, tokens in a row.
      speedup: tokens a second divided by those of the padded run. If times are not predicted, it is computed from the
        number of positions instead.
      remat, tokens_per_second, hours_per_epoch: None without a model, or for a device whose rates are not known. Of
        several devices, they are those of all together.
      choice: what the run chooses, in words: `remat`, and what else saves memory; None as above.
      peak_bytes, host_bytes: the memory that the largest step is predicted to take on each device, and the pinned
        memory on the host; None as above.
      sent_bytes: the bytes that each device sends to others in the largest step; None as above.
      refusal: the reason why the run does not fit in the device's memory; None if it fits or times are not predicted.

    Example:
      >>> from jaxpack import TrainConfig, inspect, load_documents
      >>> documents = load_documents([{"input_ids": list(range(n))} for n in (100, 10)], None, vocab_size=100)
      >>> estimates = inspect(documents, TrainConfig(max_length=128, per_device_train_batch_size=2)).layouts
      >>> round(estimates["padded"].padding_share, 3)  # two rows of 128 positions for 110 tokens
      0.57
    """

    config: TrainConfig
    padding_share: float
    shapes: list[tuple[int, int, int]]
    speedup: float
    remat: Remat | None = None
    choice: str | None = None
    tokens_per_second: float | None = None
    hours_per_epoch: float | None = None
    peak_bytes: int | None = None
    host_bytes: int | None = None
    sent_bytes: float | None = None
    refusal: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection(JupyterMixin):
    """Holds the result of `inspect`: print it with `rich.print`, show it in a notebook, or draw it with `figure`.

    Attributes:
      config: the settings of the run that was asked about.
      lengths: the lengths of all documents in tokens, int64 `[documents]`.
      num_tokens, num_targets: the tokens and the targets in all documents; a target is a token that is trained on.
      untrained: how many documents have no target.
      truncation: counts of the documents that the run shortens or drops, and of the tokens that it loses. The
        `untrained` documents count as dropped, too.
      targets_lost: how many targets are cut off.
      layouts: the estimate of the run in each layout, with about the same number of tokens per step.
      padding: `padding[name][size]` is a padding share. `name` is a layout, or `ORDINARY` for batches that are each
        padded to their longest document. `size` is the number of documents in a batch: the sizes of `BATCH_SIZES` that
        the data has enough documents for. The share of `ORDINARY` batches is the exact expectation over all orders; the
        other shares are counted, on at most 16,384 documents.
      device: the device whose times are predicted; None if times are not predicted.
      num_devices: how many of them the run is on. Batch sizes and memory are those of each.
      usable_bytes: the memory of a device that the run may use; None if times are not predicted, or if the device does
        not report its free memory.
      variants: cards with the name that was given as `gpu`, but with more memory than `device`.
      verdict: one or two sentences: what padding costs, what packing gains, whether the run fits, and how fast it is.
      recommendation: advice on the settings, with the reasons.

    Example:
      >>> from jaxpack import TrainConfig, inspect, load_documents
      >>> documents = load_documents([{"input_ids": list(range(n, 3 * n))} for n in (5, 9, 40)], None, vocab_size=200)
      >>> found = inspect(documents, TrainConfig(max_length=128))  # rich.print(found) shows all of it
      >>> found.num_tokens, found.layouts["packed"].shapes
      (108, [(1, 2, 128)])
    """

    config: TrainConfig
    lengths: np.ndarray
    num_tokens: int
    num_targets: int
    untrained: int
    truncation: Truncation
    targets_lost: int
    layouts: dict[Layout, LayoutEstimate]
    padding: dict[str, dict[int, float]]
    device: str | None
    num_devices: int
    usable_bytes: float | None
    variants: tuple[str, ...]
    verdict: str
    recommendation: str

    @property
    def run(self) -> LayoutEstimate:
        """Returns the estimate for the layout that was asked about."""
        return self.layouts[self.config.layout]

    def figure(self) -> "Figure":
        """Draws the lengths of the documents, and the padding share by batch size."""
        return _draw(self)

    def __rich__(self) -> RenderableType:
        return Group(Text(self.verdict, style="bold"), "", self.details)

    @property
    def details(self) -> RenderableType:
        """Returns all that is shown below the verdict: the tables, what they follow from, and the advice."""
        tables = (_lengths_table(self), _facts(self), _padding_table(self), _layouts_table(self))
        advice = Text(f"-> {self.recommendation}", style="bold")
        return Group(*(part for one in (*tables, Text("\n".join(_basis(self))), advice) for part in (one, "")))


def inspect(
    documents: Documents, config: TrainConfig | None = None, *, model: Transformer | None = None, gpu: str | None = None
) -> Inspection:
    """Predicts padding, lost tokens and, with a model, times of a run in each layout. The model is not run.

    Args:
      documents: the dataset, from `load_documents`.
      config: the settings of the run. The batch size counts documents or, with `packing`, rows, on each device of
        `mesh`. With `gpu`, the mesh may have any size, and "auto" is one card.
      model: the model whose times are predicted; its arrays may be abstract. None predicts no times.
      gpu: the name of the card that the run is for, such as "RTX 4090": whether the run fits on it, and how fast it
        is. None takes this machine's device.

    Raises:
      InputError: the documents yield no batch with these settings, an argument has the wrong type, or `gpu` is not
        known or cannot compute in bfloat16.

    Example:
      >>> from jaxpack import TrainConfig, inspect, load_documents
      >>> documents = load_documents([{"input_ids": list(range(n))} for n in (100, 10)], None, vocab_size=100)
      >>> found = inspect(documents, TrainConfig(max_length=128))
      >>> sorted(found.layouts)
      ['packed', 'padded', 'padding-free']
    """
    config = TrainConfig() if config is None else config
    check_type("documents", documents, Documents)
    check_type("config", config, TrainConfig)
    if model is not None:
        check_type("model", model, Transformer)
    named = None if gpu is None else card_named(gpu)
    card = card_of(current_device().device_kind) if named is None else named
    times = model is not None and card is not None
    has_limit, config = config.max_length is not None, config.cut_at(int(documents.lengths.max()))
    mesh = mesh_to_inspect(config, model, is_elsewhere=named is not None)
    runs = _in_every_layout(documents, config)
    batches: dict[Layout, Batches] = {
        layout: Batches(documents, run, num_devices=mesh.size) for layout, run in runs.items()
    }
    layouts: dict[Layout, LayoutEstimate] = {
        layout: _estimate(run, batches[layout], batches["padded"]) for layout, run in runs.items()
    }
    if model is not None and card is not None:
        layouts = _timed(layouts, batches, model, mesh, card, named)
    run = batches[config.layout]
    num_targets, kept = documents.num_targets, run.documents.num_targets
    targets_lost = int(num_targets.sum() - kept.sum())
    advice = [_advice_on_size(run, config) or _advice(layouts, has_limit)]
    advice += _advice_on_length(documents, run.truncation, targets_lost, config)
    device = (current_device().device_kind if named is None else named.name) if times else None
    usable = usable_bytes(config, card=named) if times else None
    return Inspection(
        config=config,
        lengths=documents.lengths,
        num_tokens=documents.num_tokens,
        num_targets=int(num_targets.sum()),
        untrained=int((num_targets == 0).sum()),
        truncation=run.truncation,
        targets_lost=targets_lost,
        layouts=layouts,
        padding=_padding(documents, batches["padded"].documents, config),
        device=device,
        num_devices=mesh.size,
        usable_bytes=usable,
        variants=tuple(other.name for other in cards_called(gpu or "")[1:]),
        verdict=" ".join(
            [
                _verdict_on_padding(layouts, fills_a_step=run.num_rows >= run.rows_per_step),
                *([] if device is None else [_verdict_on_times(layouts[config.layout], device, mesh.size, usable)]),
            ]
        ),
        recommendation=" ".join(advice),
    )


def _in_every_layout(documents: Documents, config: TrainConfig) -> dict[Layout, TrainConfig]:
    """Returns the settings of the run in every layout, with about the same number of tokens per step."""
    size, lengths = config.per_device_train_batch_size, np.minimum(documents.lengths, config.length_limit)
    rows = size if config.packing else packed_rows(size, lengths, config.length_limit)
    whole = min(len(lengths), max(1, round(size * config.length_limit / lengths.mean()))) if config.packing else size
    sizes = {layout: rows if layout == "packed" else whole for layout in get_args(Layout)}
    return {layout: config.in_layout(layout, size) for layout, size in sizes.items()}


def _estimate(config: TrainConfig, batches: Batches, padded: Batches) -> LayoutEstimate:
    return LayoutEstimate(
        config=config,
        padding_share=batches.padding_share,
        shapes=batches.shapes,
        speedup=(1 - batches.padding_share) / (1 - padded.padding_share),
    )


def _timed(
    layouts: dict[Layout, LayoutEstimate],
    batches: dict[Layout, Batches],
    model: Transformer,
    mesh: DeviceMesh,
    card: Card,
    named: Card | None,
) -> dict[Layout, LayoutEstimate]:
    """Adds predicted times, memory and speed-ups to the estimates; one that does not fit gets a reason as `refusal`.

    `named` is the card if the user named it, and None if it is this machine's, whose free memory counts.
    """
    timed = {}
    compiles_first = bool(adapters(model))  # as `jaxpack train` does
    fsdp = num_shards(mesh)
    model_there = model if mesh.size == 1 else on_mesh(model, mesh)
    for layout, estimate in layouts.items():
        run = batches[layout]
        try:
            more = {"optimizer_bytes": state_bytes(estimate.config, model, mesh), "compiles_first": compiles_first}
            choice = choices(settings_on(estimate.config, mesh), model_there, run, 0, named, **more)[0]
        except InputError as error:
            timed[layout] = dataclasses.replace(estimate, refusal=str(error))
            continue
        step = StepShape.of_run(model_there, run, optimizer_bytes=more["optimizer_bytes"])
        step = dataclasses.replace(step, compiles_first=compiles_first, **choice.of_step)
        largest = predict(step, card.rates)[choice.remat]
        seconds = run_seconds(model_there, run, choice.remat, card.rates, mesh, **choice.of_step)
        traffic = traffic_of(step, mesh.size // fsdp, fsdp)
        rate = float(run.tokens_per_step.sum()) / seconds
        base = timed["padded"].tokens_per_second if timed else rate
        timed[layout] = dataclasses.replace(
            estimate,
            remat=choice.remat,
            choice=str(choice),
            tokens_per_second=rate,
            peak_bytes=largest.peak_bytes,
            host_bytes=largest.host_bytes,
            sent_bytes=sum(dataclasses.astuple(traffic)),
            hours_per_epoch=seconds / run.num_steps * run.steps_per_epoch / 3600,
            speedup=rate / base if base is not None else estimate.speedup,
        )
    return timed


# Padding.


def ordinary_padding(lengths: np.ndarray, batch_size: int) -> float:
    """Returns the padding share of batches in random order that are each padded to their longest document.

    The share is 1 - tokens / positions, with the exact expectation of the positions over all orders of the documents.
    For each length, the number of documents of at most this length gives the probability that a batch has no longer
    document, and these probabilities give the expected length of its longest document. The last batch may be smaller.
    """
    ordered = np.sort(lengths).astype(np.float64)
    whole, rest = divmod(len(ordered), batch_size)
    positions = whole * batch_size * _mean_longest(ordered, batch_size) if whole else 0.0
    positions += rest * _mean_longest(ordered, rest) if rest else 0.0
    return max(0.0, float(1 - ordered.sum() / positions))


def _mean_longest(ordered: np.ndarray, count: int) -> float:
    """Returns the expected maximum of `count` lengths drawn without replacement from `ordered`, which ascends."""
    chance = np.ones(len(ordered))  # Probability that all draws are among the first 1, 2, ... lengths.
    for drawn in range(count):
        chance *= np.maximum(np.arange(1, len(ordered) + 1) - drawn, 0) / (len(ordered) - drawn)
    return float(ordered @ np.diff(chance, prepend=0.0))


def _padding(documents: Documents, cut: Documents, config: TrainConfig) -> dict[str, dict[int, float]]:
    """Returns an epoch's padding share by layout and batch size; `cut` holds the documents, cut to `max_length`."""
    all_lengths = cut.lengths
    documents, cut = _sampled(documents, config.seed), _sampled(cut, config.seed)
    shares: dict[str, dict[int, float]] = {name: {} for name in (ORDINARY, *get_args(Layout))}
    for size in (size for size in BATCH_SIZES if size <= len(all_lengths)):
        shares[ORDINARY][size] = ordinary_padding(all_lengths, size)
        for layout in get_args(Layout):
            rows = packed_rows(size, cut.lengths, config.length_limit) if layout == "packed" else size
            run = dataclasses.replace(config.in_layout(layout, rows), max_steps=-1, num_train_epochs=1.0)
            shares[layout][size] = Batches(documents if layout == "packed" else cut, run).padding_share
    return shares


def _sampled(documents: Documents, seed: int) -> Documents:
    """Returns the documents, or, if there are more than `_SAMPLE`, `_SAMPLE` stand-ins with some of their lengths.

    The lengths are drawn at random. In a stand-in, every token is a target.
    """
    if len(documents) <= _SAMPLE:
        return documents
    lengths = np.random.default_rng(seed).choice(documents.lengths, _SAMPLE, replace=False)
    tokens = np.zeros(lengths.sum(), np.int32)
    return Documents(tokens, tokens, np.cumsum(lengths) - lengths, lengths)


# The verdict.


def _verdict_on_padding(layouts: dict[Layout, LayoutEstimate], *, fills_a_step: bool) -> str:
    if not fills_a_step:
        return "The data fills less than one step, so the shares of padding say nothing about a larger dataset."
    padded, free, packed = (layouts[layout] for layout in get_args(Layout))
    gains = max(free.speedup, packed.speedup) >= _WORTH
    return (
        f"Padding takes {_percent(padded.padding_share)} of the work in padded batches of {_batch(padded.config)},"
        f" {_percent(free.padding_share)} in padding-free batches ({free.speedup:.2f} x as fast) and"
        f" {_percent(packed.padding_share)} in packed rows ({packed.speedup:.2f} x as fast)"
        f"{'' if gains else ': packing gains nothing here'}."
    )


def _verdict_on_times(run: LayoutEstimate, device: str, num_devices: int, usable: float | None) -> str:
    device = device if num_devices == 1 else f"each of {num_devices:,} {device}"
    if run.tokens_per_second is None or run.peak_bytes is None:
        return f"The {run.config.layout} run does not fit on {device}."
    speed = f"trains on about {run.tokens_per_second:,.0f} tokens a second ({_hours(run)} hours an epoch)"
    if usable is None:
        return f"The {run.config.layout} run {speed} on {device}."
    fits = "fits" if run.peak_bytes <= usable else "may not fit"
    return f"The {run.config.layout} run {fits} on {device} ({gib(run.peak_bytes)} of {gib(usable)}), and {speed}."


def _hours(estimate: LayoutEstimate) -> str:
    assert estimate.hours_per_epoch is not None
    return f"{estimate.hours_per_epoch:{'.2f' if estimate.hours_per_epoch >= 0.1 else '.2g'}}"


# Advice.


def _advice_on_size(run: Batches, config: TrainConfig) -> str | None:
    """Returns advice if one step takes more rows than the data has, else None.

    In that case, the speed-ups only say how much of a batch is empty in each layout.
    """
    if run.num_rows >= run.rows_per_step:
        return None
    has = _count(run.num_rows, "row" if config.packing else "document")
    return (
        f"The data has {has}, and a step takes {run.rows_per_step:,}: the rest of the step is padding, so these"
        " speed-ups say nothing about a larger dataset. A smaller `--per-device-train-batch-size` (or"
        " `--gradient-accumulation-steps`) wastes less."
    )


def _advice(layouts: dict[Layout, LayoutEstimate], has_limit: bool) -> str:
    padded, free, packed = (layouts[layout] for layout in get_args(Layout))
    of_padded = f"padded batches of {_batch(padded.config)} are {_percent(padded.padding_share)} padding"
    of_free = f"padding-free batches are {_percent(free.padding_share)} padding"
    of_packed = f"packed rows of {packed.config.max_length:,} tokens are {_percent(packed.padding_share)} padding"
    flags = f"--packing --per-device-train-batch-size {packed.config.per_device_train_batch_size}"
    flags = f"`{flags}`" if has_limit else f"`{flags} --max-length {packed.config.max_length}`"
    if max(free.speedup, packed.speedup) < _WORTH:
        return f"Packing gains nothing here: {of_padded}, {of_free}, and {of_packed}."
    if packed.speedup >= _WORTH * free.speedup:
        gain = f"Packed rows train on {packed.speedup:.2f} x as many tokens a second as padded batches."
        return f"Pack the documents ({flags}): {of_padded}, and {of_packed}. {gain}"
    gain = f"Padding-free batches train on {free.speedup:.2f} x as many tokens a second as padded batches"
    if free.speedup >= _WORTH * packed.speedup:
        (_, _, T), max_length = packed.shapes[0], packed.config.length_limit
        why = "no other document fits into the room that is left, and a larger `--max-length` would leave less"
        if max_length < T:
            why = (
                f"rows are rounded up to a multiple of 128, so a row of {max_length:,} tokens takes {T:,} positions;"
                " choose a `--max-length` that is a multiple of 128"
            )
        of_packed = f"{of_packed.capitalize()}, because {why}"
        return f"Stay with padding-free batches, the default: {of_padded}, {of_free}. {gain}. {of_packed}."
    return (
        f"Padding-free batches, the default, are enough: {of_padded}, {of_free}, and {of_packed}. {gain}, and packed"
        f" rows on {packed.speedup:.2f} x as many."
    )


def _advice_on_length(documents: Documents, cut: Truncation, targets_lost: int, config: TrainConfig) -> Iterator[str]:
    share, of_targets = cut.tokens / documents.num_tokens, targets_lost / max(1, documents.num_targets.sum())
    if max(share, of_targets) < _LOSS:
        return

    def lost(max_length: int) -> float:
        return np.maximum(documents.lengths - max_length, 0).sum() / documents.num_tokens

    lengths = range(128, int(documents.lengths.max()) + 128, 128)
    enough = lengths[bisect.bisect_left(lengths, -_LOSS / 5, key=lambda length: -lost(length))]
    yield (
        f"But `--max-length {config.max_length}` cuts off {_percent(share)} of all tokens and {_percent(of_targets)} of"
        f" the tokens to train on: {enough:,} would cut off {_percent(lost(enough))} of all tokens, and packing with"
        " `--packing-strategy bfd_split` would cut off none."
    )


# Tables.


def histogram(lengths: np.ndarray, most: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Returns bin edges, int `[bins + 1]`, and how many documents each bin holds.

    Bins have a round width. A last, wider bin takes the documents beyond the 99.5 % quantile that fit no other bin.
    """
    high = max(1, int(np.quantile(lengths, 0.995, method="higher")))
    width = next(step * 10**power for power in range(12) for step in (1, 2, 5) if (most - 1) * step * 10**power > high)
    edges = np.arange(0, (high // width + 1) * width + 1, width)
    if (longest := int(lengths.max())) >= edges[-1]:
        edges = np.append(edges, longest + 1)
    return edges, np.histogram(lengths, edges)[0]


def _lengths_table(found: Inspection) -> Table:
    table = Table(
        box=None, pad_edge=False, title="documents, by length in tokens", title_justify="left", show_header=False
    )
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(max_width=40)  # a bar takes what room there is
    table.add_column(no_wrap=True, style="red")
    edges, counts = histogram(found.lengths)
    shortest = np.flatnonzero(counts)[0]
    edges, counts = edges[shortest:], counts[shortest:]
    limit = found.config.length_limit
    for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        most = int(counts.max())
        bar = Bar(most, 0, max(count, most / 40) if count else 0, color="red" if low >= limit else "blue")
        here = f"<- max_length {limit:,}" if low <= limit < high else ""
        table.add_row(f"{low:,} to {high - 1:,}", f"{count:,}", bar, here)
    return table


def _facts(found: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    lengths, cut = found.lengths, found.truncation
    table.add_row("documents", f"{len(lengths):,}")
    trained = _percent(found.num_targets / found.num_tokens)
    table.add_row("tokens", f"{found.num_tokens:,}, of which {trained} are trained on")
    table.add_row("length", f"mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, longest {lengths.max():,}")
    lost, of_targets = cut.tokens / found.num_tokens, found.targets_lost / max(1, found.num_targets)
    what = f"{_count(cut.documents, 'document')}: {cut.tokens:,} of all tokens are lost ({_percent(lost)})"
    what += f", and {found.targets_lost:,} of the tokens to train on ({_percent(of_targets)})"
    split = "; longer documents are split" if (lengths > found.config.length_limit).any() else ""
    table.add_row(f"cut at {found.config.max_length:,}", what if cut.documents else f"no document{split}")
    after = (
        f"; after the cut at max_length, {cut.dropped:,} are without one and are dropped"
        if cut.dropped > found.untrained
        else ""
    )
    table.add_row("nothing to learn", f"{_count(found.untrained, 'document')} without a token to train on{after}")
    return table


def _padding_table(found: Inspection) -> Table:
    table = Table(title="share of padding, by the number of documents in a batch", title_justify="left")
    table.add_column("", no_wrap=True)
    for size in found.padding[ORDINARY]:
        table.add_column(str(size), justify="right", no_wrap=True)
    for name, shares in found.padding.items():
        table.add_row(_NAMES.get(name, name), *map(_percent, shares.values()))
    return table


def _layouts_table(found: Inspection) -> Table:
    """Returns a table with a column for each layout, so that it fits into a terminal of 80 columns."""
    table = Table(title="the same run in each layout (*: the layout of the settings)", title_justify="left")
    table.add_column("", no_wrap=True)
    columns = []
    for layout, estimate in found.layouts.items():
        name = f"{layout} *" if estimate.config is found.run.config else layout
        table.add_column(name, justify="right", no_wrap=True)
        cells = [_batch(estimate.config), _percent(estimate.padding_share), f"{estimate.speedup:.2f} x"]
        if estimate.tokens_per_second is not None:
            assert estimate.peak_bytes is not None
            rate, memory = f"{estimate.tokens_per_second:,.0f}", gib(estimate.peak_bytes)
            cells += [rate, _hours(estimate), estimate.remat, memory]
        elif found.device:
            cells += ["does not fit" if estimate.refusal else "", "", "", ""]
        columns.append(cells)
    names = ("batch", "padding", "speed-up", *(_TIMES if found.device else ()))
    for name, *cells in zip(names, *columns, strict=True):
        table.add_row(name, *cells)
    return table


def _basis(found: Inspection) -> Iterator[str]:
    """Yields lines that say whether the run fits, and what the figures follow from."""
    card = card_of(found.device or "")
    if card is None:
        yield (
            "Speed-ups compare how many positions are computed, not times. To predict times, give a model; for a GPU"
            " that this machine does not have, also give `--gpu`."
        )
        return
    named, run = found.device == card.name, found.run
    if found.num_devices > 1:
        sent = "" if run.sent_bytes is None else f"; each sends {run.sent_bytes / 1e9:.2g} GB to others in a step"
        yield f"Batches and memory are those of each device, and tokens a second of all {found.num_devices:,}{sent}."
    if run.refusal is not None:
        yield f"The run does not fit: {run.refusal}"
    elif run.peak_bytes is not None and found.usable_bytes is not None:
        verdict = "fits" if run.peak_bytes <= found.usable_bytes else "may not fit"
        host = f", and {gib(run.host_bytes)} of the host's memory" if run.host_bytes else ""
        yield (
            f"The run {verdict}: with {run.choice}, it is predicted to take {gib(run.peak_bytes)} of the"
            f" {gib(found.usable_bytes)} that it may use{host}."
        )
    if found.variants:
        yield (
            f"`gpu` is taken for {card.name}, which has the least memory of the cards with this name; for the other,"
            f" give {' or '.join(found.variants)}."
        )
    if named and found.config.memory_limit is None and found.usable_bytes is not None:
        share = found.usable_bytes * JAX_MEMORY_FRACTION / MEMORY_FRACTION
        if run.peak_bytes is not None and run.peak_bytes > share:
            yield (
                f"`jaxpack train` takes this much. A script of your own gets only {JAX_MEMORY_FRACTION:.0%} of a card"
                f" from jax, unless you set the environment variable XLA_CLIENT_MEM_FRACTION={MEMORY_FRACTION}."
            )
    if run.refusal is not None:
        return
    why = "the rates of its kernels."
    if not card.measured:
        why = (
            "the card's published figures, because jaxpack has never been measured on it: they may be off by a quarter"
            " or more."
        )
    yield f"Times for {found.device} are predicted, not measured. They follow from {why}"
    if found.usable_bytes is None and found.config.remat == "auto":
        yield "Its free memory is not known, so remat is full: `--memory-limit` sets the memory."


def _batch(config: TrainConfig) -> str:
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return f"{_count(size, 'row')} of {config.max_length:,}" if config.packing else _count(size, "document")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


# The picture.


def _draw(found: Inspection) -> "Figure":
    figure = new_figure(12.5, 4.6)
    lengths, padding = figure.subplots(1, 2)
    edges, counts = histogram(found.lengths, 40)
    shown = edges if edges[-1] - edges[-2] == edges[1] - edges[0] else edges[:-1]  # the last edge may be far out
    lengths.bar(shown[:-1], counts[: len(shown) - 1], np.diff(shown), align="edge", color=_COLORS["packed"])
    beyond = int(counts[len(shown) - 1 :].sum())
    along = f"tokens ({beyond:,} of {len(found.lengths):,} have more, to {found.lengths.max():,})"
    frame(lengths, "How long are the documents?", along if beyond else "tokens", "documents")
    if found.config.length_limit < shown[-1]:
        lengths.axvline(found.config.length_limit, color=_COLORS[ORDINARY])
        lengths.annotate(f" max_length {found.config.max_length:,}", (found.config.max_length, counts.max()))
    lines = []
    for name, shares in found.padding.items():
        line = Line(_NAMES.get(name, name), _COLORS[name], list(shares), [100 * share for share in shares.values()])
        padding.plot(line.xs, line.ys, color=line.color, marker="o", markersize=4)
        lines.append(line)
    padding.set_xscale("log", base=2)
    padding.set_xticks(sizes := list(found.padding[ORDINARY]), list(map(str, sizes)))
    padding.set_ylim(bottom=0)
    frame(padding, "How much of a batch is padding?", "documents in a batch", "padding, % of all positions")
    label_ends(padding, lines)
    return figure
