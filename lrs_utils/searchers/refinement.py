"""Steps of single layers from a scaling that was found: what no smooth curve can do."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from lrs_utils.arguments import number, whole
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.searchers.curves import Fitness, varied


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
        number("step", step, above=0)
        whole("moves", moves, least=1)
        self._moves = [*product(varied(vary), range(len(start.factors)), (1 + step, 1 / (1 + step)))]
        self._rng, self._at_once, self._best = np.random.default_rng(seed), moves, start
        self._together: LayerScaling | None = None
        self._asked: set[LayerScaling] = set()
        self._fitness: dict[LayerScaling, Fitness] = {}
        self._made_by: dict[LayerScaling, tuple[int, int, float]] = {}

    def ask(self) -> list[LayerScaling]:
        """The start; then single moves from the best, and the good ones of the last generation together."""
        if not self._asked:
            asked = [self._best]
        else:
            moves = [self._moves[i] for i in self._rng.permutation(len(self._moves))]
            self._made_by = {_move(self._best, [move]): move for move in moves}
            asked = [scaling for scaling in self._made_by if scaling not in self._asked][: self._at_once]
            if self._together is not None and self._together not in self._asked:
                asked = list(dict.fromkeys([self._together, *asked]))
        self._asked |= {*asked}
        return asked

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """Go on from the best; remember which moves were good."""
        self._fitness |= zip(candidates, fitness, strict=True)
        moved = [(self._made_by[c], self._fitness[c]) for c in candidates if c in self._made_by]
        good = [move for move, worth in moved if worth > self._fitness[self._best]]
        self._together = _move(self._best, good) if len(good) > 1 else None
        self._best = max(self._fitness, key=lambda scaling: self._fitness[scaling])  # of equals the first found


def _move(scaling: LayerScaling, moves: Sequence[tuple[int, int, float]]) -> LayerScaling:
    values = np.array([scaling.factors, scaling.temperatures or (1.0,) * len(scaling.factors)])
    for row, layer, change in moves:
        values[row, layer] = round(values[row, layer] * change, 6)
    return replace(scaling, factors=values[0].tolist(), temperatures=values[1].tolist())
