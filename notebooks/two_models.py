"""The same methods on several models: how each scaling is found, and what all are worth on the same contexts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lrs_utils import LM, GeneticSearch, LayerScaling, Ledger, find_scaling, score, search, tasks
from lrs_utils.analysis.attention import attention, induction_scores
from lrs_utils.analysis.statistics import Interval, bootstrap_mean, by_fifth, holm, paired_change
from lrs_utils.finding.parts import divide
from lrs_utils.finding.recipe import default_texts
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import read_key
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

    def read_by_fifth(self, key: str, n_contexts: int) -> Interval:
        """Accuracy on the contexts that all are judged on, by fifth of depth, under the scaling of a key."""
        suite = self.make_suite(n_contexts, _JUDGED["contexts"])
        outcomes = score(self.lm, suite, [read_key(key)], ledger=self.ledger)
        return bootstrap_mean(by_fifth(outcomes.exact[0], outcomes.depths))

    def list_evidence(self, scalings: Sequence[str], n_contexts: int, stretches: int) -> tuple[Any, list[str]]:
        """What the results of `judge` and `compare_kinds` stand on, as `Ledger.export` takes it."""
        suites = (self.make_suite(n_contexts, _JUDGED["contexts"]), _cut_unseen_text(stretches))
        layers = [key for key in scalings if ";" not in key]
        parts = [part.key for key in layers for part in split_by_kind(self.lm, read_key(key)).values()]
        fingerprint = self.lm.fingerprint
        keys = dict.fromkeys([LayerScaling.identity(self.lm.num_layers).key, *scalings, *parts])
        return [(fingerprint, key) for key in keys], [k for suite in suites for p in suite.probes for k in p.keys]

    def compare_kinds(self, key: str, n_contexts: int) -> dict[str, Interval]:
        """Points gained by a scaling's factors of sliding layers only, and of full layers only."""
        suite, parts = self.make_suite(n_contexts, _JUDGED["contexts"]), split_by_kind(self.lm, read_key(key))
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


def _cut_unseen_text(stretches: int) -> tasks.Suite:
    """Stretches of the last third of each text, which `find_scaling` searches and chooses nothing on."""
    nothing = {"search": 1, "validation": 1, "test": 1}
    return divide([], default_texts(), nothing, stretches, _JUDGED["texts"])["test"].text


def _compare(
    before: np.ndarray, after: np.ndarray, depths: np.ndarray, text_before: np.ndarray, text_after: np.ndarray
) -> dict[str, Any]:
    change = paired_change(100 * before.mean(axis=1), 100 * after.mean(axis=1))
    fifths = by_fifth(after, depths) - by_fifth(before, depths)
    return {"accuracy": after.mean(), "points": change.pop("change")} | change | {
        "by fifth": " ".join(f"{change:+.0f}" for change in 100 * fifths.mean(axis=0)),
        "perplexity": 100 * np.expm1((text_after - text_before).mean()),
    }  # fmt: skip


def describe_model(lm: LM) -> dict[str, str]:
    """What matters for positions, in words."""
    config, windows = lm.model.config.get_text_config(), list_windows(lm)
    sliding = sorted({window for window in windows if window})
    ropes = config.rope_parameters if "rope_theta" not in config.rope_parameters else {"all": config.rope_parameters}
    bases = sorted({rope["rope_theta"] for rope in ropes.values()})
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    attention = lm.model.get_submodule("model.layers.0.self_attn")
    return {
        "weights": f"{weights / 1e6:,.0f} million",
        "layers": str(lm.num_layers),
        "layers that see the whole context": str(windows.count(0)),
        "tokens that the others see": ", ".join(f"{window:,}" for window in sliding) or "all see the whole",
        "query heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "norm of queries and keys": "yes" if hasattr(attention, "q_norm") else "no",
        "base of RoPE": ", ".join(f"{base:,.0f}" for base in bases),
        "window (tokens)": f"{lm.window:,}",
    }


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


def summarise_layers(rows: pd.DataFrame) -> dict[str, Any]:
    """What `describe_layers` says of a model: its most harmful layer, what is in it, how entropy goes over layers."""
    harm, previous = rows["pi, mean"].to_numpy(float), rows["previous token"].to_numpy(float)
    worst = int(harm.argmax())
    return {
        "most harmful layer": worst,
        "its harm (nats)": float(harm[worst]),
        "all others together": float(harm.sum() - harm[worst]),
        "its previous-token head": float(previous[worst]),
        "rank of that head": int((previous > previous[worst]).sum()) + 1,
        "what it sees": f"{rows['sees'].iloc[worst]} tokens" if rows["sees"].iloc[worst] else "everything",
        "entropy over the layers": float(rows["layer"].corr(rows["entropy"], method="spearman")),
    }


