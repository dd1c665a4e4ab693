"""Every outcome ever measured, on disk, so that a crash loses nothing.

An outcome, a free answer's text or a gradient is stored under its content (model fingerprint, scaling, question with
its context), so any later run finds it: the same run after `kill -9`, another search, another notebook. It is one
SQLite file, written by any number of processes. Each row has a checksum, so a damaged number raises an error.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_utils.scoring.export import read_outcomes, write_outcomes
from lrs_utils.scoring.ledger_tables import (
    TABLES,
    LedgerError,
    compute_checksum,
    explained_errors,
    identify,
    open_database,
    refuse_strangers,
    transaction,
)


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
            refuse_strangers(self.path)
            self._db = open_database(self.path)
            self._file = identify(self.path)

    def _read_rows(
        self, table: str, model: str, scaling: str, where: str = "", *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """A candidate's rows (question and the columns of `TABLES`), each exactly as written."""
        rows = self._db.execute(
            f"SELECT question, {TABLES[table]}, checksum FROM {table} JOIN candidates ON id = candidate "
            f"WHERE model = ? AND scaling = ? {where} ORDER BY question",
            (model, scaling, *values),
        )
        for *row, checksum in rows:
            self._refuse_damaged_row(table, model, scaling, row, checksum)
            yield tuple(row)

    def _read_all_rows(self, model: str, scaling: str) -> dict[str, list[tuple[Any, ...]]]:
        """A candidate's rows, table by table."""
        with self._explained():
            return {table: list(self._read_rows(table, model, scaling)) for table in TABLES}

    def _refuse_damaged_row(self, table: str, model: str, scaling: str, row: Sequence[Any], checksum: int) -> None:
        if compute_checksum(model, scaling, *row) != checksum:
            raise LedgerError(
                f"{self.path} is damaged: in table {table} the row of question {row[0]!r:.80} (model {model}, scaling "
                f"{scaling:.60}) is not what was written. Nothing was changed: move the file away, or delete the row "
                "by `Ledger.forget(model, scaling, question)`, and run the same command again"
            )

    def find(self, model: str, scaling: str) -> dict[str, tuple[bool, float]]:
        """All outcomes of one candidate: question key -> (exact, nll)."""
        with self._explained():
            rows = self._read_rows("outcomes", model, scaling)
            return {question: (bool(exact), nll) for question, exact, nll in rows}

    def known(self, model: str, questions: Sequence[str]) -> dict[str, dict[str, tuple[bool, float]]]:
        """What is known about some questions under any scaling: scaling key -> question key -> (exact, nll)."""
        found: dict[str, dict[str, tuple[bool, float]]] = {}
        with self._explained():
            rows = self._db.execute(
                "SELECT scaling, question, exact, nll, checksum FROM candidates JOIN outcomes ON id = candidate "
                "WHERE model = ? AND question IN (SELECT value FROM json_each(?)) ORDER BY id",
                (model, json.dumps(list(questions))),
            )
            for scaling, question, exact, nll, checksum in rows:
                self._refuse_damaged_row("outcomes", model, scaling, (question, exact, nll), checksum)
                found.setdefault(scaling, {})[question] = (bool(exact), nll)
        return found

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
        for question, value in zip(questions, nll, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the nll of question {question!r:.80} under {scaling:.60} is {value}; it must be finite"
                )
        with self._explained(), self._transaction():
            self._insert(model, scaling, zip(questions, map(int, exact), map(float, nll), strict=True))
            asked = "AND question IN (SELECT value FROM json_each(?))"
            rows = self._read_rows("outcomes", model, scaling, asked, json.dumps(list(questions)))
            standing = {question: (bool(exact), nll) for question, exact, nll in rows}
        return [standing[question] for question in questions]

    def find_texts(self, model: str, scaling: str, max_new_tokens: int) -> dict[str, str]:
        """All free answers of one candidate that were cut at `max_new_tokens`: question key -> text."""
        with self._explained():
            rows = self._read_rows("texts", model, scaling, "AND max_new_tokens = ?", max_new_tokens)
            return {question: text for question, _, text in rows}

    def record_texts(
        self, model: str, scaling: str, max_new_tokens: int, questions: Sequence[str], texts: Sequence[str]
    ) -> list[str]:
        """`record` for free answers."""
        rows = [(question, max_new_tokens, text) for question, text in zip(questions, texts, strict=True)]
        with self._explained(), self._transaction():
            self._insert(model, scaling, rows, "texts")
            standing = self.find_texts(model, scaling, max_new_tokens)
        return [standing[question] for question in questions]

    def find_gradient(self, model: str, scaling: str, questions: str) -> tuple[float, NDArray[np.float64]] | None:
        """The nll and gradient of a context's questions, if known."""
        with self._explained():
            found = next(self._read_rows("gradients", model, scaling, "AND question = ?", questions), None)
        return None if found is None else (found[1], np.array(json.loads(found[2])))

    def record_gradient(
        self, model: str, scaling: str, questions: str, nll: float, gradient: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Write a gradient; returns what is now stored, as `record` does."""
        with self._explained(), self._transaction():
            self._insert(model, scaling, [(questions, nll, json.dumps(gradient.tolist()))], "gradients")
            standing = self.find_gradient(model, scaling, questions)
        assert standing is not None
        return standing

    def forget(self, model: str, scaling: str, question: str) -> None:
        """Delete what is known about a question, so that it is measured again."""
        with self._explained(), self._transaction():
            for table in TABLES:
                self._db.execute(
                    f"DELETE FROM {table} WHERE question = ? AND candidate = "
                    "(SELECT id FROM candidates WHERE model = ? AND scaling = ?)",
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
        if candidates is None:
            with self._explained():
                rows = self._db.execute("SELECT model, scaling FROM candidates ORDER BY model, scaling")
                candidates = [(model, scaling) for model, scaling in rows]
        rows_of = ((candidate, self._read_all_rows(*candidate)) for candidate in dict.fromkeys(candidates))
        return write_outcomes(Path(path), rows_of, None if questions is None else set(questions), about)

    def load(self, path: str | Path) -> int:
        """Add the outcomes of an exported file; those already known stay. Returns the number of rows read."""
        tables = read_outcomes(path)
        with self._explained(), self._transaction():
            for table, by_candidate in tables.items():
                for (model, scaling), rows in by_candidate.items():
                    self._insert(model, scaling, rows, table)
        return sum(len(rows) for by_candidate in tables.values() for rows in by_candidate.values())

    def close(self) -> None:
        """Close the file; the ledger can't be used afterwards."""
        self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _insert(self, model: str, scaling: str, rows: Any, table: str = "outcomes") -> None:
        if identify(self.path) != self._file:
            raise LedgerError(
                f"{self.path} was deleted or replaced while it was in use, and what is written now would be lost; "
                "start again with the file that is to be kept"
            )
        self._db.execute("INSERT OR IGNORE INTO candidates (model, scaling) VALUES (?, ?)", (model, scaling))
        (candidate,) = self._db.execute(
            "SELECT id FROM candidates WHERE model = ? AND scaling = ?", (model, scaling)
        ).fetchone()
        self._db.executemany(
            f"INSERT OR IGNORE INTO {table} (candidate, question, {TABLES[table]}, checksum) VALUES (?, ?, ?, ?, ?)",
            ((candidate, *row, compute_checksum(model, scaling, *row)) for row in rows),
        )

    def _transaction(self) -> AbstractContextManager[None]:
        return transaction(self._db)

    def _explained(self) -> AbstractContextManager[None]:
        return explained_errors(self.path)
