"""How trained models compare: means over trainings, and paired changes over contexts (for notebook 09).

Contexts are the units of every interval and p, for the given trainings. Whether another training would agree is told
only by how many of them do ("ahead" of "trainings").
"""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd

from lrs_utils.analysis.statistics import paired_changes

MEASURES = {  # the task and the column of what is measured
    "pairs": ("pairs", "right"), "middle of the pairs": ("pairs", "middle"), "lines": ("lines", "right"),
    "pass key": ("pass key", "right"), "perplexity": ("text", "nll"),
}  # fmt: skip


def compare_trainings(rows: pd.DataFrame, by: str, baseline: str | float) -> pd.DataFrame:
    """Every measure at every length: the mean over trainings, their range, the paired change against a baseline.

    Parameters
    ----------
    rows : DataFrame
        A row for each context or text ("context", "task", "length", "right", "middle", "nll") of training "nth" of what
        the column `by` names; rows with a "fifth" are left out.
    baseline : str or float
        What the others are compared with, on the trainings that both have. Others may have fewer trainings, not more.

    Returns
    -------
    DataFrame
        "measure", "length", `by`, then "mean", "change" with "low", "high" and "p" (`paired_changes`), in how many
        trainings it is "ahead" of how many "trainings", and "least" to "most" of them. In per cent and points; of texts
        perplexity, and its change in per cent.
    """
    cases = product(MEASURES.items(), rows[rows["fifth"].isna()].groupby("length"))
    parts = {(measure, at): _compare(of, by, baseline, *what) for (measure, what), (at, of) in cases}
    return pd.concat(parts, names=["measure", "length"]).reset_index()


def select_kind(rows: pd.DataFrame, scheme: str, factor: int) -> pd.DataFrame:
    """Rows of one scheme and target, at the samplers' own sigma.

    What was not trained stands beside every training, the same each time, so that it can be compared with all of them.
    """
    of = rows[(rows["scheme"] == scheme) & (rows["factor"] == factor) & rows["sigma"].isna()]
    untuned = [of[of["sampler"] == "untuned"].assign(nth=nth) for nth in range(1, of["nth"].max() + 1)]
    return pd.concat([of, *untuned], ignore_index=True)


def list_gains(table: pd.DataFrame, by: str, measure: str, length: int) -> pd.DataFrame:
    """Changes of a measure at a length for `dots`: "mean", "low", "high", and "note": "3 of 4" trainings are ahead."""
    of = table[(table["measure"] == measure) & (table["length"] == length) & table["change"].notna()].set_index(by)
    note = of["ahead"].astype(str) + " of " + of["trainings"].astype(str)
    return pd.DataFrame({"mean": of["change"], "low": of["low"], "high": of["high"], "note": note})


def list_factor_gains(
    tables: Mapping[str, pd.DataFrame], wanted: Mapping[tuple[str, int], str]
) -> dict[str, pd.DataFrame]:
    """What layer factors change on each model, for `dots`: a panel for each measure and length, with its unit.

    Parameters
    ----------
    tables : mapping of a model to DataFrame
        `compare_trainings` by "how" factors were found, against none.
    """
    gains = {}
    for (measure, length), unit in wanted.items():
        parts = []
        for model, table in tables.items():
            of = list_gains(table, "how", measure, length).drop(columns="note")
            parts.append(of.set_axis([f"{how}, {model}" for how in of.index]))
        gains[f"{measure}, {length:,} ({unit})"] = pd.concat(parts[::-1])
    return gains


def _compare(rows: pd.DataFrame, by: str, baseline: str | float, task: str, value: str) -> pd.DataFrame:
    values = rows[rows["task"] == task].pivot_table(index="context", columns=[by, "nth"], values=value, sort=False)
    names, single = values.columns.unique(by), values.mean().unstack()
    against = {name: f"against {name}" for name in names if name != baseline}
    table = paired_changes(_match(values, list(names), baseline), lambda name: against.get(name, name)).loc[names]
    lead = single.sub(single.loc[baseline]).round(3) * (-1 if task == "text" else 1)
    table["ahead"], table["trainings"] = (lead > 0).sum(axis=1), lead.notna().sum(axis=1)
    table = table.assign(least=single.min(axis=1), most=single.max(axis=1)).rename_axis(by)
    return _in_per_cent(table) if task == "text" else table


def _match(values: pd.DataFrame, names: list[str | float], baseline: str | float) -> pd.DataFrame:
    """By context each one's mean over its trainings, and the baseline's over the same ("against ...")."""
    wide: dict[str | float, pd.Series[float]] = {}
    of_baseline = pd.DataFrame(values.xs(baseline, axis=1, level=0))
    for name in names:
        own = pd.DataFrame(values.xs(name, axis=1, level=0))
        same = own.columns.intersection(of_baseline.columns)
        wide |= {name: own.mean(axis=1), f"against {name}": of_baseline[same].mean(axis=1)}
    return pd.DataFrame(wide)


def _in_per_cent(table: pd.DataFrame) -> pd.DataFrame:
    """Of nll that of perplexity."""
    means, changes = ["mean", "least", "most"], ["change", "low", "high"]
    table = table.copy()
    table[means], table[changes] = np.exp(table[means]), 100 * np.expm1(table[changes])
    return table
