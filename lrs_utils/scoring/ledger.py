"""Every outcome ever measured, on disk, so that a crash loses nothing.

An outcome, a free answer's text or a gradient is stored under its content (model fingerprint, scaling, question with
its context), so any later run finds it: the same run after `kill -9`, another search, another notebook. It is one
SQLite file, written by any number of processes. Each row has a checksum, so a damaged number raises an error.
"""

import csv
import gzip
import io
import json
import math
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from lrs_utils.models.download import write_whole

_APPLICATION_ID = 0x4C52_5331  # "LRS1" in the file's header: ours, and this layout
_SCHEMA = """
CREATE TABLE candidates (id INTEGER PRIMARY KEY, model TEXT NOT NULL, scaling TEXT NOT NULL, UNIQUE (model, scaling));
CREATE TABLE outcomes (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, exact INTEGER NOT NULL, nll REAL NOT NULL,
    PRIMARY KEY (candidate, question)
) WITHOUT ROWID;
"""
# added later: older ledgers are brought up to date when they are opened
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
_TABLES = {"outcomes": "exact, nll", "texts": "max_new_tokens, text", "gradients": "nll, gradient"}
_VERSION = 1  # rows have checksums
_COLUMNS = ["model", "scaling", "question", "exact", "nll", "max_new_tokens", "text"]


class LedgerError(OSError):
    """The ledger file can't be read or written; nothing recorded before is lost and the file is left unchanged."""


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
            self._refuse_strangers()
            # autocommit: transactions are the explicit ones below
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
            self._file = _identity(self.path)

    def _refuse_strangers(self) -> None:
        """Raise for a file that is not a sound ledger, before a connection that may write is opened.

        Closing such a connection would move the content of a write-ahead log into the file.
        """
        if not self.path.exists():
            return
        head, page = self.path.open("rb").read(16), _first_page(self.path)
        if head not in (b"", b"SQLite format 3\0"):
            raise sqlite3.DatabaseError(f"it begins with {head!r}")  # SQLite itself overwrites very short files
        owner, n_tables = int.from_bytes(page[68:72], "big"), int.from_bytes(page[103:105], "big")
        # a file without tables is one that another process is about to make a ledger
        if page and owner != _APPLICATION_ID and (owner or n_tables):
            raise LedgerError(f"{self.path} is another program's SQLite file, not a ledger; give another path")
        if head:
            reader = sqlite3.connect(f"file:{quote(str(self.path.absolute()))}?mode=ro", uri=True, timeout=60)
            try:
                (health,) = reader.execute("PRAGMA quick_check(1)").fetchone()
            finally:
                reader.close()
            if health != "ok":
                raise sqlite3.DatabaseError(health)

    def _open(self) -> None:
        mode = self._use_write_ahead_log()
        # with the log: survives any kill, and a power cut may cost the last second
        self._db.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")
        if mode != "wal":
            print(f"{self.path}: no write-ahead log here (journal mode {mode}); writing is slower", file=sys.stderr)
        if self._version() < _VERSION:
            with self._transaction():
                if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():  # another process's turn?
                    self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    for statement in _SCHEMA.strip().split(";\n"):
                        self._db.execute(statement)
                if self._version() < _VERSION:
                    self._bring_up_to_date()

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _bring_up_to_date(self) -> None:
        for statement in _LATER.strip().split(";\n"):
            self._db.execute(statement)
        self._db.create_function("checksum", -1, _checksum, deterministic=True)
        for table, columns in _TABLES.items():
            self._db.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER")
            self._db.execute(
                f"UPDATE {table} SET checksum = "
                f"(SELECT checksum(model, scaling, question, {columns}) FROM candidates WHERE id = candidate)"
            )
        self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _use_write_ahead_log(self) -> str:
        patience = time.monotonic() + 60
        while True:  # SQLite's own timeout doesn't cover this switch, which needs the file for itself
            try:
                return str(self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > patience:
                    raise
                time.sleep(0.02)

    def _rows(self, table: str, model: str, scaling: str, where: str = "", *values: Any) -> Iterator[tuple[Any, ...]]:
        """A candidate's rows (question and the columns of `_TABLES`), each exactly as written."""
        rows = self._db.execute(
            f"SELECT question, {_TABLES[table]}, checksum FROM {table} JOIN candidates ON id = candidate "
            f"WHERE model = ? AND scaling = ? {where} ORDER BY question",
            (model, scaling, *values),
        )
        for *row, checksum in rows:
            self._refuse_damaged_row(table, model, scaling, row, checksum)
            yield tuple(row)

    def _refuse_damaged_row(self, table: str, model: str, scaling: str, row: Sequence[Any], checksum: int) -> None:
        if _checksum(model, scaling, *row) != checksum:
            raise LedgerError(
                f"{self.path} is damaged: in table {table} the row of question {row[0]!r:.80} (model {model}, scaling "
                f"{scaling:.60}) is not what was written. Nothing was changed: move the file away, or delete the row "
                "by `Ledger.forget(model, scaling, question)`, and run the same command again"
            )

    def find(self, model: str, scaling: str) -> dict[str, tuple[bool, float]]:
        """All outcomes of one candidate: question key -> (exact, nll)."""
        with self._explained():
            rows = self._rows("outcomes", model, scaling)
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
            rows = self._rows("outcomes", model, scaling, asked, json.dumps(list(questions)))
            standing = {question: (bool(exact), nll) for question, exact, nll in rows}
        return [standing[question] for question in questions]

    def find_texts(self, model: str, scaling: str, max_new_tokens: int) -> dict[str, str]:
        """All free answers of one candidate that were cut at `max_new_tokens`: question key -> text."""
        with self._explained():
            rows = self._rows("texts", model, scaling, "AND max_new_tokens = ?", max_new_tokens)
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
            found = next(self._rows("gradients", model, scaling, "AND question = ?", questions), None)
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
            for table in _TABLES:
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
        wanted = None if questions is None else set(questions)
        outcomes: list[list[Any]] = []
        others: list[list[Any]] = []
        for model, scaling in dict.fromkeys(candidates):
            with self._explained():
                exact_nll, found, gradients = (list(self._rows(table, model, scaling)) for table in _TABLES)
            outcomes += (
                [model, scaling, question, exact, f"{nll:.9g}"]  # 9 digits: all that float32 holds
                for question, exact, nll in exact_nll
                if wanted is None or question in wanted
            )
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
        path, content = Path(path), text.getvalue().encode()
        try:
            before = gzip.decompress(path.read_bytes())
        except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error):
            before = b""
        if before.partition(b"\n")[2] != content.partition(b"\n")[2]:
            write_whole(path, gzip.compress(content, mtime=0))  # same rows, same file, in any order
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
        except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
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
        if _identity(self.path) != self._file:
            raise LedgerError(
                f"{self.path} was deleted or replaced while it was in use, and what is written now would be lost; "
                "start again with the file that is to be kept"
            )
        self._db.execute("INSERT OR IGNORE INTO candidates (model, scaling) VALUES (?, ?)", (model, scaling))
        (candidate,) = self._db.execute(
            "SELECT id FROM candidates WHERE model = ? AND scaling = ?", (model, scaling)
        ).fetchone()
        self._db.executemany(
            f"INSERT OR IGNORE INTO {table} (candidate, question, {_TABLES[table]}, checksum) VALUES (?, ?, ?, ?, ?)",
            ((candidate, *row, _checksum(model, scaling, *row)) for row in rows),
        )

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
        except sqlite3.ProgrammingError as error:  # closed, or another thread's
            raise LedgerError(
                f"{self.path}: {error}. The file is sound; open a Ledger of its own where it is needed"
            ) from error
        except sqlite3.OperationalError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name == "SQLITE_FULL":
                raise LedgerError(
                    f"no room to write {self.path} ({error}). Everything recorded so far is kept: make room and run "
                    "the same command again"
                ) from error
            if name:
                raise LedgerError(
                    f"{self.path} can't be used as a ledger: {error}. Everything recorded so far is kept"
                ) from error
            raise LedgerError(f"{self.path} is damaged ({error}); it is left as it is: move it away") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise LedgerError(
                f"{self.path} is not a ledger, or damaged ({error}); it is left as it is: move it away "
                "or give another path"
            ) from error


def _checksum(model: str, scaling: str, *row: Any) -> int:
    return zlib.crc32(repr((model, scaling, *row)).encode())


def _identity(path: Path) -> tuple[int, int] | None:
    """The identity of the file at a path; None if there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _first_page(path: Path) -> bytes:
    """The beginning of an SQLite file's first page, from its write-ahead log if that has it (sqlite.org/fileformat)."""
    page, log = path.open("rb").read(512), path.with_name(f"{path.name}-wal")
    if log.exists() and len(content := log.read_bytes()) > 32:
        size, salt = int.from_bytes(content[8:12], "big"), content[16:24]
        for at in range(32, len(content), 24 + size):
            if content[at : at + 4] == b"\0\0\0\1" and content[at + 8 : at + 16] == salt:
                page = content[at + 24 : at + 24 + 512]
    return page
