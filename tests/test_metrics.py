import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lrs_utils.analysis.statistics import (
    UTILISATION_WEIGHTS,
    bootstrap_mean,
    by_fifth,
    first_middle_last,
    holm,
    mean_over_questions,
    paired_changes,
    paired_test,
    rank_correlation,
    shift_test,
    utilisation,
    utilisation_over_depths,
)


def test_utilisation_weighs_first_middle_and_last():
    exact = np.zeros((3, 1, 5), bool)
    exact[0, 0, 0] = exact[1, 0, 2] = exact[2, 0, 4] = True
    np.testing.assert_allclose(utilisation(exact, np.linspace(0, 1, 5)), np.array(UTILISATION_WEIGHTS) / 6)
    assert UTILISATION_WEIGHTS[0] < UTILISATION_WEIGHTS[1] < UTILISATION_WEIGHTS[2]
    assert utilisation(np.ones((4, 3)), [0, 0.5, 1], weights=(2, 3, 5)) == pytest.approx(1)


def test_utilisation_is_the_same_to_the_last_bit_whoever_else_is_asked():
    exact = np.random.default_rng(0).random((40, 16, 20)) < 0.3
    for worth, questions in ((utilisation, [0, 9, 19]), (utilisation_over_depths, range(20))):
        asked = exact[..., list(questions)]
        together = worth(asked, np.array(questions) / 19)
        assert together.tolist() == [float(worth(one, np.array(questions) / 19)) for one in asked]


