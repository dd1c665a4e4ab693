"""The same methods on several models: how each scaling is found, and what all are worth on the same contexts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
from model_layers import split_by_kind

from lrs_utils import LM, GeneticSearch, LayerScaling, Ledger, find_scaling, save_factors, score, search, tasks
from lrs_utils.analysis.statistics import Interval, bootstrap_mean, by_fifth, holm, paired_change
from lrs_utils.finding.parts import divide
from lrs_utils.finding.recipe import default_texts
from lrs_utils.scaling.files import read_key
from lrs_utils.scoring.packing import pack
from lrs_utils.searchers.objectives import utilisation_then_nll

# What the gradient learns, by the name that a reader sees.
SPACES = {
    "layers, pi factors": "pi_factors",
    "layers, ntk factors": "factors",
    "layers, temperatures": "temperatures",
    "layers, ntk factors and temperatures": "both",
    "heads, temperatures": "head_temperatures",
    "heads, gains": "head_gains",
    "heads, gains and temperatures": "heads",
}
MAIN = ("the paper's GA", "layers, ntk factors and temperatures", "heads, gains")  # searched with several seeds
_JUDGED = {"contexts": 30_000, "texts": 900}  # seeds of what no search, choice or test of `find_scaling` sees


@dataclass(frozen=True)
class Trial:
    """A model and its task, with sizes that are the same for every method.

    Attributes
    ----------
    n_pairs : int
        Pairs in a context: so many that no scaling gets 15 to 85 % right.
    limits : sequence of float
        What a scaling by gradient may cost in perplexity, each as a share.
    contexts : (search, validation, test)
        Of `find_scaling`; the other methods choose on as many as its search.
    steps : int
        Of the gradient.
    candidates, population : int
        Of the genetic algorithm.
    grid : sequence of float
        Factors tried for all layers together.
    keys : str
        Of the pairs, "short" or "uuid".
    """

    lm: LM
    ledger: Ledger
    n_pairs: int
    limits: Sequence[float]
    contexts: tuple[int, int, int]
    steps: int
    candidates: int
    population: int
    grid: Sequence[float]
    own_bounds: tuple[float, float]
    keys: str = "short"

    def make_suite(self, n_contexts: int, seed: int, **options: Any) -> tasks.Suite:
        """Pairs, as many as this model's."""
        return tasks.kv_retrieval(self.n_pairs, n_contexts, seed, keys=self.keys, **options)

    def make_judged(self, n_contexts: int) -> tasks.Suite:
        """Contexts that no search, choice or test of `find_scaling` sees."""
        return self.make_suite(n_contexts, _JUDGED["contexts"])

    def descend(self, space: str, seed: int) -> pd.DataFrame:
        """`find_scaling` in a space: a row for each limit; the search is the same, the dose isn't."""
        rows = []
        for limit in self.limits:
            started = process_time()
            found = find_scaling(
                self.lm, partial(tasks.kv_retrieval, self.n_pairs, keys=self.keys), space=space, steps=self.steps,
                contexts=self.contexts, max_perplexity_rise=limit, seed=seed, ledger=self.ledger,
            )  # fmt: skip
            chosen = found.choices[found.choices["chosen"]] if len(found.choices) else found.choices
            row = {"limit": limit, "scaling": found.scaling.key, "dose": chosen["dose"].sum() if len(chosen) else 0.0}
            rows.append(row | {"minutes": (process_time() - started) / 60})
        return pd.DataFrame(rows)

    def evolve(self, bounds: tuple[float, float], seed: int) -> pd.DataFrame:
        """The paper's genetic algorithm: scheme "pi", its U of three positions."""
        started, half = process_time(), self.population // 2
        suite = self.make_suite(self.contexts[1], 1_000 + seed, positions=tasks.positions_at(self.n_pairs, (0, 0.5, 1)))
        genetic = GeneticSearch(
            self.lm.num_layers, bounds=bounds, population=2 * half, parents=half, mutations=half // 2,
            crossovers=half - half // 2, seed=seed,
        )  # fmt: skip
        result = search(
            self.lm, suite, genetic, budget=self.candidates, ledger=self.ledger, objective=utilisation_then_nll
        )
        row = {"limit": np.nan, "scaling": result.best.key, "dose": 1.0, "minutes": (process_time() - started) / 60}
        return pd.DataFrame([row])

    def try_uniform(self, scheme: str) -> pd.DataFrame:
        """One factor for all layers: of a grid, the one with the highest accuracy on contexts to choose on."""
        started = process_time()
        scalings = [LayerScaling.uniform(factor, self.lm.num_layers, scheme) for factor in self.grid]
        exact = score(self.lm, self.make_suite(self.contexts[1], 5_000), scalings, ledger=self.ledger).exact
        best = scalings[int(exact.mean(axis=(1, 2)).argmax())]
        row = {"limit": np.nan, "scaling": best.key, "dose": 1.0, "minutes": (process_time() - started) / 60}
        return pd.DataFrame([row])

    def list_searches(self, seeds: int) -> dict[str, Callable[[], pd.DataFrame]]:
        """Every search, by method and seed: pieces of a table; those of the methods of `MAIN` with `seeds` seeds."""
        low, high = self.own_bounds
        methods: dict[str, Callable[[int], pd.DataFrame]] = {
            "one factor (pi)": lambda seed: self.try_uniform("pi"),
            "one factor (ntk)": lambda seed: self.try_uniform("ntk"),
            "the paper's GA": partial(self.evolve, (1.0, 2.0)),
            f"the paper's GA (bounds {low:g} to {high:g})": partial(self.evolve, (low, high)),
            **{name: partial(self.descend, space) for name, space in SPACES.items()},
        }
        return {
            f"{name} | {seed}": partial(_find, name, find, seed)
            for name, find in methods.items()
            for seed in range(seeds if name in MAIN else 1)
        }

    def judge(self, searches: pd.DataFrame, n_contexts: int, stretches: int) -> pd.DataFrame:
        """Every scaling on the same contexts and texts, which nothing has seen.

        Parameters
        ----------
        searches : DataFrame
            "method", "seed", "limit" and "scaling" of each.

        Returns
        -------
        DataFrame
            The same rows behind one of no scaling: "accuracy", "points" with "low" and "high" (95 % bootstrap over
            contexts), "p" of the paired permutation test, the change "by fifth" of depth, the rise of "perplexity" in
            per cent.
        """
        suite = self.make_judged(n_contexts)
        text = cut_unseen_text(stretches)
        scalings = [LayerScaling.identity(self.lm.num_layers), *map(read_key, searches["scaling"])]
        distinct = list({scaling.key: scaling for scaling in scalings}.values())
        outcomes = score(self.lm, suite, distinct, ledger=self.ledger)
        nll = score(self.lm, text, distinct, ledger=self.ledger).nll[:, :, 0]
        at = [[d.key for d in distinct].index(scaling.key) for scaling in scalings]
        rows = [compare_outcomes(outcomes.exact[0], outcomes.exact[m], outcomes.depths, nll[0], nll[m]) for m in at]
        first = pd.DataFrame([{"method": "no scaling", "seed": 0, "scaling": distinct[0].key}])
        return pd.concat([first, searches], ignore_index=True).join(pd.DataFrame(rows))

    def read_by_fifth(self, key: str, n_contexts: int) -> Interval:
        """Accuracy on the contexts that all are judged on, by fifth of depth, under the scaling of a key."""
        suite = self.make_judged(n_contexts)
        outcomes = score(self.lm, suite, [read_key(key)], ledger=self.ledger)
        return bootstrap_mean(by_fifth(outcomes.exact[0], outcomes.depths))

    def list_evidence(self, scalings: Sequence[str], n_contexts: int, stretches: int) -> tuple[Any, list[str]]:
        """What the results of `judge` and `compare_kinds` stand on, as `Ledger.export` takes it."""
        suites = (self.make_judged(n_contexts), cut_unseen_text(stretches))
        layers = [key for key in scalings if ";" not in key]
        parts = [part.key for key in layers for part in split_by_kind(self.lm, read_key(key)).values()]
        fingerprint = self.lm.fingerprint
        keys = dict.fromkeys([LayerScaling.identity(self.lm.num_layers).key, *scalings, *parts])
        return [(fingerprint, key) for key in keys], [k for suite in suites for p in suite.probes for k in p.keys]

    def save(self, path: Path, row: pd.Series, **about: Any) -> None:
        """A judged row's scaling as a factor file that says what it is valid for and what it gained."""
        suite = self.make_judged(5)
        tokens = [pack(self.lm, probe, suite.name).longest for probe in suite.probes]
        held_out = {name: float(row[name]) for name in ("accuracy", "points", "low", "high", "p", "perplexity")}
        held_out["by fifth"] = row["by fifth"]
        save_factors(
            path, read_key(str(row["scaling"])), model=self.lm.name, fingerprint=self.lm.fingerprint, method=row.name,
            found={"max_perplexity_rise": float(row["limit"]), "dose": float(row["dose"]),
                   "valid for": [{"task": suite.name, "tokens": [min(tokens), max(tokens)]}]}, held_out=held_out,
            seeds={"search": int(row["seed"]), "test contexts": _JUDGED["contexts"]}, **about,
        )  # fmt: skip

    def compare_kinds(self, key: str, n_contexts: int) -> dict[str, Interval]:
        """Points gained by a scaling's factors of sliding layers only, and of full layers only."""
        suite, parts = self.make_judged(n_contexts), split_by_kind(self.lm, read_key(key))
        scalings = [LayerScaling.identity(self.lm.num_layers), *parts.values()]
        before, *after = score(self.lm, suite, scalings, ledger=self.ledger).exact.mean(axis=2)
        return {kind: bootstrap_mean(100 * (a - before)) for kind, a in zip(parts, after, strict=True)}


