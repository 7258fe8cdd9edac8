"""Splits tensors of all experts into one tensor for each expert's projection, and fuses them again.

The files of most models have a tensor for each projection of each expert, and so has the bridge's table of names.
transformers 5 holds all experts of a layer in two tensors in memory: `experts.gate_up_proj` `[E, 2F, D]`, gate above
up, and `experts.down_proj` `[E, D, F]`. GPT-OSS has such tensors in its files, too, in a layout of its own:
`gate_up_proj` `[E, D, 2F]` and `down_proj` `[E, F, D]`, with a bias `[E, out]` beside each. In them gate and up are
interleaved: even rows are gate, odd rows are up.
Quantised as MXFP4, they are `..._blocks` `[E, out, in / 32, 16]` and `..._scales` `[E, out, in / 32]`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from jax.typing import ArrayLike


class HasShape(Protocol):
    """Represents a tensor, of which only the shape is read here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape."""
        ...


Stored = TypeVar("Stored", bound=HasShape)


class Cut(NamedTuple):
    """Locates one expert's projection in a tensor of all experts.

    Attributes:
      expert: the index along the first axis.
      rows: the rows of the expert's matrix, or the numbers of its vector.
      is_transposed: whether an expert's matrix is stored as `[in, out]`, so that its rows are columns there.
    """

    expert: int
    rows: slice
    is_transposed: bool = False


# Lists the projections in each tensor of all experts.
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Maps the suffix of each of GPT-OSS' tensors to that of an expert's own tensor.
_OWN_ENDS = {"": ".weight", "_bias": ".bias", "_blocks": ".weight_blocks", "_scales": ".weight_scales"}
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(|_bias|_blocks|_scales)")
_SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")


def split_experts(tensors: Mapping[str, Stored], cut: Callable[[Stored, Cut], Stored]) -> dict[str, Stored]:
    """Returns the tensors with those of all experts cut into parts of one projection each, and all others as they are.

    Args:
      cut: a function that returns a part of a tensor, without reading it.
    """
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        parts = {} if match is None else _parts(match, tensor.shape, of_gpt_oss=_is_of_gpt_oss(match[1], tensors))
        found |= {own: cut(tensor, part) for own, part in parts.items()} or {name: tensor}
    return found


def _is_of_gpt_oss(experts: str, names: Iterable[str]) -> bool:
    return f"{experts}.down_proj_bias" in names


def _parts(match: re.Match, shape: tuple[int, ...], *, of_gpt_oss: bool) -> dict[str, Cut]:
    """Returns the parts of a tensor by the names of an expert's own tensors; empty for an unknown layout."""
    experts, kind, end = match.groups()
    projections = _PROJECTIONS[kind]
    is_transposed = of_gpt_oss and end == ""
    if len(shape) != {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}[end] or (end and not of_gpt_oss):
        return {}
    rows, count = shape[2 if is_transposed else 1], len(projections)
    if 0 in shape or rows % count:
        return {}
    size = rows // count
    return {
        f"{experts}.{expert}.{projection}{_OWN_ENDS[end]}": Cut(
            expert, slice(place, rows, count) if of_gpt_oss else slice(place * size, (place + 1) * size), is_transposed
        )
        for expert in range(shape[0])
        for place, projection in enumerate(projections)
    }


def fused_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that `fuse_experts` makes, by name and in its order."""
    empty = ((name, np.broadcast_to(np.float32(0), shape)) for name, shape in shapes.items())
    return {name: np.shape(tensor) for name, tensor in _fused(empty, _fused_shape)}


def fuse_experts(tensors: Iterable[tuple[str, ArrayLike]]) -> Iterator[tuple[str, ArrayLike]]:
    """Yields all tensors, those of single experts as GPT-OSS' tensors of all experts.

    The tensors of one layer's experts must come one after another, and those of gate before those of up.
    """
    return _fused(tensors, _fused_array)


def _fused(
    tensors: Iterable[tuple[str, ArrayLike]], fuse: Callable[[list[list[ArrayLike]]], ArrayLike]
) -> Iterator[tuple[str, ArrayLike]]:
    waiting: dict[str, list[list[ArrayLike]]] = {}  # for each projection, the tensors of its experts
    last = ""

    def finished() -> Iterator[tuple[str, ArrayLike]]:
        for name in list(waiting):
            yield name, fuse(waiting.pop(name))

    for name, tensor in tensors:
        match = _SINGLE.fullmatch(name)
        if match is None:
            yield from finished()
            yield name, tensor
            continue
        experts, _, projection, end = match.groups()
        kind = next(kind for kind, projections in _PROJECTIONS.items() if projection in projections)
        fused = f"{experts}.{kind}{'_bias' if end == 'bias' else ''}"
        if fused not in waiting:
            yield from finished()
            waiting[fused] = []
        if (fused, projection) != last:
            waiting[fused].append([])
        waiting[fused][-1].append(tensor)
        last = fused, projection
    yield from finished()


def _fused_array(projections: list[list[ArrayLike]]) -> np.ndarray:
    rows = np.stack([np.stack([np.asarray(one) for one in experts]) for experts in projections], axis=2)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])  # [E, out, ...], with gate and up in turns
    return rows.swapaxes(1, 2) if rows.ndim == 3 else rows


def _fused_shape(projections: list[list[ArrayLike]]) -> np.ndarray:
    rows, *columns = np.shape(projections[0][0])
    return np.broadcast_to(np.float32(0), (len(projections[0]), *columns, len(projections) * rows))
