"""A candidate of the genetic search taken apart: how children are made, and what moving a found curve does.

Notebook 06's illustrations and ablations. The search itself is `lrs_utils.GeneticSearch`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from lrs_utils import BezierCurve, GeneticSearch, LayerScaling, tasks
from lrs_utils.analysis.methods import colour_of
from lrs_utils.analysis.statistics import Interval, bootstrap_mean, paired_test, utilisation, utilisation_over_depths
from lrs_utils.models.load import LM
from lrs_utils.scoring.outcomes import Outcomes
from lrs_utils.scoring.perplexity import window_nll

Floats = NDArray[np.float64]


def show_family(num_layers: int, **space: Any) -> list[LayerScaling]:
    """Two parents and a child by crossover: the better parent's control points, some replaced by the other's.

    They come from small `GeneticSearch`es that keep two parents and make one child a generation; of twenty such
    families the one whose child differs most from both parents, so that a picture shows it.
    """
    families = []
    for seed in range(20):
        searcher = GeneticSearch(num_layers, population=3, parents=2, mutations=0, crossovers=1, seed=seed, **space)
        flat, better, other = searcher.ask()
        searcher.tell([flat, better, other], [(0.0,), (2.0,), (1.0,)])
        families.append([better, other, *searcher.ask()])

    def unlike(family: Sequence[LayerScaling]) -> float:
        *parents, child = (np.array(scaling.factors) for scaling in family)
        return min(float(np.abs(child - parent).sum()) for parent in parents)

    return max(families, key=unlike)


def take_halves(whole: Mapping[str, LayerScaling]) -> dict[tuple[str, str], LayerScaling]:
    """Each scaling on the first half of the layers, on the second, and on both; 1 elsewhere."""
    halves = {}
    for name, scaling in whole.items():
        layers = np.arange(len(scaling.factors))
        first = layers < len(layers) // 2
        for part, at in {"first half": first, "second half": ~first, "both": layers >= 0}.items():
            halves[name, part] = LayerScaling(np.where(at, scaling.factors, 1.0).tolist(), scaling.scheme)
    return halves


def move_points(
    curve: BezierCurve, moves: Sequence[float], num_layers: int, first_layer: int, step: float
) -> dict[tuple[int, float], LayerScaling]:
    """Each control point of a curve moved up or down alone, by (point, move), beyond any bounds of a search."""
    moved = {}
    for point in range(len(curve.values)):
        for move in moves:
            values = [value + move * (at == point) for at, value in enumerate(curve.values)]
            moved[point, move] = LayerScaling(BezierCurve(curve.layers, values).factors(num_layers, first_layer, step))
    return moved


def tabulate_moves(moved: Mapping[tuple[int, float], Floats], at_found: Floats, depths: Floats) -> pd.DataFrame:
    """Change of U, accuracy and nll with each move of a control point, with intervals over contexts.

    Parameters
    ----------
    moved : mapping of (point, move) to array, shape (2, contexts, questions)
        Accuracy and nll.
    at_found : array of the same shape
        Of the curve as it was found.
    """
    rows = {}
    for name, found in moved.items():
        u, u_found = (utilisation(each[0][:, None], depths) for each in (found, at_found))
        row = {"U": bootstrap_mean(u - u_found), "accuracy": bootstrap_mean((found - at_found)[0].mean(1))}
        row["nll"] = bootstrap_mean((found - at_found)[1].mean(1))
        rows[name] = {
            f"{what}{end}": float(v) for what, i in row.items() for end, v in zip(("", "_low", "_high"), i, strict=True)
        }
    table = pd.DataFrame(rows).T
    table.index.names = ["point", "move"]
    return table


def lines_of_moves(
    moved: Mapping[tuple[int, float], Floats], at_found: Floats, layers: Sequence[float]
) -> tuple[list[float], dict[str, Interval]]:
    """The moves in order, 0 among them, and for each control point the change of nll over them, named by its layer."""
    moves = sorted({0.0, *(move for _, move in moved)})
    lines = {}
    for point, layer in enumerate(layers):
        changes = [moved.get((point, move), at_found) - at_found for move in moves]
        means = [bootstrap_mean(change[1].mean(1)) for change in changes]
        lines[f"point {point} (layer {layer:g})"] = Interval(*np.transpose(means))
    return moves, lines


def tilt(changes: Mapping[tuple[str, str], Floats], name: str, where: Mapping[str, NDArray[np.bool_]]) -> Floats:
    """End minus beginning, first minus second half: the paper's claim as a difference of differences, by context.

    Below 0 where scaling the first half favours the end (nll) more than scaling the second does. Shape (2, contexts).
    """
    part = {half: changes[name, half] for half in ("first half", "second half")}
    of = {
        half: each[..., where["end"]].mean(-1) - each[..., where["beginning"]].mean(-1) for half, each in part.items()
    }
    return np.asarray(of["first half"] - of["second half"])


def measure_perplexity(lm: LM, name: str, scaling: LayerScaling, *, tokens: int, windows: int) -> pd.DataFrame:
    """The nll of the last half of each of some windows of a book, under a scaling."""
    [book] = tasks.long_texts("paradise-lost")
    [found] = window_nll(lm, book, [tokens], stride=tokens // 2, n_windows=windows, scaling=scaling)
    return pd.DataFrame({"scaling": name, "window": range(windows), "nll": found})


def tabulate_costs(
    short_nll: pd.DataFrame, accuracy: Mapping[str, Mapping[str, Floats]], base: str = "no scaling"
) -> pd.DataFrame:
    """What each scaling does to perplexity (times that of `base`) and to the accuracy on each suite, with intervals.

    Parameters
    ----------
    short_nll : DataFrame, index: window, a column for each scaling
    accuracy : mapping of a suite's name to a mapping of scaling to array, shape (2, contexts, questions)
    """
    rows = {}
    for name in next(iter(accuracy.values())):
        times = np.exp(bootstrap_mean(short_nll[name] - short_nll[base]))
        row = dict(zip(("perplexity, times", "low", "high"), map(float, times), strict=True))
        for what, found in accuracy.items():
            change = bootstrap_mean((found[name] - found[base])[0].mean(1))
            ends = (f"{what}, change", f"{what}, low", f"{what}, high")
            row |= {what: float(np.mean(found[name][0]))} | dict(zip(ends, map(float, change), strict=True))
        rows[name] = row
    return pd.DataFrame(rows).T


def write_costs(costs: pd.DataFrame, suites: Sequence[str]) -> pd.DataFrame:
    """`tabulate_costs` for a reader: a change with its interval in each cell, the cheapest for text first."""
    shown = pd.DataFrame({"scaling": costs.index})
    of_text = costs[["perplexity, times", "low", "high"]].to_numpy()
    shown["perplexity"] = [f"x {times:.3f} [{low:.3f}, {high:.3f}]" for times, low, high in of_text]
    for what in suites:
        ends = costs[[f"{what}, change", f"{what}, low", f"{what}, high"]].to_numpy()
        shown[f"accuracy, {what}"] = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in ends]
    return shown.iloc[of_text[:, 0].argsort(kind="stable")]


def write_held_out(table: pd.DataFrame, names: Mapping[str, str], positions: Sequence[int]) -> pd.DataFrame:
    """`tabulate_held_out` for a reader: U and accuracy with interval and p, and accuracy at three positions."""
    shown = pd.DataFrame({"method": table["method"].map(names)})
    for what in ("U", "accuracy"):
        parts = table[[what, f"{what}_low", f"{what}_high", f"{what}_p"]].to_numpy()
        shown[what] = [f"{mean:.3f} [{low:.3f}, {high:.3f}], p {p:.2g}" for mean, low, high, p in parts]
    for name, position in zip(("first", "middle", "last"), positions, strict=True):
        shown[name] = table[f"at {position}"].map("{:.2f}".format)
    return shown


def tabulate_held_out(outcomes: Outcomes, methods: Sequence[str], positions: Sequence[int]) -> pd.DataFrame:
    """A row for each method on held-out contexts: accuracy, U, U over depths with intervals and p, nll, by position.

    The first method is the one that p compares with.
    """
    table = pd.DataFrame({"method": list(methods)})
    for name, values in by_context(outcomes).items():
        table[[name, f"{name}_low", f"{name}_high"]] = np.transpose(bootstrap_mean(values.T))
        table[f"{name}_p"] = [paired_test(method, values[0]) for method in values]
    table["nll"] = outcomes.nll.mean(axis=(1, 2))
    for position in positions:
        table[f"at {position}"] = outcomes.exact[:, :, position].mean(axis=1)
    return table


def by_context(outcomes: Outcomes) -> dict[str, Floats]:
    """Accuracy, U and U over depths of each context, shape (methods, contexts)."""
    one = outcomes.exact[:, :, None]
    by = {"accuracy": outcomes.exact.mean(axis=2), "U": utilisation(one, outcomes.depths)}
    return by | {"U over depths": utilisation_over_depths(one, outcomes.depths)}


def judge_gain(own: float, new: float) -> str:
    """In words, how much of a gain on the contexts of a search is there on new ones."""
    if own <= 0:
        return "the search gained nothing even on its own contexts"
    share = new / own
    if share <= 0:
        return "none of what it gained on its own contexts is there on new ones"
    if share < 0.5:
        return "most of what it gained on its own contexts is not there on new ones"
    if share < 0.9:
        return "part of what it gained on its own contexts is not there on new ones"
    return "what it gained on its own contexts is there on new ones"


def draw_family(population: Sequence[LayerScaling], family: Sequence[LayerScaling]) -> Figure:
    """The first population beside its flat curve; a mutation of it; two parents and their child."""
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.7), sharey=True)
    flat, *mutants = population
    mutant = max(mutants, key=lambda candidate: float(np.ptp(candidate.factors))) if mutants else flat
    for candidate in mutants:
        axes[0].plot(candidate.factors, color="0.7", linewidth=0.8)
    for ax in axes[:2]:
        ax.plot(flat.factors, color="0.2", linewidth=2)
    axes[1].plot(mutant.factors, color=colour_of("GA"), linewidth=2)
    better, other, child = family
    for parent, style in ((better, "-"), (other, ":")):
        axes[2].plot(parent.factors, style, color="0.2", linewidth=1.5)
    axes[2].plot(child.factors, color=colour_of("GA"), linewidth=2)
    titles = ("first population", "mutation", "crossover")
    for title, ax in zip(titles, axes, strict=True):
        ax.set_title(title, loc="left", fontsize="medium")
        ax.set_xlabel("layer")
    axes[0].set_ylabel("factor")
    return figure


def draw_gains(gains: Mapping[str, Mapping[str, Floats]]) -> Figure:
    """Gain of each method over no scaling, by contexts: a dot with its interval, the groups one below the other.

    Parameters
    ----------
    gains : mapping of contexts ("search contexts (16)") to a mapping of method to array, shape (contexts,)
    """
    names = [(group, method) for group, methods in gains.items() for method in methods]
    figure, ax = plt.subplots(figsize=(7, 0.5 * len(names) + 1.0))
    ax.axvline(0, color="0.6", linewidth=0.8)
    for row, (group, method) in enumerate(reversed(names)):
        mean, low, high = map(float, bootstrap_mean(gains[group][method]))
        ax.plot([low, high], [row, row], color=colour_of(method), linewidth=2.5)
        ax.plot(mean, row, "o", color=colour_of(method), markersize=7)
        ax.text(mean, row + 0.18, f"{mean:+.3f}", ha="center", va="bottom", color=colour_of(method), fontsize="small")
    ax.set_yticks(range(len(names)), [f"{method}, on {group}" for group, method in reversed(names)])
    ax.set(xlabel="gain in U over no scaling", ylim=(-0.5, len(names) - 0.3))
    return figure


def draw_factors(scalings: Mapping[str, Sequence[float]], *, ax: Axes) -> None:
    """Factors by layer, a step line for each method, named at its middle."""
    for name, values in scalings.items():
        ax.step(np.arange(len(values)), values, where="mid", color=colour_of(name), linewidth=2)
        middle = len(values) // 2
        look: dict[str, Any] = {"ha": "center", "fontsize": "small", "textcoords": "offset points"}
        halo = [withStroke(linewidth=3, foreground="white")]  # lines may cross a name
        ax.annotate(name, (middle, values[middle]), (0, 4), color=colour_of(name), path_effects=halo, **look)
    ax.set(xlabel="layer", ylabel="factor")
