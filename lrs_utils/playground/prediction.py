"""Predicted accuracy of curves that no one has measured, made from those that were.

Compared with the nearest measured curve and with the plain mean in data/results/predictions.csv.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.extension import ExtendedScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.rope import SCHEMES

PREDICTED_SCHEME = SCHEMES[0]
FEWEST_SCALINGS, MOST_SCALINGS = 8, 150  # that a prediction is made from
_SMOOTHINGS = (0.01, 0.1, 1.0, 10.0)


class Surrogate:
    """Predicts accuracy by depth, interpolated between measured scalings.

    Radial basis functions over the factors of all layers, with the smoothing whose leave-one-out error is smallest.

    Parameters
    ----------
    factors : array, shape (scalings, layers)
    accuracy : array, shape (scalings, questions)

    Attributes
    ----------
    error : float
        Root mean square error of a depth's accuracy when each scaling is predicted from the others.
    error_of_mean : float
        The same when the prediction is the mean of the others.
    """

    def __init__(self, factors: NDArray[np.float64], accuracy: NDArray[np.float64]) -> None:
        self._factors, self._accuracy = factors, accuracy
        errors = {smoothing: self._measure_error(smoothing) for smoothing in _SMOOTHINGS}
        smoothing = min(errors, key=errors.__getitem__)
        self.error = errors[smoothing]
        n = len(accuracy)
        self.error_of_mean = float(np.sqrt(np.mean(((accuracy - accuracy.mean(axis=0)) * n / (n - 1)) ** 2)))
        self._interpolate = self._fit(np.ones(n, bool), smoothing)

    def predict(self, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Accuracy by depth, between 0 and 1, of one scaling's factors, shape (layers,)."""
        return np.asarray(np.clip(self._interpolate(factors[None])[0], 0, 1))

    def _fit(self, used: NDArray[np.bool_], smoothing: float) -> RBFInterpolator:
        return RBFInterpolator(
            self._factors[used], self._accuracy[used], kernel="linear", smoothing=smoothing, degree=0
        )

    def _measure_error(self, smoothing: float) -> float:
        """Leave-one-out error with this smoothing."""
        all_but_one = ~np.eye(len(self._factors), dtype=bool)
        predicted = [self._fit(used, smoothing)(self._factors[~used])[0] for used in all_but_one]
        return float(np.sqrt(np.mean((predicted - self._accuracy) ** 2)))


def is_predicted(scaling: Scaling) -> bool:
    """Whether a scaling is of a kind that predictions are for: nothing but factors of the paper's scheme."""
    if not isinstance(scaling, LayerScaling) or isinstance(scaling, ExtendedScaling):
        return False
    return scaling.temperatures is None and scaling.scheme == PREDICTED_SCHEME


def collect_accuracies(
    measured: Iterable[MeasuredScaling], n_contexts: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factors (scalings, layers) and accuracy by depth (scalings, questions) that predictions are made from.

    Of the latest scalings of the paper's scheme that are measured on at least a quarter of the contexts.
    """
    usable = [m for m in measured if 4 * len(m.exact) >= n_contexts and is_predicted(m.scaling)][-MOST_SCALINGS:]
    factors = np.array([[setting.factor for setting in m.scaling.settings] for m in usable])
    return factors, np.array([np.mean(list(m.exact.values()), axis=0) for m in usable])


def fit_surrogate(measured: Iterable[MeasuredScaling], n_contexts: int) -> Surrogate | None:
    """A surrogate of what is measured, or None while that is too little."""
    factors, accuracy = collect_accuracies(measured, n_contexts)
    return Surrogate(factors, accuracy) if len(factors) >= FEWEST_SCALINGS else None
