import numpy as np
import pandas as pd
import pytest
from training_changes import compare_trainings, list_factor_gains, list_gains, select_kind

CONTEXTS = 6


def measured(name, nth, right, nll=1.0, **more):
    """Rows of one training: contexts of pairs that differ around a share, and texts of one nll."""
    contexts = np.arange(CONTEXTS)
    pairs = pd.DataFrame({"context": contexts, "right": right + contexts, "middle": right / 2 + contexts})
    texts = pd.DataFrame({"context": contexts, "nll": nll + 0.1 * contexts})
    of_fifths = pd.DataFrame({"fifth": range(1, 6), "right": 1e6})
    tasks = [pairs.assign(task=task) for task in ("pairs", "lines", "pass key")]
    rows = pd.concat([*tasks, texts.assign(task="text"), of_fifths.assign(task="pairs")])
    return rows.assign(sampler=name, nth=nth, length=256, **more)


def row(table, name, measure):
    return table[(table["sampler"] == name) & (table["measure"] == measure)].iloc[0]


def test_a_method_is_compared_with_the_trainings_that_both_have():
    rows = pd.concat([measured("CREAM", 0, 40), measured("CREAM", 1, 60), measured("RandPos", 0, 10)])
    table = compare_trainings(rows, "sampler", "CREAM")
    cream, rand_pos = row(table, "CREAM", "pairs"), row(table, "RandPos", "pairs")
    assert cream["mean"] == pytest.approx(50 + 2.5)
    assert (cream["least"], cream["most"]) == pytest.approx((42.5, 62.5))
    assert np.isnan(cream["p"])
    assert rand_pos["change"] == pytest.approx(-30), "against training 0, not against the mean of both"
    assert (rand_pos["ahead"], rand_pos["trainings"]) == (0, 1)


def test_the_change_is_paired_over_contexts_so_equal_differences_have_no_interval():
    table = compare_trainings(pd.concat([measured("a", 0, 40), measured("b", 0, 43)]), "sampler", "a")
    b = row(table, "b", "pairs")
    assert (b["change"], b["low"], b["high"]) == pytest.approx((3, 3, 3))
    assert row(table, "b", "middle of the pairs")["change"] == pytest.approx(1.5)


def test_of_texts_it_tells_perplexity_and_less_is_ahead():
    rows = pd.concat([measured("a", 0, 40, nll=2.0), measured("b", 0, 40, nll=2.0 - np.log(2))])
    b = row(compare_trainings(rows, "sampler", "a"), "b", "perplexity")
    assert b["change"] == pytest.approx(-50)
    assert b["mean"] == pytest.approx(np.exp(2.25) / 2)
    assert b["ahead"] == 1


def test_a_kind_is_one_scheme_and_target_and_what_was_not_trained_stands_beside_every_training():
    kind = {"scheme": "YaRN", "factor": 8, "sigma": np.nan}
    rows = [measured("untuned", 0, 5, **kind), *(measured("CREAM", nth, 40, **kind) for nth in range(3))]
    rows += [measured("CREAM", 0, 99, **(kind | other)) for other in ({"sigma": 2.0}, {"scheme": "PI"}, {"factor": 4})]
    selected = select_kind(pd.concat(rows), "YaRN", 8)
    assert selected.loc[selected["task"] == "lines", "right"].max() < 99
    assert sorted(selected.loc[selected["sampler"] == "untuned", "nth"].unique()) == [0, 1, 2]
    untuned = row(compare_trainings(selected, "sampler", "CREAM"), "untuned", "pairs")
    assert (untuned["change"], untuned["trainings"]) == (pytest.approx(-35), 3)


def test_gains_are_the_changes_with_how_many_trainings_agree():
    rows = pd.concat([measured(name, nth, right) for name, right in (("a", 40), ("b", 43)) for nth in range(2)])
    table = compare_trainings(rows, "sampler", "a")
    gains = list_gains(table, "sampler", "pairs", 256)
    assert gains.index.tolist() == ["b"], "the baseline has no change"
    assert gains.loc["b"].tolist() == [pytest.approx(3), pytest.approx(3), pytest.approx(3), "2 of 2"]


def test_gains_of_factors_name_how_they_were_found_and_on_what():
    rows = pd.concat([measured(how, 0, right) for how, right in (("no factors", 40), ("GA", 46))])
    table = compare_trainings(rows.rename(columns={"sampler": "how"}), "how", "no factors")
    gains = list_factor_gains({"untuned": table, "CREAM": table}, {("pairs", 256): "points"})
    assert gains["pairs, 256 (points)"]["mean"].to_dict() == pytest.approx({"GA, CREAM": 6, "GA, untuned": 6})
