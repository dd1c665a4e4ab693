"""What a scaling is worth on contexts that no search saw: validation, doses, and the test.

Validation chooses among seeds, stopping points and doses; the test is scored once.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lrs_utils import LM, LayerScaling, Ledger, Outcomes, score, tasks
from lrs_utils.analysis.methods import colour_of, label_ends
from lrs_utils.analysis.statistics import bootstrap_mean, holm, paired_test, utilisation
from lrs_utils.scoring.perplexity import window_nll

Pieces = Mapping[str, Callable[[], pd.DataFrame]]
NO_SCALING = "no scaling"


@dataclass
class Judge:
    """Scores scalings on contexts and a text that no search saw; what it knows already it doesn't measure again.

    Attributes
    ----------
    validation : Suite
    text : str
        Its part for validation.
    tokens, windows : int
        Of the stretches of a text that perplexity is measured on: tokens in a window, windows.
    """

    lm: LM
    ledger: Ledger
    validation: tasks.Suite
    text: str
    tokens: int
    windows: int
    _known: dict[tuple[str, LayerScaling], NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """What its tables depend on, besides the searches."""
        return {"validation_contexts": len(self.validation.probes), "tokens": self.tokens, "windows": self.windows}

    def text_nll(self, text: str, scaling: LayerScaling) -> NDArray[np.float64]:
        """Mean nll of each stretch of a text; several methods end at the same scaling, which is measured once."""
        if (text, scaling) not in self._known:
            self._known[text, scaling] = window_nll(
                self.lm, text, [self.tokens], stride=self.tokens // 2, n_windows=self.windows, scaling=scaling
            )[0]
        return self._known[text, scaling]

    def validate(self, scaling: LayerScaling) -> pd.DataFrame:
        """One row: accuracy, nll and U on the validation contexts, nll of its text."""
        outcomes = score(self.lm, self.validation, [scaling], ledger=self.ledger, extrapolate=True)
        row = {"scaling": scaling.key, "accuracy": outcomes.exact.mean(), "nll": outcomes.nll.mean()}
        row |= {"U": utilisation(outcomes.exact, outcomes.depths)[0], "text": self.text_nll(self.text, scaling).mean()}
        return pd.DataFrame([row])

    def pieces(self, scalings: Mapping[str, LayerScaling]) -> Pieces:
        """`validate` for no scaling and for each of these: pieces of a table."""
        given = {name_piece(name, scaling): partial(self.validate, scaling) for name, scaling in scalings.items()}
        return {NO_SCALING: partial(self.validate, LayerScaling.identity(self.lm.num_layers)), **given}

    def text_pieces(self, text: str, scalings: Mapping[str, LayerScaling]) -> Pieces:
        """The mean nll of a text for each scaling: pieces of a table."""

        def mean(scaling: LayerScaling) -> pd.DataFrame:
            return pd.DataFrame({"text": [self.text_nll(text, scaling).mean()]})

        return {name_piece(name, scaling): partial(mean, scaling) for name, scaling in scalings.items()}


def shorten(scaling: LayerScaling) -> str:
    """Eight hexadecimal digits that name a scaling."""
    return hashlib.sha256(scaling.key.encode()).hexdigest()[:8]


def name_piece(name: str, scaling: LayerScaling) -> str:
    """The name of a scaling's piece in a table."""
    return f"{name} {shorten(scaling)}"


def compare_first(rows: pd.DataFrame) -> pd.DataFrame:
    """With `gain`, points of accuracy, and `perplexity`, its rise in per cent, against the first row: no scaling."""
    rows = rows.copy()
    rows["gain"] = 100 * (rows["accuracy"] - rows["accuracy"][0])
    rows["perplexity"] = rise(rows["text"])
    return rows


def rise(nll: Sequence[float] | pd.Series) -> NDArray[np.float64]:
    """Rise of perplexity in per cent against the first."""
    values = np.asarray(nll, float)
    return np.asarray(100 * (np.exp(values - values[0]) - 1))


def spread_doses(count: int) -> list[float]:
    """Doses in equal steps; the last is the whole scaling, 1."""
    return [round(k / count, 3) for k in range(1, count + 1)]


