"""Factors for reading beyond the window: how they are searched at one length, and measured at others.

A setting is a scheme, how factors combine with its extension, and how they were searched; its name joins the three:
"NTK, divide, GA". A scheme with no factors on top is "NTK alone". In tables, as "no scaling", these are methods.
"""

import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrs_utils import LM, ExtendedScaling, GeneticSearch, GradientSearch, LayerScaling, Ledger, score, search, tasks
from lrs_utils.analysis.statistics import bootstrap_mean, paired_changes
from lrs_utils.notebook import Run
from lrs_utils.scaling import rope
from lrs_utils.scoring.perplexity import window_nll
from lrs_utils.scoring.window import context_tokens
from lrs_utils.searchers.objectives import mixture
from lrs_utils.tasks import Suite
from lrs_utils.training.small import SIZES, WINDOW, suites

NO_SCALING = "no scaling"
SCHEMES = {"PI": "pi", "NTK": "ntk", "Dynamic NTK": "dynamic_ntk", "YaRN": "yarn"}
SPACE: dict[str, Any] = {"bounds": [0.5, 2.0], "step": 0.1, "start": 1.0, "rate": 0.05}
Setting = tuple[str, str, str]  # scheme, how factors combine with its extension, how they are searched
LONG_SETTINGS = [  # of a model whose windows are costly
    *[(name, "multiply", "GA") for name in ("PI", "Dynamic NTK", "YaRN")],
    ("PI", "multiply", "one factor"),
]
Factors = Sequence[float] | None
Reading = tuple[Any, ...]  # scheme, how factors combine with its extension, factors; the scheme alone without both


def list_settings() -> list[Setting]:
    """All that is compared: with PI both combinations are the same, and YaRN has no gradient here."""
    every = [*product(SCHEMES, ("multiply", "divide"), ("one factor", "GA", "gradient"))]
    return [of for of in every if of[:2] != ("PI", "divide") and of[::2] != ("YaRN", "gradient")]


def stretch(lm: LM, name: str, length: int, factors: Factors = None, combine: str = "multiply") -> LayerScaling:
    """A scheme with the extension that a length needs: none within the window; Dynamic NTK finds it itself."""
    if name == NO_SCALING or length <= lm.window:
        return LayerScaling.identity(lm.num_layers)
    extension = 1.0 if name == "Dynamic NTK" else length / lm.window
    return ExtendedScaling(factors or (1.0,) * lm.num_layers, SCHEMES[name], extension=extension, combine=combine)


