"""Searching for layer factors: the loop, and the paper's genetic algorithm over Bezier control points.

A searcher proposes scalings (`ask`) and is told what they are worth (`tell`). It is deterministic given its seed and
keeps nothing on disk: resuming a search is running it again, with the ledger answering for what was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_utils.bezier import BezierCurve
from lrs_utils.ledger import Ledger
from lrs_utils.metrics import chance_of_catching_up, utilisation, utilisation_over_depths
from lrs_utils.models import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling import LayerScaling
from lrs_utils.scoring import Kept, Outcomes, score
from lrs_utils.tasks import Suite

Fitness = tuple[float, ...]  # compared left to right, greater is better
Objective = Callable[[Outcomes], Sequence[Fitness]]


class Searcher(Protocol):
    """What `search` needs of a way to search. Racing needs a `rival` as well, see `GeneticSearch`."""

    def ask(self) -> list[LayerScaling]:
        """Propose candidates not proposed before; an empty list ends the search."""

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Report the worth of candidates from the last `ask` (the first of them only, where the budget ended)."""


def utilisation_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """The default objective: the paper's U over first, middle and last depth; equal U is decided by lower mean nll.

    U of a few contexts takes few values, so ties are common; nll, which is smooth, orders them (our choice).
    """
    u = utilisation(outcomes.exact, outcomes.depths)
    return list(zip(u.tolist(), (-outcomes.nll.mean(axis=(1, 2))).tolist(), strict=True))


def utilisation_over_depths_then_nll(outcomes: Outcomes) -> list[Fitness]:
    """U's weights spread over every depth asked, for suites that ask at all positions; ties as above."""
    u = utilisation_over_depths(outcomes.exact, outcomes.depths)
    return list(zip(u.tolist(), (-outcomes.nll.mean(axis=(1, 2))).tolist(), strict=True))


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
    recomputed : int
        Outcomes the model was run for; the others came from the ledger.
    layers_run, layers_alone : int
        Decoder layers computed, and how many it would have been with each candidate on its own (see `score`).
    """

    candidates: list[LayerScaling] = field(default_factory=list)
    fitness: list[Fitness] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    generation: list[int] = field(default_factory=list)
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
    suite: Suite,
    searcher: Searcher,
    *,
    budget: int,
    ledger: Ledger | None = None,
    objective: Objective = utilisation_then_nll,
    racing: float | None = None,
    batch_tokens: int | None = None,
) -> SearchResult:
    """Let a searcher spend `budget` candidates on a suite.

    With a ledger a search that was killed goes on where it was: run it again with the same arguments.

    Parameters
    ----------
    budget : int
        Candidates to evaluate; the last generation is cut to fit.
    objective : function of Outcomes
        Gives one fitness tuple a candidate, greater is better.
    racing : float, optional
        Stop a candidate after half or three quarters of the contexts if it is clearly worse than the searcher's
        `rival`. The number is the error rate: the chance that a candidate is stopped that would have ended as good
        (`chance_of_catching_up`, halved between the two looks). The objective's first number must be a mean over
        contexts. Without it every candidate sees every context: exactly the plain search.
    batch_tokens : int, optional
        As in `score`. Matrix products of another shape round differently on a GPU, and the nll may decide between
        candidates: fix it where two searches must agree to the last bit.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}; a search needs at least 1 candidate")
    if racing is not None:
        if not 0 < racing < 1:
            raise ValueError(f"racing is {racing}; it is an error rate, between 0 and 1")
        if not hasattr(searcher, "rival"):
            raise ValueError(f"{type(searcher).__name__} has no rival to race against; leave racing out")
        if len(suite.probes) < 4:
            raise ValueError(f"suite {suite.name} has {len(suite.probes)} contexts; racing needs at least 4")
    result, kept, number = SearchResult(), Kept(), 0
    worth: dict[LayerScaling, NDArray[np.float64]] = {}  # context by context, of candidates that saw them all
    with Progress(budget * len(suite.probes), "search").entered() as bar:

        def measured(candidates: Sequence[LayerScaling], first: int, end: int) -> Outcomes:
            part = replace(suite, probes=suite.probes[first:end])
            outcomes = score(lm, part, candidates, ledger=ledger, progress=bar, kept=kept, batch_tokens=batch_tokens)
            result.recomputed += outcomes.recomputed
            result.layers_run += outcomes.layers_run
            result.layers_alone += outcomes.layers_alone
            return outcomes

        while len(result.candidates) < budget and (asked := searcher.ask()):
            asked = asked[: budget - len(result.candidates)]
            told: list[Fitness] = [(-np.inf,)] * len(asked)
            seen = [len(suite.probes)] * len(asked)
            rival = None if racing is None else searcher.rival  # type: ignore[attr-defined]
            if racing is None or rival is None:
                alive, outcomes = list(range(len(asked))), measured(asked, 0, len(suite.probes))
            else:
                if rival not in worth:  # of an earlier search
                    worth[rival] = by_context(objective, measured([rival], 0, len(suite.probes)))[0]
                outcomes, seen = raced(measured, asked, worth[rival], objective, racing)
                alive = [c for c, n in enumerate(seen) if n == len(suite.probes)]
                bar.advance(sum(len(suite.probes) - n for n in seen))
            for c, fitness in zip(alive, objective(outcomes) if alive else (), strict=True):
                told[c] = tuple(fitness)
            if racing is not None and alive:
                each = by_context(objective, outcomes)
                if not np.allclose(each.mean(axis=1), [told[c][0] for c in alive]):
                    raise ValueError("the objective's first number is no mean over contexts, so it can't be raced")
                worth |= zip([asked[c] for c in alive], each, strict=True)
            searcher.tell(asked, told)
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
        What the rival is worth, context by context (`by_context`).
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


