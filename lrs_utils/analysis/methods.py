"""How methods are compared in figures: one colour for each, names at the lines' ends, dots with intervals.

A method looks the same in every figure, so a reader learns it once. Lines that are not methods (layers, texts, parts of
a context) are `plots`.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.transforms import ScaledTranslation
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
    "PI": _ORANGE, "NTK": _SKY, "Dynamic NTK": _RED, "YaRN": _BLUE,
    "scheme alone": "0.35", "layer factors": _PURPLE,
    "this curve": _BLUE, "prediction": _BLUE, "best so far": "#808000",  # of the playground; olive is no method's
    "untuned": "0.35", "plain": _GREEN, "PoSE": _ORANGE, "RandPos": _PURPLE, "CREAM": _BLUE,
    "CREAM as released": _SKY,
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


def label_ends(
    ax: Axes,
    x: float,
    heights: Mapping[str, float],
    colours: Mapping[str, tuple[float, ...] | str] | None = None,
    *,
    gap: float = 0.065,
) -> None:
    """Write each name beside the end of its line, moved apart where lines end close together.

    Parameters
    ----------
    colours : mapping of name to colour, optional
        For lines that are not methods.
    gap : float
        The least between two names, as a share of the height of the panel: more for a low one.
    """
    ax.autoscale_view()
    figure = ax.figure
    assert isinstance(figure, Figure)
    in_axes, below = ax.transScale + ax.transLimits, -np.inf
    beside = ax.transData + ScaledTranslation(5 / 72, 0, figure.dpi_scale_trans)  # 5 points, on any scale of x
    for name, height in sorted(heights.items(), key=lambda end: end[1]):
        right, top = in_axes.transform((x, height))
        below = max(top, below + gap)
        middle = in_axes.inverted().transform((right, below))[1]
        colour = colour_of(name) if colours is None else colours[name]
        ax.text(x, middle, name, va="center", color=colour, fontsize="small", transform=beside)


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


def dot_panels(
    tables: Mapping[str, pd.DataFrame],
    *,
    xlabel: str,
    columns: int = 2,
    share: bool = True,
    zero: float | None = 0.0,
) -> Figure:
    """`dots` in panels that share their rows, so that each method is named once a line of panels.

    Parameters
    ----------
    tables : mapping of a panel's title to DataFrame
        As for `dots`, methods in the order of the first that has them; a panel leaves the row of a method that it lacks
        empty. A column "note" is written at the right of its row.
    share : bool
        One scale for the panels of a line.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table.index))
    lines = -(-len(tables) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(7, lines * (0.26 * len(names) + 0.75)), squeeze=False, sharex="row" if share else False
    )
    for ax in panels.flat[len(tables) :]:
        ax.set_visible(False)
    for nth, (ax, (title, table)) in enumerate(zip(panels.flat, tables.items(), strict=False)):
        dots(table.reindex(names), xlabel="", zero=zero, ax=ax)
        ax.set_title(title, fontsize="medium", loc="left")
        ax.tick_params(axis="y", left=False, labelleft=nth % columns == 0)
        ax.set_ylim(-0.6, len(names) - 0.4)
        for row, name in enumerate(reversed(names)):
            if "note" in table and name in table.index:
                beside = ax.get_yaxis_transform()
                ax.text(1.02, row, table.loc[name, "note"], transform=beside, va="center", fontsize="x-small")
    figure.supxlabel(xlabel, fontsize="medium")
    return figure


