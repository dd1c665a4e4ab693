"""Search methods: what to try next, given the fitness of earlier candidates.

The paper's genetic algorithm (2503.04355) and its rivals, all in the same space of curves over depth. A searcher
proposes scalings (`ask`) and is told their fitness (`tell`). It is deterministic given its seed and keeps nothing
on disk: resuming a search is running it again, with the ledger holding what was measured.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_utils.arguments import number, whole
from lrs_utils.scaling.bezier import BezierCurve, on_grid
from lrs_utils.scaling.layers import LayerScaling

Fitness = tuple[float, ...]  # compared left to right, greater is better
_N_POINTS = {"bezier": 4, "linear": 2, "step": 2, "uniform": 1}  # "free" has one for each layer
_EVEN = (1 / 3, 1 / 2)  # coordinates of inner control points that stand evenly


class Searcher(Protocol):
    """What `search` needs of a search method.

    Racing needs a `rival` as well, see `GeneticSearch`; a searcher that asks the model itself counts its `answers`, see
    `GradientSearch`.
    """

    def ask(self) -> list[LayerScaling]:
        """Propose candidates not proposed before; an empty list ends the search."""

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Report the fitness of candidates from the last `ask` (the first of them only, where the budget ended)."""


def varied(vary: str) -> list[int]:
    """Which of factors (0) and temperatures (1) a search varies."""
    rows = {"factors": [0], "temperatures": [1], "both": [0, 1]}
    if vary not in rows:
        raise ValueError(f"vary is {vary!r}; choose {', '.join(rows)}")
    return rows[vary]


@dataclass(frozen=True)
class Points:
    """Control points of one curve over depth, by the layer they stand at and their height."""

    layers: tuple[float, ...]
    values: tuple[float, ...]


Genome = tuple[Points, ...]  # the curve of the factors, that of the temperatures, or both in this order


_MOST_VALUES = 10_000  # of a control point's grid


