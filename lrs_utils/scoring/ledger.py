"""Every outcome ever measured, on disk, so that a crash loses nothing.

An outcome, a free answer's text or a gradient is stored under its content (model fingerprint, scaling, question with
its context), so any later run finds it: the same run after `kill -9`, another search, another notebook. It is one
SQLite file, written by any number of processes. Each row has a checksum, so a damaged number raises an error.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_utils.scoring.export import read_rows, write_rows
from lrs_utils.scoring.ledger_tables import (
    TABLES,
    LedgerError,
    Row,
    compute_checksum,
    explained_errors,
    identify,
    open_database,
    transaction,
)

_OF_CANDIDATE = "model = ? AND scaling = ?"
_AMONG = "question IN (SELECT value FROM json_each(?))"  # any number of them as one value


class Ledger:
    """Outcomes in an SQLite file (write-ahead log), made if it doesn't exist.

    Raises
    ------
    LedgerError
        The file is not an SQLite database, belongs to another program, or is damaged (it is never overwritten); or the
        disk is full or the file can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._db = open_database(self.path)
            self._file = identify(self.path)

    def find(self, model: str, scaling: str) -> dict[str, tuple[bool, float]]:
        """All outcomes of one candidate: question key -> (exact, nll)."""
        with self._explained():
            return self._read_outcomes(_OF_CANDIDATE, model, scaling).get(scaling, {})

    def known(self, model: str, questions: Sequence[str]) -> dict[str, dict[str, tuple[bool, float]]]:
        """What is known about some questions under any scaling: scaling key -> question key -> (exact, nll)."""
        with self._explained():
            return self._read_outcomes(f"model = ? AND {_AMONG}", model, json.dumps(list(questions)))

    def record(
        self, model: str, scaling: str, questions: Sequence[str], exact: NDArray[np.bool_], nll: NDArray[np.float64]
    ) -> list[tuple[bool, float]]:
        """Write the outcomes of one context, all or none; returns what is now stored.

        If another process wrote first, its rows stay, so that all processes continue with the same numbers.

        Raises
        ------
        ValueError
            A likelihood that is not finite.
        """
        rows = [
            (model, scaling, question, int(hit), float(loss))
            for question, hit, loss in zip(questions, exact, nll, strict=True)
        ]
        for _, _, question, _, value in rows:
            if not math.isfinite(value):
                raise ValueError(
                    f"the nll of question {question!r:.80} under {scaling:.60} is {value}; it must be finite"
                )
        with self._writing():
            self._insert("outcomes", rows)
            condition = f"{_OF_CANDIDATE} AND {_AMONG}"
            standing = self._read_outcomes(condition, model, scaling, json.dumps(list(questions)))
        return [standing[scaling][question] for question in questions]

    def find_texts(self, model: str, scaling: str, max_new_tokens: int) -> dict[str, str]:
        """All free answers of one candidate that were cut at `max_new_tokens`: question key -> text."""
        with self._explained():
            rows = self._read_rows("texts", f"{_OF_CANDIDATE} AND max_new_tokens = ?", model, scaling, max_new_tokens)
            return {question: text for _, _, question, _, text in rows}

    def record_texts(
        self, model: str, scaling: str, max_new_tokens: int, questions: Sequence[str], texts: Sequence[str]
    ) -> list[str]:
        """`record` for free answers."""
        answers = zip(questions, texts, strict=True)
        with self._writing():
            self._insert("texts", [(model, scaling, question, max_new_tokens, text) for question, text in answers])
            standing = self.find_texts(model, scaling, max_new_tokens)
        return [standing[question] for question in questions]

    def find_gradient(self, model: str, scaling: str, questions: str) -> tuple[float, NDArray[np.float64]] | None:
        """The nll and gradient of a context's questions, if known."""
        with self._explained():
            rows = list(self._read_rows("gradients", f"{_OF_CANDIDATE} AND question = ?", model, scaling, questions))
        if not rows:
            return None
        [(*_, nll, gradient)] = rows
        return nll, np.array(json.loads(gradient))

    def record_gradient(
        self, model: str, scaling: str, questions: str, nll: float, gradient: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Write a gradient; returns what is now stored, as `record` does."""
        with self._writing():
            self._insert("gradients", [(model, scaling, questions, nll, json.dumps(gradient.tolist()))])
            standing = self.find_gradient(model, scaling, questions)
        assert standing is not None
        return standing

    def forget(self, model: str, scaling: str, question: str) -> None:
        """Delete what is known about a question, so that it is measured again."""
        with self._writing():
            for table in TABLES:
                self._db.execute(
                    f"DELETE FROM {table} WHERE question = ? AND candidate = "
                    f"(SELECT id FROM candidates WHERE {_OF_CANDIDATE})",
                    (question, model, scaling),
                )

    def __len__(self) -> int:
        with self._explained():
            return int(self._db.execute("SELECT count(*) FROM outcomes").fetchone()[0])

    def export(
        self,
        path: str | Path,
        candidates: Sequence[tuple[str, str]] | None,
        questions: Sequence[str] | None,
        about: str,
    ) -> int:
        """Write outcomes as a small CSV (gzip) that can be committed; `load` reads it back.

        Parameters
        ----------
        candidates : sequence of (model fingerprint, scaling key), or None for all
        questions : sequence of str, or None for all
            Question keys; those not measured are left out.
        about : str
            One line: the command and the versions that made them.

        Returns
        -------
        int : rows written
        """
        chosen = None if questions is None else set(questions)
        with self._explained():
            if candidates is None:
                candidates = self._db.execute(
                    "SELECT model, scaling FROM candidates ORDER BY model, scaling"
                ).fetchall()
            rows = (
                (table, row)
                for candidate in dict.fromkeys(candidates)
                for table in TABLES
                for row in self._read_rows(table, _OF_CANDIDATE, *candidate)
                if chosen is None or row[2] in chosen
            )
            return write_rows(Path(path), rows, about)

    def load(self, path: str | Path) -> int:
        """Add the outcomes of an exported file; those already known stay. Returns the number of rows read."""
        tables = read_rows(path)
        with self._writing():
            for table, rows in tables.items():
                self._insert(table, rows)
        return sum(map(len, tables.values()))

    def close(self) -> None:
        """Close the file; the ledger can't be used afterwards."""
        self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_rows(self, table: str, condition: str, *values: Any) -> Iterator[Row]:
        """The rows of a table under a condition, each exactly as written."""
        rows = self._db.execute(
            f"SELECT model, scaling, question, {TABLES[table]}, checksum FROM {table} "
            f"JOIN candidates ON id = candidate WHERE {condition} ORDER BY candidate, question",
            values,
        )
        for *row, checksum in rows:
            if compute_checksum(*row) != checksum:
                model, scaling, question, *_ = map(str, row)
                raise LedgerError(
                    f"{self.path} is damaged: in table {table} the row of question {question!r:.80} (model {model}, "
                    f"scaling {scaling:.60}) is not what was written. Nothing was changed: move the file away, or "
                    "delete the row by `Ledger.forget(model, scaling, question)`, and run the same command again"
                )
            yield tuple(row)

    def _read_outcomes(self, condition: str, *values: Any) -> dict[str, dict[str, tuple[bool, float]]]:
        """Outcomes of one model under a condition: scaling key -> question key -> (exact, nll)."""
        found: dict[str, dict[str, tuple[bool, float]]] = {}
        for _, scaling, question, exact, nll in self._read_rows("outcomes", condition, *values):
            found.setdefault(scaling, {})[question] = (bool(exact), nll)
        return found

    def _insert(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows; those whose candidate and question are known stay as they are."""
        if identify(self.path) != self._file:
            raise LedgerError(
                f"{self.path} was deleted or replaced while it was in use, and what is written now would be lost; "
                "start again with the file that is to be kept"
            )
        ids = {}
        for candidate in dict.fromkeys(row[:2] for row in rows):
            self._db.execute("INSERT OR IGNORE INTO candidates (model, scaling) VALUES (?, ?)", candidate)
            found = self._db.execute(f"SELECT id FROM candidates WHERE {_OF_CANDIDATE}", candidate)
            (ids[candidate],) = found.fetchone()
        self._db.executemany(
            f"INSERT OR IGNORE INTO {table} (candidate, question, {TABLES[table]}, checksum) VALUES (?, ?, ?, ?, ?)",
            ((ids[row[:2]], *row[2:], compute_checksum(*row)) for row in rows),
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Write all of a block's rows, or none."""
        with self._explained(), transaction(self._db):
            yield

    def _explained(self) -> AbstractContextManager[None]:
        return explained_errors(self.path)