def trace(rows: pd.DataFrame, doses: Sequence[tuple[str, float]]) -> pd.DataFrame:
    """Each method's line from no scaling to its whole dose.

    Parameters
    ----------
    rows : DataFrame
        Of `Judge.pieces`: no scaling first, then one for each of `doses`.
    doses : sequence of (method, dose)

    Returns
    -------
    DataFrame
        "method", "dose", "gain" and "perplexity", by method and dose; dose 0 gains and costs nothing.
    """
    names = [*dict.fromkeys(name for name, _ in doses)]
    starts = pd.DataFrame({"method": names, "dose": 0.0, "gain": 0.0, "perplexity": 0.0})
    points = compare_first(rows)[1:].assign(method=[name for name, _ in doses], dose=[dose for _, dose in doses])
    return pd.concat([starts, points]).sort_values(["method", "dose"], kind="stable")


def find_gain(rows: pd.DataFrame, percent: float) -> float:
    """The most that a method gains for at most that rise of perplexity, on the straight lines between its doses."""
    fine = np.linspace(0, 1, 500)
    cost, gain = (np.interp(fine, rows["dose"], rows[name]) for name in ("perplexity", "gain"))
    return float(gain[cost <= percent].max())


def find_front(points: pd.DataFrame, percents: Sequence[int] = (1, 5)) -> pd.DataFrame:
    """What each method gains at a limit of perplexity, and at its whole dose.

    Parameters
    ----------
    points : DataFrame
        A row for each dose from 0 to 1: "method", "dose", "gain", "perplexity".
    """
    of_each = points.groupby("method")
    front = pd.DataFrame(
        {f"gain at +{p} %": of_each.apply(partial(find_gain, percent=p), include_groups=False) for p in percents}
    )
    whole = points[points["dose"] == 1].set_index("method")
    return front.assign(gain=whole["gain"], perplexity=whole["perplexity"])


def choose_seed(rows: pd.DataFrame) -> LayerScaling:
    """Of validated scalings the one with the highest accuracy; of equals the last."""
    return LayerScaling.from_key(rows.sort_values("accuracy", kind="stable")["scaling"].iloc[-1])


def choose_dose(points: pd.DataFrame, percent: float) -> Any:
    """The row of the dose that gains most for at most that rise of perplexity."""
    affordable = points[(points["perplexity"] <= percent) & (points["dose"] > 0)]
    return affordable.sort_values("gain", kind="stable").iloc[-1]


def summarise(outcomes: Outcomes, names: Sequence[str], uniform: int) -> pd.DataFrame:
    """The test as a table: a row for each scaling, the first of them no scaling.

    Means with 95 % bootstrap intervals over contexts; p of paired permutation tests against no scaling and against the
    best uniform factor, each corrected over all scalings (Holm); depths that changed; accuracy at some depths.

    Parameters
    ----------
    uniform : int
        Which candidate has the best uniform factor.
    """
    by_context = outcomes.exact.mean(axis=2)
    rows = [_summarise_one(outcomes, by_context, m, uniform) for m in range(len(names))]
    table = pd.DataFrame(rows, index=pd.Index(names, name="method"))
    for name, baseline in {"p_no_scaling": 0, "p_uniform": uniform}.items():
        others = np.arange(len(table)) != baseline  # nothing is tested against itself
        table[name] = table[name].where(others)
        table.loc[others, name] = holm(table.loc[others, name])
    return table


