"""The Bezier playground: drag a curve over depth, watch layer factors and accuracy by depth respond.

`Playground` is the model behind the widget, a plain class that needs neither browser nor kernel; `show` puts it on the
screen. What is drawn while dragging is drawn by the browser (`playground.js`); what is measured is measured here, in
the background, context by context, and filed in the ledger.
"""

import html
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import anywidget
import ipywidgets
import numpy as np
import traitlets
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from lrs_utils.analysis.statistics import Interval, bootstrap_mean
from lrs_utils.models.load import LM, used_alone
from lrs_utils.progress import Progress
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.files import save_factors
from lrs_utils.scaling.layers import LayerScaling, reachable_decoder
from lrs_utils.scaling.rope import SCHEMES
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import Kept, score
from lrs_utils.tasks import Suite

_model_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()  # one measures at a time
_latest: WeakKeyDictionary[Any, "weakref.ref[Playground]"] = WeakKeyDictionary()  # of each model

_SETTLE_SECONDS = 0.25  # after the last move of a slider or key; the release of a drag settles at once
_FEWEST_SCALINGS, _MOST_SCALINGS = 8, 150  # that a prediction is made from


@dataclass(frozen=True)
class Measured:
    """What is known of a scaling so far: verdicts by context, each of shape (questions,)."""

    scaling: LayerScaling
    exact: Mapping[int, NDArray[np.bool_]]

    @cached_property
    def accuracy(self) -> Interval:
        """By depth; without width as long as one context is known."""
        values = np.array(list(self.exact.values()), float)
        if len(values) > 1:
            return bootstrap_mean(values, resamples=1_000)
        return Interval(*[values.mean(axis=0)] * 3)

    @property
    def mean(self) -> float:
        """Accuracy over all depths and contexts known."""
        return float(np.mean(list(self.exact.values())))


class Surrogate:
    """Accuracy by depth of scalings never measured, interpolated between those that were.

    Radial basis functions over the factors of all layers, smoothed as far as leave-one-out error asks for.

    Parameters
    ----------
    factors : array, shape (scalings, layers)
    accuracy : array, shape (scalings, questions)

    Attributes
    ----------
    error : float
        Root mean square error of a depth's accuracy when each scaling is predicted from the others.
    error_of_mean : float
        The same of predicting nothing but the mean of the others.
    """

    def __init__(self, factors: NDArray[np.float64], accuracy: NDArray[np.float64]) -> None:
        self._factors, self._accuracy = factors, accuracy
        errors = {smoothing: self._left_out(smoothing) for smoothing in (0.01, 0.1, 1.0, 10.0)}
        smoothing = min(errors, key=errors.__getitem__)
        self.error = errors[smoothing]
        n = len(accuracy)
        self.error_of_mean = float(np.sqrt(np.mean(((accuracy - accuracy.mean(axis=0)) * n / (n - 1)) ** 2)))
        self._fitted = self._fit(np.ones(n, bool), smoothing)

    def __call__(self, scaling: LayerScaling) -> NDArray[np.float64]:
        """Predicted accuracy by depth, between 0 and 1."""
        return np.asarray(np.clip(self._fitted(np.array([scaling.factors]))[0], 0, 1))

    def _fit(self, of: NDArray[np.bool_], smoothing: float) -> RBFInterpolator:
        return RBFInterpolator(self._factors[of], self._accuracy[of], kernel="linear", smoothing=smoothing, degree=0)

    def _left_out(self, smoothing: float) -> float:
        others = ~np.eye(len(self._factors), dtype=bool)
        predicted = [self._fit(of, smoothing)(self._factors[~of])[0] for of in others]
        return float(np.sqrt(np.mean((predicted - self._accuracy) ** 2)))


def _fitted(measured: Mapping[str, Measured], suite: Suite) -> Surrogate | None:
    """From the latest scalings of the paper's scheme that are known on a quarter of the contexts."""
    known = [
        m for m in measured.values()
        if 4 * len(m.exact) >= len(suite.probes) and m.scaling.temperatures is None and m.scaling.scheme == SCHEMES[0]
    ][-_MOST_SCALINGS:]  # fmt: skip
    if len(known) < _FEWEST_SCALINGS:
        return None
    factors = np.array([m.scaling.factors for m in known])
    return Surrogate(factors, np.array([np.mean(list(m.exact.values()), axis=0) for m in known]))


