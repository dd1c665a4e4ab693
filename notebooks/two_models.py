"""The same methods on several models: how each scaling is found, and what all are worth on the same contexts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import pandas as pd

from lrs_utils import LM, GeneticSearch, HeadScaling, LayerScaling, Ledger, find_scaling, score, search, tasks
from lrs_utils.analysis.attention import attention, induction_scores
from lrs_utils.analysis.statistics import bootstrap_mean, by_fifth, holm, paired_test
from lrs_utils.finding.parts import divide
from lrs_utils.finding.recipe import default_texts
from lrs_utils.scaling.base import Scaling
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
        Short pairs in a context: so many that no scaling gets 15 to 85 % right.
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

    def make_suite(self, n_contexts: int, seed: int, **options: Any) -> tasks.Suite:
        """Short pairs, as many as this model's."""
        return tasks.kv_retrieval(self.n_pairs, n_contexts, seed, keys="short", **options)

    def descend(self, space: str, seed: int) -> pd.DataFrame:
        """`find_scaling` in a space: a row for each limit; the search is the same, the dose isn't."""
        rows = []
        for limit in self.limits:
            started = process_time()
            found = find_scaling(
                self.lm, partial(tasks.kv_retrieval, self.n_pairs, keys="short"), space=space, steps=self.steps,
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

    def list_searches(self, seeds: int) -> dict[tuple[str, int], Callable[[], pd.DataFrame]]:
        """Every search by method and seed; the methods of `MAIN` are searched with `seeds` seeds."""
        low, high = self.own_bounds
        methods: dict[str, Callable[[int], pd.DataFrame]] = {
            "one factor (pi)": lambda seed: self.try_uniform("pi"),
            "one factor (ntk)": lambda seed: self.try_uniform("ntk"),
            "the paper's GA": partial(self.evolve, (1.0, 2.0)),
            f"the paper's GA (bounds {low:g} to {high:g})": partial(self.evolve, (low, high)),
            **{name: partial(self.descend, space) for name, space in SPACES.items()},
        }
        return {
            (name, seed): partial(find, seed)
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
        suite = self.make_suite(n_contexts, _JUDGED["contexts"])
        text = _cut_unseen_text(stretches)
        scalings = [LayerScaling.identity(self.lm.num_layers), *map(read_key, searches["scaling"])]
        distinct = list({scaling.key: scaling for scaling in scalings}.values())
        outcomes = score(self.lm, suite, distinct, ledger=self.ledger)
        nll = score(self.lm, text, distinct, ledger=self.ledger).nll[:, :, 0]
        at = [[d.key for d in distinct].index(scaling.key) for scaling in scalings]
        rows = [_compare(outcomes.exact[0], outcomes.exact[m], outcomes.depths, nll[0], nll[m]) for m in at]
        first = pd.DataFrame([{"method": "no scaling", "seed": 0, "scaling": distinct[0].key}])
        return pd.concat([first, searches], ignore_index=True).join(pd.DataFrame(rows))


def read_key(key: str) -> Scaling:
    """The scaling that a key is of."""
    return HeadScaling.from_key(key) if ";" in key else LayerScaling.from_key(key)


def correct(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables of all models as one, with p corrected over all rows (Holm)."""
    table = pd.concat([rows.assign(model=model) for model, rows in tables.items()], ignore_index=True)
    tested = table["method"] != "no scaling"
    table.loc[tested, "p"] = holm(table.loc[tested, "p"])
    return table


def _cut_unseen_text(stretches: int) -> tasks.Suite:
    """Stretches of the last third of each text, which `find_scaling` searches and chooses nothing on."""
    nothing = {"search": 1, "validation": 1, "test": 1}
    return divide([], default_texts(), nothing, stretches, _JUDGED["texts"])["test"].text


def _compare(
    before: np.ndarray, after: np.ndarray, depths: np.ndarray, text_before: np.ndarray, text_after: np.ndarray
) -> dict[str, Any]:
    gains = after.mean(axis=1) - before.mean(axis=1)
    interval, fifths = bootstrap_mean(100 * gains), by_fifth(after, depths) - by_fifth(before, depths)
    return {
        "accuracy": after.mean(), "points": float(interval.mean), "low": float(interval.low),
        "high": float(interval.high), "p": paired_test(after.mean(axis=1), before.mean(axis=1)),
        "by fifth": " ".join(f"{change:+.0f}" for change in 100 * fifths.mean(axis=0)),
        "perplexity": 100 * np.expm1((text_after - text_before).mean()),
    }  # fmt: skip


def describe_layers(
    lm: LM, ledger: Ledger, n_pairs: int, factor: float, *, n_contexts: int, n_texts: int, seed: int
) -> pd.DataFrame:
    """What each layer sees, how widely it looks, whether it copies, and what scaling it alone costs.

    Returns
    -------
    DataFrame
        A row for each layer: "sees" (tokens of a sliding window, 0 for all), "entropy" (of the last query, divided by
        that of even attention), "previous token" and "prefix matching" (its best head's scores, as
        `induction_scores`), and the change of the answers' nll under each scheme with its interval over contexts.
    """
    suite = tasks.kv_retrieval(n_pairs, n_contexts, seed, keys="short")
    entropy = []
    for number, probe in enumerate(suite.probes[:n_texts]):
        q = probe.questions[(2 * number + 1) * len(probe.questions) // (2 * n_texts)]
        ids = lm.tokenizer(probe.context + q.prompt + q.answer_prefix)["input_ids"]
        seen = np.array([min(len(ids), window or len(ids)) for window in list_windows(lm)])
        entropy.append(attention(lm, ids, queries=1).entropy[..., 0].mean(axis=1) / np.log(seen))
    heads = induction_scores(lm, seed=seed, n_texts=n_texts).groupby("layer").max()
    table = pd.DataFrame({"sees": list_windows(lm), "entropy": np.mean(entropy, axis=0)}).join(heads)
    for scheme in ("pi", "ntk"):
        alone = [LayerScaling.one_layer(layer, factor, lm.num_layers, scheme) for layer in range(lm.num_layers)]
        nll = score(lm, suite, [LayerScaling.identity(lm.num_layers), *alone], ledger=ledger).nll.mean(axis=2)
        changes = [bootstrap_mean(after - nll[0]) for after in nll[1:]]
        for name in ("mean", "low", "high"):
            table[f"{scheme}, {name}"] = [float(getattr(change, name)) for change in changes]
    return table.rename_axis("layer").reset_index()


def list_windows(lm: LM) -> list[int]:
    """Tokens that each layer sees; 0 for all."""
    config = lm.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * lm.num_layers
    return [config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds]


def split_by_kind(lm: LM, scaling: LayerScaling) -> dict[str, LayerScaling]:
    """A scaling with the factors of one kind of layers only, the others at 1: "sliding" and "full"."""
    parts = {}
    for kind, wanted in (("sliding layers only", True), ("full layers only", False)):
        factors = [f if bool(w) == wanted else 1.0 for f, w in zip(scaling.factors, list_windows(lm), strict=True)]
        parts[kind] = LayerScaling(factors, scheme=scaling.scheme)
    return parts
