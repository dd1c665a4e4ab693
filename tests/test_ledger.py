import gzip
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lrs_utils.scoring import ledger_tables
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.ledger_tables import LedgerError

KEYS = ["q0", "q1", "q2"]
EXACT, NLL = np.array([True, False, True]), np.array([0.1, 1.25, 2.0], np.float32).astype(float)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "new" / "ledger.sqlite")


def test_what_is_recorded_is_found_also_by_another_process(ledger):
    ledger.record("m", "s", KEYS, EXACT, NLL)
    expected = {"q0": (True, NLL[0]), "q1": (False, NLL[1]), "q2": (True, NLL[2])}
    assert ledger.find("m", "s") == expected
    assert ledger.find("m", "other") == ledger.find("other", "s") == {}
    assert Ledger(ledger.path).find("m", "s") == expected


def test_the_first_writer_of_an_outcome_wins(ledger):
    ledger.record("m", "s", KEYS[:1], EXACT[:1], NLL[:1])
    standing = ledger.record("m", "s", KEYS, ~EXACT, NLL + 1)
    assert standing == [(True, NLL[0]), (True, NLL[1] + 1), (False, NLL[2] + 1)]
    assert ledger.find("m", "s") == {"q0": (True, NLL[0]), "q1": (True, NLL[1] + 1), "q2": (False, NLL[2] + 1)}


