"""What `search` needs of a searcher, and the space of curves over the layers that most of them search in.

A searcher proposes scalings (`ask`) and is told what they are worth (`tell`). It is deterministic given its seed and
keeps nothing on disk: resuming a search is running it again, with the ledger answering for what was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lrs_utils.arguments import number, whole
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.bezier import BezierCurve, on_grid
from lrs_utils.scaling.layers import LayerScaling

Fitness = tuple[float, ...]  # compared left to right, greater is better
Candidate = TypeVar("Candidate", bound=Scaling)  # what a searcher proposes
_N_POINTS = {"bezier": 4, "linear": 2, "step": 2, "uniform": 1}  # "free" has one for each layer
_EVEN = (1 / 3, 1 / 2)  # where inner control points stand evenly: each coordinate counts from the point before
_MOST_VALUES = 10_000  # of a control point's grid


class Searcher(Protocol[Candidate]):
    """What `search` needs of a searcher.

    One that asks the model itself counts its `answers`, see `GradientSearch`.
    """

    def ask(self) -> list[Candidate]:
        """Propose candidates not proposed before; an empty list ends the search."""

    def tell(self, candidates: Sequence[Candidate], fitness: Sequence[Fitness]) -> None:
        """Report the worth of candidates from the last `ask` (the first of them only, where the budget ended)."""


def varied(vary: str) -> list[int]:
    """Which of factors (0) and temperatures (1) a search varies."""
    rows = {"factors": [0], "temperatures": [1], "both": [0, 1]}
    if vary not in rows:
        raise ValueError(f"vary is {vary!r}; choose {', '.join(rows)}")
    return rows[vary]


@dataclass(frozen=True)
class Points:
    """Control points of one curve over the layers, by the layer they stand at and their height."""

    layers: tuple[float, ...]
    values: tuple[float, ...]


Genome = tuple[Points, ...]  # the curve of the factors, that of the temperatures, or both in this order


@dataclass(frozen=True)
class Space:
    """The scalings that a search may propose: a curve over the layers for factors, temperatures, or one for each.

    Parameters
    ----------
    num_layers : int
        Decoder layers of the model.
    shape : str
        "bezier": the paper's cubic curve, four control points. "linear": a straight line. "step": one value up to some
        layer, another from it on. "uniform": one value. "free": a value for each layer.
    vary : str
        "factors" (the paper's), "temperatures" or "both" (our extension, see `LayerScaling`).
    scheme : str
        How factors enter the frequencies, as in `LayerScaling`.
    make : function
        Makes a scaling of factors, scheme and temperatures: `partial(ExtendedScaling, extension=4)` for factors on top
        of a stretch of the whole model.
    first_layer : int
        Layers before it stay as they are.
    bounds, temperature_bounds : (low, high)
        Of control values and of what comes of them. The paper's factors are in (1, 2); a model that a factor above 1
        hurts needs some below.
    step : float
        Grid of both.
    start : float, optional
        Height of the flat first curve of factors; by default the middle of the bounds (the paper's 1.5). That of
        temperatures starts at 1.
    move_layers : bool
        Also search at which layers the inner control points stand.
    """

    num_layers: int
    _: KW_ONLY
    shape: str = "bezier"
    vary: str = "factors"
    scheme: str = "pi"
    make: Callable[..., LayerScaling] = LayerScaling
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
        """Whether the k-th control point of a curve may stand elsewhere."""
        enough_layers = self.num_layers - self.first_layer >= 4  # each of four points on a layer of its own
        return self.move_layers and enough_layers and (self.shape, k) in (("bezier", 1), ("bezier", 2), ("step", 1))

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
        """What a genome stands for."""
        curves = [self._sample(points, bounds) for points, bounds in zip(genome, self.curve_bounds, strict=True)]
        factors = (1.0,) * self.num_layers if self.vary == "temperatures" else curves[0]
        temperatures = None if self.vary == "factors" else curves[-1]
        return self.make(factors, self.scheme, temperatures)

    def _sample(self, points: Points, bounds: tuple[float, float]) -> tuple[float, ...]:
        layers = np.arange(self.first_layer, self.num_layers)
        if self.shape == "bezier":
            values = BezierCurve(points.layers, points.values)(layers)
        elif self.shape == "step":
            values = np.array(points.values)[np.searchsorted(points.layers, layers, side="right") - 1]
        else:
            values = np.interp(layers, points.layers, points.values)
        return (1.0,) * self.first_layer + tuple(on_grid(values, self.step, bounds).tolist())
