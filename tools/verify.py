"""Are the committed results what the code gives? `python tools/reproduce.py --verify`.

The notebooks run once more with some committed data forgotten: a few outcomes behind each notebook and a piece of
each measured table. What is measured again, and every result computed from it, is compared with the committed data.
"""

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lrs_utils.notebook import AGAIN, sampled

_SLACK = 0.02  # relative and absolute: another machine adds bfloat16 products in another order
_OFF = 0.05  # the share of values that may be further off: answers near a tie fall to the other side
# numbers that no machine gives twice
_TIMES = ["seconds", "GiB", "seconds per 1,000 tokens", "candidate", "step", "known at the kill"]
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


def compared(run_folder: Path, results: Path, seed: int) -> list[Compared]:
    """Every committed result that a run has found again, whole or a part."""
    found = []
    for committed in sorted(results.glob("*.csv*")):
        piece, whole = run_folder / AGAIN / committed.name, run_folder / "data" / "results" / committed.name
        if piece.exists():  # then the whole is a copy of what is committed
            found.append(_compare(committed.name, _read(committed), _read(piece), _head(piece)))
        elif whole.exists() and committed.suffix == ".gz":
            before = sampled(_read(committed), seed)
            after = before[before.columns.intersection(_NAMED)].merge(_read(whole), how="left")
            found.append(_compare(committed.name, before, after))
        elif whole.exists():
            found.append(_compare(committed.name, _read(committed), _read(whole)))
    return found


def _head(path: Path) -> str:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        line = file.readline()
    return str(line) if line.startswith("#") else ""


def _read(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, skiprows=int(bool(_head(path)))).drop(columns=_TIMES, errors="ignore")
    if path.suffix == ".gz":
        rows["scaling"] = rows["scaling"].ffill()  # a long one stands in the first of its lines
    if "text" in rows and path.suffix == ".gz":
        rows["text"] = rows["text"].map(_rounded, na_action="ignore")
    return rows


def _rounded(text: str) -> str:
    """A gradient is compared by its length, to two digits; a text as it is."""
    return f"{np.linalg.norm(json.loads(text)):.2g}" if text.startswith("[[") else text


def _compare(name: str, before: pd.DataFrame, after: pd.DataFrame, head: str = "") -> Compared:
    if len(after) > len(before) or not set(after) <= set(before) or not (head or set(after) == set(before)):
        return Compared(name, max(1, after.size), max(1, after.size), "other columns or more rows")
    before, n = before[list(after)], len(after)
    places: Iterable[int] = range(len(before) - n + 1)
    if (piece := re.match(r"# (\d+) of (\d+):", head)) and n * int(piece[2]) == len(before):
        places = [n * int(piece[1])]  # else pieces differ in size, and this one is where it fits best
    off = min(_n_off(before.iloc[at : at + n], after) for at in places)
    n_values = after.columns.difference(_NAMED).size * n
    return Compared(name, n_values, off, "" if n == len(before) else f"{n} of {len(before)} rows")


def _n_off(before: pd.DataFrame, after: pd.DataFrame) -> int:
    off = 0
    for column in before.columns.difference(_NAMED):
        a, b = before[column].to_numpy(), after[column].to_numpy()
        if a.dtype.kind in "fiub" and b.dtype.kind in "fiub":
            same = np.isclose(a.astype(float), b.astype(float), rtol=_SLACK, atol=_SLACK, equal_nan=True)
        else:
            same = (a == b) | (pd.isna(a) & pd.isna(b))
        off += int((~same).sum())
    return off
