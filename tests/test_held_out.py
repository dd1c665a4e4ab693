"""Validation, doses and the test of notebook 07, on a tiny model and made-up numbers."""

import held_out
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from held_out import NO_SCALING, Judge

from lrs_utils import LayerScaling, Ledger, Outcomes, score, tasks
from lrs_utils.scoring.perplexity import window_nll

TEXT = "".join(f"{i} bottles. " for i in range(200))


@pytest.fixture
def judge(tiny, tmp_path):
    suite = tasks.kv_retrieval(3, 2, seed=1, keys="short")
    return Judge(tiny, Ledger(tmp_path / "l.sqlite"), suite, TEXT, tokens=32, windows=3)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_scaling_is_validated_on_contexts_and_on_the_text(judge, tiny):
    scaling = LayerScaling.uniform(0.9, 2)
    [row] = judge.validate(scaling).itertuples()
    outcomes = score(tiny, judge.validation, [scaling])
    assert row.nll == pytest.approx(outcomes.nll.mean())
    assert row.text == pytest.approx(window_nll(tiny, TEXT, [32], stride=16, n_windows=3, scaling=scaling).mean())
    assert LayerScaling.from_key(row.scaling) == scaling


def test_pieces_begin_with_no_scaling_and_name_each_scaling(judge):
    scaling = LayerScaling.uniform(0.9, 2)
    first, second = judge.pieces({"GA": scaling})
    assert first == NO_SCALING
    assert second == f"GA {held_out.shorten(scaling)}"
    assert len(held_out.shorten(scaling)) == 8
    [text] = judge.text_pieces(TEXT, {"GA": scaling}).values()
    assert text()["text"][0] == judge.text_nll(TEXT, scaling).mean()


def test_a_text_is_measured_once_for_a_scaling(judge, monkeypatch):
    scaling = LayerScaling.uniform(0.9, 2)
    judge.text_nll(TEXT, scaling)
    monkeypatch.setattr(held_out, "window_nll", None)
    judge.text_nll(TEXT, LayerScaling.uniform(0.9, 2))


ROWS = pd.DataFrame({"scaling": ["a", "b", "c"], "accuracy": [0.1, 0.3, 0.2], "text": [2.0, 2.0 + np.log(1.04), 2.0]})


def test_a_method_is_traced_from_no_scaling_to_its_whole_dose():
    points = held_out.trace(ROWS, [("GA", 0.5), ("GA", 1.0)])
    assert points["dose"].tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(points["gain"], [0, 20, 10])
    np.testing.assert_allclose(points["perplexity"], [0, 4, 0], atol=1e-9)
    assert held_out.spread_doses(3) == [0.333, 0.667, 1.0]


def test_a_gain_at_a_price_lies_on_the_straight_lines_between_doses():
    points = pd.DataFrame({"method": "GA", "dose": [0.0, 0.5, 1.0], "gain": [0.0, 10, 30], "perplexity": [0.0, 1, 9]})
    assert held_out.find_gain(points, 1) == pytest.approx(10, abs=0.1)
    assert held_out.find_gain(points, 5) == pytest.approx(20, abs=0.1)
    front = held_out.find_front(points)
    assert [*front] == ["gain at +1 %", "gain at +5 %", "gain", "perplexity"]
    assert front.loc["GA", ["gain", "perplexity"]].tolist() == [30, 9]
    assert held_out.choose_dose(points, 5)["dose"] == 0.5


def test_validation_chooses_the_last_of_equally_accurate_seeds():
    keys = [LayerScaling.uniform(factor, 2).key for factor in (0.8, 0.9, 1.1)]
    rows = pd.DataFrame({"scaling": keys, "accuracy": [0.4, 0.4, 0.1]})
    assert held_out.choose_seed(rows) == LayerScaling.uniform(0.9, 2)


def made_up_outcomes():
    rng = np.random.default_rng(0)
    exact = rng.random((3, 40, 5)) < np.array([0.3, 0.3, 0.9])[:, None, None]
    exact[1] = exact[0]
    return Outcomes(exact, 1.0 - 0.5 * exact, np.linspace(0, 1, 5), recomputed=0)


def test_the_test_tells_a_gain_from_no_change():
    table = held_out.summarise(made_up_outcomes(), [NO_SCALING, "uniform", "gradient"], uniform=1)
    assert table.index.name == "method"
    assert np.isnan(table["p_no_scaling"][NO_SCALING])
    assert np.isnan(table["p_uniform"]["uniform"])
    assert table["p_no_scaling"]["uniform"] == 1
    assert table["gain"]["uniform"] == 0
    gradient = table.loc["gradient"]
    assert gradient["gain_low"] > 0.4
    assert gradient["p_no_scaling"] < 0.01
    assert (gradient["depths_better"], gradient["depths_worse"]) == (5, 0)
    assert gradient["at_0"] == made_up_outcomes().exact[2, :, 0].mean()


def test_an_example_is_answered_after_scaling_only_and_stands_near_the_middle():
    before = np.zeros((2, 5), bool)
    after = before.copy()
    after[0, 0] = after[1, 3] = True
    assert held_out.find_example(before, after) == (1, 3)
    assert held_out.find_example(before, before) == (0, 2), "none: the middle of the first context"


def test_choices_are_named_by_method_and_seed_or_dose():
    first, second = LayerScaling.uniform(0.9, 2), LayerScaling.uniform(0.8, 2)
    found = {("GA, pi", 0): first, ("GA, pi", 1): second}
    doses = {"+1 %": pd.Series({"method": "GA, pi", "dose": 0.5})}
    names = held_out.name_picks({"paper": second, "+1 %": first}, found, doses)
    assert names == {"paper": "GA, pi, seed 1", "+1 %": "GA, pi at dose 0.5"}


def test_a_forest_plot_has_each_scaling_once_the_best_first():
    first, second = LayerScaling.uniform(0.9, 2), LayerScaling.uniform(0.8, 2)
    tested = {NO_SCALING: LayerScaling.identity(2), "GA": first, "TPE": first, "best": second, "+1 %": first}
    columns = {"gain": [0, 0.1, 0.1, 0.2, 0.1], "gain_low": 0.0, "gain_high": 0.3, "perplexity": 1.0}
    table = pd.DataFrame(columns, index=[*tested])
    shown = held_out.order_by_gain(table, tested, {"best": "GA, seed 1", "+1 %": "GA at dose 1.0"})
    assert shown.index.tolist() == ["GA, seed 1", "GA", "TPE"]
    assert held_out.list_intervals(shown[:1]) == "GA, seed 1 +20.0 [+0.0, +30.0]"
    assert held_out.tell(table.loc["GA"]) == "+10.0 [+0.0, +30.0]"


def test_perplexity_stands_beside_the_row_it_belongs_to():
    ax = plt.subplots()[1]
    held_out.write_perplexity(ax, [3.0, -1.0])
    assert [(text.get_text(), text.get_position()[1]) for text in ax.texts[:2]] == [("+3.0 %", 1), ("-1.0 %", 0)]


def test_scalings_are_drawn_with_temperature_1_where_they_have_none():
    warm = LayerScaling((0.9, 1.1), temperatures=(1.2, 0.8))
    factors, temperatures = held_out.draw_scalings({"paper": LayerScaling.uniform(0.9, 2), "gradient": warm}).axes
    assert factors.lines[1].get_ydata().tolist() == [0.9, 1.1]
    assert temperatures.lines[0].get_ydata().tolist() == [1, 1]
    assert temperatures.lines[1].get_ydata().tolist() == [1.2, 0.8]