def test_the_middle_is_the_depth_nearest_to_one_half():
    assert first_middle_last([1, 0.3, 0.45, 0]) == [3, 2, 0]
    for n in (8, 19, 20, 40, 75, 140):
        assert first_middle_last(np.arange(n) / (n - 1)) == [0, (n - 1) // 2, n - 1]


def test_bad_weights_and_depths_are_refused():
    with pytest.raises(ValueError, match="U needs 0 < first < middle < last"):
        utilisation(np.ones((1, 3)), [0, 0.5, 1], weights=(0.5, 0.3, 0.2))
    with pytest.raises(ValueError, match=r"U needs questions at depths 0, about 0\.5 and 1"):
        utilisation(np.ones((1, 3)), [0, 0.5, 0.9])


def test_utilisation_is_refused_where_contexts_ask_at_different_depths():
    depths = [[0, 0.5, 1], [0, 1, np.nan]]
    for worth in (utilisation, utilisation_over_depths):
        with pytest.raises(ValueError, match=r"shape \(2, 3\).*U needs contexts that all ask at the same depths"):
            worth(np.ones((2, 3)), depths)
    with pytest.raises(ValueError, match="U needs contexts that all ask at the same depths"):
        first_middle_last(depths)


NAN = np.nan
# three contexts with three, one and two questions; two candidates
DEPTHS = np.array([[0.0, 0.5, 1.0], [0.19, NAN, NAN], [0.55, 0.2, NAN]])
EXACT = np.array([[[1, 0, 1], [0, 0, 0], [1, 0, 0]], [[0, 0, 0], [1, 0, 0], [1, 1, 0]]], bool)
NLL = np.array([[[1, 2, 6], [5, NAN, NAN], [3, 4, NAN]], [[0, 1, 2], [3, NAN, NAN], [4, 4, NAN]]])


def test_a_context_s_mean_is_over_the_questions_that_it_asks():
    np.testing.assert_allclose(mean_over_questions(NLL, DEPTHS), [[3, 5, 3.5], [1, 3, 4]])
    np.testing.assert_allclose(mean_over_questions(EXACT, DEPTHS), [[2 / 3, 0, 0.5], [0, 1, 1]])
    np.testing.assert_allclose(mean_over_questions(NLL[0], DEPTHS), [3, 5, 3.5])
    same = np.random.default_rng(0).random((2, 3, 4))
    assert mean_over_questions(same, [0, 0.2, 0.6, 1]).tolist() == same.mean(axis=2).tolist()
    np.testing.assert_allclose(mean_over_questions(same, np.random.default_rng(1).random((3, 4))), same.mean(axis=2))


def test_fifths_of_depth_hold_what_each_context_asks_in_them():
    # by hand: 0 and 0.19 lie in the first fifth, 0.2 in the second, 0.5 and 0.55 in the third, 1 in the last
    by_hand = [
        [[1, NAN, 0, NAN, 1], [0, NAN, NAN, NAN, NAN], [NAN, 0, 1, NAN, NAN]],
        [[0, NAN, 0, NAN, 0], [1, NAN, NAN, NAN, NAN], [NAN, 1, 1, NAN, NAN]],
    ]
    np.testing.assert_array_equal(by_fifth(EXACT, DEPTHS), by_hand)
    np.testing.assert_array_equal(by_fifth(EXACT[1], DEPTHS), by_hand[1])
    halves = [[[1, 0.5], [0, NAN], [0, 1]], [[0, 0], [1, NAN], [1, 1]]]
    np.testing.assert_array_equal(by_fifth(EXACT, DEPTHS, 2), halves)


def test_a_curve_over_fifths_is_the_mean_of_the_contexts_that_ask_there():
    fifths = by_fifth(EXACT[0], DEPTHS)
    beginning = fifths[:, 0]
    asked = beginning[~np.isnan(beginning)]  # callers drop contexts that ask nothing there
    assert bootstrap_mean(asked) == (0.5, 0, 1)
    np.testing.assert_array_equal(np.nanmean(fifths[:, [0, 1, 2, 4]], axis=0), [0.5, 0, 0.5, 1])


def test_fifths_of_common_depths_are_means_of_the_questions_in_them():
    exact = np.random.default_rng(0).random((3, 7, 10)) < 0.5
    fifths = by_fifth(exact, np.arange(10) / 9)
    np.testing.assert_allclose(fifths, exact.reshape(3, 7, 5, 2).mean(axis=-1))
    for n_bins in range(1, 60):  # a depth at a bin's beginning belongs to it, however it is rounded
        depths = np.arange(n_bins + 1) / n_bins
        one_each = by_fifth(np.eye(n_bins + 1)[:, None], depths, n_bins)[:, 0]
        assert one_each[: n_bins - 1].argmax(axis=1).tolist() == list(range(n_bins - 1))
        assert one_each[-1].tolist() == [0] * (n_bins - 1) + [0.5]


def test_values_of_other_questions_than_the_depths_are_refused():
    for worth in (mean_over_questions, by_fifth):
        for depths in (DEPTHS[:2], [0, 1], 0.5):
            with pytest.raises(ValueError, match=r"values of shape \(2, 3, 3\) don't fit depths of shape"):
                worth(EXACT, depths)
        with pytest.raises(ValueError, match="don't fit"):
            worth([True, False], [0, 1])
    with pytest.raises(ValueError, match="n_bins is 0; give at least 1"):
        by_fifth(EXACT, DEPTHS, 0)


def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.binomial(1, 0.3, size=(200, 60))
    intervals = [bootstrap_mean(sample, resamples=500) for sample in samples]
    covered = np.mean([i.low <= 0.3 <= i.high for i in intervals])
    assert 0.88 < covered <= 1


def test_the_bootstrap_keeps_questions_apart_and_is_deterministic():
    exact = np.random.default_rng(1).random((40, 3)) < [0.1, 0.5, 0.9]
    a, b = bootstrap_mean(exact), bootstrap_mean(exact)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a.mean, exact.mean(axis=0))
    assert (a.low < a.mean).all()
    assert (a.mean < a.high).all()
    with pytest.raises(ValueError, match="at least 2 contexts"):
        bootstrap_mean(exact[:1])


def test_the_paired_test_sees_a_shift_and_not_noise():
    rng = np.random.default_rng(2)
    base = rng.random(50)
    assert paired_test(base + 0.1 + 0.01 * rng.standard_normal(50), base) < 0.001
    assert paired_test(base + 0.1 * rng.standard_normal(50), base) > 0.05
    assert paired_test(base, base) == 1.0
    with pytest.raises(ValueError, match="one number a context"):
        paired_test(np.ones((3, 2)), np.ones((3, 2)))