def test_a_context_is_written_whole_or_not_at_all(ledger):
    with pytest.raises(ValueError, match="shorter"):
        ledger.record("m", "s", KEYS, EXACT[:2], NLL)
    assert len(ledger) == 0
    ledger.record("m", "s", KEYS, EXACT, NLL)
    assert len(ledger) == 3


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "ledger.sqlite"
    code = (
        "import sys, numpy as np; from lrs_utils.scoring.ledger import Ledger; me = sys.argv[2]\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for i in range(200): ledger.record('m', me, [f'q{i}'], np.array([True]), np.array([float(i)]))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    ledger = Ledger(path)
    assert len(ledger) == 400
    assert len(ledger.find("m", "a")) == len(ledger.find("m", "b")) == 200


def test_a_new_ledger_may_be_opened_by_several_at_once(tmp_path):
    def open_and_write(at):
        round_, writer = at
        barriers[round_].wait()
        with Ledger(tmp_path / f"{round_}.sqlite") as ledger:
            ledger.record("m", str(writer), KEYS, EXACT, NLL)

    barriers = [threading.Barrier(4) for _ in range(25)]
    with ThreadPoolExecutor(4) as pool:
        for round_ in range(25):
            list(pool.map(open_and_write, [(round_, writer) for writer in range(4)]))
            assert len(Ledger(tmp_path / f"{round_}.sqlite")) == 12


def test_a_foreign_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "photos.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"photos\.sqlite is another program's SQLite file"):
        Ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all, but quite long " * 40, b"x"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"notes\.txt is not a ledger, or damaged.*left as it is"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_damaged_ledger_is_refused_and_left_alone(ledger):
    for i in range(300):
        ledger.record("m", f"s{i}", KEYS, EXACT, NLL)
    ledger.close()
    content = bytearray(ledger.path.read_bytes())
    content[4096 * 3 : 4096 * 6] = b"\xff" * 4096 * 3
    ledger.path.write_bytes(content)
    with pytest.raises(LedgerError, match="is not a ledger, or damaged"):
        Ledger(ledger.path)
    assert ledger.path.read_bytes() == bytes(content)


def test_a_full_disk_loses_nothing_and_says_what_to_do(ledger):
    ledger.record("m", "s", KEYS, EXACT, NLL)
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own "database or disk is full"
    many = [f"k{i}" for i in range(10_000)]
    with pytest.raises(LedgerError, match=r"no room to write .*ledger\.sqlite .*is kept: make room and run the same"):
        ledger.record("m", "s", many, np.ones(10_000, bool), np.zeros(10_000))
    assert len(ledger.find("m", "s")) == 3
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    ledger.record("m", "s", many, np.ones(10_000, bool), np.zeros(10_000))
    assert len(ledger) == 10_003


def test_a_ledger_in_a_folder_that_is_a_file_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_exported_outcomes_come_back_exactly(ledger, tmp_path):
    nll = np.random.default_rng(0).random(3, np.float32).astype(float)
    ledger.record("m", "pi|1.0,0.9", KEYS, EXACT, nll)
    ledger.record("m", "left out", KEYS, EXACT, nll)
    path = tmp_path / "out" / "x.csv.gz"
    assert ledger.export(path, [("m", "pi|1.0,0.9"), ("m", "unknown")], KEYS[:2], "made by a test") == 2
    assert gzip.decompress(path.read_bytes()).decode().startswith("# made by a test\nmodel,scaling,")
    before = path.read_bytes()
    ledger.export(path, [("m", "pi|1.0,0.9")], KEYS[:2], "found again by another")
    assert path.read_bytes() == before
    other = Ledger(tmp_path / "other.sqlite")
    assert other.load(path) == other.load(path) == len(other) == 2
    assert other.find("m", "pi|1.0,0.9") == {k: ledger.find("m", "pi|1.0,0.9")[k] for k in KEYS[:2]}


def test_a_long_scaling_is_written_once_and_comes_back(ledger, tmp_path):
    rng = np.random.default_rng(0)
    keys = [",".join(f"{n:.5f}" for n in rng.random(2000)) for _ in range(2)]
    for key in keys:
        ledger.record("m", key, KEYS, EXACT, rng.random(3, np.float32).astype(float))
        ledger.record_texts("m", key, 8, KEYS[:2], ["a", "b"])
    path, other = tmp_path / "x.csv.gz", Ledger(tmp_path / "other.sqlite")
    assert ledger.export(path, None, None, "made by a test") == other.load(path) == 10
    assert len(gzip.decompress(path.read_bytes())) < 2.2 * sum(map(len, keys)), "once with outcomes, once with texts"
    for key in keys:
        assert other.find("m", key) == ledger.find("m", key)
        assert other.find_texts("m", key, 8) == ledger.find_texts("m", key, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"plain text", gzip.compress(b"a,b\n1,2\n"), gzip.compress(b"x" * 999)[:40]],
    ids=["empty", "plain", "other columns", "cut off"],
)
def test_a_damaged_export_is_refused_by_name(ledger, tmp_path, content):
    path = tmp_path / "shipped.csv.gz"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"shipped\.csv\.gz is no exported ledger, or damaged"):
        ledger.load(path)
    assert len(ledger) == 0


def test_texts_are_kept_exported_and_come_back(ledger, tmp_path):
    texts = ['one, "two"\n# three', ""]
    assert ledger.find_texts("m", "s", 8) == {}
    assert ledger.record_texts("m", "s", 8, KEYS[:2], texts) == texts
    assert ledger.record_texts("m", "s", 8, KEYS[:2], ["other", "other"]) == texts  # the first stays
    assert ledger.record_texts("m", "s", 9, KEYS[:1], ["longer"]) == ["longer"]
    path = tmp_path / "shipped.csv.gz"
    assert ledger.export(path, [("m", "s")], KEYS[:2], "made by a test") == 3
    other = Ledger(tmp_path / "other.sqlite")
    assert other.load(path) == 3
    assert other.find_texts("m", "s", 8) == dict(zip(KEYS[:2], texts, strict=True))
    assert other.find_texts("m", "s", 9) == {KEYS[0]: "longer"}


