import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from tuning_figures import (
    draw_by_depth,
    draw_by_length,
    draw_counts,
    draw_densities,
    draw_examples,
    draw_factors,
    draw_gains,
    draw_losses,
    draw_perplexities,
    draw_sigmas,
    in_pieces,
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def title(figure):
    return figure.get_suptitle()


def test_pieces_are_runs_of_positions():
    assert [piece.tolist() for piece in in_pieces(np.array([0, 1, 5, 9, 10]))] == [[0, 1], [5], [9, 10]]


def test_an_example_s_pieces_are_drawn_and_named():
    figure, alt = draw_examples({"plain": np.arange(6), "PoSE": np.array([0, 1, 2, 9, 10, 11])}, 16)
    assert title(figure) == "The same 6 tokens, numbered up to 16 by 2 samplers"
    assert "plain: 0 to 5; PoSE: 0 to 2 and 9 to 11" in alt
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["PoSE", "plain"], "the first at the top"


def test_densities_are_shares_of_examples():
    drawn = {"plain": np.tile(np.arange(64), (10, 1)), "CREAM": np.tile(np.arange(64) * 4, (10, 1))}
    figure, alt = draw_densities(drawn, 256)
    [ax, other] = figure.axes
    own = max(ax.lines, key=lambda line: line.get_zorder()).get_ydata()
    assert own[:16] == pytest.approx(1)
    assert own[16:] == pytest.approx(0)
    assert max(other.lines, key=lambda line: line.get_zorder()).get_ydata() == pytest.approx(0.25)
    assert "plain 0.0 %, CREAM 25.0 %" in alt


def test_figures_state_the_numbers_that_they_draw():
    counts = {name: np.array([n, n + 2]) for name, n in (("RandPos", 90), ("CREAM", 40), ("PoSE", 20))}
    figure, alt = draw_counts(counts, [41, 50], 100)
    assert title(figure) == "Distances in one example, of 100: RandPos 91, CREAM 41, PoSE 21"
    assert "CREAM 41 (40 to 42)" in alt
    figure, alt = draw_losses(pd.DataFrame({"CREAM": [3.0, 1.5], "plain": [2.0, 1.25]}, index=[10, 20]), "YaRN")
    assert title(figure) == "YaRN: all end between 1.25 and 1.50 nats"
    assert "CREAM from 3.00 to 1.50" in alt
    figure, alt = draw_perplexities(pd.Series({"no scaling": 800.0, "plain, PI": 50.0}), 512)
    assert title(figure) == "Lowest perplexity at 512 tokens: plain, PI, 50.0"
    gains = {"pairs": pd.DataFrame({"mean": [-6.2, 3.0], "low": -9.0, "high": 4.0}, index=["CREAM", "PoSE"])}
    figure, alt = draw_gains(gains, "points", "A gain")
    assert alt == "A gain. Means, points: pairs: CREAM -6, PoSE +3."


def test_a_line_by_length_ends_at_the_target():
    rows = [
        {"measure": measure, "sampler": name, "length": length, "mean": right, "least": right - 1, "most": right + 1}
        for measure in ("pairs", "pass key")
        for name, right in (("untuned", 10.0), ("CREAM", 70.0))
        for length in (256, 512)
    ]
    figure, alt = draw_by_length(pd.DataFrame(rows), ["CREAM", "untuned"], 256)
    assert title(figure) == "Pass keys at 512 tokens, 2 windows: 10 % untuned, up to 70 % tuned (CREAM)"
    assert "pass keys 70 % (CREAM), 10 % (untuned)" in alt


def test_the_middle_fifth_is_the_third():
    rows = pd.DataFrame(
        [
            {"task": task, "length": 512, "fifth": fifth, "sampler": name, "right": 10.0 * fifth + right}
            for task in ("pairs", "pass key")
            for name, right in (("untuned", 0), ("CREAM", 5), ("PoSE", 8))
            for fifth in range(1, 6)
        ]
    )
    figure, alt = draw_by_depth(rows, ["CREAM", "PoSE", "untuned"], {"pairs": 512, "pass key": 512})
    assert title(figure) == "In the middle fifth tuned models answer 35 to 38 % of pairs"
    assert "CREAM 15, 25, 35, 45, 55" in alt


def test_trainings_and_factors_are_told_one_by_one():
    figure, alt = draw_sigmas(pd.DataFrame({0: [40.0, 70.0], 1: [30.0, 32.0]}, index=[2.0, 3.0]), "pairs (%)")
    assert title(figure) == "Trainings of one sigma differ by up to 38 points, means of sigmas by 16"
    assert "sigma 3: 70, 32" in alt
    searches = pd.DataFrame(
        {"layer": [0, 1], "factor": [0.5, 1.5], "sampler": "CREAM", "how": "GA", "nll": 2.0, "best": 1.5}
    )
    figure, alt = draw_factors(searches)
    assert title(figure) == "The best factors change the nll: 2.00 to 1.50 (CREAM)"
    assert "CREAM, GA: 0.5, 1.5" in alt
