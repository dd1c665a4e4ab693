"""The playground as a widget: sliders, buttons, a table of accuracies, and an editor that the browser draws.

What is drawn while dragging is drawn by the browser (`editor`); what is known comes from `Playground`.
"""

import html
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets

from lrs_utils.playground.accuracies import describe_difference, list_accuracies, write_table
from lrs_utils.playground.editor import Editor, write_python
from lrs_utils.playground.improving import SPACES
from lrs_utils.playground.loading import shipped_for
from lrs_utils.playground.playground import Playground
from lrs_utils.playground.state import KINDS
from lrs_utils.playground.worker import describe_error
from lrs_utils.scaling.rope import SCHEMES


def show(playground: Playground, *, save_to: str | Path = "playground.json", editor: bool = True) -> ipywidgets.Widget:
    """The playground as a widget for JupyterLab, Notebook, VS Code and Colab.

    Parameters
    ----------
    save_to : str or Path
        The factor file that the save button writes and the load button reads, as shown beside them; it can be changed
        there.
    editor : bool
        False leaves out the drawn editor, for front ends that load no custom widgets; sliders, buttons and the table
        of accuracies are built-in widgets and always there.
    """
    panel = _Panel(playground, save_to, Editor(playground) if editor else None)
    panel.connect()
    return panel.arrange()


class _Panel:
    """All widgets of a playground, kept up to date with it."""

    def __init__(self, playground: Playground, save_to: str | Path, editor: Editor | None) -> None:
        self._playground, self._editor = playground, editor
        self._sliders = [_make_sliders(playground, point) for point in range(4)]
        self._preset = ipywidgets.Dropdown(options=["", *playground.presets], description="preset")
        self._scheme = ipywidgets.Dropdown(options=SCHEMES, description="scheme")
        self._pairs = ipywidgets.BoundedIntText(playground.n_pairs, min=3, max=300, description="pairs")
        self._contexts = ipywidgets.BoundedIntText(playground.n_contexts, min=1, max=1000, description="contexts")
        self._file = ipywidgets.Text(str(save_to), description="file")
        self._files = ["", *shipped_for(playground.lm)]  # and those that are saved and loaded here
        self._shipped = ipywidgets.Dropdown(options=self._files, description="load")
        self._compared = [ipywidgets.Dropdown(options=self._files, description=name) for name in ("compare", "with")]
        narrow = {"width": "auto"}
        self._switches = {kind: ipywidgets.Checkbox(description=kind, indent=False, layout=narrow) for kind in KINDS}
        self._space = ipywidgets.Dropdown(options=SPACES, description="space")
        self._n_steps = ipywidgets.BoundedIntText(20, min=1, max=1000, description="steps")
        self._improve = ipywidgets.Button(description="Improve", tooltip="gradient steps from here; Stop ends them")
        names = ("Measure", "Stop", "Undo", "Redo", "Save factors", "Load factors")
        self._buttons = {name: ipywidgets.Button(description=name) for name in names}
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
        self._shipped.observe(self._guard(lambda: self._load(self._shipped.value)), "value")
        for kind, switch in self._switches.items():
            switch.observe(self._guard(partial(self._switch, kind)), "value")
        for compared in self._compared:
            compared.observe(self._guard(self._compare), "value")
        set_size = self._guard(lambda: playground.set_size(self._pairs.value, self._contexts.value))
        for size in (self._pairs, self._contexts):
            size.observe(set_size, "value")
        self._improve.on_click(self._guard(lambda: playground.improve(self._space.value, self._n_steps.value)))
        actions = (playground.measure, playground.stop, playground.undo, playground.redo, self._save, self._load_file)
        for button, action in zip(self._buttons.values(), actions, strict=True):
            button.on_click(self._guard(action))
        if (editor := self._editor) is not None:
            editor.observe(self._guard(editor.use_numbers), "numbers")
            editor.observe(self._guard(lambda: playground.drag(editor.dragging)), "dragging")
        playground.subscribe(self._refresh)
        self._refresh(moved=True)

    def arrange(self) -> ipywidgets.Widget:
        """All widgets, one row below the other."""
        rows = [] if self._editor is None else [self._editor]
        buttons = list(self._buttons.values())
        for row in (
            buttons[:4],
            [self._space, self._n_steps, self._improve],
            [self._preset, self._scheme],
            [self._shipped, *self._switches.values()],
            self._compared,
            [self._file, *buttons[4:]],
            [self._pairs, self._contexts],
            *self._sliders,
        ):
            rows.append(ipywidgets.HBox(list(row), layout={"flex_flow": "row wrap"}))
        return ipywidgets.VBox([*rows, self._status, self._table, self._python])

    def _guard(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """`act` as a callback: not for what a refresh itself sets, and with errors shown in the status."""

        def react(_: Any) -> None:
            if getattr(self._this_thread, "refreshing", False):
                return
            try:
                act()
            except (FileNotFoundError, ValueError) as error:  # ours, in whole sentences
                self._playground.show_status(str(error))
            except OSError as error:
                self._playground.show_status(describe_error(error))

        return react

    def _move(self, point: int) -> None:
        layer, factor = self._sliders[point]
        self._playground.move(point, layer.value, factor.value)  # refreshes the sliders even where the point stayed

    def _switch(self, kind: str) -> None:
        self._playground.switch(kind, self._switches[kind].value)

    def _use_preset(self) -> None:
        if self._preset.value:
            self._playground.use_preset(self._preset.value)

    def _load(self, path: str) -> None:
        if path:
            self._playground.load(path)
            self._add_file(path)

    def _compare(self) -> None:
        first, second = (compared.value for compared in self._compared)
        if first and second:
            self._playground.compare(first, second)
        elif self._playground.comparison is not None:
            self._playground.end_comparison()

    def _add_file(self, path: str) -> None:
        """Let a file be compared."""
        if path in self._files:
            return
        self._files.append(path)
        self._this_thread.refreshing = True
        for compared in self._compared:
            value = compared.value
            compared.options, compared.value = self._files, value
        self._this_thread.refreshing = False

    def _load_file(self) -> None:
        self._load(self._file.value)

    def _save(self) -> None:
        self._playground.save(self._file.value)
        self._add_file(self._file.value)
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
        self._preset.value = playground.preset
        self._shipped.value = playground.file if playground.file in self._shipped.options else ""
        for kind, switch in self._switches.items():
            switch.value = playground.is_shown(kind)
        self._scheme.value = playground.scheme
        self._python.value = write_python(playground)

    def _refresh_accuracies(self, moved: bool) -> None:
        playground, accuracies = self._playground, list_accuracies(self._playground)
        difference = describe_difference(playground)
        self._buttons["Undo"].disabled = not playground.can_undo
        self._buttons["Redo"].disabled = not playground.can_redo
        self._buttons["Stop"].disabled = not playground.busy
        self._status.value, self._table.value = html.escape(playground.status), write_table(accuracies, difference)
        if self._editor is not None:
            self._editor.send(moved, accuracies, difference)


def _make_sliders(playground: Playground, point: int) -> tuple[ipywidgets.IntSlider, ipywidgets.FloatSlider]:
    last_layer, (low, high) = playground.grid.num_layers - 1, playground.grid.bounds
    return (
        ipywidgets.IntSlider(min=playground.grid.first_layer, max=last_layer, description=f"P{point + 1} layer"),
        ipywidgets.FloatSlider(min=low, max=high, step=playground.grid.step, description=f"P{point + 1} factor"),
    )
