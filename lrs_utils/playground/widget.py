"""The playground as a widget: sliders, buttons, a table of accuracies, and an editor that the browser draws.

What is drawn while dragging is drawn by the browser (`widget.js`); what is known comes from `Playground`.
"""

import html
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import traitlets

from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.playground.playground import Playground
from lrs_utils.playground.worker import describe_error
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.rope import SCHEMES


def show(playground: Playground, *, save_to: str | Path = "playground.json", editor: bool = True) -> ipywidgets.Widget:
    """The playground as a widget for JupyterLab, Notebook, VS Code and Colab.

    Parameters
    ----------
    save_to : str or Path
        The factor file that the save button writes, as shown beside it; it can be changed there.
    editor : bool
        False leaves out the drawn editor, for front ends that load no custom widgets; sliders, buttons and the table
        of accuracies are built-in widgets and always there.
    """
    panel = _Panel(playground, save_to, _Editor(playground) if editor else None)
    panel.connect()
    return panel.arrange()


class _Panel:
    """All widgets of a playground, kept up to date with it."""

    def __init__(self, playground: Playground, save_to: str | Path, editor: "_Editor | None") -> None:
        self._playground, self._editor = playground, editor
        self._sliders = [_make_sliders(playground, point) for point in range(4)]
        self._preset = ipywidgets.Dropdown(options=["", *playground.presets], description="preset")
        self._scheme = ipywidgets.Dropdown(options=SCHEMES, description="scheme")
        self._pairs = ipywidgets.BoundedIntText(playground.n_pairs, min=3, max=300, description="pairs")
        self._contexts = ipywidgets.BoundedIntText(playground.n_contexts, min=1, max=1000, description="contexts")
        self._file = ipywidgets.Text(str(save_to), description="file")
        self._buttons = {
            name: ipywidgets.Button(description=name) for name in ("Measure", "Stop", "Undo", "Redo", "Save factors")
        }
        self._status, self._table = ipywidgets.HTML(), ipywidgets.HTML()
        self._python = ipywidgets.Textarea(description="as Python", disabled=True, layout={"width": "98%"})
        self._refreshing = threading.Lock()  # refreshes also come from the measuring thread
        self._this_thread = threading.local()

    def connect(self) -> None:
        """Let the widgets act on the playground, and the playground refresh the widgets."""
        playground = self._playground
        for point, pair in enumerate(self._sliders):
            for slider in pair:
                slider.observe(self._guard(partial(self._move, point)), "value")
        self._scheme.observe(self._guard(lambda: playground.set_scheme(self._scheme.value)), "value")
        self._preset.observe(self._guard(self._use_preset), "value")
        set_size = self._guard(lambda: playground.set_size(self._pairs.value, self._contexts.value))
        for size in (self._pairs, self._contexts):
            size.observe(set_size, "value")
        actions = (playground.measure, playground.stop, playground.undo, playground.redo, self._save)
        for button, action in zip(self._buttons.values(), actions, strict=True):
            button.on_click(self._guard(action))
        if (editor := self._editor) is not None:
            editor.observe(self._guard(editor.use_points), "points")
            editor.observe(self._guard(lambda: playground.drag(editor.dragging)), "dragging")
        playground.subscribe(self._refresh)
        self._refresh(moved=True)

    def arrange(self) -> ipywidgets.Widget:
        """All widgets, one row below the other."""
        rows = [] if self._editor is None else [self._editor]
        rows += [ipywidgets.HBox(pair) for pair in self._sliders]
        for row in ([self._preset, self._scheme], [self._pairs, self._contexts], [self._file], self._buttons.values()):
            rows.append(ipywidgets.HBox(list(row)))
        return ipywidgets.VBox([*rows, self._status, self._table, self._python])

    def _guard(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """`act` as a callback: not for what a refresh itself sets, and with errors shown in the status."""

        def react(_: Any) -> None:
            if getattr(self._this_thread, "refreshing", False):
                return
            try:
                act()
            except (OSError, ValueError) as error:
                self._playground.show_status(describe_error(error))

        return react

    def _move(self, point: int) -> None:
        layer, factor = self._sliders[point]
        self._playground.move(point, layer.value, factor.value)  # refreshes the sliders even where the point stayed

    def _use_preset(self) -> None:
        if self._preset.value:
            self._playground.use(self._playground.presets[self._preset.value])

    def _save(self) -> None:
        self._playground.save(self._file.value)
        self._playground.show_status(f"saved {self._file.value}")

    def _refresh(self, moved: bool) -> None:
        with self._refreshing:
            self._this_thread.refreshing = True
            try:
                if moved:  # only what moved the curve writes it back: from elsewhere it might overtake the browser
                    self._refresh_curve()
                self._refresh_accuracies(moved)
            finally:
                self._this_thread.refreshing = False

    def _refresh_curve(self) -> None:
        playground, curve = self._playground, self._playground.curve
        for point, (layer, factor) in enumerate(self._sliders):
            layer.value, factor.value = int(curve.layers[point]), curve.values[point]
        self._preset.value = next((name for name, preset in playground.presets.items() if preset == curve), "")
        self._scheme.value = playground.scheme
        self._python.value = f'LayerScaling({list(playground.scaling.factors)}, scheme="{playground.scheme}")'

    def _refresh_accuracies(self, moved: bool) -> None:
        playground, accuracies = self._playground, list_accuracies(self._playground)
        self._buttons["Undo"].disabled = not playground.can_undo
        self._buttons["Redo"].disabled = not playground.can_redo
        self._buttons["Stop"].disabled = not playground.busy
        self._status.value, self._table.value = html.escape(playground.status), _write_table(accuracies)
        if self._editor is not None:
            self._editor.send(moved, accuracies)


def _make_sliders(playground: Playground, point: int) -> tuple[ipywidgets.IntSlider, ipywidgets.FloatSlider]:
    last_layer, (low, high) = playground.lm.num_layers - 1, playground.bounds
    return (
        ipywidgets.IntSlider(min=playground.first_layer, max=last_layer, description=f"P{point + 1} layer"),
        ipywidgets.FloatSlider(min=low, max=high, step=playground.step, description=f"P{point + 1} factor"),
    )


def list_accuracies(playground: Playground) -> list[dict[str, Any]]:
    """Accuracy by depth to be drawn: baseline, best, current and prediction, as far as there is one."""
    measured = playground.measured
    shown = {
        ("baseline", "no scaling"): measured.get(playground.unscaled.key),
        ("best", "best so far"): playground.best,
        ("current", "this curve"): measured.get(playground.scaling.key),
    }
    n_contexts, depths = len(playground.suite.probes), playground.suite.depths.round(4).tolist()
    accuracies = [
        {"kind": kind, "depths": depths} | _describe_measured(name, scaling, n_contexts)
        for (kind, name), scaling in shown.items()
        if scaling is not None
    ]
    predicted, surrogate = playground.prediction(), playground.surrogate
    if predicted is not None and surrogate is not None:
        name = f"prediction: {predicted.mean():.3f}, off by {surrogate.error:.2f} a depth (leave-one-out)"
        accuracies.append({"kind": "prediction", "name": name, "depths": depths, "mean": predicted.round(4).tolist()})
    return accuracies


def _describe_measured(name: str, measured: MeasuredScaling, n_contexts: int) -> dict[str, Any]:
    mean, low, high = (np.round(part, 4).tolist() for part in measured.accuracy)
    band = {"low": low, "high": high} if len(measured.exact) > 1 else {}
    return {"name": f"{name}, {len(measured.exact)} of {n_contexts} contexts: {measured.mean:.3f}", "mean": mean} | band


def _write_table(accuracies: list[dict[str, Any]]) -> str:
    """The accuracies in words and numbers, for those who can't see them drawn."""
    rows = ""
    for accuracy in accuracies:
        columns = np.linspace(0, len(accuracy["depths"]) - 1, 5).round().astype(int)
        cells = "".join(f"<td>{accuracy['mean'][column]:.2f}</td>" for column in columns)
        rows += f"<tr><th style='text-align: left'>{html.escape(accuracy['name'])}</th>{cells}</tr>"
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
        super().__init__(config=grid | {"low": low, "high": high}, points=self._list_points(), state={"curves": []})

    def send(self, moved: bool, accuracies: list[dict[str, Any]]) -> None:
        """Send what has changed to the browser; the points only if the playground moved them."""
        playground, points = self._playground, self._list_points()
        if moved:
            self.points = points
        self.state = {
            "scheme": playground.scheme,
            "status": playground.status,
            "curves": accuracies,
            "points": points,
            "factors": list(playground.scaling.factors),
        }

    def use_points(self) -> None:
        """Take over the points that the browser moved."""
        self._playground.use(BezierCurve(*zip(*self.points, strict=True)))

    def _list_points(self) -> list[list[float]]:
        return [list(point) for point in zip(self._playground.curve.layers, self._playground.curve.values, strict=True)]