SCHEMA_OF_BEFORE = """
PRAGMA journal_mode = WAL;
PRAGMA application_id = 0x4C525331;
CREATE TABLE candidates (id INTEGER PRIMARY KEY, model TEXT NOT NULL, scaling TEXT NOT NULL, UNIQUE (model, scaling));
CREATE TABLE outcomes (
    candidate INTEGER NOT NULL REFERENCES candidates, question TEXT NOT NULL, exact INTEGER NOT NULL, nll REAL NOT NULL,
    PRIMARY KEY (candidate, question)
) WITHOUT ROWID;
INSERT INTO candidates VALUES (1, 'm', 's');
INSERT INTO outcomes VALUES (1, 'q0', 1, 0.5);
"""


def test_a_ledger_and_an_export_of_before_texts_are_read(ledger, tmp_path):
    with sqlite3.connect(tmp_path / "of-before.sqlite") as db:  # as ledgers were made at first
        db.executescript(SCHEMA_OF_BEFORE)
    db.close()
    again = Ledger(tmp_path / "of-before.sqlite")
    assert again.find("m", "s") == {KEYS[0]: (True, 0.5)}
    assert again.record_texts("m", "s", 8, KEYS[:1], ["text"]) == ["text"]
    old = tmp_path / "old.csv.gz"
    old.write_bytes(gzip.compress(f"# old\nmodel,scaling,question,exact,nll\nm,t,{KEYS[0]},1,0.25\n".encode()))
    assert again.load(old) == 1
    assert again.find("m", "t") == {KEYS[0]: (True, 0.25)}


def filled(path):
    """A ledger with a few dozen rows of each kind, all of it in the file itself; what is in it."""
    with Ledger(path) as ledger:
        for scaling in ("pi|1.0,1.2", "pi|1.0,1.3", "ntk|0.9,1.1"):
            keys = [f"{scaling[:3]} question {n}" for n in range(30)]
            ledger.record("m", scaling, keys, np.arange(30) % 3 == 0, np.arange(30) / 8)
            ledger.record_texts("m", scaling, 8, keys[:9], [f"answer {n}" for n in range(9)])
            ledger.record_gradient("m", scaling, keys[0], 0.5, np.ones((2, 4)))
        return contents(ledger)


def contents(ledger):
    """Everything that a reader of this ledger gets."""
    found = {}
    for scaling in ("pi|1.0,1.2", "pi|1.0,1.3", "ntk|0.9,1.1"):
        found |= {(scaling, key): row for key, row in ledger.find("m", scaling).items()}
        found |= {(scaling, key, "text"): row for key, row in ledger.find_texts("m", scaling, 8).items()}
        if gradient := ledger.find_gradient("m", scaling, f"{scaling[:3]} question 0"):
            found[scaling, "gradient"] = (gradient[0], gradient[1].tolist())
    known = ledger.known("m", [f"{kind} question {n}" for n in range(30) for kind in ("pi|", "ntk")])
    return found | {("known", s, q): row for s, rows in known.items() for q, row in rows.items()}


def test_a_flipped_bit_is_an_error_and_never_a_result(tmp_path):
    path = tmp_path / "l.sqlite"
    written, whole = filled(path), path.read_bytes()
    rng, verdicts = np.random.default_rng(0), {"refused": 0, "unharmed": 0, "lost": 0}
    for _ in range(200):
        damaged = bytearray(whole)
        at = int(rng.integers(len(damaged)))
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with Ledger(path) as ledger:
                found = contents(ledger)
        except LedgerError:
            verdicts["refused"] += 1
            continue
        assert found.items() <= written.items()  # a row that isn't found any more is measured again
        verdicts["unharmed" if found == written else "lost"] += 1
    print(verdicts)
    assert verdicts["refused"] > 20


def test_a_damaged_row_is_named_with_its_file_and_can_be_measured_again(ledger):
    ledger.record("m", "s", KEYS, EXACT, NLL)
    ledger._db.execute("UPDATE outcomes SET nll = 0.2 WHERE question = 'q1'")
    with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged: in table outcomes the row of question 'q1'"):
        ledger.find("m", "s")
    ledger.forget("m", "s", "q1")
    assert {*ledger.find("m", "s")} == {"q0", "q2"}