def _find(method: str, find: Callable[[int], pd.DataFrame], seed: int) -> pd.DataFrame:
    return find(seed).assign(method=method, seed=seed)


def correct(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables of all models as one, with p corrected over all rows (Holm)."""
    table = pd.concat([rows.assign(model=model) for model, rows in tables.items()], ignore_index=True)
    tested = table["method"] != "no scaling"
    table.loc[tested, "p"] = holm(table.loc[tested, "p"])
    return table


def pick(table: pd.DataFrame, model: str, limit: float, seed: int = 0) -> pd.DataFrame:
    """One row for each method of a model: that of a seed and of a limit of perplexity, where it has one."""
    rows = table[(table["model"] == model) & (table["seed"] == seed)]
    return rows[(rows["limit"] == limit) | rows["limit"].isna()].set_index("method")


def pool(by_seed: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Each method's searches together: "mean" of their points, "low" and "high" of all intervals, "perplexity"."""
    rows = pd.concat(by_seed).drop("no scaling").groupby(level="method", sort=False)
    return rows.agg(
        mean=("points", "mean"), low=("low", "min"), high=("high", "max"), perplexity=("perplexity", "mean")
    )


def cut_unseen_text(stretches: int) -> tasks.Suite:
    """Stretches of the last third of each text, which `find_scaling` searches and chooses nothing on."""
    nothing = {"search": 1, "validation": 1, "test": 1}
    return divide([], default_texts(), nothing, stretches, _JUDGED["texts"])["test"].text


def compare_outcomes(
    before: np.ndarray, after: np.ndarray, depths: np.ndarray, text_before: np.ndarray, text_after: np.ndarray
) -> dict[str, Any]:
    """Accuracy after, points gained with their interval, the change by fifth, the rise of perplexity in per cent."""
    change = paired_change(100 * before.mean(axis=1), 100 * after.mean(axis=1))
    fifths = by_fifth(after, depths) - by_fifth(before, depths)
    return {"accuracy": after.mean(), "points": change.pop("change")} | change | {
        "by fifth": " ".join(f"{change:+.0f}" for change in 100 * fifths.mean(axis=0)),
        "perplexity": 100 * np.expm1((text_after - text_before).mean()),
    }  # fmt: skip
