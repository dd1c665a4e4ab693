"""Tasks, lengths and texts that no search saw, and what a scaling changes there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lrs_utils import LM, LayerScaling, Ledger, score, tasks
from lrs_utils.analysis.statistics import bootstrap_mean, holm, paired_test
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.tasks.judging import best_subspan_em
from lrs_utils.tasks.judging import judged as verdicts

SEED = 6_000  # of all contexts here
Probe = Callable[[LayerScaling], pd.DataFrame]


@dataclass(frozen=True)
class Transfer:
    """What is asked, and of which model.

    Attributes
    ----------
    keys : str
        Of the pairs searched on.
    pairs : sequence of int
        Lengths to ask at, in pairs; those above `most` have half the contexts, since they are costly.
    contexts : int
        Of every other task.
    short_pairs, lines, fillers, documents, answer_tokens, capitals : int
        Sizes of the other tasks.
    source : str
        Where documents come from.
    text_nll : function of a text and a scaling
    texts : mapping of name to str
    """

    lm: LM
    ledger: Ledger
    keys: str
    pairs: Sequence[int]
    most: int
    contexts: int
    short_pairs: int
    lines: int
    fillers: int
    documents: int
    source: str
    answer_tokens: int
    capitals: int
    text_nll: Callable[[str, LayerScaling], NDArray[np.float64]]
    texts: Mapping[str, str]

    def probes(self) -> dict[str, Probe]:
        """What is measured, by name: functions of a scaling that give a row for each context or stretch of text."""
        n = self.contexts
        found: dict[str, Probe] = {}
        for k in self.pairs:
            contexts, positions = n if k <= self.most else max(1, n // 2), tasks.positions_at(k)
            pairs = tasks.kv_retrieval(k, contexts, SEED, keys=self.keys, positions=positions)
            found[f"{self.keys} keys, {k} pairs"] = partial(self._score, pairs)
        short = tasks.kv_retrieval(self.short_pairs, n, seed=SEED, keys="short")
        found[f"short keys, {self.short_pairs} pairs"] = partial(self._score, short)
        found[f"lines, {self.lines}"] = partial(self._score, tasks.lines_retrieval(self.lines, n, seed=SEED))
        found["pass key"] = partial(self._score, tasks.passkey(self.fillers, n, seed=SEED, depths=[0.5])[0])
        found[f"documents, {self.documents}"] = self._answer
        found["capitals, closed book"] = self._know
        return found | {name: partial(self._predict, text) for name, text in self.texts.items()}

    def _score(self, suite: tasks.Suite, scaling: LayerScaling) -> pd.DataFrame:
        found = score(self.lm, suite, [scaling], ledger=self.ledger, extrapolate=True)
        return pd.DataFrame({"right": found.exact[0].mean(axis=1), "nll": found.nll[0].mean(axis=1)})

    def _answer(self, scaling: LayerScaling) -> pd.DataFrame:
        documents = tasks.mdqa(self.documents, self.contexts, seed=SEED, source=self.source)
        # a base model has no chat template, and is asked as it is
        suite = tasks.in_chat(documents, self.lm.tokenizer) if self.lm.tokenizer.chat_template else documents
        texts = generate_answers(
            self.lm, suite, scaling, max_new_tokens=self.answer_tokens, ledger=self.ledger, extrapolate=True
        )
        return pd.DataFrame({"right": verdicts(suite, texts, best_subspan_em).mean(axis=1)})

    def _know(self, scaling: LayerScaling) -> pd.DataFrame:
        found = score(self.lm, tasks.capitals(self.capitals), [scaling], ledger=self.ledger)
        return pd.DataFrame({"right": found.nll[0].argmin(axis=1) == 0}, dtype=float)

    def _predict(self, text: str, scaling: LayerScaling) -> pd.DataFrame:
        return pd.DataFrame({"nll": self.text_nll(text, scaling)})


def name_pieces(
    probes: Mapping[str, Probe], scalings: Mapping[str, LayerScaling]
) -> dict[str, Callable[[], pd.DataFrame]]:
    """Every probe with every scaling: pieces of a table with the columns "on" and "scaling"."""

    def measure(probe: str, name: str) -> pd.DataFrame:
        return probes[probe](scalings[name]).assign(on=probe, scaling=name)

    return {f"{probe} | {name}": partial(measure, probe, name) for probe in probes for name in scalings}


def measure_changes(transfer: pd.DataFrame) -> pd.DataFrame:
    """What each scaling changes against no scaling, context by context.

    Returns
    -------
    DataFrame
        A row for each probe and scaling: "value" (accuracy, or perplexity), "change" in points of accuracy or per cent
        of perplexity with its 95 % interval "low" to "high", and "p", corrected over the table (Holm).
    """
    rows = []
    for (probe, name), found in transfer.groupby(["on", "scaling"], sort=False):
        plain = transfer[(transfer["on"] == probe) & (transfer["scaling"] == "no scaling")]
        measure = "right" if found["right"].notna().all() else "nll"
        values, before = found[measure].to_numpy(), plain[measure].to_numpy()
        change = [100 * (np.expm1(x) if measure == "nll" else x) for x in map(float, bootstrap_mean(values - before))]
        whole = values.mean() if measure == "right" else np.exp(values.mean())
        rows.append([probe, name, measure, whole, *change, paired_test(values, before)])
    table = pd.DataFrame(rows, columns=["on", "scaling", "measure", "value", "change", "low", "high", "p"])
    others = table["scaling"] != "no scaling"
    table.loc[others, "p"] = holm(table.loc[others, "p"])
    return table


def draw_changes(change: pd.DataFrame, panels: Mapping[str, tuple[str, Any]]) -> Figure:
    """A panel for each scaling: tasks above (points of accuracy), texts below (per cent of perplexity).

    Parameters
    ----------
    change : DataFrame
        As `measure_changes` gives it, indexed by scaling and probe.
    panels : mapping of a scaling to its title and colour
    """
    first = change.loc[next(iter(panels))]
    kinds = {measure: first.index[first["measure"] == measure] for measure in ("right", "nll")}
    figure, axes = plt.subplots(
        2,
        len(panels),
        figsize=(7.5, 4.6),
        sharey="row",
        sharex="row",
        height_ratios=[len(on) for on in kinds.values()],
        squeeze=False,
    )
    units = ("points of accuracy", "% of perplexity")
    for (name, (title, colour)), column in zip(panels.items(), np.transpose(axes), strict=True):
        for on, unit, ax in zip(kinds.values(), units, column, strict=True):
            rows, at = change.loc[name].loc[on], np.arange(len(on))[::-1]
            ax.axvline(0, color="0.7", linewidth=0.8)
            ax.hlines(at, rows["low"], rows["high"], color=colour, linewidth=2)
            ax.plot(rows["change"], at, "o", color=colour, markersize=4)
            ax.set_yticks(at, [*on])
            ax.set(xlabel=unit, ylim=(-0.6, len(on) - 0.4))
        column[0].set_title(title, fontsize="medium")
    return figure


def count_changes(rows: pd.DataFrame) -> tuple[int, int]:
    """How many tasks gain and how many lose, by their intervals."""
    tasks_only = rows[rows["measure"] == "right"]
    return int((tasks_only["low"] > 0).sum()), int((tasks_only["high"] < 0).sum())


def list_changes(rows: pd.DataFrame) -> str:
    """What a scaling changes, in words: a row for each probe."""
    return ", ".join(f"{on} {row['change']:+.1f}{' %' * (row['measure'] == 'nll')}" for on, row in rows.iterrows())


def tell(row: pd.Series) -> str:
    """A change with its interval, and a star where p is below 0.05."""
    unit, star = " %" if row["measure"] == "nll" else "", "*" if row["p"] < 0.05 else ""
    return f"{row['change']:+.1f}{unit} [{row['low']:+.1f}, {row['high']:+.1f}]{star}"
