"""Notebook 04's and 06's `measured`: scalings against no scaling, context by context."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from measured import Measured, draw_lines, split_by_depth, tabulate_changes, tabulate_uniform, write_interval

from lrs_utils import LayerScaling, tasks
from lrs_utils.analysis.statistics import Interval
from lrs_utils.scoring.ledger import Ledger


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_measured_scores_by_name_and_remembers_what_to_ship(tiny, tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    measured = Measured(tiny, ledger)
    suite = tasks.kv_retrieval(3, 2, keys="short")
    scalings = {"none": LayerScaling.identity(tiny.num_layers), 1.5: LayerScaling.uniform(1.5, tiny.num_layers)}
    found = measured(suite, scalings)
    assert {name: values.shape for name, values in found.items()} == {"none": (2, 2, 3), 1.5: (2, 2, 3)}
    assert set(np.unique(found["none"][0])) <= {0.0, 1.0}
    assert (found["none"][1] > 0).all(), "the second is nll"
    assert measured.candidates == [scaling.key for scaling in scalings.values()]
    assert len(measured.questions) == 6
    ledger.export(
        tmp_path / "o.csv.gz", [(tiny.fingerprint, key) for key in measured.candidates], measured.questions, ""
    )
    again = Ledger(tmp_path / "again.sqlite")
    again.load(tmp_path / "o.csv.gz")
    np.testing.assert_array_equal(Measured(tiny, again)(suite, scalings)[1.5], found[1.5])


def test_parts_of_a_context_are_fifths():
    where = split_by_depth(np.linspace(0, 1, 20))
    assert {part: int(at.sum()) for part, at in where.items()} == {"beginning": 4, "middle": 12, "end": 4}
    assert sum(at.astype(int) for at in where.values()).tolist() == [1] * 20


def test_a_uniform_factor_is_compared_with_no_scaling_in_each_part():
    where = split_by_depth([0.0, 0.5, 1.0])
    base = np.zeros((2, 4, 3))
    worse = base.copy()
    worse[1, :, 2] = 0.5  # nll at the end
    table = tabulate_uniform({("pi", 1.2): worse, ("pi", 1): base}, base, where)
    assert table["factor"].tolist() == [1] * 6 + [1.2] * 6, "in order"
    changed = table[table["change"] != 0]
    assert changed[["factor", "part", "what", "change", "change_low"]].to_numpy().tolist() == [
        [1.2, "end", "nll", 0.5, 0.5]
    ]


def test_changes_have_a_row_for_each_part_and_measure():
    change = np.stack([np.zeros((4, 3)), np.full((4, 3), 0.25)])
    table = tabulate_changes({("found", "both"): change}, split_by_depth([0.0, 0.5, 1.0]))
    assert table.index.names == ["factors", "scaled", "part", "what"]
    assert table.loc[("found", "both", "middle", "nll")].tolist() == [0.25] * 3
    assert table.loc[("found", "both", "end", "accuracy")].tolist() == [0] * 3


def test_an_interval_reads_as_in_a_sentence():
    assert write_interval(0.123, -0.05, 0.2) == "+0.12 [-0.05, +0.20]"
    assert write_interval(-0.0044, -0.006, -0.003, digits=3) == "-0.004 [-0.006, -0.003]"


def test_lines_carry_their_names_at_their_ends_without_overlap():
    line = np.linspace(0, 1, 4)
    lines = {name: Interval(line * k, line * k - 0.1, line * k + 0.1) for name, k in (("a", 1.0), ("b", 1.01))}
    ax = draw_lines(lines, range(4), xlabel="x", title="they rise").axes[0]
    a, b = ax.texts
    assert (a.get_text(), b.get_text()) == ("a", "b")
    assert b.get_position()[1] - a.get_position()[1] > 0.05
    assert ax.get_title(loc="left") == "they rise"
    assert not draw_lines(lines, range(4), xlabel="x", named=False, ax=plt.subplots()[1]).axes[0].texts
