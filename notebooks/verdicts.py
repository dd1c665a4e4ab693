"""Claims of the papers, model by model, with the numbers that decide them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
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


def find_trends(seeds: Mapping[str, Sequence[pd.DataFrame]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Rank correlation of factors and temperatures with the layer, and its p, seed by seed."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for model, of in seeds.items():
        for rows in of:
            for what, values in list_numbers(str(rows.at[MAIN[1], "scaling"])).items():
                flat = len({*values}) == 1
                trend = (0.0, 1.0) if flat else map(float, spearmanr(range(len(values)), values))
                found.setdefault((model, what), []).append((*trend,))
    return found


def tell_rows(rows: pd.DataFrame) -> str:
    """Each method's points and interval in words, for readers who don't see a figure."""
    each = zip(rows.index, rows["mean"], rows["low"], rows["high"], strict=True)
    return "; ".join(f"{method} {mean:.1f} [{low:.1f}, {high:.1f}]" for method, mean, low, high in each)


def give_verdicts(seeds: Mapping[str, Sequence[pd.DataFrame]], facts: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Claims as rows, models as columns: the number that each model gives, and whether both agree.

    Parameters
    ----------
    seeds : mapping of a model to the rows of `pick`, one for each seed of the searches
    facts : mapping of a model to what `summarise_layers` says
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
        "one factor for all layers (pi) raises accuracy (points)": "one factor (pi)",
        "the paper's algorithm raises accuracy (points)": MAIN[0],
        "the paper's scheme by gradient raises accuracy (points)": "layers, pi factors",
        "ntk factors and temperatures of layers raise accuracy (points)": MAIN[1],
        "gains of heads raise accuracy (points)": MAIN[2],
    }.items():
        claims[claim] = {model: gain(of, method) for model, of in seeds.items()}
    claims["gains of heads do more than these numbers of layers (difference of means)"] = {
        model: gain_more(of) for model, of in seeds.items()
    }
    claims["dividing one layer's positions costs more than the sum over all others (nats)"] = {
        model: (of["its harm (nats)"] > of["sum of the others"],
                f"{of['its harm (nats)']:.2f}, {of['sum of the others']:.2f}")
        for model, of in facts.items()
    }  # fmt: skip
    claims["the most harmful layer holds the best previous-token head (its rank)"] = {
        model: (of["rank of that head"] == 1, str(of["rank of that head"])) for model, of in facts.items()
    }
    claims["early layers look more widely than late ones (rank correlation)"] = {
        model: (of["entropy over the layers"] < 0 and of["its p"] < 0.05, f"{of['entropy over the layers']:+.2f}")
        for model, of in facts.items()
    }
    trends = find_trends(seeds)
    for what in ("factor", "temperature"):
        claims[f"useful {what}s rise from early to late layers (rank correlation)"] = {
            model: (all(trend > 0 and p < 0.05 for trend, p in of), ", ".join(f"{trend:+.2f}" for trend, _ in of))
            for (model, kind), of in trends.items()
            if kind == what
        }
    rows = {claim: {model: f"{'yes' if yes else 'no'}: {number}" for model, (yes, number) in of.items()}
            for claim, of in claims.items()}  # fmt: skip
    table = pd.DataFrame(rows).T.rename_axis("claim")
    answers = [{yes for yes, _ in of.values()} for of in claims.values()]
    table["both"] = ["yes" if a == {True} else "no" if a == {False} else "differ" for a in answers]
    return table
