"""Which numbers to learn, and how many: spaces and controls searched by one recipe, judged on the same contexts.

Most methods and their judging are those of `two_models`; what is new here are the other spaces, the controls and the
questions of which heads matter.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from controls import Control, ControlRun, list_controls, shuffle_heads
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import spearmanr
from two_models import Trial, compare_outcomes, cut_unseen_text

from lrs_utils import LM, HeadScaling, LayerScaling, Ledger, score, tasks
from lrs_utils.analysis.attention import attention
from lrs_utils.analysis.statistics import holm, paired_change
from lrs_utils.finding.parts import divide
from lrs_utils.finding.recipe import default_texts
from lrs_utils.progress import SilentProgress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import read_key
from lrs_utils.scaling.products import n_heads
from lrs_utils.searchers.learned import count_numbers

# The paper's own numbers first; behind each name its space, by which it is searched.
SPACES = {
    "layers: factors, pi": "pi_factors",
    "layers: factors, ntk": "factors",
    "layers: temperatures": "temperatures",
    "layers: factors and temperatures": "both",
    "layers: 4 bands": "bands_4",
    "layers: 8 bands": "bands_8",
    "layers: 32 bands": "bands_32",
    "heads: factors": "head_factors",
    "heads: temperatures": "head_temperatures",
    "heads: gains": "head_gains",
    "heads: gains and temperatures": "heads",
    "heads and layers": "layers_and_heads",
    "pairs: temperatures, a layer's heads alike": "layer_pair_temperatures",
    "pairs: temperatures": "pair_temperatures",
    "pairs of a layer, and gains of heads": "layer_pairs_and_gains",
    "channels: gains": "channel_gains",
    "control: outputs of attention and MLP": "outputs",
}
# Of Adam, for each control: chosen on other seeds (`try_rates`).
_RATES = {"random directions": 0.05, "LoRA r = 1": 0.01, "input norms": 0.01, "first two tokens": 0.01}


@dataclass(frozen=True)
class Ladder:
    """A model and its task, on which every space and control is searched and judged.

    Attributes
    ----------
    test_stretches : int
        Of each text that scalings are judged on.
    text_weight, questions, stretches
        As `find_scaling` has them by default, for the controls, which it can't search.
    """

    trial: Trial
    n_test_contexts: int
    test_stretches: int
    text_weight: float = 2.0
    questions: int = 10
    stretches: int = 8

    def list_pieces(self, names: Mapping[str, int]) -> dict[str, Callable[[], pd.DataFrame]]:
        """Every search with its judging, by name and seed: pieces of a table.

        Parameters
        ----------
        names : mapping of the name of a space or control to its number of seeds
        """
        controls = list_controls(self.trial.lm, 0)
        pieces: dict[str, Callable[[], pd.DataFrame]] = {}
        for name, seeds in names.items():
            for seed in range(seeds):
                if name in SPACES:
                    pieces[f"{name} | {seed}"] = partial(self.measure_space, name, seed)
                elif name == "control: shuffled heads":
                    pieces[f"{name} | {seed}"] = partial(self.measure_shuffled, name, seed)
                elif (of := name.removeprefix("control: ")) in controls:
                    pieces[f"{name} | {seed}"] = partial(self.measure_control, name, of, seed)
                else:
                    raise ValueError(f"{name!r} is no space or control; there are {', '.join([*SPACES, *controls])}")
        return pieces

    def measure_space(self, name: str, seed: int) -> pd.DataFrame:
        """A space searched once, chosen at every limit, and judged: a row for each limit."""
        rows = self.trial.descend(SPACES[name], seed).assign(method=name, seed=seed)
        rows["numbers"] = count_numbers(self.trial.lm, SPACES[name])
        return self._judge(rows, [read_key(key) for key in rows["scaling"]])

    def measure_shuffled(self, name: str, seed: int) -> pd.DataFrame:
        """The gains of heads that were found, given to other heads of the same layer."""
        rows = self.trial.descend("head_gains", seed).assign(method=name, seed=seed)
        shuffled = [
            shuffle_heads(found, seed) if isinstance(found := read_key(key), HeadScaling) else found
            for key in rows["scaling"]
        ]
        rows["scaling"] = [scaling.key for scaling in shuffled]
        rows["numbers"] = count_numbers(self.trial.lm, "head_gains")
        return self._judge(rows, shuffled)

    def measure_control(self, name: str, of: str, seed: int, rate: float | None = None) -> pd.DataFrame:
        """A control learned once, chosen at every limit, and judged."""
        trial, lm = self.trial, self.trial.lm
        sizes = dict(zip(("search", "validation", "test"), trial.contexts, strict=True))
        task = partial(tasks.kv_retrieval, trial.n_pairs, keys=trial.keys)
        parts = divide([task], default_texts(), sizes, self.stretches, seed)
        about: dict[str, Any] = {
            "space": name, "seed": seed, "max_perplexity_rise": trial.limits[0], "text_weight": self.text_weight,
            "questions": self.questions, "steps": trial.steps,
        }  # fmt: skip
        run = ControlRun(lm, parts, about, trial.ledger, SilentProgress())
        run.measure_unscaled()
        start = list_controls(lm, seed)[of]
        rate = rate or next(rate for kind, rate in _RATES.items() if of.endswith(kind))
        stops, rows, chosen = run.learn(start, rate), [], []
        for limit in trial.limits:
            about["max_perplexity_rise"] = limit
            found, choices = run.choose(stops)
            row = choices[choices["chosen"]] if len(choices) else choices
            rows.append({"limit": limit, "scaling": found.key, "dose": row["dose"].sum() if len(row) else 0.0})
            chosen.append(found)
        return self._judge(pd.DataFrame(rows).assign(method=name, seed=seed, numbers=start.count), chosen)

    def _judge(self, rows: pd.DataFrame, scalings: Sequence[Scaling]) -> pd.DataFrame:
        """Points and perplexity of each row's scaling on contexts and texts that nothing has seen."""
        found = {scaling.key: scaling for scaling in scalings}
        judged = {key: self._compare(scaling) for key, scaling in found.items()}
        return rows.reset_index(drop=True).join(pd.DataFrame([judged[scaling.key] for scaling in scalings]))

    def _compare(self, scaling: Scaling) -> dict[str, Any]:
        trial, lm = self.trial, self.trial.lm
        suite, text = trial.make_judged(self.n_test_contexts), cut_unseen_text(self.test_stretches)

        def measure(of: Scaling) -> tuple[NDArray[Any], NDArray[Any]]:
            # a control is scored under its hooks
            with of.applied_to(lm.model) if isinstance(of, Control) else nullcontext():
                outcomes, read = (score(lm, s, [of], ledger=trial.ledger) for s in (suite, text))
            return outcomes.exact[0], read.nll[0, :, 0]

        (before, text_before), (after, text_after) = map(measure, (LayerScaling.identity(lm.num_layers), scaling))
        return compare_outcomes(before, after, suite.depths, text_before, text_after)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Each method at each limit, its seeds together: mean of points, the lowest and highest end of their intervals."""
    rows = table.groupby(["method", "limit"], sort=False)
    return rows.agg(
        numbers=("numbers", "first"), points=("points", "mean"), low=("low", "min"), high=("high", "max"),
        perplexity=("perplexity", "mean"), p=("p", "max"), seeds=("seed", "nunique"),
    ).reset_index()  # fmt: skip


def draw_ladder(rows: pd.DataFrame, limit: float, ax: Axes) -> None:
    """Points gained against how many numbers were learned, controls hollow, the best so far joined by a line."""
    rows = rows[rows["limit"] == limit].sort_values("numbers")
    for control, marker, colour in ((False, "o", "#0173b2"), (True, "s", "#949494")):
        some = rows[rows["method"].str.startswith("control") == control]
        ax.errorbar(
            some["numbers"], some["points"], yerr=(some["points"] - some["low"], some["high"] - some["points"]),
            fmt=marker, color=colour, markerfacecolor="white" if control else colour, elinewidth=1,
        )  # fmt: skip
        for row in some.itertuples():
            name = str(row.method).removeprefix("control: ")
            ax.annotate(name, (row.numbers, row.points), (4, 3), textcoords="offset points", color=colour, fontsize=6)
    ax.axhline(0, color="0.8", zorder=0)
    ax.set(xscale="log", xlabel="numbers learned", ylabel="points gained")


def take_heads(rows: pd.DataFrame, limit: float, lm: LM) -> HeadScaling:
    """The gains of heads that the first seed found at a limit; all 1 where nothing helped."""
    [key] = rows[(rows["method"] == "heads: gains") & (rows["seed"] == 0) & (rows["limit"] == limit)]["scaling"]
    found = read_key(key)
    return found if isinstance(found, HeadScaling) else HeadScaling(gains=np.ones((lm.num_layers, n_heads(lm.model))))


def keep_largest(scaling: HeadScaling, n: int) -> HeadScaling:
    """Only the n heads whose numbers moved farthest; all others are left as they were."""
    names = [name for name in ("temperatures", "gains") if getattr(scaling, name) is not None]
    if not names:  # all are 1
        return scaling
    logs = np.array([np.log(getattr(scaling, name)) for name in names])
    size = np.abs(logs).max(axis=0)
    least = np.sort(size.ravel())[::-1][:n].min() if n else np.inf
    kept: dict[str, Any] = {
        name: np.exp(np.where(size >= least, values, 0.0)).round(5) for name, values in zip(names, logs, strict=True)
    }
    return HeadScaling(**kept)


def keep_side(scaling: HeadScaling, louder: bool) -> HeadScaling:
    """Only the gains above 1, or only those below: does boosting do it, or silencing?"""
    gains = np.array(scaling.gains)
    return HeadScaling(gains=np.where((gains > 1) == louder, gains, 1.0))


def trace_heads(
    lm: LM, scaling: HeadScaling, suite: tasks.Suite, counts: Sequence[int], ledger: Ledger
) -> pd.DataFrame:
    """Accuracy gained with only the heads that moved farthest, by how many; with those alone that got louder or softer.

    Returns
    -------
    DataFrame
        "kept" (what is kept), "heads" (how many), "points" with "low", "high" and "p".
    """
    parts: dict[str, HeadScaling] = {f"{n} heads": keep_largest(scaling, n) for n in counts}
    parts |= {"all": scaling}
    if scaling.gains is not None:
        parts |= {"gains above 1": keep_side(scaling, True), "gains below 1": keep_side(scaling, False)}
    distinct = [LayerScaling.identity(lm.num_layers), *parts.values()]
    exact = score(lm, suite, distinct, ledger=ledger).exact.mean(axis=2)
    rows = []
    for (name, part), after in zip(parts.items(), exact[1:], strict=True):
        change = paired_change(100 * exact[0], 100 * after)
        moved = int(sum((np.array(getattr(part, kind) or [1.0]) != 1).sum() for kind in ("temperatures", "gains")))
        rows.append({"kept": name, "numbers": moved, "points": change.pop("change")} | change)
    return pd.DataFrame(rows)


def correlate_heads(scaling: HeadScaling, scores: pd.DataFrame) -> pd.DataFrame:
    """Whether heads of a kind moved: Spearman's rank correlation of each score of heads with their numbers.

    Parameters
    ----------
    scores : DataFrame
        "layer", "head", and a column for each score.
    """
    rows = []
    for number in ("gains", "temperatures"):
        values = getattr(scaling, number)
        if values is None:
            continue
        logs = np.log(np.array(values))[scores["layer"], scores["head"]]
        for kind in scores.columns.drop(["layer", "head"]):
            for of, moved in (("its log", logs), ("how far it moved", np.abs(logs))):
                rho, p = spearmanr(scores[kind], moved)
                rows.append({"number": number, "score": kind, "of": of, "rho": float(rho), "p": float(p)})
    table = pd.DataFrame(rows, columns=["number", "score", "of", "rho", "p"])
    return table.assign(p=holm(table["p"]))


def watch_values(lm: LM, suite: tasks.Suite, scaling: Scaling) -> NDArray[np.float64]:
    """Attention from where an answer begins to the value that is asked for, (contexts, questions, layers, heads)."""
    found = []
    with scaling.applied_to(lm.model):
        for probe in suite.probes:
            for question in probe.questions:
                before = probe.context.index(f'"{question.answer}"') + 1
                text = probe.context + question.prompt + question.answer_prefix
                encoded = lm.tokenizer(text, return_offsets_mapping=True)
                ends = np.array(encoded["offset_mapping"])
                value = np.flatnonzero((ends[:, 0] < before + len(question.answer)) & (ends[:, 1] > before))
                edges = [0, int(value[0]), int(value[-1]) + 1]
                found.append(attention(lm, encoded["input_ids"], edges=edges, queries=1).mass[:, :, 0, 1])
    return np.array(found, float).reshape(len(suite.probes), -1, *found[0].shape)
