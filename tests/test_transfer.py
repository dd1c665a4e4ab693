"""Notebook 07's tasks and texts that no search saw, on a tiny model and made-up numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import transfer

from lrs_utils import LayerScaling, Ledger


def made_up():
    rng = np.random.default_rng(0)
    plain = pd.DataFrame({"right": rng.random(20), "nll": rng.random(20)})
    better = plain.assign(right=plain["right"] + 0.1)
    text = pd.DataFrame({"nll": rng.random(20)})
    worse = text + np.log(1.05)
    tables = {("pairs", "no scaling"): plain, ("pairs", "best"): better}
    tables |= {("book", "no scaling"): text, ("book", "best"): worse}
    return pd.concat([table.assign(on=on, scaling=name) for (on, name), table in tables.items()])


def test_changes_are_points_of_accuracy_and_per_cent_of_perplexity():
    changes = transfer.measure_changes(made_up()).set_index(["on", "scaling"])
    pairs, book = changes.loc[("pairs", "best")], changes.loc[("book", "best")]
    assert pairs["change"] == pytest.approx(10)
    assert book["change"] == pytest.approx(5)
    assert book["value"] == pytest.approx(1.05 * changes.loc[("book", "no scaling"), "value"])
    assert pairs["p"] < 0.05
    assert changes.loc[("pairs", "no scaling"), "p"] == 1
    assert transfer.tell(book) == "+5.0 % [+5.0, +5.0]*"
    rows = changes.xs("best", level="scaling")
    assert transfer.count_changes(rows) == (1, 0), "texts are no tasks"
    assert transfer.list_changes(rows) == "pairs +10.0, book +5.0 %"


def test_a_figure_has_tasks_above_and_texts_below():
    change = transfer.measure_changes(made_up()).set_index(["scaling", "on"])
    above, below = transfer.draw_changes(change, {"best": ("retrieval alone", "C0")}).axes
    plt.close("all")
    assert [label.get_text() for label in above.get_yticklabels()] == ["pairs"]
    assert [label.get_text() for label in below.get_yticklabels()] == ["book"]
    assert above.lines[1].get_xdata() == pytest.approx(10)


def test_every_probe_is_measured_with_every_scaling(tiny, tmp_path):
    ask = transfer.Transfer(
        tiny, Ledger(tmp_path / "l.sqlite"), "short", [2, 6], 4, 2, 3, 2, 2, 2, "factbook", 2, 2,
        lambda text, scaling: np.full(3, len(text) * scaling.factors[0]), {"a book": "word"},
    )  # fmt: skip
    probes = ask.probes()
    assert [*probes][:2] == ["short keys, 2 pairs", "short keys, 6 pairs"]
    scaling = LayerScaling.uniform(0.9, 2)
    pieces = transfer.name_pieces(probes, {"no scaling": LayerScaling.identity(2), "best": scaling})
    assert len(pieces) == 2 * len(probes)
    rows = {name: pieces[f"{name} | best"]() for name in probes}
    assert all(set(of["scaling"]) == {"best"} and set(of["on"]) == {name} for name, of in rows.items())
    assert [len(rows[f"short keys, {k} pairs"]) for k in (2, 6)] == [2, 1], "the longest have half the contexts"
    assert rows["capitals, closed book"]["right"].isin([0, 1]).all()
    assert rows["a book"]["nll"].tolist() == [4 * 0.9] * 3
    assert rows["documents, 2"]["right"].between(0, 1).all()
