"""The part of the playground that the browser draws, and what goes to and fro between it and the kernel."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from lrs_utils.playground.playground import Playground
from lrs_utils.playground.state import BAR_BOUNDS, KINDS

_FOLDER = Path(__file__).parent
_SCRIPTS = ("numbers.js", "drawing.js", "bars.js", "editor.js", "chart.js", "heads.js", "widget.js")


def read_script() -> str:
    """All of the browser's files as one module, each using only what stands before it."""
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS)


class Editor(anywidget.AnyWidget):
    """Bars, control points, maps of heads and accuracies.

    Attributes
    ----------
    numbers : dict
        What is edited, in both directions: "points" and `State.numbers`, where factors are None as long as they follow
        the curve, and other numbers while they are not shown.
    state : dict
        What the kernel knows, and of which numbers.
    """

    _esm = read_script()
    _css = (_FOLDER / "widget.css").read_text(encoding="utf-8")
    config = traitlets.Dict().tag(sync=True)
    numbers: Any = traitlets.Dict().tag(sync=True)
    dragging = traitlets.Bool(False).tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, playground: Playground) -> None:
        self._playground, grid = playground, playground.grid
        (low, high), (lowest, highest) = grid.bounds, BAR_BOUNDS
        config = {"layers": grid.num_layers, "heads": grid.n_heads, "first": grid.first_layer, "step": grid.step}
        config |= {"low": low, "high": high, "lowest": lowest, "highest": highest}
        super().__init__(config=config, numbers=self._list_numbers(), state={"curves": []})

    def send(self, moved: bool, accuracies: list[dict[str, Any]], difference: dict[str, Any] | None) -> None:
        """Send what has changed to the browser; the numbers only if the playground moved them."""
        playground, numbers = self._playground, self._list_numbers()
        if moved:
            self.numbers = numbers
        self.state = {
            "status": playground.status,
            "python": write_python(playground),
            "curves": accuracies,
            "difference": difference,
            "numbers": numbers,
            "factors": list(playground.state.layers.factors),
        }

    def use_numbers(self) -> None:
        """Take over the numbers that the browser changed."""
        self._playground.edit(self.numbers["points"], {k: v for k, v in self.numbers.items() if k != "points"})

    def _list_numbers(self) -> dict[str, Any]:
        playground, grid = self._playground, self._playground.grid
        curve, numbers = playground.curve, dict(playground.state.numbers)
        if playground.follows_curve:
            numbers["factors"] = None
        shown = {name: kind for kind, names in KINDS.items() if playground.is_shown(kind) for name in names}
        for name, kind in shown.items():
            if numbers[name] is None:
                row: Any = 1.0 if kind == "temperatures" else [1.0] * grid.n_heads
                numbers[name] = [row] * grid.num_layers
        points = [list(point) for point in zip(curve.layers, curve.values, strict=True)]
        return {"points": points} | {name: _as_list(rows) for name, rows in numbers.items()}


def _as_list(rows: Any) -> Any:
    """Nested tuples as the lists that come back from the browser."""
    return [_as_list(row) for row in rows] if isinstance(rows, list | tuple) else rows


def write_python(playground: Playground) -> str:
    """The code that makes the scaling shown."""
    layers, heads = playground.state.layers, playground.state.heads
    temperatures = "" if layers.temperatures is None else f", temperatures={list(layers.temperatures)}"
    code = f'LayerScaling({list(layers.factors)}, scheme="{layers.scheme}"{temperatures})'
    if heads is None:
        return code
    given = {"temperatures": heads.temperatures, "gains": heads.gains, "mlp_gains": heads.mlp_gains}
    options = "".join(f"{name}={_as_list(rows)}, " for name, rows in given.items() if rows is not None)
    return f"HeadScaling({options}layers={code})"
