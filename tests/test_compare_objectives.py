import compare_objectives
import numpy as np
import pandas as pd
import pytest

from lrs_utils import LayerScaling, Ledger, score, tasks
from lrs_utils.tasks import GENERAL


def test_objectives_leave_out_what_their_names_say():
    for name, searched in compare_objectives.OBJECTIVES.items():
        left_out = {*GENERAL} - {*searched}
        if name == "all":
            assert not left_out
        elif name == "all but keys":
            assert left_out == {"uuid", "short"}
        elif name.startswith("all but "):
            assert left_out == {name.removeprefix("all but ")}
        else:
            assert searched == [name]


def test_options_are_known_where_the_right_one_is_likeliest(tiny, tmp_path):
    question = [tasks.Question("", "", f" {answer}", place) for place, answer in enumerate(("a", "b", "c"))]
    suite = tasks.Suite("capitals-3", tuple(tasks.Probe(f"{n} is", tuple(question), 3) for n in range(4)))
    none = LayerScaling.identity(tiny.num_layers)
    verdicts = compare_objectives.read_answers(tiny, suite, none, Ledger(tmp_path / "ledger.sqlite"))
    nll = score(tiny, suite, [none]).nll[0]
    assert verdicts[:, 0].tolist() == [float(row[0] == row.min()) for row in nll]


def test_rows_replace_those_of_the_same_search_and_p_is_corrected_over_all(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_objectives, "TABLE", tmp_path / "objectives.csv")
    monkeypatch.setattr("result_tables.RESULTS", tmp_path)
    rows = pd.DataFrame({"test": ["lines", "book"], "measure": "accuracy", "change": [1.0, 2.0], "p": [0.01, np.nan]})
    for objective in ("all", "lines", "all"):
        compare_objectives.write_rows(rows.assign(model="tiny", objective=objective, seed=0, space="heads"))
    written = pd.read_csv(tmp_path / "objectives.csv", comment="#")
    assert written["objective"].tolist() == ["lines", "lines", "all", "all"]
    assert written["p"].dropna().tolist() == pytest.approx([0.02, 0.02])