def explained(error: BaseException) -> str:
    """An error in one line, with the notes added to it."""
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


class _Measurement:
    """One run of the measuring thread; at first one that is over."""

    def __init__(self) -> None:
        self.stop, self.over = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.over.set()


class Playground:
    """A curve under the user's hands, and what is known of the scaling that it stands for.

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
        if lm.num_layers - first_layer < 4:
            scaled = lm.num_layers - first_layer
            raise ValueError(
                f"{lm.name} has {scaled} layers to scale; four control points need 4, each a layer of its own"
            )
        self.lm, self.bounds, self.step, self.first_layer = lm, bounds, step, first_layer
        self._ledger, self._make_suite = Path(ledger), make_suite
        ends = self._snapped(bounds[0]), self._snapped(bounds[1])
        strongest = max(ends, key=lambda factor: abs(factor - 1))
        self._spread = tuple(np.linspace(first_layer, lm.num_layers - 1, 4).round().tolist())
        self.presets = {
            "no scaling": self._flat(1.0),
            "uniform": self._flat(strongest),
            "decreasing, as in the paper": BezierCurve(self._spread, (ends[1], ends[1], 1.0, 1.0)),
        } | dict(presets or {})
        self.curve, self.scheme, self.status = self._flat(1.0), SCHEMES[0], ""
        self.surrogate: Surrogate | None = None
        self.measured: dict[str, Measured] = {}  # by scaling key, on the suite as it is
        self._past, self._future = [(self.curve, self.scheme)], list[tuple[BezierCurve, str]]()
        self._listeners: list[Callable[[bool], None]] = []
        self._lock = threading.RLock()  # of what follows; never held while listeners are told
        self._dragged, self._running = False, _Measurement()
        self._kept = Kept()
        self._model_in_use = _model_locks.setdefault(lm.model, threading.Lock())
        earlier = _latest[lm.model]() if lm.model in _latest else None
        if earlier is not None:
            earlier.stop()  # its cell was run again
        _latest[lm.model] = weakref.ref(self)
        self.set_size(n_pairs, n_contexts)

    @property
    def scaling(self) -> LayerScaling:
        """The scaling that the curve stands for."""
        factors = self.curve.factors(self.lm.num_layers, self.first_layer, self.step, self.bounds)
        return LayerScaling(factors, self.scheme)

    @property
    def unscaled(self) -> LayerScaling:
        """The baseline."""
        return LayerScaling.identity(self.lm.num_layers)

    def known(self) -> dict[str, Measured]:
        """All scalings of which anything is known on the suite as it is, by key."""
        with self._lock:
            return dict(self.measured)

    @property
    def best(self) -> Measured | None:
        """Of those known on all contexts the one with the best mean accuracy."""
        whole = [known for known in self.known().values() if len(known.exact) == len(self.suite.probes)]
        return max(whole, key=lambda known: known.mean, default=None)

    @property
    def busy(self) -> bool:
        """Whether something is measured, or about to be."""
        return not (self._running.over.is_set() or self._running.stop.is_set())

    @property
    def can_undo(self) -> bool:
        """Whether `undo` would change anything."""
        return len(self._past) > 1 or self._past[-1] != (self.curve, self.scheme)

    @property
    def can_redo(self) -> bool:
        """Whether `redo` would change anything."""
        return bool(self._future)

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """Call `listener` after every change, with whether the curve moved; also from the measuring thread."""
        self._listeners.append(listener)

    def prediction(self) -> NDArray[np.float64] | None:
        """Accuracy by depth that the surrogate expects, or None while too little is known."""
        return None if self.surrogate is None or self.scheme != SCHEMES[0] else self.surrogate(self.scaling)

    def move(self, point: int, layer: float, value: float) -> None:
        """Move a control point; it snaps to the grid, stays within bounds and between its neighbours."""
        layers, values = list(self.curve.layers), list(self.curve.values)
        low = layers[point - 1] + 1 if point else self.first_layer
        high = layers[point + 1] - 1 if point < 3 else self.lm.num_layers - 1
        layers[point], values[point] = float(np.clip(round(layer), low, high)), self._snapped(value)
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
        suite = self._make_suite(n_pairs, n_contexts)
        self.stop()
        with Ledger(self._ledger) as ledger:
            found = ledger.known(self.lm.fingerprint, [key for probe in suite.probes for key in probe.keys])
        measured: dict[str, Measured] = {}
        for key, outcomes in found.items():
            exact = {
                p: np.array([outcomes[question][0] for question in probe.keys])
                for p, probe in enumerate(suite.probes)
                if all(question in outcomes for question in probe.keys)
            }
            if exact and ";" not in key:  # numbers of heads are no curve
                measured[key] = Measured(LayerScaling.from_key(key), exact)
        surrogate = _fitted(measured, suite)
        with self._lock:
            self.n_pairs, self.n_contexts, self.suite = n_pairs, n_contexts, suite
            self.measured, self.surrogate, self.status = measured, surrogate, self._standing()
        self._tell(moved=False)

    def drag(self, begins: bool) -> None:
        """A drag begins: nothing is measured until it ends."""
        with self._lock:
            self._dragged = begins
            self._running.stop.set()
        if begins:
            self._tell(moved=False)
        else:
            self.measure()

    def measure(self) -> None:
        """Measure the present curve now, as far as it is not known."""
        with self._lock:
            self._commit()
            self._start(0.0)
        self._tell(moved=False)

    def stop(self) -> None:
        """Cancel the running measurement and wait until the model is free; what was measured is kept."""
        with self._lock:
            self._running.stop.set()
        self.wait()
        with self._model_in_use:  # also by one that was cancelled before
            pass
        self._tell(moved=False)

    def wait(self) -> None:
        """Until the running measurement has ended."""
        with self._lock:
            running = self._running
        if running.thread is not None:
            running.thread.join()

    def undo(self) -> None:
        """Back to the curve before the last change."""
        with self._lock:
            self._commit()
            if len(self._past) > 1:
                self._future.append(self._past.pop())
            self._set(*self._past[-1])
        self._tell(moved=True)

    def redo(self) -> None:
        """Forward again."""
        with self._lock:
            self._commit()
            if self._future:
                self._past.append(self._future.pop())
            self._set(*self._past[-1])
        self._tell(moved=True)

    def save(self, path: str | Path) -> None:
        """Write the factors, with the curve and what is known of them, as a factor file."""
        known = self.known().get(self.scaling.key)
        measured = None if known is None else {"contexts": len(known.exact), "accuracy": known.mean}
        save_factors(
            path, self.scaling, model=self.lm.name, fingerprint=self.lm.fingerprint, suite=self.suite.recipe,
            curve=asdict(self.curve), measured=measured, chosen="by hand, on the contexts it was measured on",
        )  # fmt: skip

    def _change(self, curve: BezierCurve, scheme: str) -> None:
        with self._lock:
            self._set(curve, scheme)
        self._tell(moved=True)

    def _set(self, curve: BezierCurve, scheme: str) -> None:
        if (curve, scheme) == (self.curve, self.scheme):
            return
        self.curve, self.scheme = curve, scheme
        self._running.stop.set()
        if not self._dragged:
            self._start(_SETTLE_SECONDS)
        self.status = self._standing()

    def _start(self, delay: float) -> None:
        self._running.stop.set()
        self._running = running = _Measurement()
        running.over.clear()
        running.thread = threading.Thread(target=self._run, args=(running, delay), daemon=True)
        running.thread.start()

    def _run(self, running: "_Measurement", delay: float) -> None:
        """In a thread of its own: wait until the change has settled and the model is free, then measure."""
        said = ""
        try:
            if running.stop.wait(delay):
                return
            with self._model_in_use:
                suite = self._measure(running)
            with self._lock:
                measured = dict(self.measured)
            surrogate = _fitted(measured, suite)
            with self._lock:
                if self.suite is suite:
                    self.surrogate = surrogate
        except _Stopped:
            said = "stopped; what was measured is kept"
        except Exception as error:  # there is no one to raise it to
            said = explained(error)
        finally:
            running.over.set()
            with self._lock:
                if self._running is running:  # else a later change has the word
                    self.status = said or self._standing()
            self._tell(moved=False)

    def _measure(self, running: "_Measurement") -> Suite:
        with self._lock:
            suite, measured = self.suite, dict(self.measured)
            if running.stop.is_set():
                return suite
            self._commit()
            wanted = self.scaling
        began, asked = time.monotonic(), 0
        todo = [
            (p, scaling)
            for p in range(len(suite.probes))
            for scaling in dict.fromkeys((wanted, self.unscaled))  # the baseline goes along
            if scaling.key not in measured or p not in measured[scaling.key].exact
        ]
        with Ledger(self._ledger) as ledger, _stoppable(self.lm, running.stop):
            for done, (p, scaling) in enumerate(todo, 1):
                probe = replace(suite, probes=suite.probes[p : p + 1])
                outcomes = score(self.lm, probe, [scaling], ledger=ledger, kept=self._kept, progress=_Unseen(1, ""))
                asked += outcomes.recomputed
                left = (time.monotonic() - began) / done * (len(todo) - done)
                with self._lock:
                    if self.suite is not suite or running.stop.is_set():
                        raise _Stopped
                    before = self.measured.get(scaling.key) or Measured(scaling, {})
                    exact = {**before.exact, p: outcomes.exact[0, 0]}
                    self.measured[scaling.key] = Measured(before.scaling, exact)
                    self.status = (
                        f"context {p + 1} of {len(suite.probes)}, {asked} questions answered, {left:.0f} s left"
                    )
                self._tell(moved=False)
        return suite

    def _standing(self) -> str:
        """What is known of the present curve, in a line."""
        known, n_contexts = self.measured.get(self.scaling.key), len(self.suite.probes)
        line = "not measured yet" if known is None else (
            f"measured on {len(known.exact)} of {n_contexts} contexts: {known.mean:.3f} of all answers exact"
        )  # fmt: skip
        if self.scheme != SCHEMES[0]:
            return f"{line}; predictions are for {SCHEMES[0]} only"
        if self.surrogate is None:
            return f"{line}; no prediction before {_FEWEST_SCALINGS} scalings are known"
        return line

    def _commit(self) -> None:
        """The present curve is a step to come back to."""
        if self._past[-1] != (self.curve, self.scheme):
            self._past.append((self.curve, self.scheme))
            self._future.clear()

    def _flat(self, value: float) -> BezierCurve:
        return BezierCurve(self._spread, (value,) * 4)

    def _snapped(self, value: float) -> float:
        low, high = (edge / self.step for edge in self.bounds)
        steps = np.clip(np.round(value / self.step), np.ceil(low - 1e-9), np.floor(high + 1e-9))
        return float(np.round(steps * self.step, 10))

    def say(self, status: str) -> None:
        """Show a line of status."""
        with self._lock:
            self.status = status
        self._tell(moved=False)

    def _tell(self, moved: bool) -> None:
        for listener in self._listeners:
            listener(moved)


def show(playground: Playground, *, save_to: str | Path = "playground.json", editor: bool = True) -> ipywidgets.Widget:
    """The playground as a widget for JupyterLab, Notebook, VS Code and Colab.

    Parameters
    ----------
    save_to : str or Path
        The factor file that the save button writes, as shown beside it; it can be changed there.
    editor : bool
        False leaves out the drawn editor, for front ends that load no custom widgets; sliders, buttons and the table
        of curves are built-in widgets and always there.
    """
    last = playground.lm.num_layers - 1
    low, high = playground.bounds
    sliders = [
        (
            ipywidgets.IntSlider(min=playground.first_layer, max=last, description=f"P{k + 1} layer"),
            ipywidgets.FloatSlider(min=low, max=high, step=playground.step, description=f"P{k + 1} factor"),
        )
        for k in range(4)
    ]
    preset = ipywidgets.Dropdown(options=["", *playground.presets], description="preset")
    scheme = ipywidgets.Dropdown(options=SCHEMES, description="scheme")
    pairs = ipywidgets.BoundedIntText(playground.n_pairs, min=3, max=300, description="pairs")
    contexts = ipywidgets.BoundedIntText(playground.n_contexts, min=1, max=1000, description="contexts")
    file = ipywidgets.Text(str(save_to), description="file")
    buttons = {
        name: ipywidgets.Button(description=name) for name in ("Measure", "Stop", "Undo", "Redo", "Save factors")
    }
    status, table = ipywidgets.HTML(), ipywidgets.HTML()
    python = ipywidgets.Textarea(description="as Python", disabled=True, layout={"width": "98%"})
    drawn = _Editor(playground) if editor else None
    showing = threading.Lock()  # updates come from the measuring thread too
    own = threading.local()  # what a widget reports while this very thread sets it is no one's wish

    def update(moved: bool) -> None:
        with showing:
            own.setting = True
            try:
                curve, curves = playground.curve, _curves(playground)
                if moved:  # only who moved the curve writes it back: from elsewhere it might overtake the browser
                    for k, (layer, value) in enumerate(sliders):
                        layer.value, value.value = int(curve.layers[k]), curve.values[k]
                    preset.value = next((name for name, of in playground.presets.items() if of == curve), "")
                    scheme.value = playground.scheme
                    python.value = f'LayerScaling({list(playground.scaling.factors)}, scheme="{playground.scheme}")'
                buttons["Undo"].disabled, buttons["Redo"].disabled = not playground.can_undo, not playground.can_redo
                buttons["Stop"].disabled = not playground.busy
                status.value, table.value = html.escape(playground.status), _table(curves)
                if drawn is not None:
                    drawn.update(moved, curves)
            finally:
                own.setting = False

    def guarded(act: Callable[[], None]) -> Callable[[Any], None]:
        def click(_: Any) -> None:
            if getattr(own, "setting", False):
                return
            try:
                act()
            except (OSError, ValueError) as error:
                playground.say(explained(error))

        return click

    def save() -> None:
        playground.save(file.value)
        playground.say(f"saved {file.value}")

    def slide(k: int) -> None:
        playground.move(k, sliders[k][0].value, sliders[k][1].value)  # tells all, also where it did not move

    def choose() -> None:
        if preset.value:
            playground.use(playground.presets[preset.value])

    for k, pair in enumerate(sliders):
        for slider in pair:
            slider.observe(guarded(partial(slide, k)), "value")
    scheme.observe(guarded(lambda: playground.set_scheme(scheme.value)), "value")
    preset.observe(guarded(choose), "value")
    for size in (pairs, contexts):
        size.observe(guarded(lambda: playground.set_size(pairs.value, contexts.value)), "value")
    actions = (playground.measure, playground.stop, playground.undo, playground.redo, save)
    for button, act in zip(buttons.values(), actions, strict=True):
        button.on_click(guarded(act))
    if drawn is not None:
        drawn.observe(guarded(drawn.moved), "points")
        drawn.observe(guarded(lambda: playground.drag(drawn.dragging)), "dragging")
    playground.subscribe(update)
    update(True)
    rows = [ipywidgets.HBox(pair) for pair in sliders]
    controls = [ipywidgets.HBox([preset, scheme]), ipywidgets.HBox([pairs, contexts]), ipywidgets.HBox([file])]
    rows = [*rows, *controls, ipywidgets.HBox(list(buttons.values())), status, table, python]
    return ipywidgets.VBox([*([] if drawn is None else [drawn]), *rows])


def _curves(playground: Playground) -> list[dict[str, Any]]:
    """What is drawn: baseline, best, current and prediction, as far as known."""
    current, curves = playground.scaling.key, []
    measured_so_far = playground.known()
    known = {"baseline": measured_so_far.get(playground.unscaled.key), "best": playground.best}
    known["current"] = measured_so_far.get(current)
    n_contexts, depths = len(playground.suite.probes), playground.suite.depths.round(4).tolist()
    for kind, measured in known.items():
        if measured is not None and measured.exact:
            name = {"baseline": "no scaling", "best": "best so far", "current": "this curve"}[kind]
            mean, least, most = (np.round(part, 4).tolist() for part in measured.accuracy)
            about = {
                "kind": kind,
                "name": f"{name}, {len(measured.exact)} of {n_contexts} contexts: {measured.mean:.3f}",
            }
            band = {"low": least, "high": most} if len(measured.exact) > 1 else {}
            curves.append(about | {"depths": depths, "mean": mean} | band)
    predicted = playground.prediction()
    if predicted is not None and playground.surrogate is not None:
        name = f"prediction: {predicted.mean():.3f}, off by {playground.surrogate.error:.2f} a depth (leave-one-out)"
        curves.append({"kind": "prediction", "name": name, "depths": depths, "mean": predicted.round(4).tolist()})
    return curves


def _table(curves: list[dict[str, Any]]) -> str:
    """The curves in words and numbers, for who can't see them."""
    rows = ""
    for curve in curves:
        at = np.linspace(0, len(curve["depths"]) - 1, 5).round().astype(int)
        cells = "".join(f"<td>{curve['mean'][i]:.2f}</td>" for i in at)
        rows += f"<tr><th style='text-align: left'>{html.escape(curve['name'])}</th>{cells}</tr>"
    head = "".join(f"<th>{depth:g}</th>" for depth in (0, 0.25, 0.5, 0.75, 1))
    return f"<table><tr><th style='text-align: left'>exact answers (mean; at depth)</th>{head}</tr>{rows}</table>"


