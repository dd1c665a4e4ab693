"""What a scaling is searched on, and where it then helps: tasks alone, all together, all but one; real text."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lrs_utils import LM, HeadScaling, LayerScaling, Ledger, find_scaling, score, tasks
from lrs_utils.analysis.statistics import Interval, bootstrap_mean, by_fifth, paired_change
from lrs_utils.finding.free_text import continue_freely, distinct_trigrams, near_repeats
from lrs_utils.finding.parts import Task, divide
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import read_key
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.searchers.gradient import nll_gradient
from lrs_utils.searchers.learned import SPACES, layers_of
from lrs_utils.tasks.general import MAKERS
from lrs_utils.tasks.judging import best_subspan_em, judged

_KEYS = ("uuid", "short")  # the same prompt, so left out together too
_SEED = 40_000  # of the contexts that everything is judged on
_CAPITALS = "capitals, closed book"


def list_objectives(names: Sequence[str]) -> dict[str, list[str]]:
    """Objectives by name, and the tasks of each: all, each alone, all but each, all but both kinds of pairs."""
    alone = {name: [name] for name in names}
    without = {f"all but {name}": [other for other in names if other != name] for name in names}
    rest = [name for name in names if name not in _KEYS]
    both = {"all but pairs": rest} if {*_KEYS} <= {*names} and rest else {}
    return {"all": [*names]} | alone | without | both


def pick_tests(objective: str, tests: Mapping[str, tasks.Suite]) -> dict[str, tasks.Suite]:
    """What an objective is judged on: all tests, or, where tasks are left out, these tasks alone."""
    if not objective.startswith("all but "):
        return dict(tests)
    left_out = objective.removeprefix("all but ").partition(",")[0]
    names = _KEYS if left_out == "pairs" else (left_out,)
    return {name: suite for name, suite in tests.items() if name.partition(",")[0] in names}


@dataclass(frozen=True)
class Search:
    """How each objective is searched: everything but its tasks.

    Attributes
    ----------
    tasks : mapping of a task's name to function or Suite
        What `find_scaling` takes.
    options : mapping
        Of `find_scaling`.
    ways : mapping of a name to a mapping
        What differs from the options for objectives of these names, "all, NAME" or "all but TASK, NAME".
    """

    lm: LM
    ledger: Ledger
    tasks: Mapping[str, Task]
    options: Mapping[str, Any]
    ways: Mapping[str, Mapping[str, Any]]

    def list_pieces(self, objectives: Mapping[str, Sequence[str]], seeds: int) -> dict[str, Callable[[], pd.DataFrame]]:
        """Every search, by objective and seed: pieces of a table."""
        return {
            f"{name} | {seed}": partial(self.find, name, searched, seed)
            for name, searched in objectives.items()
            for seed in range(seeds)
        }

    def find(self, objective: str, searched: Sequence[str], seed: int) -> pd.DataFrame:
        """One call of `find_scaling`: its scaling as a key, and what it costs free text."""
        given = [self.tasks[name] for name in searched]
        options = {**self.options, **self.ways.get(objective, {})}
        found = find_scaling(self.lm, given, seed=seed, ledger=self.ledger, **options)
        chosen = found.choices[found.choices["chosen"]] if len(found.choices) else found.choices
        row = {"objective": objective, "seed": seed, "scaling": found.scaling.key, "dose": chosen["dose"].sum()}
        for kind in found.about["texts"]:
            text = found.row("text", f"perplexity, not seen: {kind}")
            row |= {f"{kind}, {end}": 100 * text[end] / text["no scaling"] for end in ("change", "low", "high")}
        for kind in ("greedy", "drawn"):
            row[f"near repeats, {kind}"] = 100 * found.row("free text", f"near repeats, {kind}")["change"]
        return pd.DataFrame([row | {"minutes": found.row("search", "seconds")["found"] / 60}])


def make_tests(
    sizes: Mapping[str, Sequence[int]],
    n_contexts: int,
    *,
    pages: int,
    page_words: int,
    distances: Sequence[int],
    n_capitals: int,
) -> dict[str, tasks.Suite]:
    """Held-out contexts: every task at its sizes, asked at ten depths at most; real text; what needs no context.

    Parameters
    ----------
    pages, page_words : int
        Whole pages of the Factbook, and their longest.
    distances : sequence of int
        Words between a section of a manual and the reference to it.
    """
    found = {}
    for name, of in sizes.items():
        for size in of:
            options = {} if name in ("copying", "documents") else {"positions": _positions(size)}
            n = (n_contexts + 1) // 2 if name == "documents" else n_contexts  # each is read again for every place
            found[f"{name}, {size}"] = MAKERS[name](size, n_contexts=n, seed=_SEED, **options)
    found["pages"] = tasks.country_pages(pages, _SEED, n_words=page_words)
    for distance in distances:
        found[f"references, {distance} words"] = tasks.references(distance, min(n_contexts, 30), _SEED)
    return found | {_CAPITALS: tasks.capitals(n_capitals)}


def list_other_pages(n_tested: int, n_words: int, n_searched: int, n_searched_words: int) -> tasks.Suite:
    """Whole pages to search on: none that `make_tests` gives; they may be longer, since few are short."""
    tested = {probe.context for probe in tasks.country_pages(n_tested, _SEED, n_words=n_words).probes}
    more = tasks.country_pages(n_tested + n_searched, _SEED, n_words=n_searched_words)
    others = [probe for probe in more.probes if probe.context not in tested]
    return replace(more, probes=tuple(others[:n_searched]))


def make_longer(sizes: Mapping[str, Sequence[int]], n_contexts: int) -> dict[str, tasks.Suite]:
    """Contexts longer than any in a search, asked at ten depths."""
    return {
        f"{name}, {size}": MAKERS[name](size, n_contexts=n_contexts, seed=_SEED + 1, positions=_positions(size))
        for name, of in sizes.items()
        for size in of
    }


def _positions(n_items: int) -> list[int]:
    return tasks.positions_at(n_items, [place / 9 for place in range(10)])


def judge(
    lm: LM, keys: Mapping[str, str], tests: Mapping[str, tasks.Suite], answer_tokens: int, ledger: Ledger
) -> pd.DataFrame:
    """What scalings change in each test, against no scaling.

    Parameters
    ----------
    keys : mapping of a name to the key of a scaling

    Returns
    -------
    DataFrame
        A row for each scaling and test: accuracy with "no scaling" and "found", "points" with "low", "high" and "p" of
        the permutation test over contexts, the change "by fifth" of depth, how many "fifths worse" there are (their
        interval below 0), and the change of the answers' "nll".
    """
    rows = []
    for test, suite in tests.items():
        before, nll = read_answers(lm, suite, _none(lm), answer_tokens, ledger)
        for name, key in keys.items():
            after, nll_after = read_answers(lm, suite, read_key(key), answer_tokens, ledger)
            row = {"objective": name, "test": test, "no scaling": np.nanmean(before), "found": np.nanmean(after)}
            change = paired_change(100 * _mean(before), 100 * _mean(after))
            row |= {"points": change.pop("change")} | change | {"nll": float(np.nanmean(nll_after - nll))}
            if before.shape[1] > 1:
                changes = by_fifth(after, suite.depths) - by_fifth(before, suite.depths)
                fifths = [of[~np.isnan(of)] for of in changes.T if not np.isnan(of).all()]
                row["by fifth"] = " ".join(f"{100 * of.mean():+.0f}" for of in fifths)
                row["fifths worse"] = sum(len(of) > 1 and bootstrap_mean(of).high < 0 for of in fifths)
            rows.append(row)
    return pd.DataFrame(rows)


def _mean(exact: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.nanmean(exact, axis=1))


def read_answers(
    lm: LM, suite: tasks.Suite, scaling: Scaling, answer_tokens: int, ledger: Ledger
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Verdicts and nll, shape (contexts, questions), nan where nothing is asked.

    Documents are judged on free text, as their paper does, and have no nll; of capitals the likeliest option is taken.
    Contexts may be longer than the window of a small model.
    """
    if suite.name.startswith("mdqa"):
        # a base model has no chat template, and is asked as it is
        asked = tasks.in_chat(suite, lm.tokenizer) if lm.tokenizer.chat_template else suite
        texts = generate_answers(lm, asked, scaling, max_new_tokens=answer_tokens, ledger=ledger, extrapolate=True)
        return judged(asked, texts, best_subspan_em).astype(float), np.zeros(suite.asked.shape)
    outcomes = score(lm, suite, [scaling], ledger=ledger, extrapolate=True)
    nll = np.array(outcomes.nll[0], float)
    if suite.name.startswith("capitals"):  # the options are its questions, the right one first
        return np.array(nll.argmin(axis=1) == 0, float)[:, None], nll[:, :1]
    return np.where(suite.asked, outcomes.exact[0], np.nan), nll