@dataclass(frozen=True)
class _Member:
    curve: BezierCurve
    scaling: LayerScaling
    fitness: Fitness


class GeneticSearch:
    """Genetic algorithm whose genomes are the control points of a cubic Bezier curve over depth.

    As 2503.04355 describes it, as far as that is known; where it is silent, as the co-author's LongRoPE (2402.13753,
    released code) does it: the first population is a flat curve and mutations of it; each generation keeps the best
    `parents` (elitist) and adds `mutations` of random parents and `crossovers` of two. A genome whose factors were seen
    before is not proposed again, also if its control points differ.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    first_layer : int
        Layers before it keep factor 1.
    bounds : (low, high)
        Of control values and factors. The paper's are (1, 2); a model that a factor above 1 hurts needs some below.
    step : float
        Grid of control values and factors.
    start : float, optional
        Height of the flat first curve; by default the middle of the bounds (the paper's 1.5).
    move_layers : bool
        Also search where along depth the two inner control points stand.
    population, parents, mutations, crossovers : int
        Sizes of the first population, of the elite, and of each generation's two kinds of children.
    p_gene : float
        Chance that a gene (one coordinate of a control point) is redrawn by mutation or visited by crossover.
    tries : int
        Attempts at a child that is new, before another way is taken.
    seed : int
    """

    def __init__(
        self,
        num_layers: int,
        *,
        first_layer: int = 0,
        bounds: tuple[float, float] = (1.0, 2.0),
        step: float = 0.1,
        start: float | None = None,
        move_layers: bool = True,
        population: int = 64,
        parents: int = 32,
        mutations: int = 16,
        crossovers: int = 16,
        p_gene: float = 0.3,
        tries: int = 20,
        seed: int = 0,
    ) -> None:
        low, high = bounds
        if not 0 < low < high:
            raise ValueError(f"bounds is {bounds}; factors need 0 < low < high")
        if num_layers - first_layer < 2:
            raise ValueError(f"first_layer {first_layer} leaves fewer than 2 of {num_layers} layers to scale")
        if not 2 <= parents <= population:
            raise ValueError(f"parents is {parents}; it must be from 2 to the population, {population}")
        self._grid = np.round(np.arange(round(low / step), round(high / step) + 1) * step, 10)
        self._grid = self._grid[(self._grid >= low) & (self._grid <= high)]
        start = float(self._grid[len(self._grid) // 2]) if start is None else start
        if not low <= start <= high:
            raise ValueError(f"start is {start}, outside the bounds {bounds}")
        self._num_layers, self._first_layer, self._bounds, self._step = num_layers, first_layer, bounds, step
        layers = np.linspace(first_layer, num_layers - 1, 4)
        if num_layers - first_layer >= 4:
            layers = np.round(layers)
        self._flat = BezierCurve(tuple(layers), (start,) * 4)
        self._move_layers = move_layers
        self._population, self._parents, self._mutations, self._crossovers = population, parents, mutations, crossovers
        self._p_gene, self._tries = p_gene, tries
        self._rng = np.random.default_rng(seed)
        self._seen: set[tuple[float, ...]] = set()
        self._curves: dict[tuple[float, ...], BezierCurve] = {}
        self._members: list[_Member] = []

    def ask(self) -> list[LayerScaling]:
        """The flat curve and its mutations first; then children of the fittest."""
        if not self._seen:
            children = [self._claim(self._flat)]
            children += [self._mutant(self._flat) for _ in range(self._population - 1)]
        else:
            children = [self._mutant(self._parent().curve) for _ in range(self._mutations)]
            children += [self._child() for _ in range(self._crossovers)]
        return [LayerScaling(factors) for factors in children if factors is not None]

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Keep the fittest `parents` of everything told so far."""
        self._members += [_Member(self._curves[c.factors], c, f) for c, f in zip(candidates, fitness, strict=True)]
        self._members.sort(key=lambda member: member.fitness, reverse=True)  # stable: of equals the elder stays
        del self._members[self._parents :]

    @property
    def rival(self) -> LayerScaling | None:
        """Whom a new candidate must beat to become a parent: the weakest one, or nobody while there is room."""
        return self._members[-1].scaling if len(self._members) == self._parents else None

    def curve(self, scaling: LayerScaling) -> BezierCurve:
        """The control points behind a scaling that this search proposed."""
        return self._curves[scaling.factors]

    def _claim(self, curve: BezierCurve) -> tuple[float, ...] | None:
        """The curve's factors, marked as seen; None where they were seen before."""
        factors = curve.factors(self._num_layers, self._first_layer, self._step, self._bounds)
        if factors in self._seen:
            return None
        self._seen.add(factors)
        self._curves[factors] = curve
        return factors

    def _parent(self) -> _Member:
        return self._members[self._rng.integers(len(self._members))]

    def _mutant(self, curve: BezierCurve) -> tuple[float, ...] | None:
        """Redraw genes, again and again on top of what was redrawn, until the factors are new."""
        layers, values = list(curve.layers), list(curve.values)
        for _ in range(self._tries):
            for k in range(4):
                if self._rng.random() < self._p_gene:
                    values[k] = float(self._rng.choice(self._grid))
                if self._move_layers and 0 < k < 3 and self._rng.random() < self._p_gene:
                    between = np.arange(np.floor(layers[k - 1]) + 1, layers[k + 1])
                    if len(between):
                        layers[k] = float(self._rng.choice(between))
            if (factors := self._claim(BezierCurve(layers, values))) is not None:
                return factors
        return None

    def _child(self) -> tuple[float, ...] | None:
        """Cross two parents: the better one, with genes of the other; the first that is new is taken."""
        if len(self._members) < 2:
            return self._mutant(self._members[0].curve)
        # members are sorted, so the smaller index is the fitter parent
        better, other = (self._members[i].curve for i in sorted(self._rng.choice(len(self._members), 2, replace=False)))
        for _ in range(self._tries):
            layers, values = list(better.layers), list(better.values)
            for k in range(4):
                for gene, theirs in ((layers, other.layers), (values, other.values)):
                    if self._rng.random() < self._p_gene and self._rng.random() < 0.5:
                        gene[k] = theirs[k]
                if layers == sorted(set(layers)) and (factors := self._claim(BezierCurve(layers, values))) is not None:
                    return factors
        return self._mutant(better)
