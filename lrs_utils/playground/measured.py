"""What has been measured of each scaling, on one suite."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lrs_utils.analysis.statistics import Interval, bootstrap_mean
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.rope import SCHEMES
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.tasks import Suite


@dataclass(frozen=True, eq=False)
class MeasuredScaling:
    """A scaling and its verdicts so far, by context, each of shape (questions,)."""

    scaling: Scaling
    exact: Mapping[int, NDArray[np.bool_]]

    @cached_property
    def accuracy(self) -> Interval:
        """Accuracy by depth; the interval has no width while only one context is measured."""
        verdicts = np.array(list(self.exact.values()), float)
        if len(verdicts) > 1:
            return bootstrap_mean(verdicts, resamples=1_000)
        return Interval(*[verdicts.mean(axis=0)] * 3)

    @property
    def mean(self) -> float:
        """Accuracy over all depths and all contexts measured."""
        return float(np.mean(list(self.exact.values())))


def read_measured(ledger: Ledger, fingerprint: str, suite: Suite) -> dict[str, MeasuredScaling]:
    """Every scaling that the ledger knows on at least one context of a suite, by key, oldest first."""
    verdicts = ledger.known(fingerprint, [key for probe in suite.probes for key in probe.keys])
    measured = {}
    for scaling_key, by_question in verdicts.items():
        exact = {
            context: np.array([by_question[question][0] for question in probe.keys])
            for context, probe in enumerate(suite.probes)
            if all(question in by_question for question in probe.keys)
        }
        if exact and scaling_key.partition("|")[0] in SCHEMES:  # other schemes read beyond the window
            of = HeadScaling if ";" in scaling_key else LayerScaling
            measured[scaling_key] = MeasuredScaling(of.from_key(scaling_key), exact)
    return measured
