"""The paper's genetic algorithm (2503.04355) over control points of curves, and random draws of the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lrs_utils.arguments import number, whole
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.searchers.curves import Fitness, Genome, Points, Space


class GeneticSearch:
    """Genetic algorithm whose genomes are control points of a curve over the layers.

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
        Attempts at a child that is new. After them a crossover becomes a mutation, and a mutation is left out.
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
        self._elite: list[tuple[Genome, Fitness]] = []  # the fittest first

    def ask(self) -> list[LayerScaling]:
        """The flat curve and its mutations first; then children of the fittest."""
        if not self._genomes:
            children = [self._claim(self.space.flat)]
            children += [self._mutate(self.space.flat) for _ in range(self._population - 1)]
        else:
            parents = (self._elite[self._rng.integers(len(self._elite))][0] for _ in range(self._mutations))
            children = [self._mutate(genome) for genome in parents]  # each drawn when it is mutated
            children += [self._cross() for _ in range(self._crossovers)]
        return [scaling for scaling in children if scaling is not None]

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Keep the fittest `parents` of everything told so far."""
        self._elite += zip([self._genomes[candidate] for candidate in candidates], fitness, strict=True)
        self._elite.sort(key=lambda member: member[1], reverse=True)  # stable: of equals the older stays
        del self._elite[self._parents :]

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

    def _mutate(self, genome: Genome) -> LayerScaling | None:
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
            if (scaling := self._claim(_make_genome(curves))) is not None:
                return scaling
        return None

    def _cross(self) -> LayerScaling | None:
        """Cross two parents: the better one, with genes of the other; the first that is new is taken."""
        if len(self._elite) < 2:
            return self._mutate(self._elite[0][0])
        # the elite is sorted, so the smaller index is the fitter parent
        two = sorted(self._rng.choice(len(self._elite), 2, replace=False))
        better, other = (self._elite[i][0] for i in two)
        for _ in range(self._tries):
            curves = [(list(points.layers), list(points.values)) for points in better]
            for c, k in ((c, k) for c, points in enumerate(better) for k in range(len(points.values))):
                for gene, theirs in zip(curves[c], (other[c].layers, other[c].values), strict=True):
                    if self._rng.random() < self._p_gene and self._rng.random() < 0.5:
                        gene[k] = theirs[k]
                in_order = all(layers == sorted(set(layers)) for layers, _ in curves)
                if in_order and (scaling := self._claim(_make_genome(curves))) is not None:
                    return scaling
        return self._mutate(better)


def _make_genome(curves: Sequence[tuple[list[float], list[float]]]) -> Genome:
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
        self.space, self._batch = Space(num_layers, **space), whole("batch", batch, least=1)
        self._rng = np.random.default_rng(seed)
        self._seen: set[LayerScaling] = set()

    def ask(self) -> list[LayerScaling]:
        """Candidates not proposed before; none where a hundred draws in a row find no new one."""
        asked: list[LayerScaling] = []
        misses, n_coordinates = 0, len(self.space.start_coordinates)
        while len(asked) < self._batch and misses < 100:
            genome = self.space.genome(self._rng.random(n_coordinates)) if self._seen else self.space.flat
            scaling = self.space.scaling(genome)
            if scaling in self._seen:
                misses += 1
            else:
                misses = 0
                self._seen.add(scaling)
                asked.append(scaling)
        return asked

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Nothing is learned."""
