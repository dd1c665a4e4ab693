"""Every figure's drawing function, in one style: readable at half width, safe for colour-blind readers."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from lrs_utils.analysis.methods import colour_of, label_ends
from lrs_utils.analysis.statistics import Interval
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.searchers.engine import SearchResult

_COLOURS = sns.color_palette("colorblind")
DEPTH = "depth of the answer (0 beginning, 1 end)"


def use_style() -> None:
    """Set the style of all figures; call once in a notebook's setup cell."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.15)
    plt.rcParams |= {
        "figure.figsize": (5.2, 3.2),
        "figure.constrained_layout.use": True,
        "figure.dpi": 120,
        "figure.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "lrs",
    }


def named_curves(
    curves: Mapping[str, Interval],
    x: ArrayLike | Mapping[str, ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    colours: Sequence[Any] = _COLOURS,
    ax: Axes | None = None,
) -> Figure:
    """Lines with bands, named at their ends, which are at one x: for up to five lines.

    Parameters
    ----------
    x : array, or mapping of a line's name to array
    """
    ax = ax or plt.subplots(figsize=(7, 3.4))[1]
    colour_of, last = dict(zip(curves, colours, strict=False)), 0.0
    for name, curve in curves.items():
        at = np.asarray(x[name] if isinstance(x, Mapping) else x, float)
        ax.plot(at, curve.mean, color=colour_of[name], marker="o", markersize=3, linewidth=2)
        ax.fill_between(at, curve.low, curve.high, color=colour_of[name], alpha=0.15, linewidth=0)
        last = max(last, at[-1])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    label_ends(ax, last, {name: float(curve.mean[-1]) for name, curve in curves.items()}, colour_of)
    return _figure(ax)


def named_lines(
    lines: Mapping[str, Interval | NDArray[np.float64]],
    x: ArrayLike,
    colours: Mapping[str, tuple[float, ...] | str],
    *,
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
) -> Figure:
    """A line for each thing that is not a method (a kind of text, a factor), named at its end.

    Parameters
    ----------
    lines : mapping of name to Interval or array, shape (points,)
        Intervals are drawn as bands. A name without a colour is drawn thin and grey, and not named.
    """
    ax = ax or plt.subplots(figsize=(7, 3.6))[1]
    at, ends = np.asarray(x, float), {}
    for name, line in lines.items():
        mean = np.asarray(line.mean if isinstance(line, Interval) else line, float)
        if name not in colours:
            ax.plot(at, mean, color="0.8", linewidth=0.8, zorder=0)
            continue
        ax.plot(at, mean, color=colours[name], linewidth=1.8)
        if isinstance(line, Interval):
            ax.fill_between(at, line.low, line.high, color=colours[name], alpha=0.15, linewidth=0)
        ends[name] = float(mean[-1])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    label_ends(ax, at[-1], ends, colours)
    return _figure(ax)


def octaves(ax: Axes) -> None:
    """Distances in octaves, as plain numbers."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set(major_locator=LogLocator(base=8), major_formatter="{x:,.0f}", minor_locator=NullLocator())


def layer_map(
    values: pd.DataFrame, *, ylabel: str, label: str, limit: float | None = None, ax: Axes | None = None
) -> Figure:
    """Changes (below 0 blue, above red) or shares (from 0) by layer (columns) and something else (rows).

    Parameters
    ----------
    limit : float, optional
        Colours end there, in both directions; by default at the largest value.
    """
    ax = ax or plt.subplots(figsize=(7.5, 0.3 * len(values) + 1.1))[1]
    low, high = values.to_numpy(float).min(), values.to_numpy(float).max()
    limit = max(-low, high) if limit is None else limit
    ends = {(False, False): "neither", (False, True): "max", (True, False): "min", (True, True): "both"}
    bar = {"label": label, "extend": ends[-limit > low, high > limit], "pad": 0.02}
    sns.heatmap(
        values, vmin=-limit if low < 0 else 0, vmax=limit, cmap="vlag" if low < 0 else "rocket_r", cbar_kws=bar, ax=ax
    )
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.tick_params(axis="y", rotation=0)
    ax.set_xticks(np.arange(0, values.shape[1], 2) + 0.5, np.asarray(values.columns)[::2])
    return _figure(ax)


def layer_scatter(x: ArrayLike, y: ArrayLike, *, xlabel: str, ylabel: str, ax: Axes | None = None) -> Figure:
    """One number of each layer against another, with the layers' indices as marks."""
    ax = ax or plt.subplots()[1]
    x, y = np.asarray(x, float), np.asarray(y, float)
    ax.scatter(x, y, s=130, c=np.arange(len(x)), cmap="viridis", alpha=0.35, linewidth=0)
    for layer, at in enumerate(zip(x, y, strict=True)):
        ax.annotate(str(layer), at, ha="center", va="center", fontsize="x-small")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return _figure(ax)


def heat_map(values: pd.DataFrame, *, xlabel: str, label: str, ax: Axes | None = None) -> Figure:
    """Shares between 0 and 1 over depth (index) and something else (columns), written into their cells."""
    ax = ax or plt.subplots()[1]
    sns.heatmap(values, vmin=0, vmax=1, annot=True, fmt=".2f", cmap="viridis", cbar_kws={"label": label}, ax=ax)
    ax.set(xlabel=xlabel, ylabel=DEPTH)
    ax.tick_params(axis="y", rotation=0)
    return _figure(ax)


def factors(scalings: Mapping[str, Sequence[float]], *, ylabel: str = "factor", ax: Axes | None = None) -> Figure:
    """Factor (or temperature) of every layer, one step line per scaling, with the baseline at 1."""
    ax = ax or plt.subplots()[1]
    ax.axhline(1.0, color="0.6", linewidth=0.8)
    for (name, values), colour in zip(scalings.items(), _COLOURS, strict=False):
        ax.step(np.arange(len(values)), values, where="mid", color=colour, label=name)
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.legend(frameon=False)
    return _figure(ax)


def bezier(curve: BezierCurve, factors: Sequence[float], *, ax: Axes | None = None) -> Figure:
    """A curve over the layers with its control points, and the rounded factors that it gives, as bars from 1."""
    ax = ax or plt.subplots()[1]
    layers = np.arange(len(factors))
    ax.bar(layers, np.asarray(factors) - 1, bottom=1, color=_COLOURS[9], alpha=0.45, width=0.8)
    ax.axhline(1.0, color="0.6", linewidth=0.8)
    ax.plot(curve.layers, curve.values, color="0.6", linestyle=":", linewidth=1)
    fine = np.linspace(0, len(factors) - 1, 200)
    ax.plot(fine, curve(fine), color=_COLOURS[0])
    ax.scatter(curve.layers, curve.values, color=_COLOURS[1], zorder=3, clip_on=False)
    ax.set(xlabel="layer", ylabel="factor")
    return _figure(ax)


def search_progress(result: SearchResult[Any], *, ylabel: str, ax: Axes | None = None) -> Figure:
    """Fitness of every candidate in order of evaluation, and the best so far."""
    ax = ax or plt.subplots()[1]
    n = np.arange(1, len(result.candidates) + 1)
    last = result.fitness[bisect_left(result.generation, result.generation[-1]) :]
    for start in np.flatnonzero(np.diff(result.generation)) + 1:
        ax.axvline(start + 0.5, color="0.85", linewidth=0.8)
    ax.scatter(n, [f[0] for f in result.fitness], s=12, color=_COLOURS[0])
    ax.step(n, result.best_so_far, where="post", color=_COLOURS[1])
    ax.set(xlabel="candidates evaluated (lines: generations)", ylabel=ylabel)
    ends = {"best so far": result.best_so_far[-1], "candidates": float(np.mean([f[0] for f in last]))}
    label_ends(ax, n[-1], ends, {"best so far": _COLOURS[1], "candidates": _COLOURS[0]})
    return _figure(ax)


def generations(result: SearchResult[LayerScaling], shown: int = 4) -> Figure:
    """Factors of every candidate of some generations, first to last, and the best of all up to then."""
    numbers = np.unique(np.linspace(0, result.generation[-1], shown).round().astype(int))
    figure, axes = plt.subplots(1, len(numbers), figsize=(2.5 * len(numbers), 2.6), sharey=True, squeeze=False)
    for number, ax in zip(numbers, axes[0], strict=True):
        n_so_far = bisect_right(result.generation, number)  # candidates, this generation's included
        best = result.fitness.index(max(result.fitness[:n_so_far]))
        for candidate, generation in zip(result.candidates, result.generation, strict=True):
            if generation == number:
                ax.plot(candidate.factors, color=_COLOURS[0], alpha=0.35, linewidth=0.8)
        ax.plot(result.candidates[best].factors, color=_COLOURS[1], linewidth=2)
        ax.set(title=f"generation {number}", xlabel="layer")
    axes[0, 0].set_ylabel("factor")
    return figure


def budget(
    searches: pd.DataFrame, by: str, *, y: str, ylabel: str, named: Sequence[str] = (), ax: Axes | None = None
) -> Figure:
    """What each method has found against answers scored: mean of its seeds, least to most as a band.

    Parameters
    ----------
    searches : DataFrame
        A row for each candidate: `seed`, `answers` scored so far, the best so far `y`, and the method's name `by`.
    named : sequence of str
        Methods that have a colour and their name at the end; the others are thin and grey. Scheme "pi" is dashed.
    """
    ax = ax or plt.subplots(figsize=(7, 3.8))[1]
    at, ends = np.linspace(0, searches["answers"].max(), 400), {}
    for name, rows in searches.groupby(by, sort=False):
        lines = []
        for _, one in rows.groupby("seed"):
            last = np.searchsorted(one["answers"], at, side="right") - 1  # candidate scored by then, -1 for none
            line = np.where(last < 0, np.nan, one[y].to_numpy()[last])
            lines.append(np.where(at > one["answers"].iloc[-1], np.nan, line))
        mean, look = np.mean(lines, axis=0), _look(str(name), named)
        ax.plot(at, mean, **look)
        if name in named:
            ends[str(name)] = float(mean[~np.isnan(mean)][-1])
            if len(lines) > 1:
                low, high = np.min(lines, axis=0), np.max(lines, axis=0)
                ax.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="answers scored", ylabel=ylabel)
    label_ends(ax, float(at[-1]), ends)
    return _figure(ax)


