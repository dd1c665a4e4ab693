"""How notebook 01 measures and draws decay: products of query and key by distance, and pairs of dimensions as arrows.

Knows no files and no parameters: texts, scalings and bins of distances are passed in.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import ArrayLike, NDArray

from lrs_utils import LayerScaling
from lrs_utils.analysis.attention import logits_by_distance
from lrs_utils.analysis.methods import colour_of, compare
from lrs_utils.analysis.plots import named_lines, octaves
from lrs_utils.analysis.statistics import Interval
from lrs_utils.models.load import LM

Q_COLOUR, K_COLOUR = COLOURS = "#0173b2", "#d55e00"


def draw_arrows(q: complex, k: complex, title: str, ax: Axes) -> None:
    """Draw query and key as arrows of length 1 and write the angle from k to q, which may be more than half a turn."""
    ax.add_artist(Circle((0, 0), 1, fill=False, color="0.85"))
    turn = float(np.angle(q / k) % (2 * np.pi))
    for name, vector, colour in (("q", q, Q_COLOUR), ("k", k, K_COLOUR)) if turn > 0.1 else (("q, k", q, "0.3"),):
        ax.annotate("", (vector.real, vector.imag), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
        ax.text(1.3 * vector.real, 1.25 * vector.imag, name, color=colour, ha="center", va="center")
    arc = 0.45 * np.exp(1j * (np.angle(k) + np.linspace(0, turn, 60)))
    ax.plot(arc.real, arc.imag, color="0.4", linewidth=1)
    ax.set(xlim=(-1.45, 1.45), ylim=(-1.35, 1.35), aspect="equal")
    ax.set_axis_off()
    ax.set_title(f"{title}\n{np.degrees(turn):.0f}°", fontsize="medium")


def draw_bounds(bounds: Mapping[str, Mapping[str, Interval]], distances: ArrayLike, shown: str) -> Figure:
    """Draw a panel for each family: the bound with no scaling and one more, with bands; the others thin and grey."""
    figure, axes = plt.subplots(1, len(bounds), figsize=(7, 3), squeeze=False)
    looks = {"no scaling": colour_of("no scaling"), shown: Q_COLOUR}
    for ax, (family, lines) in zip(axes[0], bounds.items(), strict=True):
        octaves(ax)
        named_lines(lines, distances, looks, xlabel="distance (tokens)", ylabel="bound B", ax=ax)
        ax.set_title(family, fontsize="medium")
    return figure


def draw_ratios(panels: Mapping[str, Mapping[str, NDArray[np.float64]]], distances: ArrayLike) -> Figure:
    """Draw a panel for each title: a line for each method, relative to no scaling."""
    figure, axes = plt.subplots(1, len(panels), figsize=(7, 3), sharey=True)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        octaves(ax)
        ax.axhline(1, color="0.8", linewidth=1, zorder=0)
        compare(lines, distances, xlabel="distance (tokens)", ylabel="", ax=ax)
        ax.set_title(title, fontsize="medium")
    axes[0].set_ylabel("bound / bound with no scaling")
    return figure


def draw_decay(panels: Mapping[str, NDArray[np.float64]], distances: ArrayLike, slopes: NDArray[np.float64]) -> Figure:
    """Draw every layer's mean logit by distance; the mean, and the layers with the largest and least slope, are named.

    Parameters
    ----------
    panels : mapping of title to array, shape (layers, bins)
    slopes : array, shape (layers,)
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(7, 3.4), sharey=True, squeeze=False)
    steep, flat = f"layer {slopes.argmax()}", f"layer {slopes.argmin()}"
    looks: dict[str, tuple[float, ...] | str] = {steep: K_COLOUR, "mean of layers": "0.1", flat: Q_COLOUR}
    for ax, (title, logits) in zip(axes[0], panels.items(), strict=True):
        octaves(ax)
        lines = {f"layer {layer}": line for layer, line in enumerate(logits)} | {"mean of layers": logits.mean(axis=0)}
        named_lines(lines, distances, looks, xlabel="distance (tokens)", ylabel="", ax=ax)
        ax.set_title(title, fontsize="medium")
    axes[0, 0].set_ylabel("mean logit (nats)")
    return figure


