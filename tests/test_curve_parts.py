"""Notebook 06's `curve_parts`: children of two candidates, and a found curve taken apart."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from curve_parts import (
    by_context,
    draw_factors,
    draw_family,
    draw_gains,
    judge_gain,
    lines_of_moves,
    measure_perplexity,
    move_points,
    show_family,
    tabulate_costs,
    tabulate_held_out,
    tabulate_moves,
    take_halves,
    tilt,
    write_costs,
    write_held_out,
)  # fmt: skip

from lrs_utils import BezierCurve, GeneticSearch, LayerScaling, score, tasks

SPACE = {"bounds": (0.7, 1.2), "step": 0.05, "start": 1.0}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_shown_child_is_neither_of_its_parents():
    better, other, child = show_family(30, **SPACE)
    assert len({better, other, child}) == 3
    assert show_family(30, **SPACE) == [better, other, child], "the same every time"
    low = np.minimum(better.factors, other.factors).min()
    high = np.maximum(better.factors, other.factors).max()
    assert low - 0.05 <= min(child.factors) <= max(child.factors) <= high + 0.05, "made of its parents' points"


def test_halves_leave_the_other_half_alone():
    whole = {"a": LayerScaling([1.1, 1.2, 1.3, 1.4, 1.5], "ntk")}
    halves = take_halves(whole)
    assert halves["a", "first half"].factors == (1.1, 1.2, 1, 1, 1)
    assert halves["a", "second half"].factors == (1, 1, 1.3, 1.4, 1.5)
    assert halves["a", "both"] == whole["a"]
    assert halves["a", "first half"].scheme == "ntk"


def test_a_control_point_moves_alone():
    curve = BezierCurve((0, 3, 6, 9), (0.9, 1.0, 1.0, 0.9))
    moved = move_points(curve, (-0.3, 0.3), 10, 0, 0.05)
    assert len(moved) == 8
    assert moved[0, -0.3].factors[0] == pytest.approx(0.6)
    assert moved[0, -0.3].factors[-1] == moved[1, 0.3].factors[-1] == pytest.approx(0.9)
    assert moved[3, 0.3].factors[-1] == pytest.approx(1.2)


def test_moves_are_compared_with_the_curve_as_found():
    depths = np.array([0.0, 0.5, 1.0])
    found = np.stack([np.zeros((4, 3)), np.ones((4, 3))])
    moved = found.copy()
    moved[0, :, 2] = 1  # every last answer is right: U gains its weight, 3/6
    moved[1] += 0.25
    table = tabulate_moves({(2, 0.3): moved, (2, -0.3): found}, found, depths)
    assert table.index.names == ["point", "move"]
    row = table.loc[(2, 0.3)]
    assert row[["U", "U_low", "accuracy", "nll"]].tolist() == pytest.approx([0.5, 0.5, 1 / 3, 0.25])
    assert not table.loc[(2, -0.3)].any()
    at, lines = lines_of_moves({(0, 0.3): moved, (0, -0.3): found}, found, [7.0])
    assert at == [-0.3, 0.0, 0.3]
    assert lines["point 0 (layer 7)"].mean.tolist() == [0, 0, 0.25]


def test_the_tilt_is_below_0_where_the_first_half_favours_the_end():
    where = {"beginning": np.array([True, False]), "end": np.array([False, True])}
    helps_the_end = np.stack([np.zeros((3, 2)), np.tile([0.0, -0.5], (3, 1))])
    changes = {("a", "first half"): helps_the_end, ("a", "second half"): np.zeros((2, 3, 2))}
    exact, nll = tilt(changes, "a", where)
    assert nll.tolist() == [-0.5] * 3
    assert exact.tolist() == [0] * 3


def test_perplexity_has_a_row_for_each_window(smollm2):
    table = measure_perplexity(smollm2, "a", LayerScaling.identity(30), tokens=16, windows=2)
    assert table[["scaling", "window"]].to_numpy().tolist() == [["a", 0], ["a", 1]]
    assert (table["nll"] > 0).all()


def test_costs_are_against_no_scaling_and_sorted_for_a_reader():
    nll = pd.DataFrame({"no scaling": [1.0, 2.0], "costly": [1.1, 2.1], "cheap": [1.0, 2.0]})
    right, wrong = np.ones((2, 2, 3)), np.zeros((2, 2, 3))
    accuracy = {"short": {"no scaling": right, "costly": wrong, "cheap": right}}
    costs = tabulate_costs(nll, accuracy)
    assert costs.loc["costly", "perplexity, times"] == pytest.approx(np.exp(0.1))
    assert costs.loc["costly", ["short", "short, change"]].tolist() == [0, -1]
    shown = write_costs(costs.loc[["costly", "cheap"]], ["short"])
    assert shown["scaling"].tolist() == ["cheap", "costly"]
    assert shown["accuracy, short"].tolist() == ["+0.000 [+0.000, +0.000]", "-1.000 [-1.000, -1.000]"]


def test_held_out_contexts_judge_each_method_against_the_first(tiny):
    suite = tasks.kv_retrieval(5, 3, keys="short")
    scalings = [LayerScaling.identity(tiny.num_layers), LayerScaling.uniform(2.0, tiny.num_layers)]
    outcomes = score(tiny, suite, scalings)
    assert {name: values.shape for name, values in by_context(outcomes).items()} == dict.fromkeys(
        ("accuracy", "U", "U over depths"), (2, 3)
    )
    table = tabulate_held_out(outcomes, ["no scaling", "found"], range(5))
    assert table["accuracy_p"][0] == 1, "against itself"
    assert table["nll"][1] == pytest.approx(outcomes.nll[1].mean())
    assert [f"at {position}" for position in range(5)] == [name for name in table if name.startswith("at ")]
    shown = write_held_out(table, {"no scaling": "no scaling", "found": "GA"}, [0, 2, 4])
    assert shown["method"].tolist() == ["no scaling", "GA"]
    assert list(shown) == ["method", "U", "accuracy", "first", "middle", "last"]


@pytest.mark.parametrize(
    ("own", "new", "words"),
    [
        (0.16, 0.04, "most of what it gained"),
        (0.16, 0.12, "part of what"),
        (0.16, 0.2, "what it gained on its own contexts is there"),
        (0.16, -0.01, "none of what"),
        (0.0, 0.1, "gained nothing even on its own"),
    ],
)
def test_words_for_a_gain_follow_its_numbers(own, new, words):
    assert words in judge_gain(own, new)


def test_pictures_have_a_line_for_each_method():
    population = GeneticSearch(30, population=6, parents=3, mutations=1, crossovers=1, **SPACE).ask()
    first, mutation, crossover = draw_family(population, show_family(30, **SPACE)).axes
    assert (len(first.lines), len(mutation.lines), len(crossover.lines)) == (len(population), 2, 3)
    gains = {"old (2)": {"GA": np.array([0.1, 0.3])}, "new (2)": {"GA": np.array([0.0, 0.1])}}
    ax = draw_gains(gains).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["GA, on new (2)", "GA, on old (2)"], (
        "first at the top"
    )
    assert [text.get_text() for text in ax.texts] == ["+0.050", "+0.200"]
    ax = plt.subplots()[1]
    draw_factors({"no scaling": [1, 1, 1], "GA": [0.9, 0.8, 0.9]}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["no scaling", "GA"]
