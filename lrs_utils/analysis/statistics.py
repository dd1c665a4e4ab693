"""From outcomes to numbers: accuracy by depth, context utilisation U, intervals and paired tests.

Contexts are the sampling unit: questions about one context share one reading, so intervals and tests resample
contexts. Only correlations over layers or heads resample layers or heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# First, middle, last. The paper (2503.04355) says only w_first < w_middle < w_last; 1:2:3 is ours (CHOICES.md).
UTILISATION_WEIGHTS = (1.0, 2.0, 3.0)


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def utilisation(
    exact: ArrayLike, depths: ArrayLike, weights: tuple[float, float, float] = UTILISATION_WEIGHTS
) -> NDArray[np.float64]:
    """Context utilisation U = w_first acc_first + w_middle acc_middle + w_last acc_last (the paper's fitness).

    Parameters
    ----------
    exact : bool array, shape (..., contexts, questions)
    depths : float array, shape (questions,)
        Must hold 0 and 1; the middle is the depth nearest to 0.5.
    weights : (first, middle, last), increasing
        Normalised to sum 1.

    Returns
    -------
    float array, shape (...)

    Raises
    ------
    ValueError
        Contexts that ask at different depths (depths of two dimensions), depths without 0 or 1, other weights.
    """
    w = _increasing(weights)
    depths = _same_depths(depths)
    accuracy = np.asarray(exact, float).mean(axis=-2)
    return _weighted(accuracy[..., first_middle_last(depths)], w)


def first_middle_last(depths: ArrayLike) -> list[int]:
    """Indices of the questions at depth 0, nearest to 0.5 and at 1."""
    depths = _same_depths(depths)
    if not (np.isin([0.0, 1.0], depths).all() and len(depths) >= 3):
        raise ValueError(f"U needs questions at depths 0, about 0.5 and 1; there are {np.round(depths, 3).tolist()}")
    # of an even number of items the earlier of the two middle ones: item (n-1)//2
    return [int(np.argmin(np.abs(depths - d))) for d in (0.0, 0.5 - 1e-9, 1.0)]


def utilisation_over_depths(
    exact: ArrayLike, depths: ArrayLike, weights: tuple[float, float, float] = UTILISATION_WEIGHTS
) -> NDArray[np.float64]:
    """U with its three weights spread over every depth asked (our variant; the paper's U has three positions).

    The weight of a depth lies on the straight lines through the three at 0, 0.5 and 1; weights are normalised to sum 1.

    Parameters
    ----------
    exact : bool array, shape (..., contexts, questions)
    depths : float array, shape (questions,)

    Returns
    -------
    float array, shape (...)
    """
    w = np.interp(_same_depths(depths), (0.0, 0.5, 1.0), _increasing(weights))
    return _weighted(np.asarray(exact, float).mean(axis=-2), w)


def mean_over_questions(values: ArrayLike, depths: ArrayLike) -> NDArray[np.float64]:
    """Each context's mean over the questions that it asks.

    Parameters
    ----------
    values : array, shape (..., contexts, questions)
        Verdicts or nll. Values where nothing is asked don't count.
    depths : float array, shape (questions,) or (contexts, questions)
        A suite's depths: two dimensions if contexts ask at different depths, nan where a context has no such question.

    Returns
    -------
    float array, shape (..., contexts)

    Raises
    ------
    ValueError
        The depths are of other questions than the values.
    """
    values, depths = _of_each_question(values, depths)
    return _mean_where(~np.isnan(depths), values) if depths.ndim == 2 else values.mean(axis=-1)


def by_fifth(exact: ArrayLike, depths: ArrayLike, n_bins: int = 5) -> NDArray[np.float64]:
    """Each context's accuracy in fifths of depth: a curve over depth for contexts that ask at different depths.

    Parameters
    ----------
    exact : bool array, shape (..., contexts, questions)
    depths : float array, shape (questions,) or (contexts, questions)
        As for `mean_over_questions`.
    n_bins : int
        Equal bins of depth: from 0 to before 1/n_bins, and so on; the last holds depth 1.

    Returns
    -------
    float array, shape (..., contexts, n_bins)
        nan where a context asks nothing in a bin. Drop those contexts before `bootstrap_mean` and `paired_test`.

    Raises
    ------
    ValueError
        No bins, or depths of other questions than the verdicts.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; give at least 1")
    exact, depths = _of_each_question(exact, depths)
    # 1e-9: 29 / 50 * 50 is a little below 29
    bins = np.minimum(np.floor(depths * n_bins + 1e-9), n_bins - 1)
    return np.stack([_mean_where(bins == number, exact) for number in range(n_bins)], axis=-1)


def _of_each_question(values: ArrayLike, depths: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, depths = np.asarray(values, float), np.asarray(depths, float)
    if depths.ndim not in (1, 2) or values.ndim < 2 or values.shape[-depths.ndim :] != depths.shape:
        raise ValueError(
            f"values of shape {values.shape} don't fit depths of shape {depths.shape}; give (..., contexts, questions) "
            "and the depths of the same suite"
        )
    return values, depths


def _mean_where(asked: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the asked questions on the last axis, nan if there are none."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.asarray(np.where(asked, values, 0).sum(axis=-1) / asked.sum(axis=-1))


def _same_depths(depths: ArrayLike) -> NDArray[np.float64]:
    depths = np.asarray(depths, float)
    if depths.ndim != 1:
        raise ValueError(
            f"depths has shape {depths.shape}: contexts ask at different depths. U needs contexts that all ask at the "
            "same depths; take the mean nll (mixture) instead"
        )
    return depths


def _weighted(accuracy: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    # one after the other: `@` and `sum` add in an order that depends on the machine and the number of candidates,
    # and if two differ only in the last bit, a search can take another path
    return np.asarray(np.cumsum(accuracy * (w / w.sum()), axis=-1)[..., -1])


def _increasing(weights: tuple[float, float, float]) -> NDArray[np.float64]:
    w = np.asarray(weights, float)
    if w.shape != (3,) or not (0 < w[0] < w[1] < w[2]):
        raise ValueError(f"weights is {weights}; U needs 0 < first < middle < last")
    return w


def bootstrap_mean(values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean over contexts with a percentile bootstrap interval.

    Parameters
    ----------
    values : array, shape (contexts,) or (contexts, questions)
        Accuracy by depth: `bootstrap_mean(outcomes.exact[candidate])`; mean accuracy: the same averaged over questions.
        If all contexts agree, the interval has no width, which says nothing about contexts not seen.

    Returns
    -------
    Interval of arrays of the shape without contexts
    """
    values = np.asarray(values, float)
    mean = values.mean(axis=0)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 contexts, there is {len(values)}")
    found = stats.bootstrap(
        (values,), np.mean, axis=0, confidence_level=level, n_resamples=resamples, method="percentile", batch=500,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Interval(mean, np.asarray(found.confidence_interval.low), np.asarray(found.confidence_interval.high))


def rank_correlation(x: ArrayLike, y: ArrayLike, *, level: float = 0.95, resamples: int = 2_000) -> Interval:
    """Spearman's rank correlation of two numbers of each unit (a layer, a head), with a bootstrap interval over units.

    The interval treats units as independent. Layers are not: values that are smooth over the layers correlate by chance
    more often (`shift_test`).

    Parameters
    ----------
    x, y : arrays, shape (units,)

    Returns
    -------
    Interval of single numbers
    """
    x, y = _paired_units(x, y)
    at = np.random.default_rng(0).integers(len(x), size=(resamples, len(x)))
    found = _spearman(x[at], y[at])
    found = found[~np.isnan(found)]  # resamples of one value only
    return Interval(_spearman(x, y), *np.asarray(np.quantile(found, [(1 - level) / 2, (1 + level) / 2])))


def shift_test(x: ArrayLike, y: ArrayLike) -> float:
    """Two-sided p of a rank correlation over the layers: how many circular shifts of one against the other do as well.

    Shifts keep how smooth each is over the layers, which a permutation would not.

    Parameters
    ----------
    x, y : arrays, shape (layers,)
    """
    x, y = _paired_units(x, y)
    shifted = np.array([_spearman(np.roll(x, by), y) for by in range(len(x))])
    return float(np.mean(np.abs(shifted) >= np.abs(shifted[0]) - 1e-12))


def _paired_units(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 4:
        raise ValueError(f"a correlation needs two numbers of at least 4 units; the shapes are {x.shape} and {y.shape}")
    return x, y


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlations over the last axis; `stats.spearmanr` takes one pair at a time, too slow for resamples."""
    x, y = (stats.rankdata(v, axis=-1) for v in (x, y))
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (x, y))
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def paired_test(a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of mean(a - b) under random exchange of a and b within each context (permutation test).

    Parameters
    ----------
    a, b : arrays, shape (contexts,)
        One number a context, the same contexts in the same order.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    if difference.ndim != 1:
        raise ValueError(f"give one number a context: the shape is {difference.shape}, not (contexts,)")
    if not difference.any():
        return 1.0
    found = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def paired_change(before: ArrayLike, after: ArrayLike) -> dict[str, float]:
    """What changes on the same contexts: "change" with its bootstrap interval "low" to "high", and "p".

    Parameters
    ----------
    before, after : arrays, shape (contexts,)
        At least two contexts.
    """
    interval = bootstrap_mean(np.asarray(after, float) - np.asarray(before, float))
    change = dict(zip(("change", "low", "high"), map(float, interval), strict=True))
    return change | {"p": paired_test(after, before)}


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """P-values of several tests, corrected so that p bounds the chance of any false alarm among them (Holm 1979).

    Parameters
    ----------
    p : array, shape (tests,)
    """
    p = np.asarray(p, float)
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.asarray(np.minimum(corrected, 1.0)[np.argsort(order)])


def paired_changes(values: pd.DataFrame, baseline: Callable[[Any], Any]) -> pd.DataFrame:
    """Each column's mean, and its paired change against another column.

    Parameters
    ----------
    values : DataFrame
        A row for each unit of chance (context, text), a column for each method. Two columns are compared on the rows
        that both have; means are over the rows that all have.
    baseline : function of a column's name
        Which column it is compared with; a column compared with itself has no change.

    Returns
    -------
    DataFrame
        A row for each column, in their order, named as in `values`: "mean", "change", its bootstrap interval "low" to
        "high", and "p" of the paired permutation test, corrected over all (Holm). One unit alone has no interval.
    """
    table = pd.DataFrame(np.nan, index=values.columns, columns=["mean", "change", "low", "high", "p"])
    table["mean"] = values.dropna().mean()
    for way in values.columns:
        if baseline(way) == way:
            continue
        after, before = values[[way, baseline(way)]].dropna().to_numpy(float).T
        table.loc[way, "change"] = (after - before).mean()
        if len(after) > 1:
            change = paired_change(before, after)
            table.loc[way, [*change]] = [*change.values()]
    tested = table["p"].notna()
    table.loc[tested, "p"] = holm(table.loc[tested, "p"])
    return table
