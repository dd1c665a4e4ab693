"""What a figure computes before it draws; that all of them draw is the notebooks' test."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lrs_utils import LayerScaling
from lrs_utils.analysis import plots
from lrs_utils.analysis.statistics import Interval
from lrs_utils.searchers.engine import SearchResult


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_budget_line_is_the_mean_of_seeds_as_far_as_all_of_them_went():
    rows = [
        ("GA", 0, 10, 1.0),
        ("GA", 0, 15, 3.0),
        ("GA", 0, 20, 3.0),
        ("GA", 1, 10, 2.0),
        ("GA", 1, 30, 2.5),
        ("line", 0, 40, 0.5),
    ]
    axes = plots.budget(pd.DataFrame(rows, columns=["by", "seed", "answers", "best"]), "by", ylabel="nats").axes[0]
    genetic, line = axes.lines
    at = {x: genetic.get_ydata()[np.searchsorted(genetic.get_xdata(), x)] for x in (9, 14, 16, 21)}
    assert np.isnan(at[9]), "nothing is known before the first candidate"
    assert (at[14], at[16], np.isnan(at[21])) == (1.5, 2.5, True)
    assert line.get_ydata()[-1] == 0.5
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (np.nanmin(band), np.nanmax(band)) == (1, 3), "the band is least to most"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["GA", "line"]


def test_the_front_leaves_out_what_another_point_betters():
    rows = [("a", 0.0, 0.0), ("a", 2.0, 5.0), ("b", 1.0, 3.0), ("b", 3.0, 4.0)]
    axes = plots.pareto(pd.DataFrame(rows, columns=["by", "cost", "gain"]), "by", x="cost", y="gain").axes[0]
    front = axes.lines[0]
    assert front.get_label() == "front"
    assert np.array_equal(front.get_xydata(), [[0, 0], [1, 3], [2, 5]])
    assert [line.get_label() for line in axes.lines[1:]] == ["a", "b"]


def test_many_ways_are_told_apart_by_colour_and_marker():
    points = pd.DataFrame({"way": [f"way {i}" for i in range(24)], "cost": range(24), "gain": range(24)})
    ways = plots.pareto(points, "way", x="cost", y="gain").axes[0].lines[1:]
    assert len({(line.get_color(), line.get_marker()) for line in ways}) == 24


def test_a_generation_shows_its_candidates_and_the_best_up_to_then():
    candidates = [LayerScaling.uniform(1 + i / 10, 3) for i in range(5)]
    fitness = [(0.1,), (0.5,), (0.2,), (0.3,), (0.9,)]
    result = SearchResult(candidates, fitness, generation=[0, 0, 1, 1, 2])
    first, second, third = plots.generations(result, shown=3).axes
    assert [len(axes.lines) for axes in (first, second, third)] == [3, 3, 2]
    assert [axes.lines[-1].get_ydata()[0] for axes in (first, second, third)] == [1.1, 1.1, 1.4]


def test_perplexity_by_length_draws_schemes_and_layer_factors_on_top_alike():
    nll = {"none, uniform": (1, 3), "PI, uniform": (1, 2), "PI, multiply, GA": (1, 1.5)}
    rows = [(way, 128 * 2**i, value) for way, values in nll.items() for i, value in enumerate(values)]
    table = pd.DataFrame(rows, columns=["way", "length", "nll"])
    without = table[~table["way"].str.startswith("none")]
    axes, other = plots.perplexity_by_length({"all": table, "fewer": without}).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert [*lines] == ["none, uniform", "PI, uniform", "PI, multiply, GA"]
    np.testing.assert_allclose(lines["PI, multiply, GA"].get_ydata(), np.exp([1, 1.5]))
    assert lines["PI, uniform"].get_color() == lines["PI, multiply, GA"].get_color()
    assert other.lines[0].get_color() == lines["PI, uniform"].get_color(), "a scheme has one colour in all panels"
    assert lines["PI, uniform"].get_linestyle() != lines["PI, multiply, GA"].get_linestyle()


def test_names_stand_at_the_ends_of_their_lines_in_their_colours():
    line = np.array([0.2, 0.4])
    curves = {name: Interval(line + by, line, line + 0.2) for name, by in (("raw", 0.0), ("chat", 0.01), ("far", 0.4))}
    axes = plots.named_curves(curves, [0, 1], xlabel="x", ylabel="y", colours=["0.35", "red", "blue"]).axes[0]
    assert axes.get_legend() is None
    assert [line.get_color() for line in axes.lines] == ["0.35", "red", "blue"]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert (heights["raw"], heights["far"]) == (0.4, 0.8), "at the end of its line"
    assert heights["chat"] > 0.42, "moved apart from another that ends close by"
    assert [text.get_color() for text in axes.texts] == ["0.35", "red", "blue"]
