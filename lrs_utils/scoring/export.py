"""Exported outcomes: a small CSV (gzip) that can be committed, with the outcomes, free answers and gradients of a run.

The first line says what made them. An outcome fills the columns up to the nll, a free answer the last two, and a
gradient the nll and the last. A long scaling stands in the first of its lines; where none stands, it is that above.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrs_utils.models.download import write_whole
from lrs_utils.scoring.ledger_tables import TABLES, LedgerError, Row

_COLUMNS = ["model", "scaling", "question", "exact", "nll", "max_new_tokens", "text"]
_LONG = 10_000  # characters of a scaling: gzip finds nothing again that stands 32 KB back
_OF_OUTCOMES = _COLUMNS[:5]  # all that a file without free answers and gradients has


def write_rows(path: Path, rows: Iterable[tuple[str, Row]], about: str) -> int:
    """Write rows of a ledger; the same rows give the same file, and a file that has them already stays.

    Parameters
    ----------
    rows : iterable of (table, row)
    about : str
        One line.

    Returns
    -------
    int : rows written
    """
    outcomes: list[Sequence[Any]] = []
    others: list[Sequence[Any]] = []
    for table, row in rows:
        (outcomes if table == "outcomes" else others).append(_lay_out(table, *row))
    text = io.StringIO()
    text.write(f"# {about}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS if others else _OF_OUTCOMES)
    above = ""
    for model, scaling, *values in outcomes + others:
        writer.writerow([model, "" if scaling == above and len(scaling) > _LONG else scaling, *values])
        above = scaling
    _write_if_changed(path, text.getvalue().encode())
    return len(outcomes) + len(others)


def read_rows(path: str | Path) -> dict[str, list[Row]]:
    """The rows of an exported file, by table.

    Raises
    ------
    LedgerError
        The file is no exported ledger, or damaged.
    """
    tables: dict[str, list[Row]] = {table: [] for table in TABLES}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.reader(line for line in file if not line.startswith("#"))
            if next(reader, None) not in (_COLUMNS, _OF_OUTCOMES):
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            scaling = ""
            for model, given, question, exact, nll, *text in reader:
                scaling = given or scaling
                table, values = _read_values(exact, nll, text)
                tables[table].append((model, scaling, question, *values))
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise LedgerError(f"{path} is no exported ledger, or damaged: {error}") from error
    return tables


def _lay_out(table: str, model: str, scaling: str, question: str, *values: Any) -> Sequence[Any]:
    """A row as a line of the file."""
    if table == "outcomes":
        exact, nll = values
        return model, scaling, question, exact, f"{nll:.9g}"  # 9 digits: all that float32 holds
    if table == "gradients":
        nll, gradient = values
        return model, scaling, question, "", repr(nll), "", gradient
    max_new_tokens, text = values
    return model, scaling, question, "", "", max_new_tokens, json.dumps(text)  # without line breaks


def _read_values(exact: str, nll: str, text: Sequence[str]) -> tuple[str, Row]:
    """The table that a line belongs to, and its values there."""
    if exact:
        return "outcomes", (int(exact), float(np.float32(nll)))
    if nll:
        return "gradients", (float(nll), text[1])
    return "texts", (int(text[0]), json.loads(text[1]))


def _write_if_changed(path: Path, content: bytes) -> None:
    """Write a file unless it has the same rows, whatever made them: a committed file changes only if results do."""
    try:
        before = gzip.decompress(path.read_bytes())
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error):
        before = b""
    if before.partition(b"\n")[2] != content.partition(b"\n")[2]:
        write_whole(path, gzip.compress(content, mtime=0))
