"""What the paper's algorithm is compared with, in the same space of curves: CMA-ES, straight lines, TPE."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_utils.arguments import whole
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.searchers.curves import Fitness, Space


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
        self._fitness: dict[LayerScaling, Fitness] = {}

    def ask(self) -> list[LayerScaling]:
        """A generation; points that give the same scaling stand for one candidate. Seen ones aren't asked again."""
        for _ in range(100):  # generations of nothing new
            self._asked = []
            if not self._fitness:
                self._asked.append((self.space.scaling(self.space.flat), self.space.start_coordinates))
            while len(self._asked) < self._cma.population_size:
                point = self._cma.ask()
                self._asked.append((self.space.scaling(self.space.genome(point)), point))
            new = [scaling for scaling in dict.fromkeys(s for s, _ in self._asked) if scaling not in self._fitness]
            if new:
                return new
            self.tell([], [])
        return []

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """The generation's fitness, by rank: the whole fitness tuple counts."""
        self._fitness |= zip(candidates, fitness, strict=True)
        if any(scaling not in self._fitness for scaling, _ in self._asked):
            return  # the budget ended within the generation
        ranks = sorted({self._fitness[scaling] for scaling, _ in self._asked}, reverse=True)
        self._cma.tell([(point, float(ranks.index(self._fitness[scaling]))) for scaling, point in self._asked])


class LinearSearch(CmaEsSearch):
    """Straight lines over the layers, two numbers, found by CMA-ES: what a curve has to beat."""

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
        self.space, self._batch = Space(num_layers, **space), whole("batch", batch, least=1)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler, direction="maximize")
        names = [f"x{i}" for i in range(len(self.space.start_coordinates))]
        self._range: Any = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        self._study.enqueue_trial(dict(zip(names, self.space.start_coordinates.tolist(), strict=True)))
        self._trials: dict[LayerScaling, list[Any]] = {}  # waiting to be told
        self._fitness: dict[LayerScaling, float] = {}

    def ask(self) -> list[LayerScaling]:
        """A batch; points whose scaling was seen before are told at once."""
        for _ in range(100 * self._batch):
            if len(self._trials) == self._batch:
                break
            trial = self._study.ask(self._range)
            genome = (
                self.space.genome(list(trial.params.values())) if self._fitness or self._trials else self.space.flat
            )
            scaling = self.space.scaling(genome)
            if scaling in self._fitness:
                self._study.tell(trial, self._fitness[scaling])
            else:
                self._trials.setdefault(scaling, []).append(trial)
        return list(self._trials)

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """The batch's fitness, of which TPE uses the first number."""
        for scaling, (first, *_) in zip(candidates, fitness, strict=True):
            self._fitness[scaling] = first
            for trial in self._trials.pop(scaling):
                self._study.tell(trial, first)
