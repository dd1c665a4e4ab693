"""Figures of samplers and of what tuned models read, each with its words for readers who don't see it (notebook 09).

Every function returns the figure, whose title says what its numbers show, and its alt text: `run.show(*draw_...(...))`.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from lrs_utils.analysis.methods import colour_of, compare, dot_panels, dots
from lrs_utils.analysis.statistics import Interval

Positions = NDArray[np.int64]  # of one example (window,), or of several (examples, window)
PLURAL = {"pairs": "pairs", "middle of the pairs": "pairs in the middle", "lines": "lines", "pass key": "pass keys"}


def in_pieces(positions: Positions) -> list[Positions]:
    """Runs of positions that follow one another."""
    return np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)


def draw_examples(examples: Mapping[str, Positions], target: int) -> tuple[Figure, str]:
    """One example's positions for each sampler, as strokes along the target."""
    figure, ax = plt.subplots(figsize=(7, 0.42 * len(examples) + 0.8))
    for row, name in enumerate(reversed([*examples])):
        ax.vlines(examples[name], row - 0.35, row + 0.35, color=colour_of(name), linewidth=0.5)
    ax.set_yticks(range(len(examples)), [*reversed([*examples])])
    ax.set(xlabel="position", xlim=(-8, target + 8))
    window = len(next(iter(examples.values())))
    _title(figure, f"The same {window:,} tokens, numbered up to {target:,} by {len(examples)} samplers")
    pieces = {name: [f"{piece[0]:,} to {piece[-1]:,}" for piece in in_pieces(at)] for name, at in examples.items()}
    told = [
        f"{name}: {' and '.join(of)}" if len(of) < 4 else f"{name}: {len(of)} pieces from {of[0]} on"
        for name, of in pieces.items()
    ]
    return figure, f"Positions of one example's tokens by sampler. {'; '.join(told)}."


def draw_reaches(reaches: Mapping[str, NDArray[np.float64]], factor: int) -> tuple[Figure, str]:
    """How many windows CREAM's middle may reach up to, as a density over many draws."""
    figure, ax = plt.subplots(figsize=(7, 2.5))
    told, edges = [], np.arange(1, factor + 1, 0.5)
    for nth, (name, ends) in enumerate(reaches.items()):
        density, _ = np.histogram(ends, edges, density=True)
        ax.stairs(density, edges, color=colour_of(name), linewidth=2)
        ax.text(0.99, 0.9 - 0.13 * nth, name, color=colour_of(name), transform=ax.transAxes, ha="right")
        told.append(f"{100 * np.mean(ends < 1.5):.1f} % by {name}")
    ax.set(xlabel="r / 2 (windows that the middle may reach up to)", ylabel="density")
    _title(figure, f"Drawn below 1.5 windows: {', '.join(told)}")
    return figure, f"How far CREAM's middle may reach. Drawn below 1.5 windows: {', '.join(told)}."


