"""The Bezier playground without its widget: a curve over depth, what is known of it, and the way back to earlier ones.

`Playground` needs neither browser nor kernel; `widget.show` puts it on the screen.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrs_utils.models.load import LM
from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.playground.prediction import FEWEST_SCALINGS, PREDICTED_SCHEME
from lrs_utils.playground.worker import Measurer
from lrs_utils.scaling.bezier import BezierCurve, on_grid
from lrs_utils.scaling.files import save_factors
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.rope import SCHEMES
from lrs_utils.tasks import Suite

_SETTLE_SECONDS = 0.25  # after the last move of a slider or key; the release of a drag settles at once


class Playground(Measurer):
    """A curve that the user moves, and what is known of the scaling that it stands for.

    After every change the running measurement is cancelled, and a new one begins in the background once nothing has
    changed for a quarter of a second; during a `drag` none begins, at its end at once. Whoever shows it subscribes.

    Parameters
    ----------
    lm : LM
        Not to be used by other code while something is measured; `stop` waits until it is free.
    make_suite : function (n_pairs, n_contexts) -> Suite
    n_pairs, n_contexts : int
        To begin with.
    ledger : str or Path
        The ledger's file: what is in it is not measured again, what is measured is added.
    presets : mapping of str to BezierCurve, optional
        Beside "no scaling", "uniform" and "decreasing, as in the paper".
    bounds, step, first_layer
        As in `BezierCurve.factors`; control points are kept on the same grid.
    """

    def __init__(
        self,
        lm: LM,
        make_suite: Callable[[int, int], Suite],
        n_pairs: int,
        n_contexts: int,
        *,
        ledger: str | Path,
        presets: Mapping[str, BezierCurve] | None = None,
        bounds: tuple[float, float] = (1.0, 2.0),
        step: float = 0.1,
        first_layer: int = 0,
    ) -> None:
        n_scaled = lm.num_layers - first_layer
        if n_scaled < 4:
            raise ValueError(
                f"{lm.name} has {n_scaled} layers to scale; four control points need 4, each a layer of its own"
            )
        super().__init__(lm, Path(ledger))
        self.bounds, self.step, self.first_layer = bounds, step, first_layer
        self._make_suite = make_suite
        self.presets = self._make_presets() | dict(presets or {})
        self.curve, self.scheme = self.presets["no scaling"], SCHEMES[0]
        self._steps, self._step_shown = [(self.curve, self.scheme)], 0  # those after it were undone
        self._dragged = False
        self.set_size(n_pairs, n_contexts)

    @property
    def scaling(self) -> LayerScaling:
        """The scaling that the curve stands for."""
        factors = self.curve.factors(self.lm.num_layers, self.first_layer, self.step, self.bounds)
        return LayerScaling(factors, self.scheme)

    @property
    def best(self) -> MeasuredScaling | None:
        """The one with the best mean accuracy of those measured on all contexts."""
        complete = [m for m in self.measured.values() if len(m.exact) == len(self.suite.probes)]
        return max(complete, key=lambda m: m.mean, default=None)

    @property
    def status(self) -> str:
        """The latest message since the last change, or else what is known of the present curve, in a line."""
        return self._message or self._describe_curve()

    @property
    def can_undo(self) -> bool:
        """Whether `undo` would change anything."""
        return self._step_shown > 0 or (self.curve, self.scheme) != self._steps[0]

    @property
    def can_redo(self) -> bool:
        """Whether `redo` would change anything."""
        return self._step_shown < len(self._steps) - 1

    def prediction(self) -> NDArray[np.float64] | None:
        """Accuracy by depth that the surrogate expects, or None while too little is known."""
        surrogate = self.surrogate
        if surrogate is None or self.scheme != PREDICTED_SCHEME:
            return None
        return surrogate.predict(np.array(self.scaling.factors))

    def move(self, point: int, layer: float, value: float) -> None:
        """Move a control point; it snaps to the grid, stays within bounds and between its neighbours."""
        layers, values = list(self.curve.layers), list(self.curve.values)
        low = layers[point - 1] + 1 if point else self.first_layer
        high = layers[point + 1] - 1 if point < 3 else self.lm.num_layers - 1
        layers[point], values[point] = float(np.clip(round(layer), low, high)), self._snap(value)
        self.use(BezierCurve(layers, values))

    def use(self, curve: BezierCurve) -> None:
        """Put this curve in place of the present one."""
        self._change(curve, self.scheme)

    def set_scheme(self, scheme: str) -> None:
        """Read the factors under another scheme."""
        LayerScaling(self.scaling.factors, scheme)  # refuses an unknown one
        self._change(self.curve, scheme)

    def set_size(self, n_pairs: int, n_contexts: int) -> None:
        """Ask other contexts; what the ledger knows of them is there at once."""
        self._set_suite(self._make_suite(n_pairs, n_contexts))
        with self._lock:
            self.n_pairs, self.n_contexts = n_pairs, n_contexts
            self._message = ""
        self._tell_listeners(moved=False)

    def drag(self, begins: bool) -> None:
        """Let a drag begin, during which nothing is measured, or end."""
        with self._lock:
            self._dragged = begins
            self._cancel()
        if begins:
            self._tell_listeners(moved=False)
        else:
            self.measure()

    def measure(self) -> None:
        """Measure the present curve now, as far as it is not known."""
        with self._lock:
            self._remember_step()
            self._start(self.scaling, delay=0.0)
        self._tell_listeners(moved=False)

    def undo(self) -> None:
        """Back to the curve before the last change."""
        self._show_step(-1)

    def redo(self) -> None:
        """Forward again."""
        self._show_step(1)

    def save(self, path: str | Path) -> None:
        """Write the factors, with the curve and what is known of them, as a factor file."""
        measured = self.measured.get(self.scaling.key)
        save_factors(
            path, self.scaling, model=self.lm.name, fingerprint=self.lm.fingerprint, suite=self.suite.recipe,
            curve=asdict(self.curve),
            measured=None if measured is None else {"contexts": len(measured.exact), "accuracy": measured.mean},
            chosen="by hand, on the contexts it was measured on",
        )  # fmt: skip

    def show_status(self, line: str) -> None:
        """Show a line of status until the next change."""
        with self._lock:
            self._message = line
        self._tell_listeners(moved=False)

    def _change(self, curve: BezierCurve, scheme: str) -> None:
        with self._lock:
            self._replace(curve, scheme)
        self._tell_listeners(moved=True)

    def _replace(self, curve: BezierCurve, scheme: str) -> None:
        if (curve, scheme) == (self.curve, self.scheme):
            return
        self.curve, self.scheme = curve, scheme
        self._cancel()
        if not self._dragged:
            self._start(self.scaling, _SETTLE_SECONDS)
        self._message = ""

    def _remember_step(self) -> None:
        """Make the present curve a step to come back to; steps that were undone are forgotten."""
        if self._steps[self._step_shown] != (self.curve, self.scheme):
            self._step_shown += 1
            self._steps[self._step_shown :] = [(self.curve, self.scheme)]

    def _show_step(self, by: int) -> None:
        """Move `by` steps along the history, as far as it goes."""
        with self._lock:
            self._remember_step()
            self._step_shown = min(max(self._step_shown + by, 0), len(self._steps) - 1)
            self._replace(*self._steps[self._step_shown])
        self._tell_listeners(moved=True)

    def _describe_curve(self) -> str:
        measured, line = self.measured.get(self.scaling.key), "not measured yet"
        if measured is not None:
            done = f"{len(measured.exact)} of {len(self.suite.probes)} contexts"
            line = f"measured on {done}: {measured.mean:.3f} of all answers exact"
        if self.scheme != PREDICTED_SCHEME:
            return f"{line}; predictions are for {PREDICTED_SCHEME} only"
        if self.surrogate is None:
            return f"{line}; no prediction before {FEWEST_SCALINGS} scalings are known"
        return line

    def _make_presets(self) -> dict[str, BezierCurve]:
        layers = np.linspace(self.first_layer, self.lm.num_layers - 1, 4).round().tolist()
        low, high = map(self._snap, self.bounds)
        strongest = max((low, high), key=lambda factor: abs(factor - 1))
        return {
            "no scaling": BezierCurve(layers, (1.0,) * 4),
            "uniform": BezierCurve(layers, (strongest,) * 4),
            "decreasing, as in the paper": BezierCurve(layers, (high, high, 1.0, 1.0)),
        }

    def _snap(self, value: float) -> float:
        return float(on_grid(np.array(value), self.step, self.bounds))
