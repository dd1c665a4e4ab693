"""Claims of the papers, model by model, with the numbers that decide them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from two_models import MAIN

from lrs_utils import LayerScaling
from lrs_utils.scaling.files import read_key


def list_numbers(key: str) -> dict[str, np.ndarray]:
    """Factors and temperatures of a scaling of layers, by the word for one."""
    scaling = read_key(key)
    assert isinstance(scaling, LayerScaling)
    factors = np.array(scaling.factors)
    return {"factor": factors, "temperature": np.array(scaling.temperatures or np.ones_like(factors))}


def average_halves(seeds: Mapping[str, Sequence[pd.DataFrame]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Geometric means of factors and temperatures over the first and second half of the layers, seed by seed."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for model, of in seeds.items():
        for rows in of:
            for what, values in list_numbers(str(rows.at[MAIN[1], "scaling"])).items():
                first, second = np.array_split(np.log(values), [len(values) // 2])
                found.setdefault((model, what), []).append((np.exp(first.mean()), np.exp(second.mean())))
    return found


def give_verdicts(
    seeds: Mapping[str, Sequence[pd.DataFrame]],
    facts: Mapping[str, Mapping[str, Any]],
    halves: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
    kept: Mapping[float, float],
) -> pd.DataFrame:
    """Claims as rows, models as columns: the number that each model gives, and whether both agree.

    Parameters
    ----------
    seeds : mapping of a model to the rows of `pick`, one for each seed of the searches
    facts : mapping of a model to what `summarise_layers` says
    halves : as `average_halves` gives them
    kept : mapping of a base of RoPE to the share of accuracy that is left under the paper's scheme
    """

    def read(of: Sequence[pd.DataFrame], method: str) -> np.ndarray:
        return np.array([rows.loc[method, ["points", "low", "high"]] for rows in of if method in rows.index], float)

    def gain(of: Sequence[pd.DataFrame], method: str) -> tuple[bool, str]:
        found = read(of, method)
        interval = f" [{found[0, 1]:+.1f}, {found[0, 2]:+.1f}]" if len(found) == 1 else ""
        return bool((found[:, 1] > 0).all()), ", ".join(f"{points:+.1f}" for points in found[:, 0]) + interval

    def gain_more(of: Sequence[pd.DataFrame]) -> tuple[bool, str]:
        heads, layers = read(of, MAIN[2]), read(of, MAIN[1])
        return bool(heads[:, 1].min() > layers[:, 2].max()), f"{heads[:, 0].mean() - layers[:, 0].mean():+.1f}"

    claims: dict[str, dict[str, tuple[bool, str]]] = {}
    for claim, method in {
        "one factor for all layers gains (points)": "one factor (pi)",
        "the paper's algorithm gains (points)": "the paper's GA",
        "the paper's scheme gains by gradient (points)": "layers, pi factors",
        "numbers of layers gain under ntk (points)": MAIN[1],
        "numbers of heads gain (points)": MAIN[2],
    }.items():
        claims[claim] = {model: gain(of, method) for model, of in seeds.items()}
    claims["heads gain more than layers (mean of points)"] = {model: gain_more(of) for model, of in seeds.items()}
    claims["one layer costs more than all others together (nats)"] = {
        model: (of["its harm (nats)"] > of["all others together"],
                f"{of['its harm (nats)']:.2f}, {of['all others together']:.2f}")
        for model, of in facts.items()
    }  # fmt: skip
    claims["it holds the best previous-token head (rank)"] = {
        model: (of["rank of that head"] == 1, str(of["rank of that head"])) for model, of in facts.items()
    }
    claims["early layers look more widely than late ones (rank correlation)"] = {
        model: (
            of["entropy over the layers"] < 0 and of["chance of that"] < 0.05,
            f"{of['entropy over the layers']:+.2f}, p {of['chance of that']:.2f}",
        )
        for model, of in facts.items()
    }
    for what in ("factor", "temperature"):
        claims[f"useful {what}s rise from early to late layers (means of halves)"] = {
            model: (
                all(second > first for first, second in of),
                ", ".join(f"{first:.2f} {second:.2f}" for first, second in of),
            )
            for (model, kind), of in halves.items()
            if kind == what
        }
    rows = {claim: {model: f"{'yes' if yes else 'no'}: {number}" for model, (yes, number) in of.items()}
            for claim, of in claims.items()}  # fmt: skip
    table = pd.DataFrame(rows).T.rename_axis("claim")
    answers = [{yes for yes, _ in of.values()} for of in claims.values()]
    table["both"] = ["yes" if a == {True} else "no" if a == {False} else "differ" for a in answers]
    smallest, largest = min(kept), max(kept)
    answer = "yes" if kept[smallest] > kept[largest] else "no"
    shares = f"{answer}: {kept[smallest]:.0%} kept at base {smallest:,.0f}, {kept[largest]:.0%} at {largest:,.0f}"
    table.loc["a small base bears the paper's scheme better (models made here)"] = [
        shares,
        *[""] * (len(seeds) - 1),
        "",
    ]
    return table