def draw_densities(drawn: Mapping[str, Positions], target: int, bins: int = 64) -> tuple[Figure, str]:
    """How often each sampler uses a position, a panel each with the others in grey."""
    step = target // bins
    used = {name: np.bincount(at.ravel() // step, minlength=bins)[:bins] / len(at) / step for name, at in drawn.items()}
    figure, panels = plt.subplots(1, len(drawn), figsize=(7, 2.3), sharey=True)
    for ax, name in zip(panels, drawn, strict=True):
        for other, line in used.items():
            own = other == name
            look = {"color": colour_of(name), "linewidth": 1.8} if own else {"color": "0.85", "linewidth": 1}
            ax.plot((np.arange(bins) + 0.5) / bins, line, zorder=3 if own else 1, **look)
        ax.set(xlabel="position / target", yscale="log", ylim=(5e-4, 1.5))
        ax.set_title(name, color=colour_of(name), fontsize="medium")
    panels[0].set_ylabel("share of examples")
    middle = used["CREAM"][bins // 8 : -bins // 8]
    densest = (bins // 8 + middle.argmax() + 0.5) / bins
    _title(figure, f"Between the ends CREAM's positions are densest at {densest:.2f} of the target")
    centre = ", ".join(f"{name} {100 * line[bins // 2]:.1f} %" for name, line in used.items())
    alt = f"How often each sampler uses a position. Share of examples with a token at the target's centre: {centre}."
    return figure, f"{alt} CREAM's middle is densest at {densest:.2f} of the target."


def draw_counts(counts: Mapping[str, NDArray[np.int64]], bounds: Sequence[int], target: int) -> tuple[Figure, str]:
    """How many different distances one example shows: mean, least and most, with CREAM's bounds."""
    spans = pd.DataFrame({name: [of.mean(), of.min(), of.max()] for name, of in counts.items()}).T
    spans = spans.set_axis(["mean", "low", "high"], axis=1).sort_values("mean", ascending=False)
    figure = dots(spans, xlabel="different distances in an example (mean, least to most)", zero=None)
    for bound in bounds:
        figure.axes[0].axvline(bound, color="0.6", linestyle=":")
    named = ", ".join(f"{name} {spans['mean'][name]:,.0f}" for name in ("RandPos", "CREAM", "PoSE"))
    _title(figure, f"Distances in one example, of {target:,}: {named}")
    told = [f"{name} {of['mean']:,.0f} ({of['low']:,.0f} to {of['high']:,.0f})" for name, of in spans.iterrows()]
    limits = " and ".join(f"{bound:,}" for bound in bounds)
    return figure, f"Different distances that an example shows. {', '.join(told)}; CREAM's bounds are {limits}."


def draw_losses(losses: pd.DataFrame, over: str) -> tuple[Figure, str]:
    """A line for each column, named at its end, over steps."""
    curves = {str(name): losses[name].to_numpy(float) for name in losses}
    figure = compare(curves, losses.index, xlabel="step", ylabel="nats a token")
    first, last = losses.iloc[0], losses.iloc[-1]
    _title(figure, f"{over}: all end between {last.min():.2f} and {last.max():.2f} nats")
    told = ", ".join(f"{name} from {a:.2f} to {b:.2f}" for name, a, b in zip(losses, first, last, strict=True))
    return figure, f"Loss while training, {over}. {told}."


def draw_by_length(table: pd.DataFrame, names: Sequence[str], window: int) -> tuple[Figure, str]:
    """Pairs and pass keys by length: means over trainings, the least to the most of them as bands."""
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.2))
    told, ylabels = [], {"pairs": "pairs answered (%)", "pass key": "pass keys found (%)"}
    for ax, (task, ylabel) in zip(panels, ylabels.items(), strict=True):
        of = table[table["measure"] == task].set_index("sampler")
        lengths = of.loc[[names[0]], "length"].to_numpy()
        lines = {name: [of.loc[[name], column].to_numpy() for column in ("mean", "least", "most")] for name in names}
        compare(
            {name: Interval(*line) for name, line in lines.items()},
            lengths,
            xlabel="length (tokens)",
            ylabel=ylabel,
            ax=ax,
        )
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        at_end = {name: mean[-1] for name, (mean, *_) in lines.items()}
        told.append(f"{PLURAL[task]} {', '.join(f'{right:.0f} % ({name})' for name, right in at_end.items())}")
    best = max(at_end, key=lambda name: at_end[name])
    _title(
        figure, f"Pass keys at {lengths[-1]:,} tokens, {lengths[-1] // window} windows: "
        f"{at_end['untuned']:.0f} % untuned, up to {at_end[best]:.0f} % tuned ({best})",
    )  # fmt: skip
    alt = "What the small model reads after each tuning, by length, with the range over trainings"
    return figure, f"{alt}. At {lengths[-1]:,} tokens: {'; '.join(told)}."


def draw_by_depth(rows: pd.DataFrame, names: Sequence[str], lengths: Mapping[str, int]) -> tuple[Figure, str]:
    """Pairs by fifth of the depth and pass keys by depth, each at a length; means over trainings.

    Parameters
    ----------
    rows : DataFrame
        Those with a "fifth", of one scheme and target (`select_kind`).
    """
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.2))
    told, centre = [], {}
    for ax, (task, length) in zip(panels, lengths.items(), strict=True):
        of = rows[(rows["task"] == task) & (rows["length"] == length) & rows["fifth"].notna()]
        right = of.pivot_table(index="fifth", columns="sampler", values="right")[[*names]]
        depths = np.linspace(0, 1, 5) if task == "pass key" else (np.arange(5) + 0.5) / 5
        ylabel = "pass keys found (%)" if task == "pass key" else f"{task} answered (%)"
        curves = {name: right[name].to_numpy() for name in names}
        compare(curves, depths, xlabel=f"depth in {length:,} tokens", ylabel=ylabel, ax=ax)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        centre[task] = [float(right[name][3]) for name in names if name != "untuned"]
        lines = (f"{name} {', '.join(f'{at:.0f}' for at in right[name])}" for name in names)
        told.append(f"{PLURAL[task]} in {length:,} tokens: {'; '.join(lines)}")
    least, most = min(centre["pairs"]), max(centre["pairs"])
    _title(figure, f"In the middle fifth tuned models answer {least:.0f} to {most:.0f} % of pairs")
    return figure, f"Right answers from the beginning to the end, in per cent. {'. '.join(told)}."


