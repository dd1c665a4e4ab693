"""The methods that are compared, and their searches, all with the same budget of answers.

A method is four choices: a searcher, a scheme, what it varies and its objective. How well what it found does on
contexts that no search saw is `held_out`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lrs_utils import LM, GradientSearch, LayerScaling, Ledger, RefinementSearch, score, search, tasks
from lrs_utils.analysis.statistics import Interval
from lrs_utils.searchers.curves import Searcher
from lrs_utils.searchers.genetic import GeneticSearch, RandomSearch
from lrs_utils.searchers.gradient import nll_gradient
from lrs_utils.searchers.objectives import Objective as Rule
from lrs_utils.searchers.objectives import mixture, utilisation_then_nll
from lrs_utils.searchers.rivals import CmaEsSearch, LinearSearch, TpeSearch

COLUMNS = ("searcher", "scheme", "vary", "objective")  # of a method, in every table


@dataclass(frozen=True)
class Objective:
    """What a search is after: the least weighted sum of mean nll, or, where no weight is given, the paper's U.

    Attributes
    ----------
    nll, short, text : float
        Weights of the nll on the pairs searched on, on pairs with short keys, and on the continuation of a text.
    """

    nll: float = 0.0
    short: float = 0.0
    text: float = 0.0

    @classmethod
    def from_name(cls, name: str) -> "Objective":
        """The objective that is called so: "nll + 0.5 text"; a weight of 1 is left out."""
        weights = {}
        for part in name.split(" + "):
            *weight, kind = part.split()
            weights[kind] = float(weight[0]) if weight else 1.0
        return cls(**weights)

    @property
    def weights(self) -> dict[str, float]:
        """Those that count."""
        return {kind: weight for kind, weight in asdict(self).items() if weight}

    def __str__(self) -> str:
        return " + ".join(f"{w:g} {kind}" if w != 1 else kind for kind, w in self.weights.items()) or "U"


U, NLL = Objective(), Objective(nll=1)


@dataclass(frozen=True)
class Method:
    """How a scaling for each layer is found.

    Attributes
    ----------
    searcher, scheme, vary : str
        Who proposes candidates, how a factor enters the frequencies, and which numbers are searched for.
    objective : Objective
    make : function of the method and a seed
        Makes its searcher.
    seeds : int
        How many searches there are of it, each on contexts of its own.
    budgets : int
        Of the gradient: steps, in multiples of the others' budget; 0 without a gradient.
    """

    searcher: str
    scheme: str
    vary: str
    objective: Objective
    make: Callable[["Method", int], Searcher[LayerScaling]]
    seeds: int = 1
    budgets: int = 0

    @property
    def columns(self) -> dict[str, str]:
        """Its four choices, as in every table."""
        return dict(zip(COLUMNS, (self.searcher, self.scheme, self.vary, str(self.objective)), strict=True))

    @property
    def name(self) -> str:
        return ", ".join(self.columns.values())

    @property
    def phrase(self) -> str:
        """The same in words."""
        who = {"GA": "the genetic algorithm", "gradient": "the gradient"}
        who["gradient x 4"] = "the gradient (with four times the budget)"
        what = "factors and temperatures" if self.vary == "both" else self.vary
        return f"{who.get(self.searcher, self.searcher)} in {what} (`{self.scheme}`, {self.objective})"

    @property
    def key(self) -> str:
        """The name of its piece in a table."""
        return " | ".join(self.columns.values())


@dataclass(frozen=True)
class Contexts:
    """What searches see. No two searches share a context, nor does one with validation or test.

    Attributes
    ----------
    keys : str
        "uuid" or "short", of the pairs searched on.
    n_pairs, search_pairs, short_pairs : int
        Pairs in a context of U, of nll, and with short keys.
    n_contexts, n_judged : int
        Contexts that candidates are judged on by U and by nll.
    text : str
        Whose continuation is judged.
    seed : int
        Of all of them.
    """

    keys: str
    n_pairs: int
    search_pairs: int
    short_pairs: int
    n_contexts: int
    n_judged: int
    text: str
    seed: int

    def pairs(self, n: int, contexts: int, offset: int, **options: Any) -> tasks.Suite:
        """Key-value pairs; each use has an offset of its own, so that contexts are new."""
        return tasks.kv_retrieval(n, contexts, seed=offset + self.seed, keys=self.keys, **options)

    def suites(self, objective: Objective, contexts: int, offset: int) -> list[tasks.Suite]:
        """A suite for each weight of an objective."""
        make = {
            "nll": lambda: self.pairs(self.search_pairs, contexts, offset),
            "short": lambda: tasks.kv_retrieval(self.short_pairs, contexts, seed=offset + self.seed, keys="short"),
            "text": lambda: tasks.continuations(self.text, contexts, seed=offset),
        }
        return [make[kind]() for kind in objective.weights]

    def judges(self, objective: Objective, seed: int) -> tuple[list[tasks.Suite], Rule]:
        """What candidates of a search are judged on, and what they are worth there."""
        if objective == U:
            ends = tasks.positions_at(self.n_pairs, (0, 0.5, 1))
            return [self.pairs(self.n_pairs, self.n_contexts, seed, positions=ends)], utilisation_then_nll
        return self.suites(objective, self.n_judged, 1_000 + seed), mixture(*objective.weights.values())


@dataclass(frozen=True)
class Contest:
    """The searches' common terms: the model, the contexts and the same sizes for all.

    Attributes
    ----------
    budget : int
        Candidates; for the gradient, as many answers.
    space : mapping
        "first_layer", "bounds", "step" and "start" of the curves that candidates are drawn from.
    wide : (low, high)
        Bounds under scheme "ntk", where a layer bears more.
    population : int
        Of the genetic algorithm.
    steps, rates, bounds
        Of the gradient: steps, rate by scheme, bounds of factors.
    """

    lm: LM
    ledger: Ledger
    contexts: Contexts
    budget: int
    space: Mapping[str, Any]
    wide: tuple[float, float]
    population: int
    steps: int
    rates: Mapping[str, float]
    bounds: tuple[float, float] | None = None

    def draw(self, kind: Callable[..., Searcher[LayerScaling]], method: Method, seed: int, **options: Any) -> Any:
        """A searcher that draws candidates from the space of curves."""
        wide = {"bounds": self.wide} if method.scheme == "ntk" else {}
        given = {"scheme": method.scheme, "vary": method.vary, "seed": seed}
        return kind(self.lm.num_layers, **given, **{**self.space, **wide, **options})

    def evolve(self, method: Method, seed: int, **options: Any) -> Any:
        """The paper's genetic algorithm."""
        half = self.population // 2
        sizes = {"population": 2 * half, "parents": half, "mutations": half // 2, "crossovers": half - half // 2}
        return self.draw(GeneticSearch, method, seed, **sizes, **options)

    def descend(self, method: Method, seed: int) -> Any:
        """Down the gradient of the same nll, a new context each step; stopping points are judged like candidates."""
        n, rate = method.budgets * self.steps, self.rates[method.scheme]
        return GradientSearch(
            self.lm, self.contexts.suites(method.objective, n, 2_000 + seed),
            weights=[*method.objective.weights.values()], vary=method.vary, steps=n,
            start=LayerScaling.uniform(1.0, self.lm.num_layers, method.scheme), rate=rate, temperature_rate=rate,
            bounds=self.bounds, every=max(1, n // 5), seed=seed, ledger=self.ledger,
        )  # fmt: skip

    def search(self, method: Method, seed: int) -> pd.DataFrame:
        """A search as rows: answers scored so far and the best so far, the scaling where it is a new best."""
        suites, rule = self.contexts.judges(method.objective, seed)
        searcher = method.make(method, seed)
        result = search(self.lm, suites, searcher, budget=self.budget, ledger=self.ledger, objective=rule)
        new = [fitness > max(result.fitness[:i], default=(-np.inf,)) for i, fitness in enumerate(result.fitness)]
        first = [fitness[0] for fitness in result.fitness]
        rows = pd.DataFrame({"answers": result.answers, "fitness": first, "best": result.best_so_far})
        rows["scaling"] = [c.key if is_new else "" for c, is_new in zip(result.candidates, new, strict=True)]
        return rows.assign(**method.columns, seed=seed)

    def refine(self, method: Method, start: LayerScaling) -> pd.DataFrame:
        """Moves of single layers, off the curve, from the result of a method's first search."""
        suites, rule = self.contexts.judges(method.objective, 0)
        searcher = RefinementSearch(start, vary=method.vary, step=self.space["step"], seed=self.contexts.seed)
        result = search(self.lm, suites, searcher, budget=self.budget, ledger=self.ledger, objective=rule)
        row = {"answers": result.answers[-1], "fitness": result.fitness[0][0], "best": max(result.fitness)[0]}
        return pd.DataFrame([method.columns | row | {"scaling": result.best.key}])

    def price(self, objective: Objective) -> pd.DataFrame:
        """Seconds that a candidate and a step of the gradient take here, with nothing else running."""
        suites, _ = self.contexts.judges(objective, 0)
        drawn = self.evolve(Method("GA", "pi", "factors", objective, self.evolve), 9).ask()
        candidates, row = drawn[: self.population // 2], {"candidate": 0.0, "step": 0.0}
        for suite in suites:
            few, flat = suite.probes[:2], LayerScaling.uniform(1.0, self.lm.num_layers, "ntk")
            for probes, some in ((few[:1], candidates[:1]), (few, candidates)):  # the first warms up
                start = perf_counter()
                score(self.lm, replace(suite, probes=probes), some)
                middle = perf_counter()
                nll_gradient(self.lm, probes[-1], flat)
                end = perf_counter()
            row["candidate"] += (middle - start) / len(candidates) * len(suite.probes) / len(few)
            row["step"] += end - middle
        return pd.DataFrame([{"objective": str(objective)} | row])


def list_methods(contest: Contest, seeds: int, general: Objective, text_weights: Sequence[float]) -> dict[str, Method]:
    """Every method that is compared, by name, those compared closely with `seeds` searches.

    Parameters
    ----------
    general : Objective
        A mixture whose text keeps ordinary language as it is.
    text_weights : sequence of float
        Other weights of that text.
    """
    with_text = [Objective(nll=1, text=weight) for weight in text_weights]
    longer = partial(Method, "gradient x 4", "ntk", "both", make=contest.descend, budgets=4)
    gradient = partial(Method, "gradient", make=contest.descend, budgets=1)
    methods = [
        Method("GA", "pi", "factors", U, contest.evolve, seeds),
        gradient("ntk", "both", NLL, seeds=seeds),
        Method("GA", "pi", "factors", NLL, contest.evolve, seeds),
        Method("CMA-ES", "pi", "factors", NLL, partial(contest.draw, CmaEsSearch), seeds),
        gradient("ntk", "both", general),
        gradient("pi", "factors", NLL),
        gradient("ntk", "factors", NLL),
        gradient("ntk", "temperatures", NLL),
        Method("GA", "ntk", "factors", NLL, contest.evolve, seeds),
        Method("GA", "ntk", "both", NLL, contest.evolve),
        Method("uniform", "ntk", "both", NLL, partial(contest.draw, CmaEsSearch, shape="uniform")),
        Method("uniform", "pi", "factors", NLL, partial(contest.draw, RandomSearch, shape="uniform")),
        Method("line", "pi", "factors", NLL, partial(contest.draw, LinearSearch)),
        Method("step", "pi", "factors", NLL, partial(contest.draw, CmaEsSearch, shape="step")),
        Method("GA, no curve", "pi", "factors", NLL, partial(contest.evolve, shape="free", p_gene=0.05)),
        Method("random curves", "pi", "factors", NLL, partial(contest.draw, RandomSearch)),
        Method("TPE", "pi", "factors", NLL, partial(contest.draw, TpeSearch)),
        *[gradient("ntk", "both", objective) for objective in with_text],
        gradient("ntk", "both", Objective(short=1)),
        gradient("ntk", "both", Objective(nll=1, short=1, text=0.5)),
        longer(general),
        *[longer(objective) for objective in with_text],
    ]
    return {method.name: method for method in methods}


def name_pieces(methods: Mapping[str, Method], contest: Contest) -> dict[str, Callable[[], pd.DataFrame]]:
    """Every search, by the name of its piece in the table of searches."""
    return {
        f"{method.key} | {seed}": partial(contest.search, method, seed)
        for method in methods.values()
        for seed in range(method.seeds)
    }


def find_ends(searches: pd.DataFrame) -> pd.DataFrame:
    """The result of each search, its last new best: a row for each seed of each method, whose name is `method`."""
    found = searches.dropna(subset=["scaling"]).groupby([*COLUMNS, "seed"], sort=False).last().reset_index()
    return found.assign(method=found[[*COLUMNS]].agg(", ".join, axis=1))


def name_refined(refinements: pd.DataFrame) -> pd.DataFrame:
    """Refinements as results of a searcher of their own."""
    rows = refinements.assign(searcher=refinements["searcher"] + ", refined", seed=0)
    return rows.assign(method=rows[[*COLUMNS]].agg(", ".join, axis=1))


def measure_gains(searches: pd.DataFrame) -> pd.DataFrame:
    """Searches whose objective is nll alone, with `gain`: nats below no scaling, every search's first candidate."""
    rows = searches[searches["objective"] == str(NLL)].copy()
    rows["method"] = rows[[*COLUMNS[:3]]].agg(", ".join, axis=1)
    rows["gain"] = rows["best"] - rows.groupby(["method", "seed"])["fitness"].transform("first")
    return rows


def count_costs(
    searches: pd.DataFrame, prices: pd.DataFrame, methods: Mapping[str, Method], steps: int
) -> pd.DataFrame:
    """Candidates, answers and seconds of each method's search, averaged over its seeds.

    Parameters
    ----------
    prices : DataFrame
        As `Contest.price` gives them, a row for each objective.
    """
    size = searches.groupby([*COLUMNS, "seed"], sort=False)["answers"].agg(candidates="size", answers="last")
    cost = size.groupby([*COLUMNS], sort=False).mean().reset_index()
    price = prices.set_index("objective").loc[cost["objective"]]
    of_gradient = [steps * methods[", ".join(row)].budgets for row in cost[[*COLUMNS]].to_numpy(str).tolist()]
    cost["seconds"] = cost["candidates"] * price["candidate"].to_numpy()
    cost["seconds"] += np.array(of_gradient) * price["step"].to_numpy()
    return cost


def draw_slopes(slopes: Mapping[str, Interval]) -> Figure:
    """The slope of the nll in each layer, a panel for each kind of number; grey where its interval holds 0."""
    figure, axes = plt.subplots(1, len(slopes), figsize=(7.5, 2.8))
    for ax, (name, (mean, low, high)) in zip(axes, slopes.items(), strict=True):
        layers, clear = np.arange(len(mean)), (low > 0) | (high < 0)
        ax.bar(layers, mean, color=np.where(clear, "C0", "0.8"), width=0.9)
        ax.vlines(layers, low, high, color="0.45", linewidth=0.7)
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.set_title(name, fontsize="medium")
        ax.set(xlabel="layer")
    axes[0].set_ylabel("nats by the log of the number")
    return figure
