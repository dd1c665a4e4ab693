"""The search: a searcher proposes scalings, the engine scores them, an objective rates them.

Killed at any moment, a search resumes when it is run again: searchers are deterministic given their seed,
and the ledger holds what was measured. Search methods are in `searchers` and `gradient`.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lrs_utils.analysis.statistics import (
    by_fifth,
    chance_of_catching_up,
    mean_over_questions,
    utilisation,
    utilisation_over_depths,
)
from lrs_utils.arguments import whole
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import Kept, Outcomes, score
from lrs_utils.searchers.gradient import GradientSearch
from lrs_utils.searchers.methods import (
    CmaEsSearch,
    Fitness,
    GeneticSearch,
    LinearSearch,
    RandomSearch,
    RefinementSearch,
    Searcher,
    TpeSearch,
)
from lrs_utils.tasks import Suite

__all__ = [
    "CmaEsSearch",
    "GeneticSearch",
    "GradientSearch",
    "LinearSearch",
    "RandomSearch",
    "RefinementSearch",
    "SearchResult",
    "Searcher",
    "TpeSearch",
    "accuracy_then_nll",
    "mixture",
    "search",
    "utilisation_over_depths_then_nll",
    "utilisation_then_nll",
    "worst_depth_then_nll",
]

Objective = Callable[..., Sequence[Fitness]]  # of one Outcomes for each suite


def utilisation_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """The default objective: the paper's U over first, middle and last depth; equal U is decided by lower mean nll.

    U of a few contexts takes few values, so ties are common; nll, which is smooth, orders them (our choice).
    """
    return _then_nll(utilisation(outcomes.exact, outcomes.depths), outcomes)


def utilisation_over_depths_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """U's weights spread over every depth asked, for suites that ask at all positions; ties as above."""
    return _then_nll(utilisation_over_depths(outcomes.exact, outcomes.depths), outcomes)


def accuracy_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """Mean accuracy over all depths asked, each context counting once; ties as above."""
    return _then_nll(_mean(outcomes.exact, outcomes.depths), outcomes)


def worst_depth_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """Accuracy at the depth where it is lowest; ties as above.

    Where contexts ask at different depths: in the fifth of depth where it is lowest, of those that any context asks in.
    """
    if outcomes.depths.ndim == 1:
        return _then_nll(outcomes.exact.mean(axis=1).min(axis=1), outcomes)
    fifths = by_fifth(outcomes.exact, outcomes.depths)
    asked = ~np.isnan(fifths).all(axis=(0, 1))
    return _then_nll(np.nanmean(fifths[..., asked], axis=1).min(axis=1), outcomes)


def mixture(*weights: float) -> Objective:
    """An objective over several suites: minus the weighted sum of their mean nll, one weight for each.

    `mixture(1)` is the mean nll of a single suite. Smooth, so a few contexts tell much.
    """

    def fitness(*outcomes: Outcomes) -> list[Fitness]:
        if len(outcomes) != len(weights):
            raise ValueError(f"mixture has {len(weights)} weights for {len(outcomes)} suites")
        parts = [weight * _mean(o.nll, o.depths) for weight, o in zip(weights, outcomes, strict=True)]
        return [(-float(value),) for value in np.asarray(sum(parts))]

    return fitness


def _then_nll(first: NDArray[np.float64], outcomes: Outcomes) -> list[Fitness]:
    return list(zip(first.tolist(), (-_mean(outcomes.nll, outcomes.depths)).tolist(), strict=True))


