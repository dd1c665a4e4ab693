"""Every outcome ever measured, on disk: what makes a crash boring.

An outcome, a free answer's text or a gradient is filed under its content (model fingerprint, scaling, question with
its context), so whoever needs it finds it: the same run after `kill -9`, another search, another notebook. One SQLite
file, written by any number of processes.
"""

import csv
import gzip
import io
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_utils.files import write_whole

_APPLICATION_ID = 0x4C52_5331  # "LRS1" in the file's header: ours, and this layout
_SCHEMA = """
CREATE TABLE candidates (id INTEGER PRIMARY KEY, model TEXT NOT NULL, scaling TEXT NOT NULL, UNIQUE (model, scaling));
CREATE TABLE outcomes (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, exact INTEGER NOT NULL, nll REAL NOT NULL,
    PRIMARY KEY (candidate, question)
) WITHOUT ROWID;
"""
_LATER = """
CREATE TABLE IF NOT EXISTS texts (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, max_new_tokens INTEGER NOT NULL,
    text TEXT NOT NULL, PRIMARY KEY (candidate, question, max_new_tokens)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gradients (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, nll REAL NOT NULL,
    gradient TEXT NOT NULL, PRIMARY KEY (candidate, question)
) WITHOUT ROWID;
"""
_COLUMNS = ["model", "scaling", "question", "exact", "nll", "max_new_tokens", "text"]


class LedgerError(OSError):
    """The ledger file can't be read or written; nothing recorded before is lost and the file is left as it is."""