def draw_openings(texts: Mapping[str, str], n_each: int, seed: int, n_words: int = 10) -> list[str]:
    """The first words of sentences, as many from each text; other seeds draw others."""
    openings = []
    for text in texts.values():
        sentences = [found.split() for found in re.findall(r"(?<=[.!?] )[A-Z][^.!?]+", " ".join(text.split()))]
        long = [" ".join(words[:n_words]) for words in sentences if len(words) > n_words]
        order = np.random.default_rng(_SEED).permutation(len(long)).tolist()
        openings += [long[at] for at in order[seed * n_each : (seed + 1) * n_each]]
    return openings


def compare_repeats(lm: LM, key: str, openings: Sequence[str], n_tokens: int, ledger: Ledger) -> pd.DataFrame:
    """Whether free text repeats itself more often than without scaling.

    Returns
    -------
    DataFrame
        A row for "greedy" and "drawn" text and each measure ("near repeats", "trigrams seen before"): the share in per
        cent with "no scaling" and "found", and its "change" with "low", "high" and "p", opening by opening.
    """
    written = [
        continue_freely(lm, scaling, openings=openings, n_tokens=n_tokens, ledger=ledger)
        for scaling in (_none(lm), read_key(key))
    ]
    shares = {
        "near repeats": [100 * near_repeats(tokens) for tokens in written],
        "trigrams seen before": [100 * (1 - distinct_trigrams(tokens)) for tokens in written],
    }
    rows = []
    for measure, (before, after) in shares.items():
        for way, kind in enumerate(("greedy", "drawn")):
            row = {"text": kind, "measure": measure, "no scaling": before[:, way].mean(), "found": after[:, way].mean()}
            rows.append(row | paired_change(before[:, way], after[:, way]))
    return pd.DataFrame(rows)


