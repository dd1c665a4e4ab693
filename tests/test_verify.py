import gzip
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import verify
from verify import _read, compared

from lrs_utils import Ledger
from lrs_utils import notebook as reproduce
from lrs_utils.notebook import Run, sampled

QUESTIONS = [f"q{i}" for i in range(50)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Committed: fifty outcomes behind notebook 01, and a table of two pieces."""
    results = tmp_path / "repository" / "data" / "results"
    ledger = Ledger(tmp_path / "first.sqlite")
    ledger.record("model", "pi|1.0", QUESTIONS, np.arange(50) % 2 == 0, np.arange(50) / 10)
    ledger.export(results / "01_a.outcomes.csv.gz", [("model", "pi|1.0")], QUESTIONS, "about")
    about = json.dumps({"pieces": ["a", "b"], "seed": 0})
    (results / "decay.csv").write_text(f"# {about} | command\npiece,value\na,1.0\na,2.0\nb,30.0\nb,40.0\n")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path / "repository")
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LRS_RESULTS", str(tmp_path / "run"))
    monkeypatch.setenv("LRS_VERIFY", "3")
    return results


def verified(tmp_path, results, nll_off=0.0, table_off=0.0):
    """A notebook that measures what isn't known and draws its table, and what comes of comparing it."""
    run = Run("01_a", "cpu", {}, {}, {}, False)
    known = run.ledger.find("model", "pi|1.0")
    for question in set(QUESTIONS) - set(known):
        i = QUESTIONS.index(question)
        run.ledger.record("model", "pi|1.0", [question], np.array([i % 2 == 0]), np.array([i / 10 + nll_off]))
    run.ship([("model", "pi|1.0")], QUESTIONS)
    pieces = {"a": [1.0, 2.0], "b": [30.0, 40.0]}
    measure = {
        p: partial(lambda p, v: pd.DataFrame({"piece": p, "value": np.add(v, table_off)}), p, v)
        for p, v in pieces.items()
    }
    run.table("decay", measure, seed=0)
    return len(known), {f"{c.name} {c.note}".strip(): c for c in compared(tmp_path / "run", results, 3)}


def test_a_sample_is_measured_again_and_agrees(repository, tmp_path):
    n_known, found = verified(tmp_path, repository, nll_off=0.01)
    assert n_known == 30
    assert all(result.agrees and result.off == 0 for result in found.values())
    assert set(found) == {"01_a.outcomes.csv.gz", "decay.csv 2 of 4 rows"}, "not a table with its own copy"
    assert found["01_a.outcomes.csv.gz"].values == 20 * 2
    assert {*sampled(_read(repository / "01_a.outcomes.csv.gz"), 3)["question"]} != {
        *sampled(_read(repository / "01_a.outcomes.csv.gz"), 4)["question"]
    }


@pytest.mark.parametrize("again", [["a"], []])
def test_pieces_that_take_too_long_are_not_measured_again(again, repository, tmp_path):
    def too_long():
        raise AssertionError

    pieces = {"a": lambda: pd.DataFrame({"piece": ["a", "a"], "value": [1.0, 2.0]}), "b": too_long}
    Run("01_a", "cpu", {}, {}, {}, False).table("decay", pieces, again=again, seed=0)
    [result] = compared(tmp_path / "run", repository, 3)
    assert (result.off, result.note) == ((0, "2 of 4 rows") if again else (0, ""))


def test_what_does_not_come_again_is_told(repository, tmp_path):
    _, found = verified(tmp_path, repository, nll_off=0.8, table_off=3.0)
    assert not found["01_a.outcomes.csv.gz"].agrees
    assert found["01_a.outcomes.csv.gz"].off == 20
    assert not found["decay.csv 2 of 4 rows"].agrees


def test_a_changed_number_in_a_committed_result_is_told(repository, tmp_path):
    path = repository / "01_a.outcomes.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    [first, *_] = sampled(_read(path), 3)["question"]
    line = next(line for line in text.splitlines() if f",{first}," in line)
    path.write_bytes(gzip.compress(text.replace(line, line.rpartition(",")[0] + ",99").encode()))
    _, found = verified(tmp_path, repository)
    assert found[path.name].off == 1


def test_texts_and_gradients_are_compared_too(tmp_path):
    for folder, text in ((tmp_path / "committed", "Rome"), (tmp_path / "run" / "data" / "results", "Paris")):
        ledger = Ledger(folder / "ledger.sqlite")
        ledger.record("model", "pi|1.0", ["q"], np.array([True]), np.array([0.5]))
        ledger.record_texts("model", "pi|1.0", 8, ["t"], [text])
        ledger.record_gradient("model", "pi|1.0", "g", 0.25, np.full((2, 3), 0.5 + len(text) / 1e4))
        ledger.export(folder / "01_a.outcomes.csv.gz", [("model", "pi|1.0")], ["q", "t", "g"], "about")
    [result] = compared(tmp_path / "run", tmp_path / "committed", 3)
    assert (result.values, result.off) == (3 * 3, 1)


def test_a_piece_may_lack_columns_and_stands_at_its_own_place(tmp_path):
    for folder in ("committed", "run/again"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "committed" / "a.csv").write_text("# about\nvalue,other\n1,\n2,5\n3,\n4,\n")
    piece = tmp_path / "run" / "again" / "a.csv"
    for text, off in (("# 1 of 2: b\nvalue\n3\n4\n", 0), ("# 0 of 2: a\nvalue\n3\n4\n", 2)):
        piece.write_text(text)
        [result] = compared(tmp_path / "run", tmp_path / "committed", 3)
        assert (result.off, result.values) == (off, 2)


def test_seconds_are_not_compared(repository, tmp_path):
    for folder in (repository, tmp_path / "run" / "data" / "results"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prices.csv").write_text("way,seconds\na,1\n" if folder == repository else "way,seconds\na,2\n")
        (folder / "derived.csv").write_text("gain\n1\n" if folder == repository else "gain\n2\n")
    found = {result.name: result for result in compared(tmp_path / "run", repository, 3)}
    assert {name: result.agrees for name, result in found.items()} == {"prices.csv": True, "derived.csv": False}
    assert verify.Compared("empty", 0, 0, "").agrees is False