def find_example(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    """Context and question nearest to the middle that only the second answers; else the middle of the first context.

    Parameters
    ----------
    before, after : bool array, shape (contexts, questions)
    """
    middle = before.shape[1] // 2
    won = np.argwhere(after & ~before)
    if not len(won):
        return 0, middle
    context, question = won[np.abs(won[:, 1] - middle).argmin()].tolist()
    return context, question


def name_picks(
    picks: Mapping[str, LayerScaling], found: Mapping[tuple[str, int], LayerScaling], doses: Mapping[str, Any]
) -> dict[str, str]:
    """Which method, and which seed or dose of it, each choice of validation is.

    Parameters
    ----------
    found : mapping of method and seed to LayerScaling
    doses : mapping of a choice to its row of `trace`
    """
    names = {role: f"{row['method']} at dose {row['dose']}" for role, row in doses.items()}
    for (method, seed), scaling in found.items():
        names |= {role: f"{method}, seed {seed}" for role in picks if role not in doses and scaling == picks[role]}
    return names


def order_by_gain(table: pd.DataFrame, tested: Mapping[str, LayerScaling], names: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a forest plot, best first, in points: each scaling once, without no scaling.

    Parameters
    ----------
    table : DataFrame
        As `summarise` gives it.
    names : mapping
        Of `name_picks`.
    """
    of_methods = {scaling for method, scaling in tested.items() if method not in names}
    kept = [method for method, scaling in tested.items() if method != NO_SCALING]
    kept = [method for method in kept if method not in names or tested[method] not in of_methods]
    rows = 100 * table.loc[kept, ["gain", "gain_low", "gain_high"]].round(4)
    rows.columns = pd.Index(["mean", "low", "high"])
    rows["perplexity"] = table.loc[kept, "perplexity"]
    rows.index = pd.Index([names.get(method, method) for method in kept])
    return rows.sort_values("mean", ascending=False, kind="stable")


def list_intervals(rows: pd.DataFrame) -> str:
    """Every row of a forest plot in words."""
    return "; ".join(f"{n} {m:+.1f} [{a:+.1f}, {b:+.1f}]" for n, m, a, b in rows[["mean", "low", "high"]].itertuples())


def tell(row: pd.Series) -> str:
    """The gain of a row of the test, in points, rounded as its CSV file is."""
    gain, low, high = (100 * round(float(row[name]), 4) for name in ("gain", "gain_low", "gain_high"))
    return f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]"


def write_perplexity(ax: Axes, perplexity: Sequence[float] | pd.Series) -> None:
    """The rise of perplexity beside each row of a forest plot, first at the top."""
    style: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": "small"}
    for row, percent in zip(reversed(range(len(perplexity))), perplexity, strict=True):
        ax.text(1.15, row, f"{percent:+.1f} %", **style)
    ax.text(1.15, len(perplexity) - 0.2, "perplexity", **style)


def draw_scalings(scalings: Mapping[str, LayerScaling]) -> Figure:
    """Factor and temperature of each layer, the last scaling's line thicker; names in the methods' colours."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 4), sharex=True)
    for name, scaling in scalings.items():
        layers = np.arange(len(scaling.factors))
        temperatures = scaling.temperatures or (1.0,) * len(layers)
        for ax, values in zip(axes, (scaling.factors, temperatures), strict=True):
            ax.step(layers, values, where="mid", color=colour_of(name), linewidth=1.8)
        label_ends(axes[0], float(layers[-1]), {name: scaling.factors[-1]})
    for ax, what in zip(axes, ("factor", "temperature"), strict=True):
        ax.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        ax.set(ylabel=what)
    axes[1].set_xlabel("layer")
    return figure


def _summarise_one(outcomes: Outcomes, by_context: NDArray[np.float64], m: int, uniform: int) -> dict[str, float]:
    exact, gain = outcomes.exact[m], by_context[m] - by_context[0]
    u, nll = utilisation(exact[:, None], outcomes.depths), outcomes.nll[m].mean(axis=1)
    row: dict[str, float] = {}
    for name, values in {"accuracy": by_context[m], "U": u, "nll": nll, "gain": gain}.items():
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, bootstrap_mean(values)), strict=True))
    row["p_no_scaling"], row["p_uniform"] = (paired_test(by_context[m], by_context[other]) for other in (0, uniform))
    row |= _count_changed_depths(exact, outcomes.exact[0])
    n = exact.shape[1]
    return row | {f"at_{q}": exact[:, tasks.positions_at(n, [q])[0]].mean() for q in (0, 0.25, 0.5, 0.75, 1)}


def _count_changed_depths(exact: NDArray[np.bool_], plain: NDArray[np.bool_]) -> dict[str, float]:
    """How many depths are better and how many worse than with no scaling, by a paired test of each."""
    p = np.array([paired_test(a, b) for a, b in zip(exact.T, plain.T, strict=True)])
    change, corrected = exact.mean(axis=0) - plain.mean(axis=0), holm(p)
    better, worse = (int((corrected[change * sign > 0] < 0.05).sum()) for sign in (1, -1))
    uncorrected = int((p[change < 0] < 0.05).sum())
    return {"depths_better": better, "depths_worse": worse, "depths_worse_uncorrected": uncorrected}