def list_parts(key: str, doses: Sequence[float]) -> dict[str, Scaling]:
    """Forms of a scaling: doses of it, its gains and the rest apart, and no gain above 1."""
    whole = read_key(key)
    parts: dict[str, Scaling] = {f"dose {dose:g}": whole.at_dose(dose) for dose in doses}
    if isinstance(whole, HeadScaling) and whole.gains is not None:
        gains = np.array(whole.gains)
        parts["gains alone"] = HeadScaling(gains=gains)
        for name, of in {"without gains": np.ones_like(gains), "no gain above 1": np.minimum(gains, 1.0)}.items():
            parts[name] = HeadScaling(whole.temperatures, of, layers=whole.layers)
    return {name: of for name, of in parts.items() if name.startswith("dose") or not (of.is_identity or of == whole)}


def measure_part(
    lm: LM,
    name: str,
    scaling: Scaling,
    tests: Mapping[str, tasks.Suite],
    *,
    openings: Sequence[str],
    n_tokens: int,
    answer_tokens: int,
    ledger: Ledger,
) -> pd.DataFrame:
    """The rows of `compare_repeats`, with the "part" of a scaling that they are of and its "points, TEST"."""
    judged = judge(lm, {name: scaling.key}, tests, answer_tokens, ledger).set_index("test")["points"]
    repeats = compare_repeats(lm, scaling.key, openings, n_tokens, ledger)
    return repeats.assign(part=name, **{f"points, {test}": points for test, points in judged.items()})


def choose_dose(
    lm: LM,
    key: str,
    rows: pd.DataFrame,
    doses: Sequence[float],
    texts: Mapping[str, str],
    *,
    limit: float,
    n_stretches: int,
    ledger: Ledger,
) -> pd.DataFrame:
    """The largest dose at which nothing repeats itself beyond chance and perplexity keeps a limit; else the least.

    Parameters
    ----------
    rows : DataFrame
        Of `measure_part`, for each dose.
    limit : float
        Per cent that the perplexity of each text may rise by, where searches choose among their scalings.

    Returns
    -------
    DataFrame
        Rows of `compare_perplexity` for the doses that were tried, with "dose" and "scaling"; the last is chosen.
    """
    tables = []
    for dose in sorted(doses, reverse=True):
        if (rows[rows["part"] == f"dose {dose:g}"]["low"] > 0).any() and dose > min(doses):
            continue
        scaling = read_key(key).at_dose(dose).key
        table = compare_perplexity(lm, scaling, texts, n_stretches, ledger, part="validation")
        tables.append(table.assign(dose=dose, scaling=scaling))
        if (table["change"] <= limit).all():
            break
    return pd.concat(tables, ignore_index=True)


def compare_perplexity(
    lm: LM, key: str, texts: Mapping[str, str], n_stretches: int, ledger: Ledger, part: str = "test"
) -> pd.DataFrame:
    """What a scaling changes in the perplexity of each text, per cent, on a third of it.

    Parameters
    ----------
    n_stretches : int
        Of each text, about 270 tokens.
    part : str
        "test", which no search or choice reads, or "validation", where they choose.
    """
    cut = divide([], texts, dict.fromkeys(("search", "validation", "test"), 4), n_stretches, 0)[part]
    before, after = (score(lm, cut.text, [s], ledger=ledger).nll[0, :, 0] for s in (_none(lm), read_key(key)))
    rows = []
    for kind in texts:
        change = paired_change(before[cut.kinds == kind], after[cut.kinds == kind])
        ends = {end: 100 * np.expm1(change[end]) for end in ("change", "low", "high")}
        rows.append({"text": kind, "perplexity": float(np.exp(before[cut.kinds == kind].mean()))} | ends)
    return pd.DataFrame(rows)


