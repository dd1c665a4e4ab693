"""The methods that notebook 07 compares, on a tiny model."""

import json

import numpy as np
import pandas as pd
import pytest
import searches
from searches import NLL, Contest, Contexts, Method, Objective, U

from lrs_utils import LayerScaling, Ledger, tasks
from lrs_utils.analysis.statistics import Interval
from lrs_utils.notebook import ROOT

TEXT = "word " * 900


@pytest.fixture
def contest(tiny, tmp_path):
    contexts = Contexts("short", 4, 3, 3, n_contexts=2, n_judged=1, text=TEXT, seed=5)
    space = {"first_layer": 0, "bounds": (0.7, 1.2), "step": 0.05, "start": 1.0}
    return Contest(tiny, Ledger(tmp_path / "l.sqlite"), contexts, 4, space, (0.3, 2.0), 4, 2, {"pi": 0.05, "ntk": 0.1})


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (U, "U"),
        (NLL, "nll"),
        (Objective(nll=0.5), "0.5 nll"),
        (Objective(nll=1, short=1, text=0.5), "nll + short + 0.5 text"),
    ],
)
def test_an_objective_and_its_name_tell_the_same(objective, name):
    assert str(objective) == name
    if objective != U:
        assert Objective.from_name(name) == objective


def test_the_committed_searches_are_found_by_the_names_of_todays_methods(contest):
    methods = searches.list_methods(contest, 3, Objective.from_name("nll + 0.5 text"), [0.2])
    with open(ROOT / "data/results/searches.csv", encoding="utf-8") as file:
        about, _ = json.JSONDecoder().raw_decode(file.readline().removeprefix("# "))
    assert [*searches.name_pieces(methods, contest)] == about["pieces"]


def test_a_methods_name_its_piece_and_its_columns_say_the_same_four_choices(contest):
    method = Method("GA", "pi", "factors", U, contest.evolve)
    assert method.name == "GA, pi, factors, U"
    assert method.key == "GA | pi | factors | U"
    assert [*method.columns] == [*searches.COLUMNS]
    longer = Method("gradient x 4", "ntk", "both", NLL, contest.descend, budgets=4)
    assert longer.phrase == "the gradient (with four times the budget) in factors and temperatures (`ntk`, nll)"


def test_searches_share_no_context_and_are_judged_as_their_objective_says(contest):
    contexts = contest.contexts
    [ends], _ = contexts.judges(U, 1)
    assert [question.position for question in ends.probes[0].questions] == [0, 1, 3]
    (pairs, text), rule = contexts.judges(Objective(nll=1, text=0.5), 1)
    assert pairs.recipe == tasks.kv_retrieval(3, 1, seed=1_006, keys="short").recipe
    assert len(text.probes) == 1
    other = contexts.suites(NLL, 1, 2_001)[0]
    assert other.probes[0].context != pairs.probes[0].context
    assert rule is not searches.utilisation_then_nll


def test_bounds_are_wide_under_ntk_only(contest):
    def lowest(scheme):
        method = Method("random", scheme, "factors", NLL, contest.evolve)
        drawn = contest.draw(searches.RandomSearch, method, 0, batch=200).ask()
        return min(min(scaling.factors) for scaling in drawn)

    assert lowest("pi") >= 0.7 > lowest("ntk")


@pytest.mark.parametrize("name", ["GA, pi, factors, U", "gradient, ntk, both, nll", "gradient x 4, ntk, both, 0.5 nll"])
def test_a_search_gives_its_new_bests_and_their_scalings(contest, name):
    method = searches.list_methods(contest, 1, Objective(nll=0.5), [])[name]
    rows = contest.search(method, 0)
    assert (rows["best"].diff().dropna() >= 0).all()
    assert LayerScaling.from_key(rows["scaling"][0]).is_identity, "every search begins at no scaling"
    new = rows["scaling"] != ""
    assert new.sum() >= rows["best"].nunique()
    assert {", ".join(row) for row in rows[[*searches.COLUMNS]].to_numpy(str)} == {name}


def test_the_end_of_a_search_is_its_last_new_best_and_refining_starts_there(contest):
    row = {"searcher": "GA", "scheme": "pi", "vary": "factors", "objective": "nll"}
    keys = [LayerScaling.uniform(factor, 2).key for factor in (1.0, 0.9)]
    rows = pd.DataFrame({"scaling": [keys[0], keys[1], np.nan], "seed": 0}).assign(**row)
    [end] = searches.find_ends(rows).itertuples()
    assert (end.scaling, end.method) == (keys[1], "GA, pi, factors, nll")
    method = Method("GA", "pi", "factors", NLL, contest.evolve)
    refined = contest.refine(method, LayerScaling.from_key(keys[1]))
    assert refined["best"][0] >= refined["fitness"][0]
    assert searches.name_refined(refined)["method"].tolist() == ["GA, refined, pi, factors, nll"]


def test_gains_are_counted_from_a_searchs_first_candidate_and_only_after_nll():
    row = {"searcher": "GA", "scheme": "pi", "vary": "factors"}
    rows = pd.DataFrame({"fitness": [-3.0, -2.0, -5.0], "best": [-3.0, -2.0, -5.0], "seed": [0, 0, 0]}).assign(**row)
    rows["objective"] = ["nll", "nll", "U"]
    gained = searches.measure_gains(rows)
    assert gained["gain"].tolist() == [0, 1]
    assert set(gained["method"]) == {"GA, pi, factors"}


def test_a_price_counts_steps_of_the_gradient_only_for_the_gradient(contest):
    methods = searches.list_methods(contest, 1, Objective(nll=0.5), [])
    some = ["GA, pi, factors, nll", "gradient, ntk, both, nll", "gradient x 4, ntk, both, 0.5 nll"]
    rows = pd.DataFrame([methods[name].columns | {"seed": 0, "answers": n} for name in some for n in (10, 20)])
    prices = pd.DataFrame({"objective": ["nll", "0.5 nll"], "candidate": [1.0, 1.0], "step": [10.0, 10.0]})
    costs = searches.count_costs(rows, prices, methods, steps=3)
    assert costs["seconds"].tolist() == [2, 2 + 30, 2 + 120]
    assert costs["answers"].tolist() == [20, 20, 20]


def test_a_price_is_measured_on_every_suite_of_an_objective(contest):
    price = contest.price(Objective(nll=1, short=1))
    assert price["objective"].tolist() == ["nll + short"]
    assert (price[["candidate", "step"]] > 0).all(axis=None)


def test_slopes_that_are_clear_of_0_are_coloured():
    interval = Interval(np.array([1.0, 0.1]), np.array([0.5, -0.2]), np.array([1.5, 0.4]))
    [ax] = searches.draw_slopes({"factors": interval, "temperatures": interval}).axes[:1]
    clear, unclear = (bar.get_facecolor() for bar in ax.patches)
    assert clear != unclear