@dataclass(frozen=True)
class Space:
    """The scalings that a search may propose: a curve over depth for the factors, the temperatures, or one for each.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    shape : str
        "bezier": the paper's cubic curve, four control points. "linear": a straight line. "step": one value up to some
        layer, another from it on. "uniform": one value. "free": a value for each layer.
    vary : str
        "factors" (the paper's), "temperatures" or "both" (our extension, see `LayerScaling`).
    scheme, extension, combine
        How factors enter the frequencies, and what they come on top of: as in `LayerScaling`.
    first_layer : int
        Layers before it are not scaled.
    bounds, temperature_bounds : (low, high)
        Of control values and of what comes of them. The paper's factors are in (1, 2); a model that a factor above 1
        hurts needs some below.
    step : float
        Grid of both.
    start : float, optional
        Height of the flat first curve of factors; by default the middle of the bounds (the paper's 1.5). That of
        temperatures starts at 1.
    move_layers : bool
        Also search where the inner control points are along depth.
    """

    num_layers: int
    _: KW_ONLY
    shape: str = "bezier"
    vary: str = "factors"
    scheme: str = "pi"
    extension: float = 1.0
    combine: str = "multiply"
    first_layer: int = 0
    bounds: tuple[float, float] = (1.0, 2.0)
    temperature_bounds: tuple[float, float] = (0.5, 2.0)
    step: float = 0.1
    start: float | None = None
    move_layers: bool = True

    def __post_init__(self) -> None:
        if self.shape not in (*_N_POINTS, "free"):
            raise ValueError(f"shape is {self.shape!r}; choose one of {', '.join(_N_POINTS)}, free")
        varied(self.vary)
        whole("num_layers", self.num_layers, least=2)
        whole("first_layer", self.first_layer, least=0)
        if self.num_layers - self.first_layer < 2:
            raise ValueError(f"first_layer {self.first_layer} leaves fewer than 2 of {self.num_layers} layers to scale")
        for name in ("bounds", "temperature_bounds"):
            low, high = (number(f"{name}[{i}]", bound, above=0) for i, bound in enumerate(getattr(self, name)))
            if low >= high:
                raise ValueError(f"{name} is {(low, high)}; factors and temperatures need 0 < low < high")
            number("step", self.step, least=(high - low) / _MOST_VALUES, most=round(high - low, 9))
        for start, (low, high) in zip(self.starts, self.curve_bounds, strict=True):
            if not low <= start <= high:
                raise ValueError(f"start is {start}, outside the bounds {(low, high)}")

    @property
    def curve_bounds(self) -> list[tuple[float, float]]:
        """Bounds of each curve."""
        return [(self.bounds, self.temperature_bounds)[row] for row in varied(self.vary)]

    @property
    def starts(self) -> list[float]:
        """Height of each flat first curve."""
        grid = self.grid(self.bounds)
        start = float(grid[len(grid) // 2]) if self.start is None else self.start
        return [(start, 1.0)[row] for row in varied(self.vary)]

    def grid(self, bounds: tuple[float, float]) -> NDArray[np.float64]:
        """Values that a control point may take."""
        low, high = bounds
        grid = np.round(np.arange(round(low / self.step), round(high / self.step) + 1) * self.step, 10)
        return np.asarray(grid[(grid >= low) & (grid <= high)])

    @property
    def flat(self) -> Genome:
        """Where a search starts."""
        first, last = self.first_layer, self.num_layers - 1
        n = _N_POINTS.get(self.shape, last - first + 1)
        layers = np.linspace(first, last, 3)[:2] if self.shape == "step" else np.linspace(first, last, n)
        if last - first >= 3:
            layers = np.round(layers)
        return tuple(Points(tuple(layers.tolist()), (start,) * n) for start in self.starts)

    def moves(self, k: int) -> bool:
        """Whether the k-th control point of a curve may move along depth."""
        room = self.num_layers - self.first_layer >= 4  # for four points on whole layers
        return self.move_layers and room and (self.shape, k) in (("bezier", 1), ("bezier", 2), ("step", 1))

    def between(self, layers: Sequence[float], k: int) -> NDArray[np.float64]:
        """Whole layers where the k-th control point may stand, between its neighbours."""
        after = layers[k + 1] if k + 1 < len(layers) else self.num_layers
        return np.arange(np.floor(layers[k - 1]) + 1, after)

    @property
    def start_coordinates(self) -> NDArray[np.float64]:
        """Coordinates of about the flat curve."""
        coordinates: list[float] = []
        for points, (low, high) in zip(self.flat, self.curve_bounds, strict=True):
            coordinates += [(value - low) / (high - low) for value in points.values]
            coordinates += [_EVEN[k - 1] for k in range(len(points.values)) if self.moves(k)]
        return np.array(coordinates)

    def genome(self, coordinates: Sequence[float] | NDArray[np.float64]) -> Genome:
        """Control points at coordinates from 0 to 1: first a curve's values, then the layers of those that move."""
        given, genome = iter(np.asarray(coordinates, float).tolist()), []
        for points, (low, high) in zip(self.flat, self.curve_bounds, strict=True):
            values = tuple(low + next(given) * (high - low) for _ in points.values)
            layers = list(points.layers)
            moving = [k for k in range(len(layers)) if self.moves(k)]
            for k in moving:
                below = layers[k - 1] + 1  # those that move later need a layer each as well
                above = (layers[-1] if self.shape == "bezier" else self.num_layers) - 1 - (moving[-1] - k)
                layers[k] = float(round(below + next(given) * max(above - below, 0)))
            genome.append(Points(tuple(layers), values))
        return tuple(genome)

    def scaling(self, genome: Genome) -> LayerScaling:
        """The scaling that a genome encodes."""
        curves = [self._sampled(points, bounds) for points, bounds in zip(genome, self.curve_bounds, strict=True)]
        factors = (1.0,) * self.num_layers if self.vary == "temperatures" else curves[0]
        temperatures = None if self.vary == "factors" else curves[-1]
        return LayerScaling(factors, self.scheme, temperatures, extension=self.extension, combine=self.combine)

    def _sampled(self, points: Points, bounds: tuple[float, float]) -> tuple[float, ...]:
        if self.shape == "bezier":
            return BezierCurve(points.layers, points.values).factors(
                self.num_layers, self.first_layer, self.step, bounds
            )
        layers = np.arange(self.first_layer, self.num_layers)
        if self.shape == "step":
            values = np.array(points.values)[np.searchsorted(points.layers, layers, side="right") - 1]
        else:
            values = np.interp(layers, points.layers, points.values)
        return (1.0,) * self.first_layer + tuple(on_grid(values, self.step, bounds).tolist())


@dataclass(frozen=True)
class _Member:
    genome: Genome
    scaling: LayerScaling
    fitness: Fitness


class GeneticSearch:
    """Genetic algorithm whose genomes are control points of a curve over depth.

    As 2503.04355 describes it, as far as that is known; where it is silent, as the co-author's LongRoPE (2402.13753,
    released code) does it: the first population is a flat curve and mutations of it; each generation keeps the best
    `parents` (elitist) and adds `mutations` of random parents and `crossovers` of two. A genome whose scaling was seen
    before is not proposed again, even if its control points differ.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    population, parents, mutations, crossovers : int
        Sizes of the first population, of the elite, and of each generation's two kinds of children.
    p_gene : float
        Chance that a gene (one coordinate of a control point) is redrawn by mutation or visited by crossover.
    tries : int
        Attempts at a child that is new, before another way is taken.
    seed : int
    space
        Everything else is `Space`'s. `shape="free"` leaves the Bezier constraint out.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        population: int = 64,
        parents: int = 32,
        mutations: int = 16,
        crossovers: int = 16,
        p_gene: float = 0.3,
        tries: int = 20,
        seed: int = 0,
        **space: Any,
    ) -> None:
        self.space = Space(num_layers, **space)
        whole("population", population, least=2)
        whole("parents", parents, least=2, most=population)
        for name, value in (("mutations", mutations), ("crossovers", crossovers)):
            whole(name, value, least=0)
        number("p_gene", p_gene, above=0, most=1)
        whole("tries", tries, least=1)
        self._grids = [self.space.grid(bounds) for bounds in self.space.curve_bounds]
        self._population, self._parents, self._mutations, self._crossovers = population, parents, mutations, crossovers
        self._p_gene, self._tries = p_gene, tries
        self._rng = np.random.default_rng(seed)
        self._genomes: dict[LayerScaling, Genome] = {}  # of everything ever proposed
        self._members: list[_Member] = []

    def ask(self) -> list[LayerScaling]:
        """The flat curve and its mutations first; then children of the fittest."""
        if not self._genomes:
            children = [self._claim(self.space.flat)]
            children += [self._mutant(self.space.flat) for _ in range(self._population - 1)]
        else:
            children = [self._mutant(self._parent().genome) for _ in range(self._mutations)]
            children += [self._child() for _ in range(self._crossovers)]
        return [scaling for scaling in children if scaling is not None]

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Keep the fittest `parents` of everything told so far."""
        self._members += [_Member(self._genomes[c], c, f) for c, f in zip(candidates, fitness, strict=True)]
        self._members.sort(key=lambda member: member.fitness, reverse=True)  # stable: of equals the older one stays
        del self._members[self._parents :]

    @property
    def rival(self) -> LayerScaling | None:
        """The parent that a new candidate must beat to become one: the weakest, or none while there is room."""
        return self._members[-1].scaling if len(self._members) == self._parents else None

    def curve(self, scaling: LayerScaling) -> BezierCurve:
        """The control points behind the factors of a scaling that this search proposed (shape "bezier")."""
        points = self._genomes[scaling][0]
        return BezierCurve(points.layers, points.values)

    def _claim(self, genome: Genome) -> LayerScaling | None:
        """The genome's scaling, marked as seen; None where it was seen before."""
        scaling = self.space.scaling(genome)
        if scaling in self._genomes:
            return None
        self._genomes[scaling] = genome
        return scaling

    def _parent(self) -> _Member:
        return self._members[self._rng.integers(len(self._members))]

    def _mutant(self, genome: Genome) -> LayerScaling | None:
        """Redraw genes, again and again on top of what was redrawn, until the scaling is new."""
        curves = [(list(points.layers), list(points.values)) for points in genome]
        for _ in range(self._tries):
            for (layers, values), grid in zip(curves, self._grids, strict=True):
                for k in range(len(values)):
                    if self._rng.random() < self._p_gene:
                        values[k] = float(self._rng.choice(grid))
                    if self.space.moves(k) and self._rng.random() < self._p_gene:
                        between = self.space.between(layers, k)
                        if len(between):
                            layers[k] = float(self._rng.choice(between))
            if (scaling := self._claim(_genome(curves))) is not None:
                return scaling
        return None

    def _child(self) -> LayerScaling | None:
        """Cross two parents: the better one, with genes of the other; the first that is new is taken."""
        if len(self._members) < 2:
            return self._mutant(self._members[0].genome)
        # members are sorted, so the smaller index is the fitter parent
        better, other = (
            self._members[i].genome for i in sorted(self._rng.choice(len(self._members), 2, replace=False))
        )
        for _ in range(self._tries):
            curves = [(list(points.layers), list(points.values)) for points in better]
            for c, k in ((c, k) for c, points in enumerate(better) for k in range(len(points.values))):
                for gene, theirs in zip(curves[c], (other[c].layers, other[c].values), strict=True):
                    if self._rng.random() < self._p_gene and self._rng.random() < 0.5:
                        gene[k] = theirs[k]
                in_order = all(layers == sorted(set(layers)) for layers, _ in curves)
                if in_order and (scaling := self._claim(_genome(curves))) is not None:
                    return scaling
        return self._mutant(better)


def _genome(curves: Sequence[tuple[list[float], list[float]]]) -> Genome:
    return tuple(Points(tuple(layers), tuple(values)) for layers, values in curves)


class RandomSearch:
    """Control points drawn at random, the flat curve first: what any search has to beat.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    batch : int
        Candidates that are proposed together.
    seed : int
    space
        Everything else is `Space`'s.
    """

    def __init__(self, num_layers: int, *, batch: int = 20, seed: int = 0, **space: Any) -> None:
        self.space, self._batch = Space(num_layers, **space), batch
        self._rng = np.random.default_rng(seed)
        self._seen: set[LayerScaling] = set()

    def ask(self) -> list[LayerScaling]:
        """Candidates not proposed before; none where a hundred draws in a row find no new one."""
        asked: list[LayerScaling] = []
        misses = 0
        while len(asked) < self._batch and misses < 100:
            scaling = self.space.scaling(self._drawn() if self._seen else self.space.flat)
            misses = misses + 1 if scaling in self._seen else 0
            if not misses:
                self._seen.add(scaling)
                asked.append(scaling)
        return asked

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Nothing is learned."""

    def _drawn(self) -> Genome:
        return self.space.genome(self._rng.random(len(self.space.start_coordinates)))


class CmaEsSearch:
    """Covariance matrix adaptation (Hansen; the package `cmaes`) over the coordinates of a space.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    sigma : float
        First spread, as a share of each coordinate's range.
    population : int, optional
        Candidates a generation; CMA-ES's own rule by default.
    seed : int
    space
        Everything else is `Space`'s.
    """

    def __init__(
        self, num_layers: int, *, sigma: float = 0.2, population: int | None = None, seed: int = 0, **space: Any
    ) -> None:
        import cmaes  # the extra `rivals`

        self.space = Space(num_layers, **space)
        start = self.space.start_coordinates
        if len(start) < 2:
            raise ValueError("CMA-ES needs two coordinates or more; for one value try RandomSearch")
        bounds = np.tile([0.0, 1.0], (len(start), 1))
        self._cma = cmaes.CMA(start, sigma, bounds=bounds, seed=seed, population_size=population)
        self._asked: list[tuple[LayerScaling, NDArray[np.float64]]] = []
        self._worth: dict[LayerScaling, Fitness] = {}

    def ask(self) -> list[LayerScaling]:
        """A generation; points that give the same scaling stand for one candidate. Seen ones aren't asked again."""
        for _ in range(100):  # generations of nothing new
            self._asked = []
            if not self._worth:
                self._asked.append((self.space.scaling(self.space.flat), self.space.start_coordinates))
            while len(self._asked) < self._cma.population_size:
                point = self._cma.ask()
                self._asked.append((self.space.scaling(self.space.genome(point)), point))
            new = [scaling for scaling in dict.fromkeys(s for s, _ in self._asked) if scaling not in self._worth]
            if new:
                return new
            self.tell([], [])
        return []

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """The generation's worth, by rank: the whole fitness tuple counts."""
        self._worth |= zip(candidates, fitness, strict=True)
        if any(scaling not in self._worth for scaling, _ in self._asked):
            return  # the budget ended within the generation
        ranks = sorted({self._worth[scaling] for scaling, _ in self._asked}, reverse=True)
        self._cma.tell([(point, float(ranks.index(self._worth[scaling]))) for scaling, point in self._asked])


class LinearSearch(CmaEsSearch):
    """Straight lines over depth, two numbers, found by CMA-ES: what a curve has to beat."""

    def __init__(self, num_layers: int, **options: Any) -> None:
        super().__init__(num_layers, shape="linear", **options)


class TpeSearch:
    """Tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's) over the coordinates of a space.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    batch : int
        Candidates that are proposed together; those of a batch are kept apart by counting the others as bad.
    seed : int
    space
        Everything else is `Space`'s.
    """

    def __init__(self, num_layers: int, *, batch: int = 5, seed: int = 0, **space: Any) -> None:
        import optuna  # the extra `rivals`

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self._batch = Space(num_layers, **space), batch
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler, direction="maximize")
        names = [f"x{i}" for i in range(len(self.space.start_coordinates))]
        self._range: Any = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        self._study.enqueue_trial(dict(zip(names, self.space.start_coordinates.tolist(), strict=True)))
        self._trials: dict[LayerScaling, list[Any]] = {}  # waiting to be told
        self._worth: dict[LayerScaling, float] = {}

    def ask(self) -> list[LayerScaling]:
        """A batch; points whose scaling was seen before are told at once."""
        for _ in range(100 * self._batch):
            if len(self._trials) == self._batch:
                break
            trial = self._study.ask(self._range)
            genome = self.space.genome(list(trial.params.values())) if self._worth or self._trials else self.space.flat
            scaling = self.space.scaling(genome)
            if scaling in self._worth:
                self._study.tell(trial, self._worth[scaling])
            else:
                self._trials.setdefault(scaling, []).append(trial)
        return list(self._trials)

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """The batch's worth, of which TPE uses the first number."""
        for scaling, worth in zip(candidates, fitness, strict=True):
            self._worth[scaling] = worth[0]
            for trial in self._trials.pop(scaling):
                self._study.tell(trial, worth[0])


class RefinementSearch:
    """From a scaling, steps of single layers that leave its curve: a smooth curve can't spare one layer alone.

    Each generation tries moves of single layers, drawn at random, from the best scaling so far, and all moves of the
    generation before that were better, made together. It ends when no move from the best is left untried.

    Parameters
    ----------
    start : LayerScaling
    step : float
        A move multiplies or divides one value by 1 + step.
    vary : str
        "factors", "temperatures" or "both".
    moves : int
        Tried in each generation.
    seed : int
    """

    def __init__(
        self, start: LayerScaling, *, step: float = 0.05, vary: str = "factors", moves: int = 10, seed: int = 0
    ) -> None:
        self._moves = [*product(varied(vary), range(len(start.factors)), (1 + step, 1 / (1 + step)))]
        self._rng, self._at_once, self._best = np.random.default_rng(seed), moves, start
        self._together: LayerScaling | None = None
        self._worth: dict[LayerScaling, Fitness | None] = {}  # None: asked
        self._made_by: dict[LayerScaling, tuple[int, int, float]] = {}

    def ask(self) -> list[LayerScaling]:
        """The start; then single moves from the best, and the good ones of the last generation together."""
        if not self._worth:
            asked = [self._best]
        else:
            moves = [self._moves[i] for i in self._rng.permutation(len(self._moves))]
            self._made_by = {_moved(self._best, [move]): move for move in moves}
            asked = [scaling for scaling in self._made_by if scaling not in self._worth][: self._at_once]
            if self._together is not None and self._together not in self._worth:
                asked = list(dict.fromkeys([self._together, *asked]))
        self._worth |= dict.fromkeys(asked)
        return asked

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Go on from the best; remember which moves were good."""
        self._worth |= zip(candidates, fitness, strict=True)
        before, told = self._best, {c: f for c, f in self._worth.items() if f is not None}
        good = [self._made_by[c] for c in candidates if c in self._made_by and told[c] > told[before]]
        self._together = _moved(before, good) if len(good) > 1 else None
        self._best = max(told, key=lambda scaling: told[scaling])


def _moved(scaling: LayerScaling, moves: Sequence[tuple[int, int, float]]) -> LayerScaling:
    values = np.array([scaling.factors, scaling.temperatures or (1.0,) * len(scaling.factors)])
    for row, layer, change in moves:
        values[row, layer] = round(values[row, layer] * change, 6)
    return replace(scaling, factors=values[0].tolist(), temperatures=values[1].tolist())
