import gzip
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lrs_utils.ledger import Ledger, LedgerError

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
        "import sys, numpy as np; from lrs_utils.ledger import Ledger; me = sys.argv[2]\n"
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


def test_a_ledger_and_an_export_of_before_texts_are_read(ledger, tmp_path):
    ledger.record("m", "s", KEYS[:1], [True], [0.5])
    ledger._db.execute("DROP TABLE texts")
    ledger.close()
    again = Ledger(ledger.path)
    assert again.find("m", "s") == {KEYS[0]: (True, 0.5)}
    assert again.record_texts("m", "s", 8, KEYS[:1], ["text"]) == ["text"]
    old = tmp_path / "old.csv.gz"
    old.write_bytes(gzip.compress(f"# old\nmodel,scaling,question,exact,nll\nm,t,{KEYS[0]},1,0.25\n".encode()))
    assert again.load(old) == 1
    assert again.find("m", "t") == {KEYS[0]: (True, 0.25)}