def _mean(values: NDArray[np.bool_] | NDArray[np.float64], depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over what is asked, each context counting once: (candidates, contexts, questions) -> (candidates,)."""
    if depths.ndim == 1:
        # in one step: a mean of means differs in the last bit, and searches must replay
        return np.asarray(values.mean(axis=(1, 2)))
    return np.asarray(mean_over_questions(values, depths).mean(axis=1))


@dataclass
class SearchResult:
    """How a search went, in the order of evaluation.

    Attributes
    ----------
    candidates : list of LayerScaling
    fitness : list of tuples
        (-inf,) where racing stopped a candidate.
    seen : list of int
        Contexts that each candidate saw: all, unless racing stopped it.
    generation : list of int
        The `ask` that each candidate came from.
    answers : list of int
        Answers scored up to and with each candidate, including those found in the ledger; a gradient counts as
        `gradient.PRICE`.
    recomputed : int
        Outcomes the model was run for; the others came from the ledger.
    layers_run, layers_alone : int
        Decoder layers computed, and how many it would have been with each candidate on its own (see `score`).
    """

    candidates: list[LayerScaling] = field(default_factory=list)
    fitness: list[Fitness] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    generation: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    recomputed: int = 0
    layers_run: int = 0
    layers_alone: int = 0

    @property
    def best(self) -> LayerScaling:
        """The fittest candidate; of equals the first found."""
        return self.candidates[self.fitness.index(max(self.fitness))]

    @property
    def best_so_far(self) -> NDArray[np.float64]:
        """First number of the best fitness after each evaluation, shape (candidates,)."""
        return np.maximum.accumulate([f[0] for f in self.fitness])


def search(
    lm: LM,
    suite: Suite | Sequence[Suite],
    searcher: Searcher,
    *,
    budget: int,
    ledger: Ledger | None = None,
    objective: Objective = utilisation_then_nll,
    racing: float | None = None,
    extrapolate: bool = False,
    batch_tokens: int | None = None,
    executor: Executor | None = None,
) -> SearchResult:
    """Let a searcher spend `budget` candidates on a suite, or on several.

    With a ledger a killed search resumes: run it again with the same arguments.

    Parameters
    ----------
    budget : int
        Candidates to evaluate; the last generation is cut to fit.
    objective : function of Outcomes, one for each suite
        Gives one fitness tuple a candidate, greater is better.
    racing : float, optional
        Stop a candidate after half or three quarters of the contexts if it is clearly worse than the searcher's
        `rival`. The number is the error rate: the chance that a candidate is stopped that would have ended as good
        (`chance_of_catching_up`, halved between the two looks). The objective's first number must be a mean over
        contexts. Without it every candidate sees every context: exactly the plain search.
    extrapolate : bool
        Allow prompts longer than the window, as in `score`.
    batch_tokens : int, optional
        As in `score`.
    executor : concurrent.futures.Executor, optional
        Runs the model elsewhere, see `score`; gradients are computed here.
    """
    suites = [suite] if isinstance(suite, Suite) else list(suite)
    whole("budget", budget, least=1)
    if not suites:
        raise ValueError("suite is an empty list; give at least one suite")
    if not isinstance(ledger, Ledger | None):
        raise ValueError(f"ledger is {ledger!r}; give a Ledger: Ledger({str(ledger)!r})")
    if len(suites) > 1 and objective is utilisation_then_nll:
        raise ValueError(
            f"there are {len(suites)} suites and the default objective takes the outcomes of one; give an objective of "
            f"{len(suites)} (`mixture`)"
        )
    if racing is not None:
        if not 0 < racing < 1:
            raise ValueError(f"racing is {racing}; it is an error rate, between 0 and 1")
        if not hasattr(searcher, "rival"):
            raise ValueError(f"{type(searcher).__name__} has no rival to race against; leave racing out")
        if len(suites) > 1:
            raise ValueError(f"there are {len(suites)} suites; racing needs a single one")
        if suites[0].depths.ndim == 2:
            raise ValueError(f"contexts of {suites[0].name} ask at different depths; leave racing out")
        if len(suites[0].probes) < 4:
            raise ValueError(f"suite {suites[0].name} has {len(suites[0].probes)} contexts; racing needs at least 4")
    result, kept, number, spent = SearchResult(), Kept(), 0, 0
    worth: dict[LayerScaling, NDArray[np.float64]] = {}  # context by context, of candidates that saw them all
    n_contexts, n_answers = sum(len(s.probes) for s in suites), sum(int(s.asked.sum()) for s in suites)
    with Progress(budget * n_contexts, "search").entered() as bar:

        def measured(candidates: Sequence[LayerScaling], first: int = 0, end: int | None = None) -> list[Outcomes]:
            return [measured_on(s, candidates, first, end) for s in suites]

        def measured_on(suite: Suite, candidates: Sequence[LayerScaling], first: int, end: int | None) -> Outcomes:
            outcomes = score(
                lm, replace(suite, probes=suite.probes[first:end]), candidates, ledger=ledger, progress=bar, kept=kept,
                extrapolate=extrapolate, batch_tokens=batch_tokens, executor=executor,
            )  # fmt: skip
            result.recomputed += outcomes.recomputed
            result.layers_run += outcomes.layers_run
            result.layers_alone += outcomes.layers_alone
            return outcomes

        while len(result.candidates) < budget and (asked := searcher.ask()):
            asked = asked[: budget - len(result.candidates)]
            told: list[Fitness] = [(-np.inf,)] * len(asked)
            seen = [n_contexts] * len(asked)
            rival = None if racing is None else searcher.rival  # type: ignore[attr-defined]
            if racing is None or rival is None:
                alive, outcomes = list(range(len(asked))), measured(asked)
            else:
                if rival not in worth:  # of an earlier search
                    worth[rival] = by_context(objective, measured([rival])[0])[0]
                one, seen = raced(lambda *part: measured(*part)[0], asked, worth[rival], objective, racing)
                outcomes, alive = [one], [c for c, n in enumerate(seen) if n == n_contexts]
                bar.advance(sum(n_contexts - n for n in seen))
            for c, fitness in zip(alive, objective(*outcomes) if alive else (), strict=True):
                told[c] = tuple(fitness)
                if any(math.isnan(value) for value in told[c]):
                    raise ValueError(f"the objective gave {told[c]} to {asked[c]}; candidates are compared by it")
            if racing is not None and alive:
                each = by_context(objective, outcomes[0])
                if not np.allclose(each.mean(axis=1), [told[c][0] for c in alive]):
                    raise ValueError("the objective's first number is no mean over contexts, so it can't be raced")
                worth |= zip([asked[c] for c in alive], each, strict=True)
            searcher.tell(asked, told)
            for n in seen:
                spent += n_answers * n // n_contexts
                result.answers.append(spent + getattr(searcher, "answers", 0))
            result.candidates += asked
            result.fitness += told
            result.seen += seen
            result.generation += [number] * len(asked)
            best = ", ".join(f"{value:.3f}" for value in max(result.fitness))
            bar.advance(0, f"generation {number}: {len(result.candidates)} candidates, best fitness {best}")
            number += 1
    return result


def raced(
    measured: Callable[[Sequence[LayerScaling], int, int], Outcomes],
    asked: Sequence[LayerScaling],
    rival: NDArray[np.float64],
    objective: Objective,
    error_rate: float,
) -> tuple[Outcomes, list[int]]:
    """One generation's race: outcomes of those that stay, and how many contexts each candidate saw.

    Parameters
    ----------
    measured : function (candidates, first, end) -> Outcomes
        Scores candidates on the contexts from `first` to before `end`.
    rival : float array, shape (contexts,)
        The rival's values, context by context (`by_context`).
    """
    n = len(rival)
    looks = [n // 2, n * 3 // 4]
    seen = np.full(len(asked), looks[0])
    outcomes = measured(asked, 0, looks[0])
    for end, following in pairwise([*looks, n]):
        behind = by_context(objective, outcomes) - rival[:end]
        stay = chance_of_catching_up(behind, n) >= error_rate / len(looks)
        alive = np.flatnonzero(seen == end)[stay]
        seen[alive] = following
        stage = measured([asked[c] for c in alive], end, following)
        exact = np.concatenate([outcomes.exact[stay], stage.exact], axis=1)
        outcomes = replace(outcomes, exact=exact, nll=np.concatenate([outcomes.nll[stay], stage.nll], axis=1))
        if not len(alive):
            break
    return outcomes, seen.tolist()


def by_context(objective: Objective, outcomes: Outcomes) -> NDArray[np.float64]:
    """The objective's first number of each context by itself, (candidates, contexts)."""
    contexts = range(outcomes.exact.shape[1])
    each = (objective(replace(outcomes, exact=outcomes.exact[:, [p]], nll=outcomes.nll[:, [p]])) for p in contexts)
    return np.array([[fitness[0] for fitness in column] for column in each]).reshape(len(contexts), -1).T
