"""Exported outcomes: a small CSV (gzip) that can be committed, with the outcomes, free answers and gradients of a run.

The first line says what made them. An outcome fills the columns up to the nll, a free answer the last two, and a
gradient the nll and the last.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrs_utils.models.download import write_whole
from lrs_utils.scoring.ledger_tables import LedgerError

_COLUMNS = ["model", "scaling", "question", "exact", "nll", "max_new_tokens", "text"]
_OF_OUTCOMES = _COLUMNS[:5]  # all that a file without free answers and gradients has

Row = tuple[Any, ...]
Candidate = tuple[str, str]  # model fingerprint and scaling key


def write_outcomes(
    path: Path,
    candidates: Iterable[tuple[Candidate, Mapping[str, Sequence[Row]]]],
    questions: Collection[str] | None,
    about: str,
) -> int:
    """Write rows of a ledger; the same rows give the same file, and a file that has them already stays.

    Parameters
    ----------
    candidates : iterable of (candidate, mapping of table to rows)
        Each row is a question and the columns of its table.
    questions : collection of str, or None for all
    about : str
        One line.

    Returns
    -------
    int : rows written
    """
    outcomes: list[list[Any]] = []
    others: list[list[Any]] = []
    for candidate, tables in candidates:
        chosen = {
            table: [row for row in rows if questions is None or row[0] in questions] for table, rows in tables.items()
        }
        outcomes += _lay_out_outcomes(candidate, chosen["outcomes"])
        others += _lay_out_texts(candidate, chosen["texts"])
        others += _lay_out_gradients(candidate, chosen["gradients"])
    text = io.StringIO()
    text.write(f"# {about}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS if others else _OF_OUTCOMES)
    writer.writerows(outcomes)
    writer.writerows(others)
    _write_if_changed(path, text.getvalue().encode())
    return len(outcomes) + len(others)


def read_outcomes(path: str | Path) -> dict[str, dict[Candidate, list[Row]]]:
    """The rows of an exported file: table -> candidate -> rows.

    Raises
    ------
    LedgerError
        The file is no exported ledger, or damaged.
    """
    tables: dict[str, dict[Candidate, list[Row]]] = {"outcomes": {}, "texts": {}, "gradients": {}}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.reader(line for line in file if not line.startswith("#"))
            if next(reader, None) not in (_COLUMNS, _OF_OUTCOMES):
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            for model, scaling, question, exact, nll, *text in reader:
                table, row = _read_row(question, exact, nll, text)
                tables[table].setdefault((model, scaling), []).append(row)
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise LedgerError(f"{path} is no exported ledger, or damaged: {error}") from error
    return tables


def _lay_out_outcomes(candidate: Candidate, rows: Iterable[Row]) -> Iterator[list[Any]]:
    for question, exact, nll in rows:
        yield [*candidate, question, exact, f"{nll:.9g}"]  # 9 digits: all that float32 holds


def _lay_out_texts(candidate: Candidate, rows: Iterable[Row]) -> Iterator[list[Any]]:
    for question, max_new_tokens, text in rows:
        yield [*candidate, question, "", "", max_new_tokens, json.dumps(text)]  # without line breaks


def _lay_out_gradients(candidate: Candidate, rows: Iterable[Row]) -> Iterator[list[Any]]:
    for question, nll, gradient in rows:
        yield [*candidate, question, "", repr(nll), "", gradient]


def _read_row(question: str, exact: str, nll: str, text: Sequence[str]) -> tuple[str, Row]:
    """The table that a line belongs to, and its row there."""
    if exact:
        return "outcomes", (question, int(exact), float(np.float32(nll)))
    if nll:
        return "gradients", (question, float(nll), text[1])
    return "texts", (question, int(text[0]), json.loads(text[1]))


def _write_if_changed(path: Path, content: bytes) -> None:
    """Write a file unless it has the same rows, whatever made them: a committed file changes only if results do."""
    try:
        before = gzip.decompress(path.read_bytes())
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error):
        before = b""
    if before.partition(b"\n")[2] != content.partition(b"\n")[2]:
        write_whole(path, gzip.compress(content, mtime=0))
