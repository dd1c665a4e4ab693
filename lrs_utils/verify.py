"""Are the committed results what the code gives? `python -m lrs_utils.reproduce --verify`.

The notebooks run once more with some of what is committed forgotten: a few outcomes behind each notebook, a piece of
each measured table. What is measured again, and every result computed from it, is compared with what is committed.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

VERIFY = "LRS_VERIFY"  # the variable that says which sample: a seed
AGAIN = "again"  # the folder, below a run's, for pieces of tables measured again
_SAMPLE = 20  # outcomes forgotten behind each notebook
_SLACK = 0.05  # relative and absolute: another machine adds bfloat16 products in another order
_OFF = 0.05  # the share of values that may be further off: answers near a tie fall to the other side
_TIMES = {"prices", "cluster", "benchmark", "extrapolation_cost"}  # seconds, which no machine gives twice
_NAMED = ["model", "scaling", "question", "max_new_tokens"]


class Compared(NamedTuple):
    """A committed result against what was found again."""

    name: str
    values: int  # compared
    off: int  # of them, further off than rounding explains
    note: str

    @property
    def agrees(self) -> bool:
        return self.values > 0 and self.off <= _OFF * self.values


def sampled(outcomes: Path, seed: int) -> pd.DataFrame:
    """Rows of exported outcomes that are to be forgotten and measured again."""
    rows = _read(outcomes)
    return rows.sample(min(_SAMPLE, len(rows)), random_state=seed)


def compared(run_folder: Path, results: Path, seed: int) -> list[Compared]:
    """Every committed result that a run has found again, whole or a part."""
    found = []
    for committed in sorted(results.glob("*.csv*")):
        for again in (run_folder / "data" / "results" / committed.name, run_folder / AGAIN / committed.name):
            if not again.exists() or committed.stem in _TIMES:
                continue
            before, after = _read(committed), _read(again)
            if committed.suffix == ".gz":
                before = sampled(committed, seed)
                after = before[before.columns.intersection(_NAMED)].merge(after, how="left")
            found.append(_compare(committed.name, before, after))
    return found


def _read(path: Path) -> pd.DataFrame:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        has_head = file.readline().startswith("#")
    return pd.read_csv(path, skiprows=int(has_head))


def _compare(name: str, before: pd.DataFrame, after: pd.DataFrame) -> Compared:
    if list(before.columns) != list(after.columns) or len(after) > len(before):
        return Compared(name, after.size, after.size, "other columns or more rows")
    # a piece of a table stands where it fits best
    off = min(_n_off(before.iloc[at : at + len(after)], after) for at in range(len(before) - len(after) + 1))
    n_values = after.columns.difference(_NAMED).size * len(after)
    return Compared(name, n_values, off, "" if len(after) == len(before) else f"{len(after)} of {len(before)} rows")


def _n_off(before: pd.DataFrame, after: pd.DataFrame) -> int:
    off = 0
    for column in before:
        a, b = before[column].to_numpy(), after[column].to_numpy()
        if a.dtype.kind in "fiub" and b.dtype.kind in "fiub":
            same = np.isclose(a.astype(float), b.astype(float), rtol=_SLACK, atol=_SLACK, equal_nan=True)
        else:
            same = (a == b) | (pd.isna(a) & pd.isna(b))
        off += int((~same).sum())
    return off