class _Editor(anywidget.AnyWidget):
    """The part that the browser draws."""

    _esm = Path(__file__).parent / "widget.js"
    _css = """
    .lrs-playground { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-start }
    .lrs-playground { color: var(--jp-ui-font-color1, #222) }
    .lrs-panel { flex: 1 1 420px; max-width: 640px; font: 12px sans-serif }
    .lrs-panel text { fill: currentColor }
    .lrs-axes path { stroke: currentColor; fill: none } .lrs-bars rect { fill: #56b4e9; opacity: 0.45 }
    .lrs-one { stroke: #949494; stroke-width: 1 } .lrs-curve { stroke: #0173b2; stroke-width: 2.2; fill: none }
    .lrs-polygon { stroke: #949494; stroke-dasharray: 3 3; fill: none }
    .lrs-handle { fill: #de8f05; stroke: white; stroke-width: 1.5; cursor: grab; touch-action: none }
    .lrs-handle:focus { outline: none; stroke: currentColor; stroke-width: 3 }
    """
    config = traitlets.Dict().tag(sync=True)
    points: Any = traitlets.List().tag(sync=True)
    dragging = traitlets.Bool(False).tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        low, high = playground.bounds
        grid = {"layers": playground.lm.num_layers, "first": playground.first_layer, "step": playground.step}
        super().__init__(config=grid | {"low": low, "high": high}, points=self._points(), state={"curves": []})

    def update(self, moved: bool, curves: list[dict[str, Any]]) -> None:
        """Send what has changed; the points only if the playground moved them."""
        playground, points = self._playground, self._points()
        if moved:
            self.points = points
        about = {"scheme": playground.scheme, "status": playground.status, "curves": curves}
        self.state = about | {"points": points, "factors": list(playground.scaling.factors)}

    def moved(self) -> None:
        """The browser moved a point."""
        self._playground.use(BezierCurve(*zip(*self.points, strict=True)))

    def _points(self) -> list[list[float]]:
        return [list(point) for point in zip(self._playground.curve.layers, self._playground.curve.values, strict=True)]


class _Stopped(Exception):
    """Raised inside the model to cancel a measurement."""


class _Unseen(Progress):
    """Progress that the status line shows instead."""

    @contextmanager
    def entered(self) -> Iterator[Progress]:
        yield self

    def advance(self, units: int, note: str | None = None) -> None:
        pass


@contextmanager
def _stoppable(lm: LM, stop: threading.Event) -> Iterator[None]:
    """Let a measurement of this thread end before the next layer once `stop` is set: a context may take seconds."""
    own = threading.get_ident()

    def check(*_: object) -> None:
        if stop.is_set() and threading.get_ident() == own:
            raise _Stopped

    with used_alone(lm.model):
        handles = [layer.register_forward_pre_hook(check) for layer in reachable_decoder(lm.model).layers]
    try:
        yield
    finally:
        with used_alone(lm.model):
            for handle in handles:
                handle.remove()
