"""What is known of the scalings that the playground compares: curves of accuracy by depth, and the same as a table."""

import html
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from lrs_utils.analysis.methods import colour_of
from lrs_utils.playground.comparison import find_difference
from lrs_utils.playground.measured import MeasuredScaling
from lrs_utils.playground.playground import Playground


def _hex(method: str) -> str:
    return to_hex(colour_of(method))  # type: ignore[arg-type]  # a tuple of three numbers or a name


# What the names of files begin with, and two colours for those that are named after no method.
_METHODS = {"ga": "GA", "paper": "paper", "layers": "layers", "general": "heads"}
_OTHERS = ("#ca9161", "#cc78bc")
# The scaling shown has the colour of what a gradient found: a gradient may have found it, or goes on from it.
_COLOURS = {
    "baseline": _hex("no scaling"),
    "best": _hex("best so far"),
    "current": _hex("gradient"),
    "prediction": _hex("gradient"),
}


def list_accuracies(playground: Playground) -> list[dict[str, Any]]:
    """Accuracy by depth to be drawn: baseline, best, current and prediction, as far as there is one.

    While two scalings are compared, they stand in place of best and prediction.
    """
    measured, comparison, colours = playground.measured, playground.comparison, dict(_COLOURS)
    shown = {("baseline", "no scaling"): measured.get(playground.unscaled.key)}
    if comparison is None:
        shown["best", "best so far"] = playground.best
    else:
        colours |= dict(zip(("first", "second"), choose_colours(comparison.names), strict=True))
        first, second = comparison.find(measured)
        shown["first", comparison.names[0]], shown["second", comparison.names[1]] = first, second
    shown["current", "this scaling"] = measured.get(playground.scaling.key)
    n_contexts, depths = len(playground.suite.probes), playground.suite.depths.round(4).tolist()
    accuracies = [
        {"kind": kind, "colour": colours[kind], "depths": depths} | _describe_measured(name, scaling, n_contexts)
        for (kind, name), scaling in shown.items()
        if scaling is not None
    ]
    predicted, surrogate = playground.prediction(), playground.surrogate
    if predicted is not None and surrogate is not None and comparison is None:
        name = f"prediction: {predicted.mean():.3f}, off by {surrogate.error:.2f} a depth (leave-one-out)"
        of = {"kind": "prediction", "colour": _COLOURS["prediction"], "depths": depths}
        accuracies.append(of | {"name": name, "mean": predicted.round(4).tolist()})
    return accuracies


def describe_difference(playground: Playground) -> dict[str, Any] | None:
    """The first of two compared scalings minus the second, by depth, and over all depths in its name."""
    comparison = playground.comparison
    first, second = (None, None) if comparison is None else comparison.find(playground.measured)
    found = None if first is None or second is None else find_difference(first, second)
    if comparison is None or found is None:
        return None
    mean, low, high = (float(part) for part in found.mean)
    names = " minus ".join(_stem(name) for name in comparison.names)
    line = dict(zip(("mean", "low", "high"), (np.round(part, 4).tolist() for part in found.by_depth), strict=True))
    return line | {
        "name": f"{names}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {found.n_contexts} contexts",
        "colour": _hex("gradient"),
        "depths": playground.suite.depths.round(4).tolist(),
    }


def choose_colours(names: tuple[str, str]) -> tuple[str, str]:
    """Of two files: those of the methods that they are named after, where these have one each."""
    methods = [_METHODS.get(_stem(name).partition("-")[0]) for name in names]
    first, second = (other if method is None else _hex(method) for method, other in zip(methods, _OTHERS, strict=True))
    return (first, second) if first != second else _OTHERS


def _stem(name: str) -> str:
    """What a file is called."""
    return Path(name).name.removesuffix(".json")


def _describe_measured(name: str, measured: MeasuredScaling, n_contexts: int) -> dict[str, Any]:
    mean, low, high = (np.round(part, 4).tolist() for part in measured.accuracy)
    band = {"low": low, "high": high} if len(measured.exact) > 1 else {}
    return {"name": f"{name}, {len(measured.exact)} of {n_contexts} contexts: {measured.mean:.3f}", "mean": mean} | band


def write_table(accuracies: list[dict[str, Any]], difference: dict[str, Any] | None = None) -> str:
    """The accuracies in words and numbers, for those who can't see them drawn."""
    rows = ""
    for accuracy in [*accuracies, *([] if difference is None else [difference])]:
        columns = np.linspace(0, len(accuracy["depths"]) - 1, 5).round().astype(int)
        cells = "".join(f"<td>{accuracy['mean'][column]:.2f}</td>" for column in columns)
        rows += f"<tr><th style='text-align: left'>{html.escape(accuracy['name'])}</th>{cells}</tr>"
    head = "".join(f"<th>{depth:g}</th>" for depth in (0, 0.25, 0.5, 0.75, 1))
    return f"<table><tr><th style='text-align: left'>exact answers (mean; at depth)</th>{head}</tr>{rows}</table>"
