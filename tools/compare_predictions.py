"""How well the playground's predictions fit, against the nearest measured curve and the plain mean.

    python tools/compare_predictions.py

Each scaling among the outcomes that ship is predicted from the others of its set; the surrogate chooses its smoothing
without the one left out, too. A row of data/results/predictions.csv is one way to predict on one set. No model is run.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from result_tables import RESULTS, write_table

from lrs_utils import Ledger, tasks
from lrs_utils.analysis.statistics import bootstrap_mean
from lrs_utils.playground.measured import read_measured
from lrs_utils.playground.prediction import Surrogate, collect_accuracies

Array = NDArray[np.float64]

SHIPPED = ("06_ga_search", "07_held_out_and_transfer")
FINGERPRINT = "8fdb7e348d6e86d3"  # SmolLM2-135M in bfloat16, which these notebooks measured
SETS = {
    "notebook 06, search over all depths": tasks.kv_retrieval(20, 16, seed=0),
    "notebook 06, both searches, three positions": tasks.kv_retrieval(
        20, 16, seed=0, positions=tasks.positions_at(20, (0, 0.5, 1))
    ),
    "notebooks 06 and 07, held-out contexts": tasks.kv_retrieval(20, 100, seed=10_000),
}


def interpolate(factors: Array, accuracy: Array, predicted: Array) -> Array:
    """What the playground shows."""
    return Surrogate(factors, accuracy).predict(predicted)


def take_nearest(factors: Array, accuracy: Array, predicted: Array) -> Array:
    """Accuracy of the scaling whose factors are nearest; the first of several equally near."""
    return np.asarray(accuracy[((factors - predicted) ** 2).sum(axis=1).argmin()])


def take_mean(factors: Array, accuracy: Array, predicted: Array) -> Array:
    """Mean accuracy of all scalings, whatever the factors."""
    return np.asarray(accuracy.mean(axis=0))


PREDICTORS = {"surrogate": interpolate, "nearest measured curve": take_nearest, "plain mean": take_mean}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "shipped.sqlite") as ledger:
        for name in SHIPPED:
            ledger.load(RESULTS / f"{name}.outcomes.csv.gz")
        rows = pd.concat([compare(name, suite, ledger) for name, suite in SETS.items()])
    write_table("predictions", rows, "compare_predictions.py", "%.4f")
    print(rows.round(4).to_string(index=False))


def compare(name: str, suite: tasks.Suite, ledger: Ledger) -> pd.DataFrame:
    """One row a predictor: its errors, and by how much its mean absolute error is above the surrogate's."""
    measured = read_measured(ledger, FINGERPRINT, suite)
    factors, accuracy = collect_accuracies(measured.values(), len(suite.probes))
    errors = {way: leave_one_out(predict, factors, accuracy) for way, predict in PREDICTORS.items()}
    by_scaling = {way: np.abs(error).mean(axis=1) for way, error in errors.items()}
    rows = []
    for way, error in errors.items():
        above, low, high = map(float, bootstrap_mean(by_scaling[way] - by_scaling["surrogate"]))
        rows.append(
            {"outcomes": name, "scalings": len(factors), "predictor": way}
            | {"root mean square error": np.sqrt((error**2).mean()), "mean absolute error": np.abs(error).mean()}
            | {"above surrogate": above, "low": low, "high": high}
        )
    return pd.DataFrame(rows)


def leave_one_out(predict: Callable[[Array, Array, Array], Array], factors: Array, accuracy: Array) -> Array:
    """Predicted minus measured accuracy of each scaling by depth, shape (scalings, questions)."""
    others = ~np.eye(len(factors), dtype=bool)
    predicted = [predict(factors[known], accuracy[known], factors[~known][0]) for known in others]
    return np.array(predicted) - accuracy


if __name__ == "__main__":
    main()