def test_utilisation_spread_over_depths_weighs_the_end_three_times_the_beginning():
    exact = np.zeros((5, 2, 5), bool)
    for question in range(5):
        exact[question, :, question] = True
    worth = utilisation_over_depths(exact, np.linspace(0, 1, 5))
    np.testing.assert_allclose(worth / worth[0], [1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(worth.sum(), 1)
    three = utilisation_over_depths(exact[..., [0, 2, 4]], [0, 0.5, 1])
    np.testing.assert_allclose(three, utilisation(exact[..., [0, 2, 4]], [0, 0.5, 1]))
    with pytest.raises(ValueError, match="U needs 0 < first"):
        utilisation_over_depths(exact, np.linspace(0, 1, 5), (3, 2, 1))


def test_rank_correlation_is_spearmans_with_an_interval_that_covers_it():
    chance = np.random.default_rng(0)
    x = chance.normal(size=40)
    y = x + chance.normal(size=40)
    found = rank_correlation(x, y)
    assert found.mean == pytest.approx(stats.spearmanr(x, y).statistic)
    assert 0 < found.low < found.mean < found.high < 1
    assert rank_correlation(x, np.exp(x)).mean == pytest.approx(1)
    ties = [1, 1, 2, 2, 3, 4]
    found = rank_correlation(ties, ties[::-1])
    assert found.mean == pytest.approx(stats.spearmanr(ties, ties[::-1]).statistic)
    assert -1 <= found.low <= found.high <= 1
    with pytest.raises(ValueError, match="two numbers of at least 4 units"):
        rank_correlation([1, 2, 3], [1, 2, 3])


def test_shift_test_keeps_its_error_rate_where_layers_resemble_their_neighbours():
    chance = np.random.default_rng(0)

    def smooth():
        noise = chance.normal(size=60)
        for i in range(1, 60):
            noise[i] += 0.9 * noise[i - 1]
        return noise[30:]

    p = [shift_test(smooth(), smooth()) for _ in range(300)]
    assert np.mean(np.array(p) <= 0.05) < 0.09
    line = smooth()
    assert shift_test(line, line + 0.1 * smooth()) <= 2 / 30


def test_holm_keeps_one_false_alarm_among_many_tests_rare():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])  # by hand
    assert holm([0.6, 0.9]).tolist() == [1, 1]
    p = np.random.default_rng(0).random((2000, 8))  # eight tests of nothing
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.015)


def test_changes_are_paired_and_corrected_over_all_columns():
    rng = np.random.default_rng(5)
    unit = rng.normal(0, 10, 30)  # far more than what the ways differ by
    values = pd.DataFrame(
        {"base": unit, "better": unit + 1 + rng.normal(0, 1, 30), "same": unit + rng.normal(0, 1, 30)}
    )
    table = paired_changes(values, lambda way: "base")
    assert list(table.index) == ["base", "better", "same"]
    assert table.loc["base", ["change", "low", "high", "p"]].isna().all()
    assert table.loc["better", "low"] > 0.3
    assert table.loc["same", "low"] < 0 < table.loc["same", "high"]
    np.testing.assert_allclose(table["mean"], values.mean())
    alone = [paired_test(values[way], values["base"]) for way in ("better", "same")]
    np.testing.assert_allclose(table["p"].dropna(), holm(alone))


def test_changes_need_units_that_both_columns_have():
    values = pd.DataFrame({"base": [1.0, 2.0, 3.0], "few": [np.nan, np.nan, 5.0], "some": [2.0, 3.0, np.nan]})
    table = paired_changes(values, lambda way: "base")
    assert table.loc["few", "change"] == 2
    assert table.loc["few", ["low", "high", "p"]].isna().all(), "one unit has no interval"
    assert table.loc["some", ["change", "low", "high"]].tolist() == [1, 1, 1]
