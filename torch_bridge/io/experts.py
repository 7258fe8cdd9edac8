"""Presents a tensor of all experts' matrices as one tensor for each expert's projection.

transformers 5 holds the matrices of a layer's experts in two tensors, `experts.gate_up_proj` `[E, 2F, D]`, gate above
up, and `experts.down_proj` `[E, D, F]`. The files of most models have a tensor for each projection of each expert.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar


class HasShape(Protocol):
    """Represents a tensor, of which only the shape is read here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape."""
        ...


Stored = TypeVar("Stored", bound=HasShape)

_PROJECTIONS = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}


def split_experts(tensors: Mapping[str, Stored], cut: Callable[[Stored, int, int, int], Stored]) -> dict[str, Stored]:
    """Returns the tensors with those of all experts cut into views of one matrix each, and all others as they are.

    Args:
      cut: returns the rows `first` to `last` (exclusive) of an expert's matrix: `cut(tensor, expert, first, last)`.
    """
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        kind = next((end for end in _PROJECTIONS if name.endswith(f".{end}")), None)
        projections = _PROJECTIONS.get(kind or "", ())
        # GPT-OSS has tensors of these names in another order of axes, and biases beside them.
        is_cut = projections and len(tensor.shape) == 3 and tensor.shape[1] % len(projections) == 0
        if not is_cut or f"{name}_bias" in tensors:
            found[name] = tensor
            continue
        rows = tensor.shape[1] // len(projections)
        for expert in range(tensor.shape[0]):
            for number, projection in enumerate(projections):
                whole = f"{name.rpartition('.')[0]}.{expert}.{projection}.weight"
                found[whole] = cut(tensor, expert, number * rows, (number + 1) * rows)
    return found
