"""Gradient steps from where the playground stands, one at a time."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lrs_utils.models.load import LM
from lrs_utils.progress import SilentProgress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.searchers.descent import GradientSearch
from lrs_utils.tasks import Suite

SPACES = ("both", "factors", "temperatures", "heads", "head_temperatures", "head_gains")  # those that are drawn


class Step(NamedTuple):
    """Where a step led, and the nll where it was taken."""

    number: int
    nll: float
    scaling: Scaling


def take_steps(
    lm: LM, suite: Suite, start: Scaling, vary: str, n_steps: int, rate: float, ledger: Path
) -> Generator[Step, None, None]:
    """Steps of a `GradientSearch`, each computed when it is asked for."""
    with Ledger(ledger) as known:
        search = GradientSearch(
            lm, suite, vary=vary, start=start, steps=n_steps, rate=rate, temperature_rate=rate, every=1, ledger=known,
            progress=SilentProgress(),
        )  # fmt: skip
        search.ask()  # the start
        while stepped := search.ask():
            yield Step(len(search.nll), search.nll[-1][0], stepped[0])


def suite_to_learn(make_suite: Callable[[int], Suite], measured: Suite) -> Suite:
    """As many contexts again, none of them measured; those measured where there are no others."""
    known = {probe.keys for probe in measured.probes}
    suite = make_suite(2 * len(measured.probes))
    others = tuple(probe for probe in suite.probes if probe.keys not in known)
    return replace(suite, probes=others) if others else measured