def _none(lm: LM) -> LayerScaling:
    return LayerScaling.identity(lm.num_layers)


def try_temperatures(
    lm: LM, key: str, tests: Mapping[str, tasks.Suite], multipliers: Sequence[float], ledger: Ledger
) -> pd.DataFrame:
    """Whether longer contexts want a higher temperature: that of all layers times each multiplier, test by test.

    Returns
    -------
    DataFrame
        A row for each test and multiplier: "accuracy", and the "points" it adds to the scaling as it was found, with
        "low" and "high".
    """
    found = read_key(key)
    heads = found if isinstance(found, HeadScaling) else HeadScaling(layers=layers_of(found, lm))
    layers = heads.layers or _none(lm)
    before = layers.temperatures or (1.0,) * lm.num_layers
    rows = []
    for name, suite in tests.items():
        warmed = [replace(layers, temperatures=tuple(m * t for t in before)) for m in (1.0, *multipliers)]
        scalings = [replace(heads, layers=of) for of in warmed]
        exact = score(lm, suite, scalings, ledger=ledger, extrapolate=True).exact.mean(axis=2)
        for multiplier, after in zip(multipliers, exact[1:], strict=True):
            change = paired_change(100 * exact[0], 100 * after)
            row = {"test": name, "temperatures times": multiplier, "accuracy": after.mean()}
            rows.append(row | {"points": change["change"], "low": change["low"], "high": change["high"]})
    return pd.DataFrame(rows)


def read_by_fifth(exact: NDArray[np.float64], depths: NDArray[np.float64]) -> Interval:
    """Accuracy by fifth of depth; each fifth over the contexts that ask there."""
    fifths = [of[~np.isnan(of)] for of in by_fifth(exact, depths).T]
    found = [bootstrap_mean(of) if len(of) > 1 else Interval(*[np.array(np.nan)] * 3) for of in fifths]
    return Interval(*(np.array(ends, float) for ends in zip(*found, strict=True)))


def draw_gains(table: pd.DataFrame, ax: Axes) -> str:
    """A map of objectives and tests: points gained; what chance explains is left without its number.

    Returns
    -------
    str
        Its last row, in words.
    """
    gains = table.pivot_table(index="objective", columns="test", values="points", sort=False)
    sure = table.assign(sure=(table["low"] > 0) | (table["high"] < 0))
    sure = sure.pivot_table(index="objective", columns="test", values="sure", sort=False).astype(bool)
    shown = gains.round().astype(int).astype(str).where(sure, "")
    limit = float(np.abs(gains.to_numpy()).max())
    sns.heatmap(
        gains, annot=shown, fmt="", cmap="vlag_r", vmin=-limit, vmax=limit, ax=ax, cbar=False, annot_kws={"size": 8}
    )
    ax.set(xlabel="", ylabel="searched on")
    return f"searched on {gains.index[-1]}, " + ", ".join(f"{test} {n:+.0f}" for test, n in gains.iloc[-1].items())


def measure_angles(
    lm: LM, made: Mapping[str, Callable[..., tasks.Suite]], space: str, n_contexts: int, seed: int, ledger: Ledger
) -> pd.DataFrame:
    """How far tasks pull in the same direction: the cosine between their gradients at no scaling.

    Returns
    -------
    DataFrame
        A row for each pair of tasks and layer: "a", "b", "layer" (-1: all together), "cosine".
    """
    scaling, gradients = LayerScaling.uniform(1.0, lm.num_layers, "ntk"), {}
    for name, make in made.items():
        probes = make(n_contexts=n_contexts, seed=_SEED + seed).probes
        found = [nll_gradient(lm, probe, scaling, SPACES[space], ledger=ledger) for probe in probes]
        gradients[name] = np.mean([gradient for _, gradient in found], axis=0)
    rows = []
    for a, b in combinations(gradients, 2):
        x, y = gradients[a], gradients[b]
        rows.append({"a": a, "b": b, "layer": -1, "cosine": _cosine(x.ravel(), y.ravel())})
        rows += [{"a": a, "b": b, "layer": at, "cosine": _cosine(x[:, at], y[:, at])} for at in range(x.shape[1])]
    return pd.DataFrame(rows)


def _cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(x @ y) / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-12)
