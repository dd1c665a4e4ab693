"""The playground without its widget: one scaling that is changed in many ways, what is known of it, and the way back.

`Playground` needs neither browser nor kernel; `widget.show` puts it on the screen.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_utils.arguments import whole
from lrs_utils.models.load import LM
from lrs_utils.playground.comparison import Comparison
from lrs_utils.playground.history import History
from lrs_utils.playground.improving import SPACES, suite_to_learn, take_steps
from lrs_utils.playground.loading import Loaded, load_state, load_to_measure
from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.playground.prediction import FEWEST_SCALINGS, PREDICTED_SCHEME, is_predicted
from lrs_utils.playground.state import KINDS, Grid, State
from lrs_utils.playground.worker import Cancelled, Measurer
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.files import save_factors
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.products import n_heads
from lrs_utils.tasks import Suite

_SETTLE_SECONDS = 0.25  # after the last move of a slider or key; the release of a drag settles at once


class Playground(Measurer):
    """One scaling, which the user changes, and what is known of it.

    It comes from a curve (`move`, `use`), from a file (`load`), from single numbers (`set_number`) or from gradient
    steps (`improve`). After every change the running measurement is cancelled, and a new one begins in the background
    once nothing has changed for a quarter of a second; during a `drag` none begins, at its end at once. Whoever shows
    it subscribes.

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
        As in `BezierCurve.factors`; control points are kept on the same grid, single numbers on its steps.
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
        self.grid = Grid(lm.num_layers, n_heads(lm.model), bounds, step, first_layer)
        self._make_suite = make_suite
        self.presets = self.grid.make_presets() | dict(presets or {})
        self.state = State(self.unscaled, None, self.presets["no scaling"])
        self.switched_on: frozenset[str] = frozenset()
        self._history = History(self.state)
        self._dragged = self._improves = False
        self._loaded = Loaded("", self.state)  # the last file
        self.comparison: Comparison | None = None
        self.set_size(n_pairs, n_contexts)

    @property
    def scaling(self) -> LayerScaling | HeadScaling:
        """The scaling that is shown."""
        return self.state.scaling

    @property
    def curve(self) -> BezierCurve:
        """Whose control points are drawn."""
        return self.state.curve

    @property
    def scheme(self) -> str:
        """How factors enter the frequencies."""
        return self.state.layers.scheme

    @property
    def follows_curve(self) -> bool:
        """Whether the factors are those of the curve."""
        return self.state.layers.factors == self.grid.sample(self.curve)

    @property
    def preset(self) -> str:
        """The name of the preset that is shown, or nothing."""
        return next((name for name, curve in self.presets.items() if self._of_preset(curve) == self.state), "")

    @property
    def file(self) -> str:
        """The factor file that is shown, or nothing."""
        return self._loaded.name if self._loaded.state == self.state else ""

    @property
    def best(self) -> MeasuredScaling | None:
        """The one with the best mean accuracy of those measured on all contexts."""
        complete = [m for m in self.measured.values() if len(m.exact) == len(self.suite.probes)]
        return max(complete, key=lambda m: m.mean, default=None)

    @property
    def status(self) -> str:
        """The latest message since the last change, or else what is known of the scaling shown, in a line."""
        return self._message or self._describe_scaling()

    @property
    def can_undo(self) -> bool:
        """Whether `undo` would change anything."""
        return self._history.can_undo(self.state)

    @property
    def can_redo(self) -> bool:
        """Whether `redo` would change anything."""
        return self._history.can_redo

    def prediction(self) -> NDArray[np.float64] | None:
        """Accuracy by depth that the surrogate expects, or None while too little is known."""
        if self.surrogate is None or not is_predicted(self.scaling):
            return None
        return self.surrogate.predict(np.array(self.state.layers.factors))

    def move(self, point: int, layer: float, value: float) -> None:
        """Move a control point; it snaps to the grid, stays within bounds and between its neighbours."""
        self.use(self.grid.move(self.curve, point, layer, value))

    def use(self, curve: BezierCurve) -> None:
        """Let the factors follow this curve; all other numbers stay."""
        followed = self.state.with_numbers({"factors": self.grid.sample(curve)})
        self._change(replace(followed, curve=curve))

    def use_preset(self, name: str) -> None:
        """Start over from the curve of this name."""
        self._change(self._of_preset(self.presets[name]))

    def load(self, path: str | Path) -> None:
        """Show the scaling of a factor file, or of one that ships by its name.

        Raises
        ------
        OSError, ValueError
            Of `load_factors`, or of a scaling that doesn't fit the model; then nothing has changed.
        """
        self._loaded = load_state(path, self.lm, self.grid, self.state)
        self._change(self._loaded.state)

    def compare(self, first: str | Path, second: str | Path) -> None:
        """Measure two factor files side by side, in the background; the scaling shown stays.

        Raises
        ------
        OSError, ValueError
            Of `load_factors`, or of a scaling that doesn't fit the model.
        """
        scalings = load_to_measure(first, self.lm), load_to_measure(second, self.lm)
        with self._lock:
            self.comparison = Comparison((str(first), str(second)), scalings)
            self._begin(partial(self._measure, [*scalings, self.scaling]), delay=0.0)
            self._message = ""
        self._tell_listeners(moved=False)

    def end_comparison(self) -> None:
        """Show the best so far and predictions again."""
        self.comparison = None
        self._tell_listeners(moved=False)

    def set_number(self, name: str, value: float, layer: int, head: int | None = None) -> None:
        """Set one of `State.numbers`, of a layer or of a head; it snaps to the grid's steps."""
        rows = self.grid.set_number(self.state.numbers[name], value, layer, head)
        self._change(self.state.with_numbers({name: rows}))

    def edit(self, points: Sequence[Sequence[float]], numbers: Mapping[str, Any]) -> None:
        """Take over control points and `State.numbers` from an editor; factors that are None follow the curve."""
        curve = BezierCurve(*zip(*points, strict=True))
        factors = numbers["factors"] or self.grid.sample(curve)
        self._change(replace(self.state.with_numbers({**numbers, "factors": factors}), curve=curve))

    def switch(self, kind: str, on: bool) -> None:
        """Show numbers of one of `state.KINDS` to be edited, or take all of them away."""
        self.switched_on = self.switched_on | {kind} if on else self.switched_on - {kind}
        self._change(self.state if on else self.state.with_numbers(dict.fromkeys(KINDS[kind])))

    def is_shown(self, kind: str) -> bool:
        """Whether numbers of one of `state.KINDS` were switched on or are any but 1."""
        return kind in self.switched_on or any(self.state.numbers[name] is not None for name in KINDS[kind])

    def set_scheme(self, scheme: str) -> None:
        """Read the factors under another scheme."""
        self._change(replace(self.state, layers=replace(self.state.layers, scheme=scheme)))

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
        """Measure the scaling shown now, as far as it is not known."""
        with self._lock:
            self._remember_step()
            self._start(self.scaling, delay=0.0)
        self._tell_listeners(moved=False)

    def improve(self, vary: str = "both", n_steps: int = 20, *, rate: float = 0.05, n_contexts: int = 2) -> None:
        """Take gradient steps from the scaling shown, in the background; any change or `stop` ends them.

        Each step's scaling is shown, and measured on the first so many contexts; the last one on all. Steps follow the
        nll of other contexts than those measured, where there are any.

        Parameters
        ----------
        vary : str
            Which numbers are learned, a name of `improving.SPACES`.
        """
        if vary not in SPACES:
            raise ValueError(f"vary is {vary!r}; choose one of {', '.join(SPACES)}")
        whole("n_steps", n_steps, least=1)
        with self._lock:
            self._remember_step()
            self._begin(partial(self._improve, vary, n_steps, rate, n_contexts), delay=0.0)
            self._improves, self._message = True, "the first step"
        self._tell_listeners(moved=False)

    def undo(self) -> None:
        """Back to the scaling before the last change."""
        self._show_step(-1)

    def redo(self) -> None:
        """Forward again."""
        self._show_step(1)

    def save(self, path: str | Path) -> None:
        """Write the scaling, with its curve and what is known of it, as a factor file."""
        measured = self.measured.get(self.scaling.key)
        save_factors(
            path, self.scaling, model=self.lm.name, fingerprint=self.lm.fingerprint, suite=self.suite.recipe,
            curve=asdict(self.curve) if self.follows_curve else None,
            measured=None if measured is None else {"contexts": len(measured.exact), "accuracy": measured.mean},
            chosen="by hand, on the contexts it was measured on",
        )  # fmt: skip

    def show_status(self, line: str) -> None:
        """Show a line of status until the next change."""
        with self._lock:
            self._message = line
        self._tell_listeners(moved=False)

    def _improve(self, vary: str, n_steps: int, rate: float, n_contexts: int, over: threading.Event) -> None:
        suite = suite_to_learn(partial(self._make_suite, self.n_pairs), self.suite)
        where = "the same contexts" if suite is self.suite else "other contexts"
        with closing(take_steps(self.lm, suite, self.scaling, vary, n_steps, rate, self._ledger)) as steps:
            for step in steps:
                done = f"step {step.number} of {n_steps}, nll {step.nll:.3f} on {where}"
                with self._lock:
                    if over.is_set():
                        raise Cancelled
                    self.state, self._message = self.state.show(step.scaling), done
                self._tell_listeners(moved=True)
                self._measure([self.scaling], over, n_contexts, f"{done}; ")
        with self._lock:
            if not over.is_set():
                self._end_improving()
        self._measure([self.scaling], over)

    def _end_improving(self) -> None:
        """Make where the steps led a step to come back to."""
        if self._improves:
            self._improves = False
            self._remember_step()

    def _cancel(self) -> None:
        with self._lock:
            self._end_improving()
            super()._cancel()

    def _change(self, state: State) -> None:
        with self._lock:
            self._replace(state)
        self._tell_listeners(moved=True)

    def _replace(self, state: State) -> None:
        if state == self.state:
            return
        self._cancel()  # before: what is left may be a step to come back to
        self.state = state
        if not self._dragged:
            self._start(self.scaling, _SETTLE_SECONDS)
        self._message = ""

    def _remember_step(self) -> None:
        self._history.remember(self.state)

    def _show_step(self, by: int) -> None:
        with self._lock:
            self._replace(self._history.go(by, self.state))
        self._tell_listeners(moved=True)

    def _describe_scaling(self) -> str:
        measured, line = self.measured.get(self.scaling.key), "not measured yet"
        if measured is not None:
            done = f"{len(measured.exact)} of {len(self.suite.probes)} contexts"
            line = f"measured on {done}: {measured.mean:.3f} of all answers exact"
        if not is_predicted(self.scaling):
            line += f"; predictions are only for factors under {PREDICTED_SCHEME}"
        elif self.surrogate is None:
            line += f"; no prediction before {FEWEST_SCALINGS} scalings are known"
        return f"{line}. {self._loaded.caution}" if self._loaded.caution and self.file else line

    def _of_preset(self, curve: BezierCurve) -> State:
        return State(LayerScaling(self.grid.sample(curve), self.scheme), None, curve)
