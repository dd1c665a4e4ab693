"""What a candidate is worth: functions of a suite's outcomes, or of one for each of several suites."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_utils.analysis.statistics import mean_over_questions, utilisation, utilisation_over_depths
from lrs_utils.scoring.outcomes import Outcomes
from lrs_utils.searchers.curves import Fitness

Objective = Callable[..., Sequence[Fitness]]  # of one Outcomes for each suite


def utilisation_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """The default objective: the paper's U over first, middle and last depth; equal U is decided by lower mean nll.

    U of a few contexts takes few values, so ties are common; nll, which is smooth, orders them (our choice).
    """
    return _then_nll(utilisation(outcomes.exact, outcomes.depths), outcomes)


def utilisation_over_depths_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """U's weights spread over every depth asked, for suites that ask at all positions; ties as above."""
    return _then_nll(utilisation_over_depths(outcomes.exact, outcomes.depths), outcomes)


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


def _mean(values: NDArray[np.float64], depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over what is asked, each context counting once: (candidates, contexts, questions) -> (candidates,)."""
    if depths.ndim == 1:
        # in one step: a mean of means differs in the last bit, and searches must replay
        return np.asarray(values.mean(axis=(1, 2)))
    return np.asarray(mean_over_questions(values, depths).mean(axis=1))