def draw_gains(gains: Mapping[str, pd.DataFrame], xlabel: str, title: str, columns: int = 2) -> tuple[Figure, str]:
    """A forest plot in panels of changes against a baseline (`list_gains`); three in a line have their own scales."""
    figure = dot_panels(gains, xlabel=xlabel, columns=columns, share=columns < 3)
    _title(figure, title)
    told = [f"{panel}: {', '.join(f'{n} {round(g):+d}' for n, g in of['mean'].items())}" for panel, of in gains.items()]
    return figure, f"{title}. Means, {xlabel}: {'; '.join(told)}."


def draw_sigmas(single: pd.DataFrame, ylabel: str) -> tuple[Figure, str]:
    """One number of each training (columns) at each sigma (index)."""
    figure, ax = plt.subplots(figsize=(7, 2.6))
    for nth, marker in zip(single, "osD^", strict=False):
        ax.plot(single.index, single[nth], marker, color=colour_of("CREAM"), markersize=6)
        last = (single.index[-1], single[nth].iloc[-1])
        ax.annotate(f"training {nth}", last, (8, -3), textcoords="offset points", fontsize="small")
    ax.set(xlabel="sigma of r", ylabel=ylabel, ylim=(0, 100))
    ax.margins(x=0.15)
    apart, of_means = (single.max(axis=1) - single.min(axis=1)).max(), np.ptp(single.mean(axis=1))
    _title(figure, f"Trainings of one sigma differ by up to {apart:.0f} points, means of sigmas by {of_means:.0f}")
    told = [f"sigma {sigma:g}: {', '.join(f'{right:.0f}' for right in of)}" for sigma, of in single.iterrows()]
    return figure, f"{ylabel} by sigma, one number for each training. {'; '.join(told)}."


def draw_factors(searches: pd.DataFrame) -> tuple[Figure, str]:
    """The factors that each search found, a panel for each model that it searched on ("sampler")."""
    names = list(dict.fromkeys(searches["sampler"]))
    figure, panels = plt.subplots(1, len(names), figsize=(7, 2.6), sharey=True, squeeze=False)
    titles, told = [], []
    for ax, name in zip(panels[0], names, strict=True):
        ax.axhline(1.0, color="0.6", linewidth=0.8)
        of_model = searches[searches["sampler"] == name]
        for how, of in of_model.groupby("how", sort=False):
            ax.step(of["layer"], of["factor"], where="mid", color=colour_of(str(how)), linewidth=2)
            end = (of["layer"].iloc[-1] + 0.1, of["factor"].iloc[-1])
            ax.annotate(str(how), end, color=colour_of(str(how)), va="center", fontsize="small", annotation_clip=False)
            told.append(f"{name}, {how}: {', '.join(f'{factor:g}' for factor in of['factor'])}")
        ax.set(xlabel="layer", xticks=sorted(set(of_model["layer"])))
        ax.set_title(f"on {name}", loc="left", fontsize="medium")
        titles.append(f"{of_model['nll'].iloc[0]:.2f} to {of_model['best'].min():.2f} ({name})")
    panels[0, 0].set_ylabel("factor")
    _title(figure, f"The best factors change the nll: {', '.join(titles)}")
    return figure, f"Layer factors found on top of YaRN's stretch. {'; '.join(told)}."


def draw_perplexities(perplexity: pd.Series, length: int) -> tuple[Figure, str]:
    """Perplexity at one length by method, the lowest at the top."""
    ordered = perplexity.sort_values()
    table = pd.DataFrame({"mean": ordered, "low": ordered, "high": ordered})
    figure = dots(table, xlabel=f"perplexity at {length:,} tokens (logarithmic)", zero=None)
    figure.axes[0].set_xscale("log")
    figure.axes[0].xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,.0f}")
    for row, value in enumerate(ordered[::-1]):
        figure.axes[0].annotate(f"{value:.1f}", (value, row), (7, -3), textcoords="offset points", fontsize="small")
    figure.axes[0].minorticks_off()
    figure.axes[0].margins(x=0.12)
    _title(figure, f"Lowest perplexity at {length:,} tokens: {ordered.index[0]}, {ordered.iloc[0]:.1f}")
    return figure, f"Perplexity at {length:,} tokens. {', '.join(f'{n} {p:.1f}' for n, p in ordered.items())}."


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
