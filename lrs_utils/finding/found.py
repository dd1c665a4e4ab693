"""What `find_scaling` returns: a scaling, its gain and cost on contexts that nothing has seen, and ways to keep it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lrs_utils.analysis.methods import COLOURS
from lrs_utils.analysis.numbers import describe_numbers, draw_numbers, list_maps
from lrs_utils.analysis.statistics import bootstrap_mean, by_fifth, mean_over_questions, paired_change, utilisation
from lrs_utils.export import Exported, export
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import save_factors
from lrs_utils.scoring.outcomes import Outcomes
from lrs_utils.searchers.learned import BANDS
from lrs_utils.tasks import Suite

FIFTHS = ("first fifth", "second fifth", "middle fifth", "fourth fifth", "last fifth")
_SPACES = {
    "both": "factors and temperatures of layers", "heads": "head gains and temperatures",
    "outputs": "gains of attention and MLP outputs", "pi_factors": "factors of positions",
    "layers_and_heads": "numbers of layers and heads", "pair_temperatures": "temperatures of pairs of dimensions",
    "layer_pair_temperatures": "temperatures of pairs, the same for a layer's heads",
    "layer_pairs_and_gains": "temperatures of a layer's pairs, and head gains",
    "channel_gains": "gains of channels", **{f"bands_{n}": f"factors of {n} bands" for n in BANDS},
    **{name: name.replace("_", " ") for name in ("factors", "temperatures")},
    **{f"head_{name}": f"head {name}" for name in ("factors", "gains", "temperatures")},
}  # fmt: skip
_MARKERS = "so^"  # of no scaling, the one found, one more
_REPEATS = ("near repeats", "trigrams seen before")


@dataclass(frozen=True)
class Judged:
    """Outcomes of the test, for no scaling and for the one found.

    Attributes
    ----------
    tasks : list of Suite
    outcomes : list, one for each of both scalings, of Outcomes, one a task
    text : mapping of "search" and "test" to the nll of stretches under both
        Texts that the search saw, and texts that it didn't.
    kinds : array of str, shape (stretches,)
    free : list of arrays, shape (2, 2)
        `free_text`'s near repeats and trigrams seen before, greedy and drawn.
    """

    tasks: list[Suite]
    outcomes: list[list[Outcomes]]
    text: dict[str, list[NDArray[np.float64]]]
    kinds: NDArray[np.str_]
    free: list[NDArray[np.float64]]


@dataclass(frozen=True)
class Found:
    """A scaling, with what it gains and costs.

    Attributes
    ----------
    lm : LM
    scaling : LayerScaling or HeadScaling
        No scaling where nothing helped.
    table : DataFrame
        A row for each measure of each task: "no scaling", "found", "change" with its interval "low" to "high", and "p"
        of the paired permutation test over contexts.
    choices : DataFrame
        The candidates that validation chose from.
    judged : Judged
        The outcomes behind the table.
    about : dict
        Settings of the search, and what the scaling is valid for.
    evidence : (list of (model fingerprint, scaling key), list of str)
        What was measured, as `Ledger.export` takes it.
    """

    lm: LM
    scaling: Scaling
    table: pd.DataFrame
    choices: pd.DataFrame
    judged: Judged
    about: dict[str, Any]
    evidence: tuple[list[tuple[str, str]], list[str]] = field(default_factory=lambda: ([], []), repr=False)

    def __str__(self) -> str:
        tasks = " and ".join(suite.name for suite in self.judged.tasks)
        if self.scaling.is_identity:
            return (
                f"No {_SPACES[self.about['space']]} helped {self.lm.name} on {tasks} within the limits, "
                "so the result is no scaling."
            )
        gains = [
            f"{100 * r['found']:.0f} % of {suite.name} right instead of {100 * r['no scaling']:.0f} % "
            f"({100 * r['change']:+.0f} points [{100 * r['low']:+.0f}, {100 * r['high']:+.0f}], "
            f"{len(suite.probes)} held-out contexts)"
            for suite in self.judged.tasks
            for r in [self.row(suite.name, "accuracy")]
        ]
        text, minutes = self.row("text", "perplexity, not seen"), self.row("search", "seconds")["found"] / 60
        return (
            f"{self.lm.name} gets {' and '.join(gains)}, and the perplexity of text it never saw changes by "
            f"{100 * (text['found'] / text['no scaling'] - 1):+.1f} %: {describe_numbers(self.scaling, self.lm)}, "
            f"found in {minutes:.1f} minutes."
        )

    def row(self, task: str, measure: str) -> dict[str, Any]:
        """One row of the table."""
        rows = self.table[(self.table["task"] == task) & (self.table["measure"] == measure)]
        return dict(rows.to_dict("records")[0])  # type: ignore[arg-type]

    def plot(self, others: Mapping[str, Outcomes] | None = None) -> Figure:
        """Accuracy by depth with no scaling and with the one found, and the numbers of the latter.

        Parameters
        ----------
        others : mapping of name to Outcomes, optional
            Outcomes of other scalings on the test contexts (`judged.tasks[0]`), each drawn as a further line.
        """
        n_maps = max(1, len(list_maps(self.scaling, self.lm)))
        ratios = (1.2, *[1] * n_maps)
        figure, (left, *maps) = plt.subplots(1, 1 + n_maps, figsize=(5.2 + 4.3 * n_maps, 3.2), width_ratios=ratios)
        suite, (before, after) = self.judged.tasks[0], (found[0] for found in self.judged.outcomes)
        draw_by_depth({"no scaling": before, "found": after, **(others or {})}, left)
        left.set_title(f"{self.lm.name}, {suite.name}", loc="left")
        draw_numbers(self.scaling, self.lm, maps)
        return figure

    def save(self, path: str | Path) -> None:
        """Write a factor file with its provenance and what it is valid for; `load_factors` reads it."""
        save_factors(path, self.scaling, **self._tell_provenance())

    def export(self, folder: str | Path, form: str = "auto") -> Exported | None:
        """Save the model with the scaling as a folder that loads without lrs_utils: `export`.

        Where nothing helped there is nothing to save: it says so, and gives None.
        """
        if self.scaling.is_identity:
            print(f"{self} Nothing is written to {folder}.")
            return None
        figure = self.plot()
        plt.close(figure)
        return export(self.lm, self.scaling, folder, form, provenance=self._tell_provenance(), figure=figure)

    def _tell_provenance(self) -> dict[str, Any]:
        rows = self.table.replace({np.nan: None}).to_dict("records")
        return {"model": self.lm.name, "fingerprint": self.lm.fingerprint, "found": self.about, "test": rows}


def draw_by_depth(outcomes: Mapping[str, Outcomes], ax: Axes) -> None:
    """Accuracy by depth, in fifths or tenths: one line per scaling, with intervals, labelled with its name and mean."""
    labels = []
    for (name, o), marker in zip(outcomes.items(), _MARKERS, strict=False):
        colour = COLOURS.get(name, COLOURS["the paper's GA"])
        n_bins = 10 if o.depths.ndim == 1 and len(o.depths) >= 20 else 5
        parts = [part[~np.isnan(part)] for part in by_fifth(o.exact[0], o.depths, n_bins).T]
        at = np.array([(bin + 0.5) / n_bins for bin, part in enumerate(parts) if len(part)])
        parts = [part for part in parts if len(part)]
        ax.plot(at, [part.mean() for part in parts], color=colour, marker=marker)
        for x, part in zip(at, parts, strict=True):
            if len(part) > 1:
                interval = bootstrap_mean(part)
                ax.vlines(x, float(interval.low), float(interval.high), color=colour, alpha=0.5)
        mean = mean_over_questions(o.exact[0], o.depths).mean()
        labels.append((float(parts[-1].mean()), f"{name}, {100 * mean:.0f} %", colour))
    height = -1.0
    for y, text, colour in sorted(labels):
        height = max(y, height + 0.09)  # labels of lines that end together are stacked
        ax.annotate(
            text, (at[-1], height), (8, 0), textcoords="offset points", color=colour, va="center", annotation_clip=False
        )
    ax.axvspan(0.2, 0.8, color="0.94", zorder=0)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="depth of the answer (0 beginning, 1 end)", ylabel="accuracy")


def tabulate(judged: Judged, *, seconds: float, answers: int) -> pd.DataFrame:
    """The table of `Found`."""
    rows: list[dict[str, Any]] = []
    for number, suite in enumerate(judged.tasks):
        before, after = (found[number] for found in judged.outcomes)
        rows += [{"task": suite.name} | row for row in _compare_task(before, after)]
    for part, seen in (("search", "seen"), ("test", "not seen")):
        rows.append({"task": "text"} | _compare_perplexity(f"perplexity, {seen}", *judged.text[part]))
    for kind in dict.fromkeys(judged.kinds.tolist()):
        of_kind = [nll[judged.kinds == kind] for nll in judged.text["test"]]
        rows.append({"task": "text"} | _compare_perplexity(f"perplexity, not seen: {kind}", *of_kind))
    for measure, name in enumerate(_REPEATS):
        for way, kind in enumerate(("greedy", "drawn")):
            repeats = [float(free[measure, way]) for free in judged.free]
            rows.append({"task": "free text"} | _make_row(f"{name}, {kind}", *repeats))
    rows.append({"task": "search"} | _make_row("seconds", 0.0, seconds))
    rows.append({"task": "search"} | _make_row("answers", 0.0, float(answers)))
    return pd.DataFrame(rows)


def _compare_task(before: Outcomes, after: Outcomes) -> list[dict[str, Any]]:
    accuracy = [mean_over_questions(o.exact[0], o.depths) for o in (before, after)]
    rows = [_compare("accuracy", *accuracy)]
    fifths = [by_fifth(o.exact[0], o.depths) for o in (before, after)]
    for name, *parts in zip(FIFTHS, fifths[0].T, fifths[1].T, strict=True):
        there = ~np.isnan(parts[0])
        if there.any():
            rows.append(_compare(name, parts[0][there], parts[1][there]))
    if before.depths.ndim == 1 and {0.0, 1.0} <= {*before.depths.tolist()} and len(before.depths) > 2:
        rows.append(_make_row("U", *(float(utilisation(o.exact[0], o.depths)) for o in (before, after))))
    nll = [mean_over_questions(o.nll[0], o.depths) for o in (before, after)]
    rows.append(_compare("nll", *nll))
    return rows


def _compare(name: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, Any]:
    row = _make_row(name, float(before.mean()), float(after.mean()))
    return row | (paired_change(before, after) if len(before) > 1 else {}) | {"change": row["change"]}


def _compare_perplexity(name: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, Any]:
    change, perplexity = paired_change(before, after), float(np.exp(before.mean()))
    ends = {end: float(perplexity * np.expm1(change[end])) for end in ("low", "high")}
    return _make_row(name, perplexity, float(np.exp(after.mean()))) | ends | {"p": change["p"]}


def _make_row(measure: str, before: float, after: float) -> dict[str, Any]:
    return {"measure": measure, "no scaling": before, "found": after, "change": after - before}
