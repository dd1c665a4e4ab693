"""The search: a searcher proposes scalings, the engine scores them, an objective rates them.

A search that was killed resumes where it was when it is run again: searchers are deterministic given their seed,
and the ledger answers for what was measured.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from lrs_utils.arguments import whole
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import Outcomes, score
from lrs_utils.scoring.trie import Shared
from lrs_utils.searchers.curves import Candidate, Fitness, Searcher
from lrs_utils.searchers.objectives import Objective, utilisation_then_nll
from lrs_utils.tasks import Suite


@dataclass
class SearchResult(Generic[Candidate]):
    """How a search went, in the order of evaluation.

    Attributes
    ----------
    candidates : list of LayerScaling or HeadScaling
    fitness : list of tuples
    generation : list of int
        The `ask` that each candidate came from.
    answers : list of int
        Answers scored up to and with each candidate, including those found in the ledger; a gradient counts as
        `gradient.PRICE`.
    recomputed : int
        Outcomes the model was run for; the others came from the ledger.
    """

    candidates: list[Candidate] = field(default_factory=list)
    fitness: list[Fitness] = field(default_factory=list)
    generation: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    recomputed: int = 0

    @property
    def best(self) -> Candidate:
        """The fittest candidate; of equals the first found."""
        return self.candidates[self.fitness.index(max(self.fitness))]

    @property
    def best_so_far(self) -> NDArray[np.float64]:
        """First number of the best fitness after each evaluation, shape (candidates,)."""
        return np.maximum.accumulate([f[0] for f in self.fitness])


def search(
    lm: LM,
    suite: Suite | Sequence[Suite],
    searcher: Searcher[Candidate],
    *,
    budget: int,
    ledger: Ledger | None = None,
    objective: Objective = utilisation_then_nll,
    extrapolate: bool = False,
    batch_tokens: int | None = None,
    executor: Executor | None = None,
) -> SearchResult[Candidate]:
    """Let a searcher spend `budget` candidates on a suite, or on several.

    With a ledger a killed search resumes: run it again with the same arguments.

    Parameters
    ----------
    budget : int
        Candidates to evaluate; the last generation is cut to fit.
    objective : function of Outcomes, one for each suite
        Gives one fitness tuple a candidate, greater is better.
    extrapolate : bool
        Allow prompts longer than the window, as in `score`.
    batch_tokens : int, optional
        As in `score`.
    executor : concurrent.futures.Executor, optional
        Runs the model elsewhere, see `score`; gradients are computed here.
    """
    suites = [suite] if isinstance(suite, Suite) else list(suite)
    _refuse_bad(suites, budget, ledger, objective)
    result, shared, generation = SearchResult[Candidate](), Shared(), 0
    answers_each = sum(int(s.asked.sum()) for s in suites)
    with Progress(budget * sum(len(s.probes) for s in suites), "search").shown() as bar:
        while len(result.candidates) < budget and (asked := searcher.ask()):
            asked = asked[: budget - len(result.candidates)]
            outcomes = [
                score(
                    lm, s, asked, ledger=ledger, progress=bar, shared=shared, extrapolate=extrapolate,
                    batch_tokens=batch_tokens, executor=executor,
                )
                for s in suites
            ]  # fmt: skip
            fitness = _rate(objective, outcomes, asked)
            searcher.tell(asked, fitness)
            before, own = len(result.candidates), getattr(searcher, "answers", 0)
            result.answers += [answers_each * (before + nth) + own for nth in range(1, len(asked) + 1)]
            result.candidates += asked
            result.fitness += fitness
            result.generation += [generation] * len(asked)
            result.recomputed += sum(o.recomputed for o in outcomes)
            best = ", ".join(f"{value:.3f}" for value in max(result.fitness))
            bar.advance(0, f"generation {generation}: {len(result.candidates)} candidates, best fitness {best}")
            generation += 1
    return result


def _refuse_bad(suites: Sequence[Suite], budget: int, ledger: Ledger | None, objective: Objective) -> None:
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


def _rate(objective: Objective, outcomes: Sequence[Outcomes], candidates: Sequence[Scaling]) -> list[Fitness]:
    """The fitness of each candidate; nan is refused, since it can't be compared."""
    rated = [tuple(fitness) for fitness in objective(*outcomes)]
    for candidate, fitness in zip(candidates, rated, strict=True):
        if any(map(math.isnan, fitness)):
            raise ValueError(f"the objective gave {fitness} to {candidate}; candidates are compared by it")
    return rated
