"""How methods are compared in figures: one colour for each, names at the lines' ends, dots with intervals.

A method looks the same in every figure, so a reader learns it once. Lines that are not methods (layers, texts, parts of
a context) are `plots`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from lrs_utils.analysis.statistics import Interval

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _BROWN, _PINK, _GREY, _YELLOW, _SKY = sns.color_palette("colorblind")
# By what a method's name begins with, up to a comma: "GA, pi, factors, U" has the colour of "GA".
COLOURS: dict[str, tuple[float, ...] | str] = {
    "no scaling": "0.35",
    "one factor": _GREEN, "uniform": _GREEN, "best uniform": _GREEN,
    "GA": _ORANGE, "the paper's GA": _ORANGE, "paper": _ORANGE,
    "gradient": _BLUE, "gradient x 4": _SKY, "found": _BLUE, "heads": _BLUE, "layers": _PURPLE, "outputs": _BROWN,
    "GA, no curve": _YELLOW, "random curves": _GREY, "line": _BROWN, "step": _PINK, "CMA-ES": _RED, "TPE": _PURPLE,
    "none": "0.35", "PI": _ORANGE, "NTK": _GREEN, "Dynamic NTK": _PURPLE, "YaRN": _BLUE,
    "this curve": _BLUE, "prediction": _BLUE, "best so far": _GREEN,  # of the playground
    "untuned": "0.35", "plain": _GREEN, "PoSE": _ORANGE, "RandPos": _PURPLE, "CREAM": _BLUE,
}  # fmt: skip


def colour_of(name: str) -> tuple[float, ...] | str:
    """The colour of a method in every figure.

    Raises
    ------
    ValueError
        A name that begins with no method of `COLOURS`.
    """
    known = [method for method in COLOURS if name == method or name.startswith((f"{method},", f"{method} ("))]
    if not known:
        raise ValueError(f"{name!r} is no method with a colour; name it in lrs_utils/analysis/methods.py")
    return COLOURS[max(known, key=len)]


def compare(
    curves: Mapping[str, Interval | NDArray[np.float64]],
    x: ArrayLike,
    *,
    xlabel: str,
    ylabel: str,
    thin: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure:
    """A line for each method, named at its end, with its interval as a band.

    Parameters
    ----------
    curves : mapping of a method's name to Interval or array, shape (points,)
    thin : sequence of str
        Methods that are drawn thin and grey, without a band and a name: the rest of the field.
    """
    ax = ax or plt.subplots(figsize=(7, 3.6))[1]
    at, ends = np.asarray(x, float), {}
    for name, curve in curves.items():
        mean = curve.mean if isinstance(curve, Interval) else curve
        if name in thin:
            ax.plot(at, mean, color="0.8", linewidth=0.8, zorder=0)
            continue
        ax.plot(at, mean, color=colour_of(name), linewidth=2)
        if isinstance(curve, Interval):
            ax.fill_between(at, curve.low, curve.high, color=colour_of(name), alpha=0.15, linewidth=0)
        ends[name] = float(np.asarray(mean)[-1])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    label_ends(ax, at[-1], ends)
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def label_ends(ax: Axes, x: float, heights: Mapping[str, float], colours: Mapping[str, Any] | None = None) -> None:
    """Write each method's name beside the end of its line, moved apart where lines end close together.

    Parameters
    ----------
    colours : mapping of str to a colour, optional
        Of lines that are not methods.
    """
    low, high = ax.get_ylim()
    gap, below = 0.065 * (high - low), -np.inf
    right = x + 0.015 * float(np.ptp(ax.get_xlim()))
    for name, height in sorted(heights.items(), key=lambda end: end[1]):
        below = max(height, below + gap)
        ax.text(right, below, name, va="center", color=colours[name] if colours else colour_of(name), fontsize="small")


def dots(table: pd.DataFrame, *, xlabel: str, zero: float | None = 0.0, ax: Axes | None = None) -> Figure:
    """A dot with its interval for each method, the best at the top: a forest plot.

    Parameters
    ----------
    table : DataFrame
        Index: the method's name. Columns "mean", "low", "high"; drawn in the order of the rows, first at the top.
    zero : float, optional
        Where a vertical line marks no difference.
    """
    ax = ax or plt.subplots(figsize=(7, 0.32 * len(table) + 0.9))[1]
    rows = np.arange(len(table))[::-1]
    if zero is not None:
        ax.axvline(zero, color="0.7", linewidth=0.8)
    for row, (name, of) in zip(rows, table.iterrows(), strict=True):
        colour = colour_of(str(name))
        ax.plot([of["low"], of["high"]], [row, row], color=colour, linewidth=2)
        ax.plot(of["mean"], row, "o", color=colour, markersize=5)
    ax.set_yticks(rows, [str(name) for name in table.index])
    ax.set(xlabel=xlabel)
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure
