"""One call of `find_scaling`, step by step: measure with no scaling, search, choose on validation, test once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrs_utils.analysis.statistics import bootstrap_mean, by_fifth, mean_over_questions
from lrs_utils.finding import free_text
from lrs_utils.finding.found import Judged
from lrs_utils.finding.parts import Part
from lrs_utils.finding.plan import DOSES, GRADIENT, NOTES, STOPS, count_context_tokens, keep_note, name_note
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import Outcomes, score
from lrs_utils.searchers.descent import GradientSearch
from lrs_utils.searchers.gradient import PRICE
from lrs_utils.tasks import Suite

# Under "pi" near tokens move too, and gains are small (data/results/test.csv).
_SCHEMES = {"pi_factors": "pi"}  # by space; else "ntk"
_LOOPS = 0.02  # repeats may rise by this much, or by more if within chance over openings (CHOICES.md)


class Run:
    """One call of `find_scaling`; its steps are called in the order in which they stand here.

    Parameters
    ----------
    about : mapping
        Settings of the search, as `Found.about` keeps them.

    Attributes
    ----------
    answers : int
        Answers scored so far, a gradient counted as `gradient.PRICE` of them.
    """

    def __init__(
        self, lm: LM, parts: Mapping[str, Part], about: Mapping[str, Any], ledger: Ledger, bar: Progress
    ) -> None:
        self._lm, self._parts, self._about, self._ledger, self._bar = lm, parts, about, ledger, bar
        self._unscaled = LayerScaling.identity(lm.num_layers)
        self.answers = 0
        self._keys: set[str] = {self._unscaled.key}
        self._questions: set[str] = set()

    @property
    def evidence(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Everything that was measured: (fingerprint, scaling) of each candidate, and what was asked."""
        return [(self._lm.fingerprint, key) for key in sorted(self._keys)], sorted(self._questions)

    def measure_unscaled(self) -> None:
        """Outcomes of the validation contexts and texts with no scaling, and what the model writes freely."""
        self._unscaled_outcomes = self._score_tasks("validation", self._unscaled)
        self._unscaled_text = self._score_text("validation", self._unscaled)
        self._unscaled_repeats = self._measure_repeats(self._unscaled)

    def search(self) -> list[Scaling]:
        """The scaling at each stopping point, the last one first."""
        about, suites = self._about, [*self._parts["search"].tasks, self._parts["search"].text]
        weights = [1 / max(float(np.nanmean(o.nll)), 1e-6) for o in self._unscaled_outcomes] + [about["text_weight"]]
        tokens = [count_context_tokens(self._lm, suite, about["questions"]) for suite in suites]
        bar = self._bar.part(sum(tokens) / len(tokens) * GRADIENT / PRICE)
        searcher = GradientSearch(
            self._lm, suites, weights=weights,
            start=LayerScaling.uniform(1.0, self._lm.num_layers, _SCHEMES.get(about["space"], "ntk")),
            vary=about["space"], steps=about["steps"], rate=about["rate"], every=math.ceil(about["steps"] / STOPS),
            questions=about["questions"], ledger=self._ledger, seed=about["seed"], progress=bar,
        )  # fmt: skip
        stops: list[Scaling] = []
        while asked := searcher.ask():
            stops += asked
        self.answers += searcher.answers
        self._keys |= {scaling.key for scaling in searcher.visited}
        self._questions |= {*searcher.gradient_keys}
        return stops[:0:-1]  # without the start

    def choose(self, stops: Sequence[Scaling]) -> tuple[Scaling, pd.DataFrame]:
        """The largest dose within all limits at each stopping point; of those the one that gains most."""
        rows: list[dict[str, Any]] = []
        best: Scaling = self._unscaled
        most, at = 0.0, -1
        for number, stop in enumerate(stops):
            for dose, scaling, verdict in self._try_doses(stop):
                rows.append({"stop": len(stops) - number, "dose": dose} | verdict)
                if verdict["verdict"] == "admitted" and verdict["points"] > most:
                    best, most, at = scaling, verdict["points"], len(rows) - 1
        choices = pd.DataFrame(rows)
        choices["chosen"] = [number == at for number in range(len(choices))]
        return best, choices

    def test(self, scaling: Scaling) -> Judged:
        """The test contexts and texts, scored for no scaling and for the chosen one."""
        both = [self._unscaled, scaling]
        outcomes = [self._score_tasks("test", s) for s in both]
        text = {name: [self._score_text(name, s) for s in both] for name in ("search", "test")}
        part = self._parts["test"]
        repeats = [self._measure_repeats(s).mean(axis=-1) for s in both]
        return Judged(part.tasks, outcomes, text, part.kinds, repeats)

    def keep_seconds(self, seconds: float) -> float:
        """The seconds of the call when it was first made, from the ledger; `seconds` if that is now."""
        note = name_note("seconds", self._parts, self._about)
        self._keys.add(NOTES)
        self._questions.add(note)
        return float(keep_note(self._ledger, self._lm, note, lambda: round(seconds, 1)))

    def _try_doses(self, stop: Scaling) -> Iterator[tuple[float, Scaling, dict[str, Any]]]:
        """Doses of a stopping point that are worth a look, the largest first, and what validation says of each."""
        n_readable = self._count_readable_doses(stop)
        if not n_readable:
            dose = float(DOSES[0])
            yield dose, stop.at_dose(dose), {"verdict": "perplexity rises"}
        for dose in map(float, DOSES[:n_readable][::-1]):
            scaling = stop.at_dose(dose)
            verdict = self._compare_with_limits(scaling)
            yield dose, scaling, verdict
            if verdict["verdict"] in ("admitted", "gain within chance"):
                return  # a smaller dose would gain less

    def _count_readable_doses(self, stop: Scaling) -> int:
        """How many doses, from the smallest on, keep to the limit for text: found by halving."""
        low, high = 0, len(DOSES)  # doses below `low` keep to it; doses from `high` on don't
        while low < high:
            middle = (low + high + 1) // 2
            if self._reads_text_as_well(stop.at_dose(DOSES[middle - 1])):
                low = middle
            else:
                high = middle - 1
        return low

    def _compare_with_limits(self, scaling: Scaling) -> dict[str, Any]:
        """What a candidate gains on validation, and the first limit that it doesn't keep to."""
        gains, n_worse = [], 0
        for before, after in zip(self._unscaled_outcomes, self._score_tasks("validation", scaling), strict=True):
            gains.append(np.subtract(*(mean_over_questions(o.exact[0], o.depths) for o in (after, before))))
            fifths = np.subtract(*(by_fifth(o.exact[0], o.depths) for o in (after, before)))
            n_worse += sum(_is_loss(change[~np.isnan(change)]) for change in fifths.T)
        rise, error = self._measure_perplexity_rise(scaling)
        points = 100 * float(np.mean([gain.mean() for gain in gains]))
        measured = {"points": points, "perplexity %": 100 * rise, "and its error": 100 * error}
        if points <= 0 or not any(bootstrap_mean(gain).low > 0 for gain in gains):
            return measured | {"verdict": "gain within chance"}
        if n_worse:
            return measured | {"verdict": f"{n_worse} fifths of the depths worse"}
        # of greedy and drawn text, opening by opening
        near, trigrams = (self._measure_repeats(scaling) - self._unscaled_repeats).mean(axis=1)
        measured |= {"near repeats %": 100 * near.mean(), "trigrams seen before %": 100 * trigrams.mean()}
        loops = any(more.mean() > _LOOPS and bootstrap_mean(more).low > 0 for more in (near, trigrams))
        return measured | {"verdict": "free text repeats itself" if loops else "admitted"}

    def _reads_text_as_well(self, scaling: Scaling) -> bool:
        """Whether the rise of perplexity, its standard error added, is within the limit. Half of the stretches are
        enough if the rise is two standard errors away from it."""
        n, limit = len(self._unscaled_text), self._about["max_perplexity_rise"]
        rise, error = self._measure_perplexity_rise(scaling, n // 2 if n >= 8 else n)
        if abs(rise - limit) <= 2 * error:
            rise, error = self._measure_perplexity_rise(scaling)
        return bool(rise + error <= limit)

    def _measure_perplexity_rise(self, scaling: Scaling, n: int | None = None) -> tuple[float, float]:
        """By what share perplexity rises on the first n validation stretches, and its standard error."""
        change = self._score_text("validation", scaling, n) - self._unscaled_text[:n]
        return math.expm1(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)

    def _measure_repeats(self, scaling: Scaling) -> NDArray[np.float64]:
        """Near repeats and trigrams seen before in free text, shape (2, greedy and drawn, openings)."""
        seed = self._about["seed"]
        self._questions |= {*free_text.keys(seed)}
        tokens = free_text.continue_freely(self._lm, scaling, seed=seed, ledger=self._ledger)
        measured = np.array([free_text.near_repeats(tokens), 1 - free_text.distinct_trigrams(tokens)])
        return np.stack([measured[..., 0], measured[..., 1]], axis=1)  # a copy: means depend on the layout in memory

    def _score_tasks(self, part: str, scaling: Scaling) -> list[Outcomes]:
        outcomes = [self._score(suite, scaling) for suite in self._parts[part].tasks]
        self.answers += sum(int(suite.asked.sum()) for suite in self._parts[part].tasks)
        return outcomes

    def _score_text(self, part: str, scaling: Scaling, n: int | None = None) -> NDArray[np.float64]:
        """The nll of a part's stretches, or of the first n."""
        text = self._parts[part].text
        return self._score(replace(text, probes=text.probes[:n]), scaling).nll[0, :, 0]

    def _score(self, suite: Suite, scaling: Scaling) -> Outcomes:
        self._keys.add(scaling.key)
        self._questions |= {key for probe in suite.probes for key in probe.keys}
        bar = self._bar.part(count_context_tokens(self._lm, suite))
        return score(self._lm, suite, [scaling], ledger=self._ledger, progress=bar)


def _is_loss(change: NDArray[np.float64]) -> bool:
    """Whether contexts lost beyond their bootstrap interval (a permutation test of four can't be significant)."""
    return len(change) > 1 and bool(bootstrap_mean(change).high < 0)
