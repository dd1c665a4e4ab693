"""Scalings against no scaling, context by context: what notebooks 04 and 06 measure, and how they draw it.

`Measured` scores and remembers what it scored, so that the notebook can ship it. The rest turns accuracy and nll into
tables of changes by part of the context, and draws lines with their names at their ends.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from lrs_utils import LayerScaling, score, tasks
from lrs_utils.analysis.methods import label_ends
from lrs_utils.analysis.statistics import Interval, bootstrap_mean
from lrs_utils.models.load import LM
from lrs_utils.scoring.ledger import Ledger

Name = TypeVar("Name", bound=Hashable)
Floats = NDArray[np.float64]
PART_COLOURS = ("#0173b2", "#d55e00", "#029e73", "#949494")  # safe for colour-blind readers


class Measured:
    """Scores scalings, and remembers which outcomes a notebook's results stand on.

    Attributes
    ----------
    candidates, questions : list of str
        Keys of the scalings and of the questions that were asked, for `run.ship`.
    """

    def __init__(self, lm: LM, ledger: Ledger) -> None:
        self._lm, self._ledger = lm, ledger
        self.candidates: list[str] = []
        self.questions: list[str] = []

    def __call__(self, suite: tasks.Suite, scalings: Mapping[Name, LayerScaling]) -> dict[Name, Floats]:
        """Accuracy and nll by name, shape (2, contexts, questions)."""
        self.candidates += [scaling.key for scaling in scalings.values()]
        self.questions += [key for probe in suite.probes for key in probe.keys]
        outcomes = score(self._lm, suite, list(scalings.values()), ledger=self._ledger)
        both = np.stack([outcomes.exact.astype(float), outcomes.nll], axis=1)
        return dict(zip(scalings, both, strict=True))


def split_by_depth(depths: ArrayLike) -> dict[str, NDArray[np.bool_]]:
    """Which questions are about the first fifth of positions, the middle, and the last fifth."""
    at = np.asarray(depths, float)
    return {"beginning": at <= 0.2, "middle": (at > 0.2) & (at < 0.8), "end": at >= 0.8}


def tabulate_uniform(
    found: Mapping[tuple[str, float], Floats], base: Floats, where: Mapping[str, NDArray[np.bool_]]
) -> pd.DataFrame:
    """A row for each scheme, factor, part and measure: its mean, and its change against no scaling, with intervals.

    Parameters
    ----------
    found : mapping of (scheme, factor) to array, shape (2, contexts, questions)
        Accuracy and nll, as `Measured` gives them.
    base : array of the same shape
        With no scaling.
    """
    rows = []
    for (scheme, factor), values in sorted(found.items()):
        for part, at in where.items():
            pairs = zip(values[..., at].mean(-1), base[..., at].mean(-1), strict=True)
            for what, (scaled, before) in zip(("accuracy", "nll"), pairs, strict=True):
                change = map(float, bootstrap_mean(scaled - before))
                rows.append([scheme, factor, part, what, *map(float, bootstrap_mean(scaled)), *change])
    columns = ["scheme", "factor", "part", "what", "mean", "low", "high", "change", "change_low", "change_high"]
    return pd.DataFrame(rows, columns=columns)


def tabulate_changes(changes: Mapping[tuple[str, str], Floats], where: Mapping[str, NDArray[np.bool_]]) -> pd.DataFrame:
    """Of changes by (factors, scaled layers): a row for each part of the context and measure, with its interval."""
    rows = {}
    for name, change in changes.items():
        for part, at in where.items():
            for what, values in zip(("accuracy", "nll"), change[..., at].mean(-1), strict=True):
                rows[(*name, part, what)] = [*map(float, bootstrap_mean(values))]
    table = pd.DataFrame(rows, index=["change", "low", "high"]).T
    table.index.names = ["factors", "scaled", "part", "what"]
    return table


def write_interval(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A number with its interval, for a sentence: +0.12 [+0.05, +0.20]."""
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def draw_lines(
    lines: Mapping[str, Interval],
    x: ArrayLike,
    *,
    xlabel: str,
    ylabel: str = "",
    title: str = "",
    colours: Sequence[str] = PART_COLOURS,
    named: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Lines with their intervals as bands and, if `named`, their names at their right ends, apart from each other."""
    ax = ax or plt.subplots(figsize=(7, 3.4))[1]
    at = np.asarray(x, float)
    for line, colour in zip(lines.values(), colours, strict=False):
        ax.plot(at, line.mean, "-o", color=colour, markersize=3.5)
        ax.fill_between(at, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left", fontsize="medium")
    if named:
        ends = {name: float(line.mean[-1]) for name, line in lines.items()}
        label_ends(ax, at[-1], ends, dict(zip(lines, colours, strict=False)), gap=0.075)
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure
