"""What the playground shows: one scaling in its parts, the curve whose control points are drawn, the grid of both."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.bezier import BezierCurve, on_grid
from lrs_utils.scaling.extension import ExtendedScaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling

KINDS = {"temperatures": ("temperatures",), "heads": ("head_temperatures", "head_gains")}  # that can be switched on
BAR_BOUNDS = (0.1, 10.0)  # of numbers that are set one by one; those of a file may lie outside


@dataclass(frozen=True)
class State:
    """A scaling in its parts.

    Attributes
    ----------
    layers : LayerScaling
    heads : HeadScaling or None
        Numbers of heads alone, without `layers`; None where all are 1.
    curve : BezierCurve
        Whose control points are drawn; `layers` need not follow it.
    """

    layers: LayerScaling
    heads: HeadScaling | None
    curve: BezierCurve

    def show(self, scaling: Scaling) -> "State":
        """The parts of any scaling within the window; the curve stays, and the scheme where no factor has one."""
        heads = scaling if isinstance(scaling, HeadScaling) else None
        unscaled = replace(self.layers, factors=(1.0,) * len(scaling.settings), temperatures=None)
        layers = scaling if heads is None else heads.layers or unscaled
        if not isinstance(layers, LayerScaling) or isinstance(layers, ExtendedScaling):
            raise ValueError("it reads beyond the window, which the playground does not show")
        if layers.bands is not None:
            raise ValueError("it has numbers for bands, which the playground does not show")
        if heads is not None and heads.factors is not None:
            raise ValueError("it has factors of heads, which the playground does not show")
        if heads is None:
            return State(layers, None, self.curve)
        return State(layers, _of_heads(layers, heads.temperatures, heads.gains, heads.mlp_gains), self.curve)

    @property
    def scaling(self) -> LayerScaling | HeadScaling:
        """All parts together."""
        if (heads := self.heads) is None:
            return self.layers
        return HeadScaling(heads.temperatures, heads.gains, mlp_gains=heads.mlp_gains, layers=self.layers)

    @property
    def numbers(self) -> dict[str, Any]:
        """What can be edited, by the names of `searchers.learned`: a row of layers, or layers by heads; None: all 1."""
        return {
            "factors": self.layers.factors,
            "temperatures": self.layers.temperatures,
            "head_temperatures": None if self.heads is None else self.heads.temperatures,
            "head_gains": None if self.heads is None else self.heads.gains,
        }

    def with_numbers(self, numbers: Mapping[str, Any]) -> "State":
        """The same with some of `numbers` in place of its own."""
        now = self.numbers | dict(numbers)
        layers = replace(self.layers, factors=now["factors"], temperatures=now["temperatures"])
        mlp_gains = None if self.heads is None else self.heads.mlp_gains
        return State(layers, _of_heads(layers, now["head_temperatures"], now["head_gains"], mlp_gains), self.curve)


def _of_heads(layers: LayerScaling, temperatures: Any, gains: Any, mlp_gains: Any) -> HeadScaling | None:
    unscaled = LayerScaling.identity(len(layers.factors))
    heads = HeadScaling(temperatures, gains, mlp_gains=mlp_gains, layers=unscaled)
    return None if heads.is_identity else heads


@dataclass(frozen=True)
class Grid:
    """Where control points and bars may stand.

    Attributes
    ----------
    num_layers, n_heads : int
        Of the model.
    bounds, step, first_layer
        As in `BezierCurve.factors`.
    """

    num_layers: int
    n_heads: int
    bounds: tuple[float, float]
    step: float
    first_layer: int

    def sample(self, curve: BezierCurve) -> tuple[float, ...]:
        """A curve's factors."""
        return curve.factors(self.num_layers, self.first_layer, self.step, self.bounds)

    def snap(self, value: float, bounds: tuple[float, float] | None = None) -> float:
        """The nearest number of the grid, within the bounds of control points by default."""
        return float(on_grid(np.array(value), self.step, bounds or self.bounds))

    def move(self, curve: BezierCurve, point: int, layer: float, value: float) -> BezierCurve:
        """A curve with one control point moved, on the grid, within bounds and between its neighbours."""
        layers, values = list(curve.layers), list(curve.values)
        low = layers[point - 1] + 1 if point else self.first_layer
        high = layers[point + 1] - 1 if point < 3 else self.num_layers - 1
        layers[point], values[point] = float(np.clip(round(layer), low, high)), self.snap(value)
        return BezierCurve(layers, values)

    def set_number(self, rows: Any, value: float, layer: int, head: int | None) -> list[Any]:
        """Rows of `State.numbers` with one number set, on the grid."""
        shape = (self.num_layers,) if head is None else (self.num_layers, self.n_heads)
        changed = np.ones(shape) if rows is None else np.array(rows, float)
        changed[layer if head is None else (layer, head)] = self.snap(value, BAR_BOUNDS)
        return list(changed.tolist())

    def refuse_misfit(self, state: State) -> None:
        """Raise the ValueError of a scaling of another number of layers or heads than the model's."""
        rows = [state.heads.temperatures, state.heads.gains] if state.heads is not None else []
        n_layers, n_heads = len(state.layers.factors), {len(row[0]) for row in rows if row is not None}
        if n_layers != self.num_layers:
            raise ValueError(f"it is of {n_layers} layers, and this model has {self.num_layers}")
        if any(width > self.n_heads and width % self.n_heads == 0 for width in n_heads):
            raise ValueError("it has numbers of pairs or channels, which the playground does not show, but can compare")
        if n_heads - {self.n_heads}:
            raise ValueError(f"it is of {n_heads.pop()} heads a layer, and this model has {self.n_heads}")

    def make_presets(self) -> dict[str, BezierCurve]:
        """Curves to begin with."""
        layers = np.linspace(self.first_layer, self.num_layers - 1, 4).round().tolist()
        low, high = map(self.snap, self.bounds)
        strongest = max((low, high), key=lambda factor: abs(factor - 1))
        return {
            "no scaling": BezierCurve(layers, (1.0,) * 4),
            "uniform": BezierCurve(layers, (strongest,) * 4),
            "decreasing, as in the paper": BezierCurve(layers, (high, high, 1.0, 1.0)),
        }