def pareto(
    points: pd.DataFrame, by: str, *, x: str, y: str, named: Sequence[str] = (), ax: Axes | None = None
) -> Figure:
    """Gain of each method against its cost, with its doses joined by a line, and the front that no other point beats.

    Parameters
    ----------
    points : DataFrame
        Columns `x` (cost, less is better), `y` (gain) and `by`; rows of a method in the order of its doses.
    named : sequence of str
        As for `budget`; a name stands at the last dose.
    """
    ax = ax or plt.subplots(figsize=(7, 4.2))[1]
    ordered = points.sort_values(x)
    front = ordered[ordered[y] > ordered[y].astype(float).cummax().shift(fill_value=-np.inf)]
    ax.step(front[x], front[y], where="post", color="0.88", linewidth=7, label="front", zorder=0)
    for name, rows in points.groupby(by, sort=False):
        look = _look(str(name), named)
        ax.plot(rows[x], rows[y], marker="o" if name in named else None, markersize=4, label=name, **look)
        if name in named:
            ax.annotate(
                str(name), (rows[x].iloc[-1], rows[y].iloc[-1]), (6, 0), textcoords="offset points", va="center",
                color=look["color"], fontsize="small", path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
    ax.set(xlabel=x, ylabel=y)
    return _figure(ax)


def _look(name: str, named: Sequence[str]) -> dict[str, Any]:
    """How a method's line looks where only some are `named`."""
    dash = "--" if ", pi," in name else "-"
    if name not in named:
        return {"color": "0.8", "linewidth": 0.8, "linestyle": dash, "zorder": 0.5}
    return {"color": colour_of(name), "linewidth": 1.8, "linestyle": dash}


def benchmark(table: pd.DataFrame, pairs: int) -> Figure:
    """Seconds an answer against the number of pairs, and how much faster than decoding at `pairs`.

    Parameters
    ----------
    table : DataFrame
        As `summary` of tools/benchmark.py gives it.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1, 1))
    names, ends = {"generate": "generate, one by one", "score, all positions": "score, all positions"}, {}
    colours = dict(zip(names.values(), _COLOURS, strict=False))
    for (line, name), marker in zip(names.items(), "os", strict=True):
        rows = table[table["line"] == line].sort_values("pairs")
        each, ends[name] = rows["seconds_an_answer"], float(rows["seconds_an_answer"].iloc[-1])
        left.errorbar(
            rows["pairs"], each, yerr=[each - rows["least"], rows["most"] - each], color=colours[name], marker=marker,
            markersize=4, capsize=2,
        )  # fmt: skip
        left.plot(rows["pairs"], each * rows["share_of_limit"], color=colours[name], linestyle=":", linewidth=1)
    ticks = sorted({int(n) for n in table.loc[table["line"] == "generate", "pairs"]})
    left.set(xscale="log", yscale="log", xlabel="pairs in the context", ylabel="seconds an answer")
    left.set_title("dotted: their operations at full rate", loc="left", fontsize="small")
    left.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    left.minorticks_off()
    label_ends(left, ticks[-1], ends, colours)
    bars = table[(table["pairs"] == pairs) & ~table["line"].str.endswith("generate")].iloc[::-1]
    ratio = bars["times_faster"]
    right.barh(
        bars["line"], ratio, xerr=[ratio - bars["slowest"], bars["fastest"] - ratio], color=_COLOURS[0], capsize=2
    )
    for y, (value, high) in enumerate(zip(ratio, bars["fastest"], strict=True)):
        right.text(high * 1.05, y, f"{value:.0f}x", va="center", fontsize="small")
    right.set(xscale="log", xlabel="times faster than generate")
    right.set_title(f"{pairs} pairs", loc="left", fontsize="small")
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_formatter("{x:g}")
    right.set_xlim(min(1, bars["slowest"].min() / 2), bars["fastest"].max() * 2)
    return figure


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure
