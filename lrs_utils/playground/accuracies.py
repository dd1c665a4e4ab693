"""What is known of the scalings that the playground compares: curves of accuracy by depth, and the same as a table."""

import html
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from lrs_utils.analysis.methods import colour_of
from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.playground.playground import Playground


def _hex(method: str) -> str:
    return to_hex(colour_of(method))  # type: ignore[arg-type]  # a tuple of three numbers or a name


# The scaling shown has the colour of what a gradient found: a gradient may have found it, or goes on from it.
_COLOURS = {
    "baseline": _hex("no scaling"),
    "best": "#029e73",
    "current": _hex("gradient"),
    "prediction": _hex("gradient"),
}


def list_accuracies(playground: Playground) -> list[dict[str, Any]]:
    """Accuracy by depth to be drawn: baseline, best, current and prediction, as far as there is one."""
    measured = playground.measured
    shown = {
        ("baseline", "no scaling"): measured.get(playground.unscaled.key),
        ("best", "best so far"): playground.best,
        ("current", "this scaling"): measured.get(playground.scaling.key),
    }
    n_contexts, depths = len(playground.suite.probes), playground.suite.depths.round(4).tolist()
    accuracies = [
        {"kind": kind, "colour": _COLOURS[kind], "depths": depths} | _describe_measured(name, scaling, n_contexts)
        for (kind, name), scaling in shown.items()
        if scaling is not None
    ]
    predicted, surrogate = playground.prediction(), playground.surrogate
    if predicted is not None and surrogate is not None:
        name = f"prediction: {predicted.mean():.3f}, off by {surrogate.error:.2f} a depth (leave-one-out)"
        of = {"kind": "prediction", "colour": _COLOURS["prediction"], "depths": depths}
        accuracies.append(of | {"name": name, "mean": predicted.round(4).tolist()})
    return accuracies


def _describe_measured(name: str, measured: MeasuredScaling, n_contexts: int) -> dict[str, Any]:
    mean, low, high = (np.round(part, 4).tolist() for part in measured.accuracy)
    band = {"low": low, "high": high} if len(measured.exact) > 1 else {}
    return {"name": f"{name}, {len(measured.exact)} of {n_contexts} contexts: {measured.mean:.3f}", "mean": mean} | band


def write_table(accuracies: list[dict[str, Any]]) -> str:
    """The accuracies in words and numbers, for those who can't see them drawn."""
    rows = ""
    for accuracy in accuracies:
        columns = np.linspace(0, len(accuracy["depths"]) - 1, 5).round().astype(int)
        cells = "".join(f"<td>{accuracy['mean'][column]:.2f}</td>" for column in columns)
        rows += f"<tr><th style='text-align: left'>{html.escape(accuracy['name'])}</th>{cells}</tr>"
    head = "".join(f"<th>{depth:g}</th>" for depth in (0, 0.25, 0.5, 0.75, 1))
    return f"<table><tr><th style='text-align: left'>exact answers (mean; at depth)</th>{head}</tr>{rows}</table>"
