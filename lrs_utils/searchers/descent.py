"""The search that follows the gradient of the nll downhill, in numbers of layers or heads (ours, not the paper's)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrs_utils.arguments import number, whole
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.packing import pack
from lrs_utils.searchers.curves import Fitness
from lrs_utils.searchers.gradient import PRICE, fits_at_once, gradient_key, nll_gradient, sum_key, sum_nll_gradient
from lrs_utils.searchers.learned import (
    LAYER_NUMBERS,
    SPACES,
    count_learned,
    layers_of,
    numbers_of,
    refuse_space,
    scaling_of,
)
from lrs_utils.tasks import Probe, Suite


class GradientSearch:
    """Adam on the logs of numbers of layers or heads, one context of each suite a step (ours, not the paper's).

    `search` gives it candidates to judge: the scaling after every few steps, so the stopping point is chosen by
    whatever objective and suite the search is told, which may differ from those followed downhill here.

    Parameters
    ----------
    lm : LM
    suites : Suite or sequence of Suite
        What the nll is taken of. Each context is drawn once before any is drawn a second time.
    weights : sequence of float, optional
        Of the suites' nll in their sum; 1 each by default.
    vary : str
        What is learned, a name of `learned.SPACES`: "factors" (or "pi_factors", the same here), "temperatures" or
        "both" (of layers), "head_temperatures", "head_gains" or "heads" (both), and so on.
    start : Scaling, optional
        No scaling by default. Its scheme (not "yarn") and extension are kept.
    steps : int
        The rate falls to 0 over them, as half a cosine.
    rate, temperature_rate : float
        Adam's, of the logs; that of temperatures of layers by itself.
    bounds : (low, high), optional
        Of factors (of layers, bands or heads); by default only that the longest context fits into the window, with a
        tenth to spare (not with `extrapolate`).
    every : int
        Steps between candidates.
    questions : int, optional
        At most so many questions of a context in a step, drawn again each time and spread over depth: a cheaper step.
    extrapolate : bool
        Allow contexts longer than the window.
    ledger : Ledger, optional
        Gradients found there are not computed again: a search that was killed resumes where it was.
    seed : int
        Of the order of contexts.
    progress : Progress, optional
        Advanced by `gradient.PRICE` for every context; without it each `ask` shows its own.
    """

    def __init__(
        self,
        lm: LM,
        suites: Suite | Sequence[Suite],
        *,
        weights: Sequence[float] | None = None,
        vary: str = "both",
        start: Scaling | None = None,
        steps: int = 60,
        rate: float = 0.02,
        temperature_rate: float = 0.02,
        bounds: tuple[float, float] | None = None,
        every: int = 10,
        questions: int | None = None,
        extrapolate: bool = False,
        ledger: Ledger | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        _refuse_bad(
            vary, bounds, steps=steps, every=every, questions=questions, rate=rate, temperature_rate=temperature_rate
        )
        self._suites = [suites] if isinstance(suites, Suite) else list(suites)
        self._weights = [1.0] * len(self._suites) if weights is None else list(weights)
        if len(self._weights) != len(self._suites):
            raise ValueError(f"weights has {len(self._weights)} values for {len(self._suites)} suites")
        self._lm, self._start = lm, LayerScaling.identity(lm.num_layers) if start is None else start
        self._bounds = _find_widest_bounds(lm, self._suites, self._start, extrapolate) if bounds is None else bounds
        self._extrapolate, self._progress, self._ledger = extrapolate, progress, ledger
        self._steps, self._every, self._questions = steps, every, questions
        self._choose_numbers(vary)
        refuse_space(lm, vary)
        rates = {"temperatures": temperature_rate}
        groups = [{"params": [row], "lr": rates.get(name, rate)} for name, row in self._logs.items()]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, steps)
        self._drawn = draw_steps(self._suites, questions, seed)
        self._start_asked = False
        self.nll: list[list[float]] = []  # of each step, suite by suite or their weighted sum
        self.gradients: list[NDArray[np.float64]] = []  # of each step, (rows, layers), and where it was taken
        self.visited: list[Scaling] = []
        self.gradient_keys: list[str] = []

    def _choose_numbers(self, vary: str) -> None:
        """Set the logs of what a space learns, what their exponentials multiply, and which gradient that takes."""
        self._numbers = tuple(name.removeprefix("=") for name in SPACES[vary])
        self._values = numbers_of(self._start, self._lm, self._numbers)
        if {*LAYER_NUMBERS} & {*self._numbers}:  # one gradient for all searches of layers
            self._numbers = (*LAYER_NUMBERS, *(name for name in self._numbers if name not in LAYER_NUMBERS))
        self._logs: dict[str, Tensor] = {}
        self._base: dict[str, Any] = {}
        for entry in SPACES[vary]:
            name = entry.removeprefix("=")
            if entry == name:
                self._base[name], values = 1.0, torch.tensor(self._values[name], dtype=torch.float32)
            else:  # the same multipliers for all heads of a layer
                self._base[name] = self._values[name]
                values = torch.ones(count_learned(entry, self._lm), self._lm.num_layers)
            self._logs[name] = values.log().requires_grad_()

    @property
    def answers(self) -> int:
        """What the steps so far cost, in answers scored."""
        asked = sum(min(suite.n_questions, self._questions or suite.n_questions) for suite in self._suites)
        return PRICE * len(self.nll) * asked

    @property
    def scaling(self) -> Scaling:
        """Where the search is."""
        values = {**self._values}
        for name, logs in self._logs.items():
            rows = np.array([[round(v, 5) for v in row] for row in logs.exp().tolist()])
            values[name] = self._base[name] * np.tile(rows, (len(values[name]) // len(rows), 1))
        return scaling_of(values, self._start, self._lm, self._numbers)

    def ask(self) -> list[Scaling]:
        """The start, then where the next few steps lead."""
        if not self._start_asked:
            self._start_asked = True
            return [self._start]
        left = min(self._every, self._steps - len(self.nll))
        bar = self._progress or Progress(left * len(self._suites) * PRICE, "gradient")
        with bar.shown():
            for _ in range(left):
                self._step(bar)
        return [self.scaling] if left else []

    def tell(self, candidates: Sequence[Scaling], fitness: Sequence[Fitness]) -> None:
        """Nothing: the next step doesn't depend on fitness."""

    def _step(self, bar: Progress) -> None:
        scaling, probes = self.scaling, next(self._drawn)
        losses, total = self._differentiate(probes, scaling, bar)
        by_number = np.split(total, np.cumsum([len(self._values[name]) for name in self._numbers])[:-1])
        for name, gradient in zip(self._numbers, by_number, strict=True):
            if (logs := self._logs.get(name)) is not None:
                of_heads = gradient.reshape(-1, *logs.shape)  # a log that heads share has the sum of theirs
                logs.grad = torch.tensor(of_heads.sum(0), dtype=logs.dtype)
        self._adam.step()
        self._cosine.step()
        for name, logs in self._logs.items():
            if name.endswith("factors") or name.startswith("bands_"):
                logs.data.clamp_(*map(math.log, self._bounds))
        self.visited.append(scaling)
        self.nll.append(losses)
        self.gradients.append(total)
        shown = ", ".join(f"{value:.3f}" for value in losses)
        bar.advance(0, f"step {len(self.nll)} of {self._steps}, nll {shown}")

    def _differentiate(
        self, probes: Sequence[Probe], scaling: Scaling, bar: Progress
    ) -> tuple[list[float], NDArray[np.float64]]:
        """Each suite's nll, or their weighted sum if all contexts are read at once, and the sum of the gradients."""
        layers = layers_of(scaling, self._lm)
        keys = [gradient_key(probe, layers.scheme, layers.combine, self._numbers) for probe in probes]
        options: dict[str, Any] = {"extrapolate": self._extrapolate, "ledger": self._ledger}
        if len(probes) > 1 and fits_at_once(self._lm, probes, scaling):
            self.gradient_keys.append(sum_key(keys, self._weights))
            nll, total = sum_nll_gradient(self._lm, probes, self._weights, scaling, self._numbers, **options)
            bar.advance(PRICE * len(probes))
            return [nll], total
        self.gradient_keys += keys
        losses, parts = [], []
        for weight, probe in zip(self._weights, probes, strict=True):
            nll, gradient = nll_gradient(self._lm, probe, scaling, self._numbers, **options)
            losses.append(nll)
            parts.append(weight * gradient)
            bar.advance(PRICE)
        return losses, np.sum(parts, axis=0)


def draw_steps(suites: Sequence[Suite], questions: int | None, seed: int) -> Iterator[list[Probe]]:
    """A context of each suite for every step, without end; each comes once before any comes a second time.

    Parameters
    ----------
    questions : int, optional
        At most so many questions of a context, drawn again each time, one from each stretch of depth.
    """
    rng = np.random.default_rng(seed)
    orders = [_shuffle_forever(rng.spawn(1)[0], len(suite.probes)) for suite in suites]
    question_rng = rng.spawn(1)[0]

    def draw_questions(probe: Probe) -> Probe:
        if questions is None or len(probe.questions) <= questions:
            return probe
        by_depth = sorted(range(len(probe.questions)), key=lambda q: probe.questions[q].position)
        some = [int(question_rng.choice(part)) for part in np.array_split(by_depth, questions)]
        return replace(probe, questions=tuple(probe.questions[q] for q in sorted(some)))

    while True:
        yield [draw_questions(suite.probes[next(order)]) for suite, order in zip(suites, orders, strict=True)]


def _shuffle_forever(rng: np.random.Generator, n: int) -> Iterator[int]:
    """Indices of n contexts: all of them in random order, again and again."""
    while True:
        yield from rng.permutation(n).tolist()


def _refuse_bad(
    vary: str, bounds: tuple[float, float] | None, *, steps: int, every: int, questions: int | None, **rates: float
) -> None:
    if vary not in SPACES:
        raise ValueError(f"vary is {vary!r}; choose one of {', '.join(SPACES)}")
    for name, value in (("steps", steps), ("every", every), ("questions", questions)):
        if value is not None:
            whole(name, value, least=1)
    for name, rate in rates.items():
        number(name, rate, above=0)
    if bounds is not None and not 0 < bounds[0] < bounds[1]:
        raise ValueError(f"bounds is {bounds}; factors need 0 < low < high")


def _find_widest_bounds(lm: LM, suites: Sequence[Suite], start: Scaling, extrapolate: bool) -> tuple[float, float]:
    """Bounds of factors that only keep the longest context within the window, and the start within them."""
    layers = layers_of(start, lm)
    rows = (*(layers.bands or ()), *((start.factors if isinstance(start, HeadScaling) else None) or ()))
    low, others = 0.0, [number for row in rows for number in row]
    if not extrapolate:
        longest = max(pack(lm, probe, "a context").longest for suite in suites for probe in suite.probes)
        reach = replace(layers, factors=(1.0,) * lm.num_layers, bands=None).reach
        low = 1.1 * longest / (lm.window * (reach if math.isfinite(reach) else 1.0))
    return min(max(low, 1e-3), *layers.factors, *others), math.inf
