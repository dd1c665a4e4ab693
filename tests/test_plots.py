"""What a figure computes before it draws; that all of them draw is the notebooks' test."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lrs_utils import LayerScaling
from lrs_utils.analysis import methods, plots
from lrs_utils.analysis.methods import colour_of
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
    table = pd.DataFrame(rows, columns=["by", "seed", "answers", "best"])
    axes = plots.budget(table, "by", y="best", ylabel="nats", named=["GA"]).axes[0]
    genetic, line = axes.lines
    at = {x: genetic.get_ydata()[np.searchsorted(genetic.get_xdata(), x)] for x in (9, 14, 16, 21)}
    assert np.isnan(at[9]), "nothing is known before the first candidate"
    assert (at[14], at[16], np.isnan(at[21])) == (1.5, 2.5, True)
    assert line.get_ydata()[-1] == 0.5
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (np.nanmin(band), np.nanmax(band)) == (1, 3), "the band is least to most"
    assert [text.get_text() for text in axes.texts] == ["GA"], "the others are thin, grey and without a name"
    assert (genetic.get_color(), line.get_color()) == (colour_of("GA"), "0.8")


def test_the_front_leaves_out_what_another_point_betters():
    rows = [("GA", 0.0, 0.0), ("GA", 2.0, 5.0), ("TPE", 1.0, 3.0), ("TPE", 3.0, 4.0)]
    points = pd.DataFrame(rows, columns=["by", "cost", "gain"])
    axes = plots.pareto(points, "by", x="cost", y="gain", named=["GA"]).axes[0]
    front = axes.lines[0]
    assert front.get_label() == "front"
    assert np.array_equal(front.get_xydata(), [[0, 0], [1, 3], [2, 5]])
    assert [line.get_label() for line in axes.lines[1:]] == ["GA", "TPE"]
    [name] = axes.texts
    assert (name.get_text(), name.xy) == ("GA", (2, 5)), "a name stands at its last dose"


def test_a_method_has_one_colour_in_all_figures_and_is_dashed_under_pi():
    names = ["GA, pi, factors", "GA, ntk, factors"]
    searches = pd.DataFrame({"by": names, "seed": 0, "answers": 9, "best": [0.1, 0.2]})
    points = pd.DataFrame({"by": names, "cost": [1, 2], "gain": [3, 4]})
    budget = plots.budget(searches, "by", y="best", ylabel="nats", named=names).axes[0].lines
    pareto = plots.pareto(points, "by", x="cost", y="gain", named=names).axes[0].lines[1:]
    assert {line.get_color() for line in [*budget, *pareto]} == {colour_of("GA")}
    assert [line.get_linestyle() for line in [*budget, *pareto]] == ["--", "-"] * 2


def test_a_generation_shows_its_candidates_and_the_best_up_to_then():
    candidates = [LayerScaling.uniform(1 + i / 10, 3) for i in range(5)]
    fitness = [(0.1,), (0.5,), (0.2,), (0.3,), (0.9,)]
    result = SearchResult(candidates, fitness, generation=[0, 0, 1, 1, 2])
    first, second, third = plots.generations(result, shown=3).axes
    assert [len(axes.lines) for axes in (first, second, third)] == [3, 3, 2]
    assert [axes.lines[-1].get_ydata()[0] for axes in (first, second, third)] == [1.1, 1.1, 1.4]


def test_the_progress_of_a_search_is_named_at_the_ends_of_what_it_shows():
    candidates = [LayerScaling.uniform(1 + i / 10, 3) for i in range(4)]
    result = SearchResult(candidates, [(0.1,), (0.9,), (0.2,), (0.4,)], generation=[0, 0, 1, 1])
    axes = plots.search_progress(result, ylabel="U").axes[0]
    assert axes.get_legend() is None
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights == pytest.approx({"best so far": 0.9, "candidates": 0.3})


def test_dots_stand_by_group_and_each_method_is_named_once():
    index = pd.MultiIndex.from_tuples([("PI", "one factor"), ("PI", "GA"), ("YaRN", "GA")])
    numbers = {"mean": [-1.0, 2.0, 3.0], "low": [-2.0, 1.0, np.nan], "high": [0.0, 3.0, np.nan]}
    table = pd.DataFrame(numbers, index=index)
    panels = {"all": table, "one": table.iloc[1:2], "another": table.iloc[2:]}
    figure = methods.dots_by_group(panels, xlabel="per cent")
    first, second, third = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["PI", "YaRN"]
    dots = [line for line in first.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [-1, 2, 3]
    heights = [float(dot.get_ydata()[0]) for dot in dots]
    assert heights[0] < heights[1] < 0.5 < heights[2], "the first method above the second, groups from the top"
    [dot] = [line for line in third.lines if line.get_marker() == "o"]
    assert dot.get_ydata()[0] == heights[2], "a group has its height in all panels"
    assert dots[1].get_color() == dots[2].get_color() == methods.COLOURS["GA"]
    names = [text.get_text() for ax in (first, second, third) for text in ax.texts]
    assert sorted(names) == ["GA", "one factor"]
    assert methods.tell_dots(panels, " %").startswith("all: PI, one factor -1.0 % [-2.0, 0.0]; PI, GA 2.0 %")
    assert methods.tell_dots({"another": table.iloc[2:]}) == "another: YaRN, GA 3.0."


def test_names_at_the_ends_of_lines_stand_apart_on_a_logarithmic_scale_too():
    values = pd.DataFrame([[10, 100], [10, 101], [10, 1000]], index=["PI", "NTK", "YaRN"], columns=[256, 512])
    [ax] = methods.by_length(values, ylabel="perplexity").axes
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heights["PI"] == pytest.approx(100)
    assert heights["NTK"] > 110, "moved up"
    assert heights["YaRN"] == pytest.approx(1000)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "512"]


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