class Ledger:
    """Outcomes in an SQLite file (write-ahead log), made if it doesn't exist.

    Raises
    ------
    LedgerError
        The file is no SQLite database, another program's, or damaged (it is never overwritten); the disk is full or
        the file can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            if self.path.exists() and (head := self.path.open("rb").read(16)) not in (b"", b"SQLite format 3\0"):
                raise sqlite3.DatabaseError(f"it begins with {head!r}")  # SQLite itself overwrites very short files
            # autocommit: transactions are the explicit ones below
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        # emptiness before owner: a process that makes the ledger between the two must not look like a stranger
        empty = not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        (owner,) = self._db.execute("PRAGMA application_id").fetchone()
        if owner != _APPLICATION_ID and not (owner == 0 and empty):
            raise LedgerError(f"{self.path} is another program's SQLite file, not a ledger; give another path")
        (health,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if health != "ok":
            raise sqlite3.DatabaseError(health)
        self._use_write_ahead_log()
        self._db.execute("PRAGMA synchronous = NORMAL")  # survives any kill; a power cut may cost the last second
        if empty:
            with self._transaction():
                if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():  # another process's turn?
                    self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    for statement in _SCHEMA.strip().split(";\n"):
                        self._db.execute(statement)
        later = "SELECT count(*) FROM sqlite_master WHERE name IN ('texts', 'gradients')"
        if self._db.execute(later).fetchone()[0] < 2:
            with self._transaction():  # ledgers of before have none
                for statement in _LATER.strip().split(";\n"):
                    self._db.execute(statement)

    def _use_write_ahead_log(self) -> None:
        patience = time.monotonic() + 60
        while True:  # SQLite's own timeout doesn't cover this switch, which needs the file for itself
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > patience:
                    raise
                time.sleep(0.02)

    def find(self, model: str, scaling: str) -> dict[str, tuple[bool, float]]:
        """All outcomes of one candidate: question key -> (exact, nll)."""
        with self._explained():
            rows = self._db.execute(
                "SELECT question, exact, nll FROM outcomes JOIN candidates ON id = candidate "
                "WHERE model = ? AND scaling = ?",
                (model, scaling),
            )
            return {question: (bool(exact), nll) for question, exact, nll in rows}

    def known(self, model: str, questions: Sequence[str]) -> dict[str, dict[str, tuple[bool, float]]]:
        """What is known of some questions under any scaling: scaling key -> question key -> (exact, nll)."""
        found: dict[str, dict[str, tuple[bool, float]]] = {}
        with self._explained():
            rows = self._db.execute(
                "SELECT scaling, question, exact, nll FROM candidates JOIN outcomes ON id = candidate "
                "WHERE model = ? AND question IN (SELECT value FROM json_each(?)) ORDER BY id",
                (model, json.dumps(list(questions))),
            )
            for scaling, question, exact, nll in rows:
                found.setdefault(scaling, {})[question] = (bool(exact), nll)
        return found

    def record(
        self, model: str, scaling: str, questions: Sequence[str], exact: NDArray[np.bool_], nll: NDArray[np.float64]
    ) -> list[tuple[bool, float]]:
        """Write the outcomes of one context, all or none; returns what now stands there.

        What another process wrote first stays, so that all processes go on with the same numbers.
        """
        with self._explained(), self._transaction():
            self._insert(model, scaling, zip(questions, map(int, exact), map(float, nll), strict=True))
            standing = self.find(model, scaling)
        return [standing[question] for question in questions]

    def find_texts(self, model: str, scaling: str, max_new_tokens: int) -> dict[str, str]:
        """All free answers of one candidate that were cut at `max_new_tokens`: question key -> text."""
        with self._explained():
            return dict(
                self._db.execute(
                    "SELECT question, text FROM texts JOIN candidates ON id = candidate "
                    "WHERE model = ? AND scaling = ? AND max_new_tokens = ?",
                    (model, scaling, max_new_tokens),
                )
            )

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
            found = self._db.execute(
                "SELECT nll, gradient FROM gradients JOIN candidates ON id = candidate "
                "WHERE model = ? AND scaling = ? AND question = ?",
                (model, scaling, questions),
            ).fetchone()
        return None if found is None else (found[0], np.array(json.loads(found[1])))

    def record_gradient(
        self, model: str, scaling: str, questions: str, nll: float, gradient: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Write a gradient; returns what now stands there, as `record` does."""
        with self._explained(), self._transaction():
            self._insert(model, scaling, [(questions, nll, json.dumps(gradient.tolist()))], "gradients")
            standing = self.find_gradient(model, scaling, questions)
        assert standing is not None
        return standing

    def forget(self, model: str, scaling: str, question: str) -> None:
        """Delete what is known of a question, so that it is measured again."""
        with self._explained(), self._transaction():
            for table in ("outcomes", "texts", "gradients"):
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
            Question keys; what isn't measured is left out.
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
        wanted = None if questions is None else set(questions)
        outcomes: list[list[Any]] = []
        others: list[list[Any]] = []
        for model, scaling in dict.fromkeys(candidates):
            outcomes += (
                [model, scaling, question, int(exact), f"{nll:.9g}"]  # 9 digits: all that float32 holds
                for question, (exact, nll) in sorted(self.find(model, scaling).items())
                if wanted is None or question in wanted
            )
            with self._explained():
                found = self._db.execute(
                    "SELECT question, max_new_tokens, text FROM texts JOIN candidates ON id = candidate "
                    "WHERE model = ? AND scaling = ? ORDER BY question, max_new_tokens",
                    (model, scaling),
                ).fetchall()
                gradients = self._db.execute(
                    "SELECT question, nll, gradient FROM gradients JOIN candidates ON id = candidate "
                    "WHERE model = ? AND scaling = ? ORDER BY question",
                    (model, scaling),
                ).fetchall()
            others += (
                [model, scaling, question, "", "", most, json.dumps(text)]  # without line breaks
                for question, most, text in found
                if wanted is None or question in wanted
            )
            others += (
                [model, scaling, q, "", repr(nll), "", text]
                for q, nll, text in gradients
                if wanted is None or q in wanted
            )
        text = io.StringIO()
        text.write(f"# {about}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS if others else _COLUMNS[:5])
        writer.writerows(outcomes)
        writer.writerows(others)
        path = Path(path)
        content = text.getvalue().encode()
        if not path.exists() or gzip.decompress(path.read_bytes()).partition(b"\n")[2] != content.partition(b"\n")[2]:
            write_whole(path, gzip.compress(content, mtime=0))  # same rows, same file, whoever found them again
        return len(outcomes) + len(others)

    def load(self, path: str | Path) -> int:
        """Add the outcomes of an exported file; those already known stay. Returns the number of rows read."""
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                reader = csv.reader(line for line in file if not line.startswith("#"))
                if next(reader, None) not in (_COLUMNS, _COLUMNS[:5]):  # without texts
                    raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
                outcomes: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
                texts: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
                gradients: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
                for model, scaling, question, exact, nll, *text in reader:
                    if exact:
                        row: tuple[Any, ...] = (question, int(exact), float(np.float32(nll)))
                        outcomes.setdefault((model, scaling), []).append(row)
                    elif nll:
                        gradients.setdefault((model, scaling), []).append((question, float(nll), text[1]))
                    else:
                        row = (question, int(text[0]), json.loads(text[1]))
                        texts.setdefault((model, scaling), []).append(row)
        except (ValueError, IndexError, EOFError, gzip.BadGzipFile) as error:
            raise LedgerError(f"{path} is no exported ledger, or damaged: {error}") from error
        tables = {"outcomes": outcomes, "texts": texts, "gradients": gradients}
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
        self._db.execute("INSERT OR IGNORE INTO candidates (model, scaling) VALUES (?, ?)", (model, scaling))
        (candidate,) = self._db.execute(
            "SELECT id FROM candidates WHERE model = ? AND scaling = ?", (model, scaling)
        ).fetchone()
        self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?, ?)", ((candidate, *row) for row in rows))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ours, which say what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error) or "disk I/O" in str(error):
                free = shutil.disk_usage(self.path.parent).free // 2**20
                raise LedgerError(
                    f"no room to write {self.path} ({error}; {free} MiB free). Everything recorded so far is kept: "
                    "make room and run the same command again"
                ) from error
            raise LedgerError(f"{self.path} can't be used as a ledger: {error}") from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.path} is not a ledger, or damaged ({error}); it is left as it is: move it away "
                "or give another path"
            ) from error
