import numpy as np
import pandas as pd
import record


def test_each_method_is_timed_from_an_empty_ledger_and_judged_on_the_same_contexts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "STEPS", (8, 9))
    monkeypatch.setattr(record, "CONTEXTS", (4, 4, 4))
    monkeypatch.setattr(record, "CANDIDATES", 20)
    rows = pd.DataFrame(record.time_methods(tiny, 3, "short", tmp_path))
    decoding = "the paper's GA, decoding each answer"
    assert list(rows["method"]) == ["find_scaling", "find_scaling", "the paper's GA", decoding]
    assert list(rows["steps"]) == [8, 9, 20, 20]  # a random model reaches no goal
    assert (rows["minutes"] > 0).all()
    assert rows["answers"].iloc[0] < rows["answers"].iloc[1]
    assert rows["answers"].iloc[2] == 20 * 4 * 3
    assert (rows["low"] <= rows["points"]).all()
    assert (rows["points"] <= rows["high"]).all()
    assert np.isfinite(rows["perplexity %"].iloc[:2]).all()
    assert len({*map(str, tmp_path.iterdir())}) >= 2  # a ledger each


def test_the_last_goal_ends_the_calls(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "GOALS", {"short": (-1,)})
    monkeypatch.setattr(record, "STEPS", (8, 9))
    monkeypatch.setattr(record, "CONTEXTS", (4, 4, 4))
    rows = record.time_methods(tiny, 3, "short", tmp_path)
    assert [next(rows)["steps"], next(rows)["method"]] == [8, "the paper's GA"]


def test_rows_of_a_task_replace_earlier_ones_and_leave_the_others(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("result_tables.RESULTS", tmp_path)
    rows = pd.DataFrame({"method": ["find_scaling"], "points": [1.0]})
    for keys, points in (("short", 1.0), ("uuid", 2.0), ("short", 3.0)):
        record.write_rows(rows.assign(model="tiny", pairs=3, keys=keys, points=points), tiny)
    written = pd.read_csv(tmp_path / "record.csv", comment="#")
    assert list(zip(written["keys"], written["points"], strict=True)) == [("uuid", 2.0), ("short", 3.0)]
