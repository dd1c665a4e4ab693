"""Cubic Bezier curves over the layers: four control points that stand for all layer factors (arXiv 2503.04355).

B(t) = (1-t)^3 P0 + 3(1-t)^2 t P1 + 3(1-t) t^2 P2 + t^3 P3 with P_k = (layer, value). Whether the paper lets the
control points move along the layer axis is not known; both are possible here (CHOICES.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BPoly
from scipy.optimize import brentq


@dataclass(frozen=True)
class BezierCurve:
    """A cubic Bezier curve that maps layer to factor.

    Parameters
    ----------
    layers : 4 numbers, strictly increasing
        Where the control points stand on the layer axis. Increasing, so that x(t) is and every layer has one value.
    values : 4 numbers
        Their heights (factors).
    """

    layers: tuple[float, float, float, float]
    values: tuple[float, float, float, float]

    def __init__(self, layers: Sequence[float], values: Sequence[float]) -> None:
        for name, given in (("layers", layers), ("values", values)):
            points = tuple(float(p) for p in given)
            if len(points) != 4:
                raise ValueError(f"{name} has {len(points)} numbers; a cubic Bezier curve has 4 control points")
            if not all(map(math.isfinite, points)):
                raise ValueError(f"{name} is {points}; control points must be finite")
            object.__setattr__(self, name, points)
        if not all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError(
                f"control layers {self.layers} are not increasing; order them so that each is greater than the last"
            )

    def __call__(self, layer: "Sequence[float] | NDArray[np.float64 | np.int64]") -> NDArray[np.float64]:
        """Height of the curve over `layer` (shape (layers,)); beyond the end points it stays at their height."""
        t = np.array([self._parameter(float(at)) for at in layer])
        return np.asarray(BPoly(np.array(self.values)[:, None], [0.0, 1.0])(t))

    def _parameter(self, layer: float) -> float:
        """The t with x(t) = layer; unique, since x(t) increases when the control layers do."""
        a, b, c, d = self.layers
        if layer <= a or layer >= d:
            return float(layer >= d)
        k1, k2, k3 = 3 * (b - a), 3 * (c - 2 * b + a), d - 3 * c + 3 * b - a  # x(t) in powers of t
        if k2 == k3 == 0:  # evenly spaced: t is the normalised depth
            return (layer - a) / (d - a)
        return float(brentq(lambda t: ((k3 * t + k2) * t + k1) * t + a - layer, 0.0, 1.0, xtol=1e-14))

    def factors(
        self,
        num_layers: int,
        first_layer: int = 0,
        step: float | None = 0.1,
        bounds: tuple[float, float] | None = None,
    ) -> tuple[float, ...]:
        """Sample the curve at every layer.

        Parameters
        ----------
        num_layers : int
            Layers of the model.
        first_layer : int
            Layers before it get 1.0 (the paper scales the last 30 of 32 layers).
        step : float or None
            Round to multiples of it; None leaves the curve's own values.
        bounds : (low, high) or None
            Clip, to the multiples of `step` within them.

        Returns
        -------
        tuple of float, shape (num_layers,)
        """
        if not 0 <= first_layer < num_layers:
            raise ValueError(f"first_layer is {first_layer}; it must be from 0 to {num_layers - 1}")
        sampled = on_grid(self(np.arange(first_layer, num_layers)), step, bounds)
        return (1.0,) * first_layer + tuple(sampled.tolist())


def on_grid(values: NDArray[np.float64], step: float | None, bounds: tuple[float, float] | None) -> NDArray[np.float64]:
    """Round to multiples of `step` and clip to the multiples within `bounds`, as `BezierCurve.factors` does."""
    if step is not None:
        if not step > 0:
            raise ValueError(f"step is {step}; it must be positive, or None for no rounding")
        values = np.round(values / step)
    if bounds is not None:
        low, high = bounds
        if not low <= high:
            raise ValueError(f"bounds is {bounds}; give (low, high) with low <= high")
        if step is not None:  # in steps, and those within the bounds; 1e-9: 0.7 / 0.1 is 6.999999999999999
            low, high = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        values = np.clip(values, low, high)
    return values if step is None else np.round(values * step, 10)  # 10 digits: 1.2000000000000002 is 1.2