def list_windows(lm: LM) -> list[int]:
    """Tokens that each layer sees; 0 for all."""
    config = lm.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * lm.num_layers
    return [config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds]


def split_by_kind(lm: LM, scaling: Scaling) -> dict[str, LayerScaling]:
    """A scaling of layers with the factors of one kind of layers only, the others at 1."""
    assert isinstance(scaling, LayerScaling)
    parts = {}
    for kind, wanted in (("sliding layers only", True), ("full layers only", False)):
        factors = [f if bool(w) == wanted else 1.0 for f, w in zip(scaling.factors, list_windows(lm), strict=True)]
        parts[kind] = LayerScaling(factors, scheme=scaling.scheme)
    return parts


def draw_layers(values: pd.Series, windows: Sequence[int], *, ylabel: str, ax: Axes) -> None:
    """A bar for each layer, those that see the whole context dark; the highest carries its number."""
    ax.bar(values.index, values, color=["0.75" if window else "0.25" for window in windows])
    ax.axhline(0, color="0.6", linewidth=0.8)
    top = int(values.to_numpy().argmax())
    ax.annotate(
        f"layer {top}", (top, float(values.max())), (0, 2), textcoords="offset points", ha="center", fontsize="small"
    )
    ax.set(ylabel=ylabel, xlim=(-0.7, len(values) - 0.3))
    ax.margins(y=0.2)


def give_verdicts(
    picked: Mapping[str, pd.DataFrame],
    facts: Mapping[str, Mapping[str, Any]],
    halves: Mapping[tuple[str, str], Sequence[float]],
    kept: Mapping[float, float],
) -> pd.DataFrame:
    """Claims as rows, models as columns: the number that each model gives, and whether both agree.

    Parameters
    ----------
    picked : mapping of a model to the rows of `pick`
    facts : mapping of a model to what `summarise_layers` says
    halves : mapping of (model, "factor" or "temperature") to its means over the first and second half of the layers
    kept : mapping of a base of RoPE to the share of accuracy that is left under the paper's scheme
    """

    def gain(rows: pd.DataFrame, method: str) -> tuple[bool, str]:
        points, low, high = (float(rows.at[method, name]) for name in ("points", "low", "high"))  # type: ignore[arg-type]
        return low > 0, f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"

    def gain_more(rows: pd.DataFrame) -> tuple[bool, str]:
        numbers = rows.loc[[MAIN[2], MAIN[1]], ["points", "low", "high"]].to_numpy(float)
        return bool(numbers[0, 1] > numbers[1, 2]), f"{numbers[0, 0] - numbers[1, 0]:+.1f}"

    claims: dict[str, dict[str, tuple[bool, str]]] = {}
    for claim, method in {
        "one factor for all layers gains (points)": "one factor (pi)",
        "the paper's algorithm gains (points)": "the paper's GA",
        "the paper's scheme gains by gradient (points)": "layers, pi factors",
        "numbers of layers gain under ntk (points)": MAIN[1],
        "numbers of heads gain (points)": MAIN[2],
    }.items():
        claims[claim] = {model: gain(rows, method) for model, rows in picked.items()}
    claims["heads gain more than layers (points)"] = {model: gain_more(rows) for model, rows in picked.items()}
    claims["one layer costs more than all others together (nats)"] = {
        model: (of["its harm (nats)"] > of["all others together"],
                f"{of['its harm (nats)']:.2f}, {of['all others together']:.2f}")
        for model, of in facts.items()
    }  # fmt: skip
    claims["it holds the best previous-token head (rank)"] = {
        model: (of["rank of that head"] == 1, str(of["rank of that head"])) for model, of in facts.items()
    }
    claims["early layers look more widely than late ones (rank correlation)"] = {
        model: (of["entropy over the layers"] < 0, f"{of['entropy over the layers']:+.2f}")
        for model, of in facts.items()
    }
    for what in ("factor", "temperature"):
        claims[f"useful {what}s rise from early to late layers (means of halves)"] = {
            model: (second > first, f"{first:.2f}, {second:.2f}")
            for (model, kind), (first, second) in halves.items()
            if kind == what
        }
    rows = {claim: {model: f"{'yes' if yes else 'no'}: {number}" for model, (yes, number) in of.items()}
            for claim, of in claims.items()}  # fmt: skip
    table = pd.DataFrame(rows).T.rename_axis("claim")
    answers = [{yes for yes, _ in of.values()} for of in claims.values()]
    table["both"] = ["yes" if a == {True} else "no" if a == {False} else "differ" for a in answers]
    smallest, largest = min(kept), max(kept)
    shares = f"{kept[smallest]:.0%} kept at base {smallest:,.0f}, {kept[largest]:.0%} at {largest:,.0f}"
    table.loc["a small base bears division better (models made here)"] = [shares, *[""] * (len(picked) - 1), ""]
    return table