def draw_changes(
    changes: Mapping[tuple[int, float], tuple[NDArray[np.float64], NDArray[np.float64]]], distances: ArrayLike
) -> Figure:
    """Draw a panel for each layer: what each factor changes at each distance, and dotted what was predicted.

    Parameters
    ----------
    changes : mapping of (layer, factor) to (change, prediction)
    """
    layers = list(dict.fromkeys(layer for layer, _ in changes))
    figure, axes = plt.subplots(1, len(layers), figsize=(7, 3), sharey=True, squeeze=False)
    for ax, layer in zip(axes[0], layers, strict=True):
        of_layer = {factor: pair for (of, factor), pair in changes.items() if of == layer}
        looks = {f"{factor:g}": COLOURS[i % len(COLOURS)] for i, factor in enumerate(of_layer)}
        octaves(ax)
        ax.axhline(0, color="0.8", linewidth=1, zorder=0)
        for factor, (_, predicted) in of_layer.items():
            ax.plot(distances, predicted, color=looks[f"{factor:g}"], linestyle=":", linewidth=1.5)
        lines = {f"{factor:g}": change for factor, (change, _) in of_layer.items()}
        named_lines(lines, distances, looks, xlabel="distance (tokens)", ylabel="", ax=ax)
        ax.set_title(f"layer {layer}", fontsize="medium")
    axes[0, 0].set_ylabel("change of the mean logit (nats)")
    return figure


def in_bins(values: NDArray[np.float64], bins: NDArray[np.int_]) -> Interval:
    """Find the mean, least and most of one number a distance within each bin.

    Parameters
    ----------
    bins : array, shape (bins,)
        Index where each begins, increasing.
    """
    mean = np.add.reduceat(values, bins) / np.diff(bins, append=len(values))
    return Interval(mean, np.minimum.reduceat(values, bins), np.maximum.reduceat(values, bins))


def measure_decay(
    lm: LM, what: str, texts: Sequence[ArrayLike], edges: NDArray[np.int_], scaling: LayerScaling
) -> pd.DataFrame:
    """Measure the mean logit in bins of distance.

    Parameters
    ----------
    what : str
        Goes into the column of that name.
    texts : sequence of int array
        Tokens of each.
    edges : array, shape (bins + 1,)
        Distances where bins begin, and where the last one ends.

    Returns
    -------
    DataFrame
        With no scaling, each layer by text and each head over texts; with a scaling, only layers over texts.
    """
    logits = _mean_logits(lm, texts, edges, scaling)
    of_layers = _rows(logits.mean(axis=2, keepdims=True), what).assign(head="mean")
    if scaling.is_identity:
        return pd.concat([of_layers, _rows(logits.mean(axis=0, keepdims=True), what).assign(text="mean")])
    over_texts = of_layers.groupby(["what", "layer", "head", "bin"])["logit"].mean()
    return over_texts.reset_index().assign(text="mean")


def find_slopes(by_text: NDArray[np.float64], octaves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit how much each line falls in an octave.

    Parameters
    ----------
    by_text : array, shape (texts, lines, bins)

    Returns
    -------
    array, shape (texts, lines)
    """
    return -np.array([np.polyfit(octaves, text.T, 1)[0] for text in by_text])


def find_r2(lines: NDArray[np.float64], shape: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the share of each line's variance that a straight line in `shape` explains.

    Parameters
    ----------
    lines : array, shape (lines, bins)
    shape : array, shape (bins,)
    """
    return np.array([np.corrcoef(line, shape)[0, 1] ** 2 for line in lines])


def explain_change(
    before: NDArray[np.float64], after: NDArray[np.float64], middles: NDArray[np.float64], factor: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[float]]:
    """Compare what a factor changed in a layer's curve with what stretching the curve by it predicts.

    Returns
    -------
    (change, prediction, numbers)
        The prediction is nan where r / factor lies outside the curve. Numbers are root mean squares of the change and
        of what is left of it, and the share that is explained, over the other bins.
    """
    stretched, inside = stretch(before, middles, factor)
    whole, left = (float(np.sqrt(np.mean((after - other)[inside] ** 2))) for other in (before, stretched))
    return after - before, np.where(inside, stretched - before, np.nan), [whole, left, 1 - (left / whole) ** 2]


def stretch(
    before: NDArray[np.float64], middles: NDArray[np.float64], factor: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Stretch a curve f over distance to f(r / factor); say which of its bins have both r and r / factor."""
    octaves = np.log2(middles)
    inside = (middles / factor >= middles[0]) & (middles / factor <= middles[-1])
    return np.interp(octaves - np.log2(factor), octaves, before), inside


def _mean_logits(
    lm: LM, texts: Sequence[ArrayLike], edges: NDArray[np.int_], scaling: LayerScaling
) -> NDArray[np.float64]:
    """Shape (texts, layers, heads, bins)."""
    found = []
    for tokens in texts:
        with scaling.applied_to(lm.model):
            logits = logits_by_distance(lm, np.asarray(tokens).tolist())
        found.append(np.add.reduceat(logits[..., : edges[-1]], edges[:-1], axis=2) / np.diff(edges))
    return np.array(found)


def _rows(logits: NDArray[np.float64], what: str) -> pd.DataFrame:
    """One row for each of the axes (text, layer, head, bin)."""
    text, layer, head, number = np.indices(logits.shape).reshape(4, -1)
    values = logits.ravel().round(3)
    return pd.DataFrame({"what": what, "text": text, "layer": layer, "head": head, "bin": number, "logit": values})