def dots_by_group(
    tables: Mapping[str, pd.DataFrame], *, xlabel: str, zero: float | None = 0.0, columns: int = 2
) -> Figure:
    """Dots with intervals in groups, a panel for each table: what methods do, scheme by scheme, or task by task.

    Parameters
    ----------
    tables : mapping of a panel's title to DataFrame
        Index: group, method. Columns "mean", "low", "high"; no interval where "low" is missing. Groups stand from the
        top in the order of the first table, and in all panels at the same height.
    zero : float, optional
        Where a vertical line marks no difference.
    columns : int
        Panels side by side.
    """
    groups = [*dict.fromkeys(group for table in tables.values() for group, _ in table.index)]
    methods = [*dict.fromkeys(method for table in tables.values() for _, method in table.index)]
    columns = min(columns, len(tables))
    n_rows, height = -(-len(tables) // columns), 0.17 * len(groups) * (len(methods) + 1) + 0.75
    figure, grid = plt.subplots(
        n_rows, columns, figsize=(7, n_rows * height + 0.6), sharex=True, sharey=True, squeeze=False
    )
    places = np.linspace(-0.3, 0.3, len(methods)) if len(methods) > 1 else [0.0]
    for (title, table), ax in zip(tables.items(), grid.flat, strict=False):
        if zero is not None:
            ax.axvline(zero, color="0.7", linewidth=0.8, zorder=0)
        for (group, method), of in zip(table.index, table.to_dict("records"), strict=True):
            row, colour = groups.index(group) + places[methods.index(method)], colour_of(method)
            ax.plot([of["low"], of["high"]], [row, row], color=colour, linewidth=2, alpha=0.6)
            ax.plot(of["mean"], row, "o", color=colour, markersize=4.5)
        ax.set_title(title, loc="left", fontsize="medium")
        ax.set_yticks(range(len(groups)), groups)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(groups) - 0.5, -0.5)
        for row in range(len(groups) - 1):
            ax.axhline(row + 0.5, color="0.92", linewidth=0.8, zorder=0)
    for ax in grid.flat[len(tables) :]:
        ax.remove()
    for ax in grid.flat[len(tables) - columns : len(tables)]:
        ax.tick_params(labelbottom=True)  # the lowest of each column, also above an empty place
    figure.supxlabel(xlabel, fontsize="medium")
    _name_dots(tables, groups, dict(zip(methods, places, strict=True)), [*grid.flat])
    return figure


def _name_dots(
    tables: Mapping[str, pd.DataFrame], groups: Sequence[str], places: Mapping[str, float], panels: Sequence[Axes]
) -> None:
    """Write each method's name once, beside its first dot, on the side where there is more room."""
    named = set[str]()
    low, high = panels[0].get_xlim()
    for table, ax in zip(tables.values(), panels, strict=False):
        for (group, method), of in zip(table.index, table.to_dict("records"), strict=True):
            if method not in named:
                named.add(method)
                on_left = of["mean"] > (low + high) / 2
                end = np.nanmin([of["low"], of["mean"]]) if on_left else np.nanmax([of["high"], of["mean"]])
                ax.annotate(
                    method, (end, groups.index(group) + places[method]), (-6 if on_left else 6, 0),
                    textcoords="offset points", ha="right" if on_left else "left", va="center",
                    color=colour_of(method), fontsize="small",
                )  # fmt: skip


def tell_dots(tables: Mapping[str, pd.DataFrame], unit: str = "") -> str:
    """The numbers that `dots_by_group` draws, for readers who don't see them."""
    panels = []
    for title, table in tables.items():
        told = []
        for (group, method), of in zip(table.index, table.to_dict("records"), strict=True):
            interval = "" if np.isnan(of["low"]) else f" [{of['low']:.1f}, {of['high']:.1f}]"
            told.append(f"{group}, {method} {of['mean']:.1f}{unit}{interval}")
        panels.append(f"{title}: {'; '.join(told)}.")
    return " ".join(panels)


def by_length(values: pd.DataFrame, *, ylabel: str, ax: Axes | None = None) -> Figure:
    """A line for each method against the tokens read, both on logarithmic scales.

    Parameters
    ----------
    values : DataFrame
        Index: the method's name; columns: lengths in tokens.
    """
    ax = ax or plt.subplots(figsize=(7, 3.4))[1]
    ax.set(xscale="log", yscale="log")
    lines = {str(name): line.to_numpy(float) for name, line in values.iterrows()}
    figure = compare(lines, values.columns.to_numpy(float), xlabel="length (tokens)", ylabel=ylabel, ax=ax)
    ax.set_xticks(values.columns, [f"{length:,}" for length in values.columns])
    ax.xaxis.minorticks_off()
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}", minor_formatter="")
    return figure
