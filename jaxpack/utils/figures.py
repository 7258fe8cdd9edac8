"""Helpers that all figures share: figures without a window, light axes, and labels at the ends of lines."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxpack.errors import not_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """Holds a line of a panel: its points, its label, and the color of the label."""

    label: str
    color: Any
    xs: Sequence[float]
    ys: Sequence[float]


def require_matplotlib() -> None:
    """Raises an `InputError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise not_installed("Drawing a picture", "matplotlib", "bench")


def new_figure(width: float, height: float) -> "Figure":
    """Creates an off-screen figure of `width` x `height` inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # opens no window, whatever backend the user has set
    return figure


def frame(panel: "Axes", title: str, along: str, up: str) -> None:
    """Sets a panel's title, the labels of its x axis (`along`) and y axis (`up`), and a light grid."""
    panel.set_title(title, loc="left", fontsize=12, fontweight="bold")
    panel.set_xlabel(along)
    panel.set_ylabel(up)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="both", color="#E5E5E5", linewidth=0.7)
    panel.set_axisbelow(True)


def label_ends(panel: "Axes", lines: list[Line]) -> None:
    """Labels each line at the right edge of its panel, at the height of its end; close labels are moved apart."""
    panel.figure.canvas.draw()
    last = max(line.xs[-1] for line in lines)
    lines = sorted(lines, key=lambda line: line.ys[-1])
    ends = panel.transData.transform([(last, line.ys[-1]) for line in lines])[:, 1]
    heights = apart(ends, 13 * panel.figure.dpi / 72)
    heights -= max(0.0, heights[-1] - panel.bbox.ymax)
    for line, height in zip(lines, heights, strict=True):
        at = panel.transData.inverted().transform((0, height))[1]
        text = line.label + (f" (to {line.xs[-1]})" if line.xs[-1] < last else "")
        panel.annotate(text, (last, at), (7, 0), textcoords="offset points", va="center", fontsize=9,
                       color=line.color, annotation_clip=False)  # fmt: skip


def head(figure: "Figure", about: str) -> None:
    """Writes a line above all panels that says what was measured, on which machine and when."""
    figure.suptitle(about, x=0.01, ha="left", fontsize=10, color="#555555")


def lying_bars(
    panel: "Axes", places: np.ndarray, values: list[float], colors: list, texts: list[str], room: float = 1.3
) -> None:
    """Draws horizontal bars with a text at the end of each; the panel is `room` times as wide as the longest bar."""
    panel.barh(places, values, 0.62, color=colors)
    for place, value, text in zip(places, values, texts, strict=True):
        panel.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=10)
    panel.set_xlim(0, room * max(values))
    panel.xaxis.set_major_formatter("{x:,.10g}")


def apart(wanted: np.ndarray, least: float) -> np.ndarray:
    """Moves the ascending places `wanted` at least `least` apart, as little as possible: groups keep their mean."""
    groups: list[list[float]] = []
    for offset in wanted - least * np.arange(len(wanted)):
        groups.append([offset])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return np.concatenate([np.full(len(group), np.mean(group)) for group in groups]) + least * np.arange(len(wanted))
