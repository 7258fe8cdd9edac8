"""Defines a case (one configuration to measure), and the plans that vary it."""

import dataclasses
from typing import Any, get_args

from jaxpack.constants import Implementation, Layout, Remat
from jaxpack.data.documents import Documents
from jaxpack.data.packing import packed_rows
from jaxpack.errors import InputError

REMAT = ("auto", *get_args(Remat))
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
ABLATION = ("padded", "padding-free", "packed", "with kernels", "keeping all")  # each adds to the one before
_LEAST_DOCUMENTS = 128  # to time if rows are not full: the mean length of fewer is a poor estimate
OFFLOADED = "with kernels, offloading"  # the other memory choice, also compared with "with kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Holds one configuration of one system, which one process measures.

    Attributes:
      model: a name of `presets.SHAPES`, for random weights, or a Hugging Face folder.
      system: "jaxpack", or an opponent.
      rows: the batch size of a step, in rows of `max_length` if packed, else in documents.
      remat: what the backward pass recomputes; an opponent has its own values.
      implementation: the implementation of our kernels.
      adapts_experts: whether the experts of a mixture have adapters, too.
      load_in_4bit: whether the frozen projections are held in 4 bits.
      optim, offload_weights, offload_embedding, memory_limit: as in `TrainConfig`.
      mesh: as in `TrainConfig`; `rows` are those of each device.
      card: a limit on the GiB that the process takes of the device, to imitate a smaller card.
      steps: the number of steps that are timed, after the warm-up.
    """

    model: str
    system: str = "jaxpack"
    layout: Layout = "packed"
    rows: int = 16
    max_length: int = 1024
    remat: str = "full"
    implementation: Implementation | None = None
    full_finetuning: bool = False
    adapts_experts: bool = False
    load_in_4bit: bool = False
    optim: str = "adamw"
    offload_weights: str = "auto"
    offload_embedding: str = "auto"
    memory_limit: float | None = None
    mesh: str = "auto"
    card: float | None = None
    steps: int = 10
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("rows", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.load_in_4bit and self.full_finetuning:
            raise InputError(
                "`load_in_4bit` must be without `full_finetuning`, got both: 4-bit weights are not trained."
            )
        if self.card is not None and not self.card > 0:
            raise InputError(f"`card` must be None or a positive number, got {self.card}.")
        if self.layout not in get_args(Layout):
            raise InputError(f"`layout` must be one of {get_args(Layout)}, got {self.layout!r}.")
        if self.system == "jaxpack" and self.remat not in REMAT:
            raise InputError(f"`remat` must be one of {REMAT}, got {self.remat!r}.")

    def __str__(self) -> str:
        what = "rows" if self.layout == "packed" else "documents"
        parts = [self.system, self.model, self.layout, f"{self.rows} {what}", f"remat {self.remat}"]
        parts += [self.implementation] if self.implementation else []
        parts += ["full fine-tuning"] if self.full_finetuning else []
        parts += ["experts adapted"] if self.adapts_experts else []
        parts += ["4-bit"] if self.load_in_4bit else []
        parts += [self.optim] if self.optim != "adamw" else []
        parts += [f"within {self.memory_limit:g} GiB"] if self.memory_limit is not None else []
        parts += [f"mesh {self.mesh}"] if self.mesh != "auto" else []
        parts += [f"on a card of {self.card:g} GiB"] if self.card is not None else []
        for name, setting in (("weights", self.offload_weights), ("embedding", self.offload_embedding)):
            parts += [] if setting == "auto" else [f"{name} on the {'host' if setting == 'on' else 'device'}"]
        return " ".join(parts)


@dataclasses.dataclass(frozen=True)
class Planned:
    """Holds a case within a plan; `label` names its part in the plan."""

    plan: str
    label: str
    case: Case

    def __str__(self) -> str:
        return f"{self.plan}: {self.label}: {self.case}"

    def record(self, **figures: Any) -> dict[str, Any]:
        """Returns the record of a measurement: the plan, the label, the case, and its figures.

        Raises:
          TypeError: a figure has the name of a field of the case, which it would hide.
        """
        return dict(plan=self.plan, label=self.label, **dataclasses.asdict(self.case), **figures)


def case_of(record: dict[str, Any]) -> Case:
    """Returns the case that a record measured."""
    return Case(**{field.name: record[field.name] for field in dataclasses.fields(Case) if field.name in record})


def batch_sizes(base: Case, sizes: tuple[int, ...] = BATCH_SIZES) -> list[Planned]:
    """Plans `base` at each batch size; the label (system and layout) names a line of the picture."""
    least = 0 if base.layout == "packed" else _LEAST_DOCUMENTS
    return [
        Planned(
            "batch_sizes",
            f"{base.system} {base.layout}",
            dataclasses.replace(base, rows=rows, steps=max(base.steps, -(-least // rows))),
        )
        for rows in sizes
    ]


def ablation(base: Case, count: int, documents: Documents) -> list[Planned]:
    """Plans what each of our choices adds, at about the same tokens a step, those of `count` documents.

    The first three cases run XLA's operations and recompute every layer, as a plain JAX program does.
    """
    plain = dataclasses.replace(base, implementation="xla", remat="full")
    padded, free, packed = _layouts(plain, count, documents)
    kernels = dataclasses.replace(packed, implementation=None)
    cases = {
        "padded": padded,
        "padding-free": free,
        "packed": packed,
        "with kernels": kernels,
        "keeping all": dataclasses.replace(kernels, remat="none"),
        OFFLOADED: dataclasses.replace(kernels, remat="offload"),
    }
    return [Planned("ablation", label, case) for label, case in cases.items()]


def losses(base: Case, count: int, documents: Documents) -> list[Planned]:
    """Plans a run in each layout over the same documents, with about the tokens of `count` documents a step."""
    return [Planned("losses", case.layout, case) for case in _layouts(base, count, documents)]


def _layouts(base: Case, count: int, documents: Documents) -> list[Case]:
    """Returns `base` padded, padding-free and packed, at about the same tokens a step."""
    rows = packed_rows(count, documents.lengths, base.max_length)
    return [
        dataclasses.replace(base, layout=layout, rows=rows if layout == "packed" else count)
        for layout in get_args(Layout)
    ]