def slow_frequencies(scheme: str, factor: float = 1.0, combine: str = "multiply") -> NDArray[np.float64]:
    """By how much each frequency of a head of small-rope, fast to slow, is slowed at four windows."""
    own = rope.frequencies(SIZES["hidden_size"] // SIZES["num_attention_heads"], SIZES["rope_theta"])
    at = {"extension": 4.0, "combine": combine, "length": 4 * WINDOW}
    scaled, _ = rope.layer_frequencies(own, factor, scheme, WINDOW, **at)  # type: ignore[arg-type]
    return np.asarray(own / scaled)


def ask_beyond(lm: LM, text: str, length: int, contexts: int, seed: int) -> Suite:
    """Stretches of text, none longer than `length` tokens, whose end, beyond the window, is to be predicted."""
    words, longest = length, length
    while longest >= length:
        words = int(0.99 * words * length / longest)
        judged = int(words * min(1 / 4, 1 - lm.window / length))
        suite = tasks.continuations(text, contexts, seed=1_000 + seed, words=words, judged=judged)
        longest = max(context_tokens(lm, probe) for probe in suite.probes)
    return suite


def search_layers(
    lm: LM, suite: Suite, start: LayerScaling, how: str, budget: int, *, seed: int = 0, ledger: Ledger | None = None
) -> tuple[list[Any], list[float]]:
    """Candidates on top of a scheme, the scheme alone first, and the nll of each on the suite.

    Parameters
    ----------
    start : LayerScaling
        The scheme alone, as `stretch` gives it.
    how : "one factor", "GA" or "gradient"
        Numbers for all layers tried one after the other; the paper's search; ours, for as many answers.
    budget : int
        Candidates.
    """
    if how == "one factor":
        low, high = SPACE["bounds"]
        numbers = np.arange(low, high, SPACE["step"]).round(2).tolist()
        few = numbers[:: -(-len(numbers) // budget)]
        tried: list[Any] = [replace(start, factors=(number,) * lm.num_layers) for number in [1.0, *few]]
        return tried, score(lm, suite, tried, ledger=ledger, extrapolate=True).nll.mean(axis=(1, 2)).tolist()
    makers: dict[str, Callable[..., Any]] = {"GA": _genetic, "gradient": partial(_descent, ledger=ledger)}
    searcher = makers[how](lm, suite, start, budget, seed=seed)
    result = search(lm, suite, searcher, budget=budget, objective=mixture(1), extrapolate=True, ledger=ledger)
    return list(result.candidates), [-nll for [nll] in result.fitness]


def _genetic(lm: LM, suite: Suite, start: ExtendedScaling, budget: int, *, seed: int) -> Any:
    size = 4 if budget < 16 else 8
    return GeneticSearch(
        lm.num_layers, scheme=start.scheme, bounds=SPACE["bounds"], step=SPACE["step"], start=SPACE["start"],
        make=partial(ExtendedScaling, extension=start.extension, combine=start.combine), population=size,
        parents=size // 2, mutations=size // 4, crossovers=size // 4, seed=seed,
    )  # fmt: skip


def _descent(lm: LM, suite: Suite, start: ExtendedScaling, budget: int, *, seed: int, ledger: Ledger | None) -> Any:
    steps = max(2, budget * len(suite.probes) // 5)  # a gradient costs as much as four answers: no more than the others
    return GradientSearch(
        lm, suite, start=start, steps=steps, every=max(1, steps // 6), rate=SPACE["rate"], vary="factors",
        extrapolate=True, ledger=ledger, seed=seed,
    )  # fmt: skip


def search_all(
    run: Run, table: str, lm: LM, text: str, settings: Iterable[Setting], sizes: Sequence[int], seed: int
) -> pd.DataFrame:
    """The best factors of every setting: a row for each layer, with the nll of the scheme alone and the best.

    Parameters
    ----------
    sizes : length in tokens, contexts, candidates
    """
    length, contexts, budget = sizes
    suite = ask_beyond(lm, text, length, contexts, seed)

    def measure(name: str, combine: str, how: str) -> pd.DataFrame:
        start = stretch(lm, name, length, combine=combine)
        candidates, nll = search_layers(lm, suite, start, how, budget, seed=seed, ledger=run.ledger)
        best = candidates[int(np.argmin(nll))].factors
        rows = pd.DataFrame({"layer": range(lm.num_layers), "factor": best, "nll": nll[0], "best": min(nll)})
        return rows.assign(
            scheme=name, combine=combine, how=how, method=f"{name}, {combine}, {how}", candidates=len(nll)
        )

    pieces = {", ".join(setting): partial(measure, *setting) for setting in settings}
    return run.table(
        table, pieces, model=lm.fingerprint, suite=suite.fingerprint, space=SPACE, sizes=tuple(sizes), seed=seed
    )


def list_readings(found: pd.DataFrame, without: Sequence[str] = ()) -> dict[str, Reading]:
    """What is measured, by its setting's name: no scaling, each scheme alone, and the factors found on top of it."""
    readings: dict[str, Reading] = {NO_SCALING: (NO_SCALING,)} | {f"{name} alone": (name,) for name in SCHEMES}
    for method, rows in found.groupby("method", sort=False):
        readings[str(method)] = (*rows[["scheme", "combine"]].iloc[0], tuple(rows["factor"]))
    return {method: of for method, of in readings.items() if of[0] not in without}


def choose_best(found: pd.DataFrame) -> pd.DataFrame:
    """Of each scheme the one factor and the layer factors that were best where they were searched.

    Returns
    -------
    DataFrame
        Index: the setting's name. Columns "scheme" and "kind", which is "one factor" or "layer factors".
    """
    rows = found.groupby("method", sort=False).first()
    rows["kind"] = rows["how"].where(rows["how"] == "one factor", "layer factors")
    rows["kind"] = pd.Categorical(rows["kind"], ["one factor", "layer factors"])
    rows["scheme"] = pd.Categorical(rows["scheme"], [*SCHEMES])
    best = rows.groupby(["scheme", "kind"], observed=True)["best"].idxmin()
    return rows.loc[best, ["scheme", "kind"]].astype(str)


def measure_perplexity(
    run: Run, table: str, lm: LM, readings: Mapping[str, Reading], plays: Sequence[str], **at: Any
) -> pd.DataFrame:
    """Mean nll of every reading, by text and length, its seconds, and the most memory that the process ever had.

    Parameters
    ----------
    at
        "lengths" in tokens; "texts", how many of them at each length; "stride" and "windows", as `window_nll` has.
    """
    known: dict[Any, list[float]] = {}  # within the window nothing is scaled

    def measure(method: str, name: str, combine: str = "multiply", factors: Factors = None) -> pd.DataFrame:
        rows = []
        for length, n in zip(at["lengths"], at["texts"], strict=True):
            scaling = stretch(lm, name, length, factors, combine)
            for text in range(n):
                what = text, length, scaling
                if what not in known:
                    known[what] = _time_nll(lm, plays[text], length, scaling, at)
                rows.append([text, length, *known[what]])
        columns = ["text", "length", "nll", "seconds per 1,000 tokens", "GiB"]
        return pd.DataFrame(rows, columns=columns).assign(method=method)

    pieces = {method: partial(measure, method, *of) for method, of in readings.items()}
    return run.table(table, pieces, model=lm.fingerprint, **at, readings=[*readings.values()])


def _time_nll(lm: LM, text: str, length: int, scaling: LayerScaling, at: Mapping[str, Any]) -> list[float]:
    start, windows = time.perf_counter(), at["windows"]
    options = {"stride": at["stride"], "n_windows": windows, "first_end": max(at["lengths"])}
    nll = float(window_nll(lm, text, [length], scaling=scaling, extrapolate=True, **options).mean())
    seconds = 1_000 * (time.perf_counter() - start) / (windows * length)
    return [nll, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]


def measure_retrieval(
    run: Run, table: str, lm: LM, readings: Mapping[str, Reading], lengths: Sequence[int], contexts: int, seed: int
) -> pd.DataFrame:
    """Per cent of exact answers of the small model on pairs and on a pass key, by context and length."""

    def measure(method: str, name: str, combine: str = "multiply", factors: Factors = None) -> pd.DataFrame:
        parts = []
        for length, task in product(lengths, ("pairs", "pass key")):
            scaling = stretch(lm, name, length, factors, combine)
            asked = suites(task, length, contexts, 2_000 + seed)
            part = _answer(lm, asked, scaling, run.ledger)
            parts.append(part.assign(method=method, task=task, length=length))
        return pd.concat(parts)

    pieces = {method: partial(measure, method, *of) for method, of in readings.items()}
    about: dict[str, Any] = {"model": lm.fingerprint, "lengths": list(lengths), "n": contexts, "seed": seed}
    return run.table(table, pieces, **about, readings=[*readings.values()])


def _answer(lm: LM, asked: Sequence[Suite], scaling: LayerScaling, ledger: Ledger) -> pd.DataFrame:
    outcomes = [score(lm, suite, [scaling], ledger=ledger, extrapolate=True) for suite in asked]
    right = 100 * np.mean([of.exact[0].mean(axis=1) for of in outcomes], axis=0)
    nll = np.mean([of.nll[0].mean(axis=1) for of in outcomes], axis=0)
    return pd.DataFrame({"context": range(len(right)), "right": right, "nll": nll})


def measure_long_retrieval(
    run: Run, table: str, lm: LM, readings: Mapping[str, Reading], length: int, keys: str, seed: int
) -> pd.DataFrame:
    """Whether each answer is right (0 or 100) and its nll: one context of pairs, and a pass key at its beginning."""
    n = (length - 200) // {"uuid": 73, "short": 15}[keys]

    def measure(method: str, name: str, combine: str = "multiply", factors: Factors = None) -> pd.DataFrame:
        pairs = tasks.kv_retrieval(n, 1, seed=2_000 + seed, keys=keys, positions=range(0, n, max(1, n // 15)))
        [key] = tasks.passkey((length - 80) // 25, 1, seed=2_000 + seed, depths=[0])
        scaling, parts = stretch(lm, name, length, factors, combine), []
        for task, suite in {"pairs": pairs, "pass key": key}.items():
            outcomes = score(lm, suite, [scaling], ledger=run.ledger, extrapolate=True)
            columns = {"right": 100 * outcomes.exact[0, 0], "nll": outcomes.nll[0, 0], "depth": outcomes.depths}
            parts.append(pd.DataFrame(columns).assign(task=task))
        return pd.concat(parts).assign(method=method)

    pieces = {method: partial(measure, method, *of) for method, of in readings.items()}
    about: dict[str, Any] = {"model": lm.fingerprint, "length": length, "keys": keys, "seed": seed}
    return run.table(table, pieces, **about, readings=[*readings.values()])


def name_alone(method: str) -> str:
    """The setting of the same scheme with no factors on top."""
    return method.partition(", ")[0] + " alone" if ", " in method else method


def name_one_factor(method: str) -> str:
    """The setting of the same scheme and combination with one factor for all layers."""
    scheme, _, rest = method.partition(", ")
    return f"{scheme}, {rest.partition(', ')[0]}, one factor" if rest else method


def name_multiply(method: str) -> str:
    """The same setting with factors multiplied into the scheme."""
    return method.replace("divide", "multiply")


def compare_perplexity(rows: pd.DataFrame, baseline: Callable[[str], str] = name_alone) -> pd.DataFrame:
    """Perplexity of every setting and length, and its paired change against a baseline, in per cent.

    Perplexity is of the texts that all lengths have. Intervals are over texts; `p` is corrected over the settings at a
    length (Holm).
    """
    wide = rows.pivot_table(index="text", columns=["method", "length"], values="nll", sort=False)
    lengths = wide.columns.unique("length")
    by_length = {at: paired_changes(pd.DataFrame(wide.xs(at, axis=1, level=1)), baseline) for at in lengths}
    table = pd.concat(by_length, names=["length"]).drop(columns="mean").reset_index()
    mean = wide.dropna().mean().rename("perplexity").reset_index()
    table = mean.merge(table, how="left", on=["method", "length"])
    changes = {column: 100 * np.expm1(table[column]) for column in ("change", "low", "high")}
    return table.assign(perplexity=np.exp(table["perplexity"]), **changes)


def compare_best(rows: pd.DataFrame, found: pd.DataFrame, rival: str = "scheme alone") -> pd.DataFrame:
    """What `choose_best` chose, against the scheme alone, or its layer factors against its one factor.

    Returns
    -------
    DataFrame
        `compare_perplexity`'s, with "scheme" and "kind"; only rows that have a rival.
    """
    best = choose_best(found)
    if rival == "scheme alone":
        return compare_perplexity(rows).dropna(subset="change").join(best, on="method", how="inner")
    one = {of["scheme"]: method for method, of in best.iterrows() if of["kind"] == "one factor"}
    chosen = rows[rows["method"].isin(best.index)]
    table = compare_perplexity(chosen, lambda method: str(one.get(method.partition(", ")[0], method)))
    return table.dropna(subset="change").join(best, on="method")


def group_by_setting(table: pd.DataFrame, mean: str = "change") -> pd.DataFrame:
    """Rows as `methods.dots_by_group` takes them: a group for each scheme and combination, a method for each search."""
    parts = [str(method).split(", ") for method in table["method"]]
    groups = [scheme if scheme == "PI" else f"{scheme}, {combine}" for scheme, combine, _ in parts]
    return _as_groups(table, groups, [how for *_, how in parts], mean)


def group_by_scheme(table: pd.DataFrame, mean: str = "change") -> pd.DataFrame:
    """Rows as `methods.dots_by_group` takes them, of a table with "scheme" and "kind"."""
    return _as_groups(table, table["scheme"], table["kind"], mean)


def _as_groups(table: pd.DataFrame, groups: Iterable[str], kinds: Iterable[str], mean: str) -> pd.DataFrame:
    index = pd.MultiIndex.from_arrays([[*groups], [*kinds]])
    return table.rename(columns={mean: "mean"}).reindex(columns=["mean", "low", "high"]).set_index(index)


def count_certain(table: pd.DataFrame) -> tuple[int, int]:
    """How many settings read better than their rival, and how many worse, with p below 0.05."""
    certain = table[table["p"] < 0.05]["change"]
    return int((certain < 0).sum()), int((certain > 0).sum())


def list_changes(table: pd.DataFrame) -> str:
    """The change of each scheme with its interval, as a sentence has it: "-3.7 % [-6.0, -1.2] on PI, ..."."""
    parts = []
    for of in table.to_dict("records"):
        interval = "" if np.isnan(of["low"]) else f" [{of['low']:+.1f}, {of['high']:+.1f}]"
        parts.append(f"{of['change']:+.1f} %{interval} on {of['scheme']}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def average_alone(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity with no scaling and with each scheme alone (index) by length (columns), of texts of all lengths."""
    table = compare_perplexity(rows[~rows["method"].str.contains(", ")])
    values = table.pivot_table(index="method", columns="length", values="perplexity", sort=False)
    return values.rename(index=lambda name: name.removesuffix(" alone"))


def say_setting(method: str) -> str:
    """A setting in words: "no scaling", "PI alone", "YaRN with one factor", "NTK with layer factors"."""
    if ", " not in method:
        return method
    scheme, *_, how = method.split(", ")
    return f"{scheme} with {how if how == 'one factor' else 'layer factors'}"


def say_lengths(values: pd.DataFrame) -> str:
    """The numbers of `methods.by_length`'s figure."""
    told = [
        f"{name} {', '.join(f'{value:,.1f} at {length:,}' for length, value in line.items())}"
        for name, line in values.iterrows()
    ]
    return "; ".join(told) + " tokens."


def list_panels(lm: LM, rows: pd.DataFrame, found: pd.DataFrame, lengths: Iterable[int]) -> dict[str, pd.DataFrame]:
    """What `choose_best` chose against the scheme alone, for `methods.dots_by_group`: a panel for each length."""
    changes = compare_best(rows, found)
    at = [length for length in dict.fromkeys(lengths) if (changes["length"] == length).any()]
    return {f"{lm.name}, {n:,} tokens": group_by_scheme(changes[changes["length"] == n]) for n in at}


def group_retrieval(
    retrieval: pd.DataFrame, best: pd.DataFrame, task: str, lengths: Iterable[int]
) -> dict[str, pd.DataFrame]:
    """Exact answers in per cent with intervals over contexts, for `methods.dots_by_group`: a panel for each length.

    They are of each scheme alone and of what `choose_best` chose.
    """
    kinds = {f"{scheme} alone": (scheme, "scheme alone") for scheme in SCHEMES}
    kinds |= {str(method): (of["scheme"], of["kind"]) for method, of in best.iterrows()}
    kinds[NO_SCALING] = (NO_SCALING, "scheme alone")
    panels = {}
    for length in lengths:
        at = retrieval[(retrieval["task"] == task) & (retrieval["length"] == length)]
        parts = {kind: bootstrap_mean(at[at["method"] == method]["right"]) for method, kind in kinds.items()}
        rows = [[float(part.mean), float(part.low), float(part.high)] for part in parts.values()]
        index = pd.MultiIndex.from_tuples([*parts])
        panels[f"{length:,} tokens"] = pd.DataFrame(rows, columns=["mean", "low", "high"], index=index)
    return panels
