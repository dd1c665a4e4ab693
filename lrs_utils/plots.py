"""Every figure's drawing function, in one style: readable at half width, safe for colour-blind readers."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lrs_utils.metrics import Interval
from lrs_utils.search import SearchResult

_COLOURS = sns.color_palette("colorblind")


def use_style() -> None:
    """Set the style of all figures; call once in a notebook's set-up cell."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.15)
    plt.rcParams |= {
        "figure.figsize": (5.2, 3.2),
        "figure.constrained_layout.use": True,
        "figure.dpi": 120,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "lrs",
    }


def by_depth(
    curves: Mapping[str, Interval],
    depths: ArrayLike | Mapping[str, ArrayLike],
    *,
    ylabel: str,
    ax: Axes | None = None,
) -> Figure:
    """Curves over the depth of the answer, each with its interval as a band and its name at the curve's end.

    Parameters
    ----------
    curves : mapping of name to Interval, arrays of shape (questions,)
    depths : array, shape (questions,), or a mapping of name to such
    """
    ax = ax or plt.subplots()[1]
    for (name, curve), colour, marker in zip(curves.items(), _COLOURS, "osD^v", strict=False):
        x = np.asarray(depths[name] if isinstance(depths, Mapping) else depths, float)
        ax.plot(x, curve.mean, color=colour, marker=marker, markersize=3.5, label=name)
        ax.fill_between(x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    ax.set(xlabel="depth of the answer (0 begin, 1 end)", ylabel=ylabel, xlim=(-0.02, 1.02))
    if len(curves) > 1:
        ax.legend(frameon=False)
    return _figure(ax)


def heat_map(values: pd.DataFrame, *, xlabel: str, label: str, ax: Axes | None = None) -> Figure:
    """Shares between 0 and 1 over depth (index) and something else (columns), written into their cells."""
    ax = ax or plt.subplots()[1]
    sns.heatmap(values, vmin=0, vmax=1, annot=True, fmt=".2f", cmap="viridis", cbar_kws={"label": label}, ax=ax)
    ax.set(xlabel=xlabel, ylabel="depth of the answer (0 begin, 1 end)")
    return _figure(ax)


def factors(scalings: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Figure:
    """Factor of every layer, one step line a scaling, with the baseline at 1."""
    ax = ax or plt.subplots()[1]
    ax.axhline(1.0, color="0.6", linewidth=0.8)
    for (name, values), colour in zip(scalings.items(), _COLOURS, strict=False):
        ax.step(np.arange(len(values)), values, where="mid", color=colour, label=name)
    ax.set(xlabel="layer", ylabel="factor")
    ax.legend(frameon=False)
    return _figure(ax)


def search_progress(result: SearchResult, *, ylabel: str, ax: Axes | None = None) -> Figure:
    """Fitness of every candidate in order of evaluation, and the best so far."""
    ax = ax or plt.subplots()[1]
    n = np.arange(1, len(result.candidates) + 1)
    for start in np.flatnonzero(np.diff(result.generation)) + 1:
        ax.axvline(start + 0.5, color="0.85", linewidth=0.8)
    ax.scatter(n, [f[0] for f in result.fitness], s=12, color=_COLOURS[0], label="candidate")
    ax.step(n, result.best_so_far, where="post", color=_COLOURS[1], label="best so far")
    ax.set(xlabel="candidates evaluated (lines: generations)", ylabel=ylabel)
    ax.legend(frameon=False)
    return _figure(ax)


def benchmark(table: pd.DataFrame, pairs: int) -> Figure:
    """Seconds an answer against the number of pairs, and how much faster than decoding at `pairs`.

    Parameters
    ----------
    table : DataFrame
        As `lrs_utils.benchmark.summary` gives it.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1, 1.2))
    lines = {"generate": "model.generate, one by one", "score, all positions": "score, all positions"}
    for (line, label), colour, marker in zip(lines.items(), _COLOURS, "os", strict=False):
        rows = table[table["line"] == line].sort_values("pairs")
        each = rows["seconds_an_answer"]
        left.errorbar(
            rows["pairs"], each, yerr=[each - rows["least"], rows["most"] - each], color=colour, marker=marker,
            markersize=4, capsize=2, label=label,
        )  # fmt: skip
        left.plot(rows["pairs"], each * rows["share_of_limit"], color=colour, linestyle=":", linewidth=1)
    left.plot([], [], color="0.4", linestyle=":", linewidth=1, label="their operations at full rate")
    ticks = sorted(set(table.loc[table["line"] == "generate", "pairs"]))
    left.set(xscale="log", yscale="log", xlabel="pairs in the context", ylabel="seconds an answer")
    left.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    left.minorticks_off()
    left.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(-0.1, 1))
    bars = table[(table["pairs"] == pairs) & ~table["line"].str.endswith("generate")].iloc[::-1]
    ratio = bars["times_faster"]
    right.barh(
        bars["line"], ratio, xerr=[ratio - bars["slowest"], bars["fastest"] - ratio], color=_COLOURS[0], capsize=2
    )
    for y, (value, high) in enumerate(zip(ratio, bars["fastest"], strict=True)):
        right.text(high * 1.05, y, f"{value:.0f}x", va="center", fontsize="small")
    right.set(xscale="log", xlabel=f"times faster than generate, {pairs} pairs")
    right.set_xlim(min(1, bars["slowest"].min() / 2), bars["fastest"].max() * 2)
    return figure


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure
