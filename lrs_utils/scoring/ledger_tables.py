"""The file of a ledger: its tables, and how a file that is foreign, damaged or unwritable is told from a sound one."""

import sqlite3
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

_APPLICATION_ID = 0x4C52_5331  # "LRS1" in the file's header: ours, and this layout
# "IF NOT EXISTS", as older ledgers have only the first two
_SCHEMA = """
CREATE TABLE IF NOT EXISTS
candidates (id INTEGER PRIMARY KEY, model TEXT NOT NULL, scaling TEXT NOT NULL, UNIQUE (model, scaling));
CREATE TABLE IF NOT EXISTS outcomes (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, exact INTEGER NOT NULL, nll REAL NOT NULL,
    PRIMARY KEY (candidate, question)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, max_new_tokens INTEGER NOT NULL,
    text TEXT NOT NULL, PRIMARY KEY (candidate, question, max_new_tokens)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gradients (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, nll REAL NOT NULL,
    gradient TEXT NOT NULL, PRIMARY KEY (candidate, question)
) WITHOUT ROWID;
"""
TABLES = {"outcomes": "exact, nll", "texts": "max_new_tokens, text", "gradients": "nll, gradient"}
_VERSION = 1  # rows have checksums

Row = tuple[Any, ...]  # model, scaling, question, and the columns of a table


class LedgerError(OSError):
    """The ledger file can't be read or written; nothing recorded before is lost and the file is left unchanged."""


def open_database(path: Path) -> sqlite3.Connection:
    """Connect to a ledger file; an empty one gets its tables, an older one the new, and any other file is refused.

    Transactions are not begun by the connection: `transaction` does that.
    """
    _refuse_strangers(path)
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        _prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database


def compute_checksum(*row: Any) -> int:
    """The checksum of a row, its candidate included."""
    return zlib.crc32(repr(row).encode())


def identify(path: Path) -> tuple[int, int] | None:
    """The identity of the file at a path; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Write all of a block's rows, or none."""
    with database:  # commits, or rolls back after an error
        database.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, which say what to do."""
    try:
        yield
    except sqlite3.ProgrammingError as error:  # closed, or another thread's
        raise LedgerError(f"{path}: {error}. The file is sound; open a Ledger of its own where it is needed") from error
    except sqlite3.OperationalError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            raise LedgerError(
                f"no room to write {path} ({error}). Everything recorded so far is kept: make room and run "
                "the same command again"
            ) from error
        if name:
            raise LedgerError(
                f"{path} can't be used as a ledger: {error}. Everything recorded so far is kept"
            ) from error
        raise LedgerError(f"{path} is damaged ({error}); it is left as it is: move it away") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise LedgerError(
            f"{path} is not a ledger, or damaged ({error}); it is left as it is: move it away or give another path"
        ) from error


def _refuse_strangers(path: Path) -> None:
    """Raise for a file that is not a sound ledger, before SQLite opens it.

    Even a connection that only reads may leave files beside another program's database, and closing one that may write
    moves the content of the write-ahead log into the file.
    """
    if not path.exists() or not path.stat().st_size:
        return
    page = _read_first_page(path)
    # sqlite.org/fileformat: the application's id, and the number of tables and indexes
    owner, n_tables = int.from_bytes(page[68:72], "big"), int.from_bytes(page[103:105], "big")
    # a file without tables is one that another process is about to make a ledger
    if owner != _APPLICATION_ID and (owner or n_tables):
        raise LedgerError(f"{path} is another program's SQLite file, not a ledger; give another path")
    # where there is no write-ahead log, only a connection that may write can undo a write that was cut off
    mode = "rw" if owner == _APPLICATION_ID and path.with_name(f"{path.name}-journal").exists() else "ro"
    with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, timeout=60)) as reader:
        (health,) = reader.execute("PRAGMA quick_check(1)").fetchone()
    if health != "ok":
        raise sqlite3.DatabaseError(health)


def _read_first_page(path: Path) -> bytes:
    """The beginning of an SQLite file's first page, from its write-ahead log if that has it."""
    with path.open("rb") as file:
        page = file.read(512)
    if not page.startswith(b"SQLite format 3\0"):
        raise sqlite3.DatabaseError(f"it begins with {page[:16]!r}")  # SQLite itself would overwrite a file of one byte
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and len(content := log.read_bytes()) > 32:
        # a header of 32 bytes with page size and salt, then frames: 24 bytes with page number and salt, and the page
        size, salt = int.from_bytes(content[8:12], "big"), content[16:24]
        for at in range(32, len(content), 24 + size):
            if content[at : at + 4] == b"\0\0\0\1" and content[at + 8 : at + 16] == salt:
                page = content[at + 24 : at + 24 + 512]
    return page


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    mode = _use_write_ahead_log(database)
    # with the log: survives any kill, and a power cut may cost the last second
    database.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")
    if mode != "wal":
        print(f"{path}: no write-ahead log here (journal mode {mode}); writing is slower", file=sys.stderr)
    if _read_version(database) < _VERSION:
        with transaction(database):
            if _read_version(database) < _VERSION:  # another process may have been first
                _bring_up_to_date(database)


def _use_write_ahead_log(database: sqlite3.Connection) -> str:
    """Ask for the log; returns the journal mode that the file has now."""
    patience = time.monotonic() + 60
    while True:  # SQLite's own timeout doesn't cover this switch, which needs the file for itself
        try:
            return str(database.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > patience:
                raise
            time.sleep(0.02)


def _read_version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _bring_up_to_date(database: sqlite3.Connection) -> None:
    database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    for statement in _SCHEMA.strip().split(";\n"):
        database.execute(statement)
    database.create_function("checksum", -1, compute_checksum, deterministic=True)
    for table, columns in TABLES.items():
        database.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER")
        database.execute(
            f"UPDATE {table} SET checksum = "
            f"(SELECT checksum(model, scaling, question, {columns}) FROM candidates WHERE id = candidate)"
        )
    database.execute(f"PRAGMA user_version = {_VERSION}")