@pytest.mark.parametrize("refused", ["another program's", "not a ledger, or damaged"])
def test_a_refused_file_stays_as_it_is_with_its_write_ahead_log(tmp_path, refused):
    path = tmp_path / "l.sqlite"
    if "another" in refused:
        used = sqlite3.connect(path, isolation_level=None)
        used.executescript("PRAGMA journal_mode = WAL; CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1);")
    else:
        filled(path)
        used = Ledger(path)
        used.record("m", "s", KEYS, EXACT, NLL)
    killed = tmp_path / "killed"
    killed.mkdir()
    before = {name: (tmp_path / name).read_bytes() for name in ("l.sqlite", "l.sqlite-wal")}
    if "damaged" in refused:
        before["l.sqlite"] = before["l.sqlite"][: 3 * 4096].ljust(len(before["l.sqlite"]), b"\xff")
    for name, content in before.items():
        (killed / name).write_bytes(content)
    with pytest.raises(LedgerError, match=refused):
        Ledger(killed / "l.sqlite")
    assert {name: (killed / name).read_bytes() for name in before} == before
    used.close()


def test_misuse_is_not_called_damage(ledger):
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(LedgerError, match=r"thread.*The file is sound; open a Ledger of"),
    ):
        pool.submit(ledger.find, "m", "s").result()
    ledger.close()
    with pytest.raises(LedgerError, match=r"closed database.*The file is sound"):
        ledger.find("m", "s")


def test_without_a_write_ahead_log_every_write_waits_for_the_disk_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(ledger_tables, "_use_write_ahead_log", lambda database: "delete")
        ledger = Ledger(tmp_path / "l.sqlite")
    assert "l.sqlite: no write-ahead log here (journal mode delete)" in capsys.readouterr().err
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    ledger.record("m", "s", KEYS, EXACT, NLL)
    with Ledger(tmp_path / "other.sqlite") as other:
        assert other._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert other._db.execute("PRAGMA synchronous").fetchone() == (1,)
    assert capsys.readouterr().err == ""


def test_a_write_killed_without_a_write_ahead_log_is_undone(tmp_path):
    path = tmp_path / "l.sqlite"
    code = (
        "import os, sys, numpy as np; from lrs_utils.scoring import ledger, ledger_tables\n"
        "ledger_tables._use_write_ahead_log = lambda database: 'delete'\n"
        "own = ledger.Ledger(sys.argv[1]); own.record('m', 's', ['q0'], np.array([True]), np.array([0.5]))\n"
        "own._db.executescript('PRAGMA cache_size = 1; BEGIN; UPDATE outcomes SET exact = 0;')\n"
        "for i in range(1000): own._db.execute('INSERT INTO candidates (model, scaling) VALUES (?, ?)', (i, i))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert path.with_name("l.sqlite-journal").exists()
    with Ledger(path) as ledger:
        assert ledger.find("m", "s") == {"q0": (True, 0.5)}


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_ledger_that_goes_away_while_it_is_in_use_is_noticed(ledger, how):
    ledger.record("m", "s", KEYS[:1], EXACT[:1], NLL[:1])
    ledger.path.unlink()
    if how == "replaced":
        ledger.path.write_bytes(b"")
    with pytest.raises(LedgerError, match=r"ledger\.sqlite was deleted or replaced while it was in use"):
        ledger.record("m", "s", KEYS, EXACT, NLL)


def test_a_likelihood_that_is_no_number_is_refused_with_its_question(ledger):
    with pytest.raises(ValueError, match="the nll of question 'q1' under s is nan; it must be finite"):
        ledger.record("m", "s", KEYS, EXACT, np.array([1.0, np.nan, 2.0]))
    assert ledger.find("m", "s") == {}
