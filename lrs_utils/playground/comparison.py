"""Two saved scalings side by side: what each is worth, and their difference with an interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lrs_utils.analysis.statistics import Interval, bootstrap_mean
from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.scaling.base import Scaling


class Difference(NamedTuple):
    """How much more of the answers is exact under one scaling than under another, context by context."""

    by_depth: Interval
    mean: Interval  # over depths
    n_contexts: int


@dataclass(frozen=True)
class Comparison:
    """Two scalings by the names of their files."""

    names: tuple[str, str]
    scalings: tuple[Scaling, Scaling]

    def find(self, measured: Mapping[str, MeasuredScaling]) -> tuple[MeasuredScaling | None, MeasuredScaling | None]:
        """What is measured of both."""
        first, second = (measured.get(scaling.key) for scaling in self.scalings)
        return first, second


@lru_cache(maxsize=4)
def find_difference(first: MeasuredScaling, second: MeasuredScaling) -> Difference | None:
    """Of the first to the second, over contexts that both are measured on; None before there are two."""
    contexts = sorted(first.exact.keys() & second.exact.keys())
    if len(contexts) < 2:
        return None
    by_question = np.array([first.exact[at].astype(float) - second.exact[at] for at in contexts])
    return Difference(
        bootstrap_mean(by_question, resamples=1_000), bootstrap_mean(by_question.mean(axis=1)), len(contexts)
    )
