from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import objectives
import pandas as pd
import pytest
from objectives import Search, draw_gains, judge, list_objectives, make_tests, measure_angles, read_answers

from lrs_utils import HeadScaling, LayerScaling, Ledger, score, tasks
from lrs_utils.finding import free_text
from lrs_utils.finding import parts as dividing

SIZES = {"uuid": [2], "short": [3, 4], "copying": [20]}
TEXTS = {name: " ".join(f"{name}{i % 50}" for i in range(200)) for name in ("book", "facts")}


def test_objectives_leave_out_what_their_names_say():
    names = ["uuid", "short", "lines", "copying"]
    for name, searched in list_objectives(names).items():
        left_out = {*names} - {*searched}
        if name == "all":
            assert not left_out
        elif name == "all but pairs":
            assert left_out == {"uuid", "short"}
        elif name.startswith("all but "):
            assert left_out == {name.removeprefix("all but ")}
        else:
            assert searched == [name]
    assert "all but pairs" not in list_objectives(["uuid", "short"])


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture
def suites(monkeypatch):
    """Everything that needs no fetched text."""
    few = tasks.Suite("pages", tasks.copying(30, 6, 1).probes)
    monkeypatch.setattr(objectives.tasks, "country_pages", lambda n, seed, n_words: replace(few, probes=few.probes[:n]))
    return make_tests(SIZES, 3, pages=2, page_words=9, distances=[], n_capitals=8)


def test_every_task_is_tested_at_its_sizes_on_contexts_that_no_search_can_see(suites):
    assert [*suites] == ["uuid, 2", "short, 3", "short, 4", "copying, 20", "pages", "capitals, closed book"]
    assert suites["short, 4"] == tasks.kv_retrieval(4, 3, 40_000, keys="short", positions=range(4))


def test_pages_that_are_searched_on_are_not_tested_on(suites):
    searched = objectives.list_other_pages(2, 9, 3, 9)
    assert (len(suites["pages"].probes), len(searched.probes)) == (2, 3)
    assert not {*suites["pages"].probes} & {*searched.probes}


def test_what_was_left_out_is_what_is_tested(suites):
    assert objectives.pick_tests("all", suites) == suites
    assert [*objectives.pick_tests("all but short", suites)] == ["short, 3", "short, 4"]
    assert [*objectives.pick_tests("all but pairs", suites)] == ["uuid, 2", "short, 3", "short, 4"]


SENTENCES = " ".join(f"Sentence {i} has " + " ".join(f"w{i}x{j}" for j in range(9)) + "." for i in range(20))


def test_openings_are_sentences_and_other_seeds_draw_others():
    drawn = [objectives.draw_openings({"a": SENTENCES}, 4, seed) for seed in range(2)]
    assert all(opening.startswith("Sentence") and len(opening.split()) == 10 for opening in drawn[0])
    assert len({*drawn[0], *drawn[1]}) == 8


def test_repeats_are_those_of_the_free_text(tiny, ledger):
    openings = objectives.draw_openings({"a": SENTENCES}, 4, 0)
    scaling = HeadScaling(gains=np.full((tiny.num_layers, 4), 3.0))
    table = objectives.compare_repeats(tiny, scaling.key, openings, 12, ledger)
    assert len(table[["text", "measure"]].drop_duplicates()) == len(table) == 4
    tokens = free_text.continue_freely(tiny, scaling, openings=openings, n_tokens=12)
    greedy = table[(table["text"] == "greedy") & (table["measure"] == "near repeats")].iloc[0]
    assert greedy["found"] == pytest.approx(100 * free_text.near_repeats(tokens)[:, 0].mean())
    assert greedy["change"] == pytest.approx(greedy["found"] - greedy["no scaling"])


def test_parts_of_a_scaling_are_weaker_and_each_is_judged(tiny, ledger, suites):
    gains, temperatures = np.full((tiny.num_layers, 4), 3.0), np.full((tiny.num_layers, 4), 1.2)
    gains[0, 0] = 0.5
    layers = LayerScaling([1.0] * tiny.num_layers, temperatures=[1.1] * tiny.num_layers)
    whole = HeadScaling(temperatures, gains, layers=layers)
    parts = objectives.list_parts(whole.key, [1.0, 0.5])
    assert [*parts] == ["dose 1", "dose 0.5", "gains alone", "without gains", "no gain above 1"]
    assert parts["dose 0.5"] == whole.at_dose(0.5)
    assert parts["gains alone"] == HeadScaling(gains=gains)
    assert parts["without gains"] == HeadScaling(temperatures, layers=layers)
    assert parts["no gain above 1"].gains[0][:2] == (0.5, 1.0)
    assert [*objectives.list_parts(layers.key, [0.5])] == ["dose 0.5"]
    openings = objectives.draw_openings({"a": SENTENCES}, 4, 0)
    options = {"openings": openings, "n_tokens": 12, "answer_tokens": 3, "ledger": ledger}
    table = objectives.measure_part(tiny, "whole", whole, {"short, 3": suites["short, 3"]}, **options)
    assert set(table["part"]) == {"whole"}
    assert table["points, short, 3"].nunique() == 1


@pytest.mark.parametrize(("limit", "tried"), [(1.0, [0.8, 0.6]), (2.0, [0.8]), (0.1, [0.8, 0.6, 0.3])])
def test_the_largest_dose_within_limits_is_chosen(tiny, ledger, monkeypatch, limit, tried):
    def compare(lm, key, texts, n_stretches, ledger, part):
        assert part == "validation", "the test part is for the test"
        return pd.DataFrame({"change": [-1.0, objectives.read_key(key).gains[0][0] - 1]})  # 1.41 at 0.8, 0.93 at 0.6

    monkeypatch.setattr(objectives, "compare_perplexity", compare)
    low = {"dose 1": [-1, 0.1], "dose 0.8": [-1, -0.1], "dose 0.6": [-1, -1], "gains alone": [1, 1]}
    rows = pd.DataFrame([{"part": part, "low": value} for part, values in low.items() for value in values])
    scaling = HeadScaling(gains=np.full((tiny.num_layers, 4), 3.0))
    options = {"limit": limit, "n_stretches": 3, "ledger": ledger}
    table = objectives.choose_dose(tiny, scaling.key, rows, [0.6, 1.0, 0.8, 0.3], TEXTS, **options)
    assert list(dict.fromkeys(table["dose"])) == tried
    assert table["scaling"].iloc[-1] == scaling.at_dose(tried[-1]).key


def test_perplexity_is_that_of_the_third_that_no_search_reads(tiny, ledger, monkeypatch):
    monkeypatch.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
    nothing = objectives.compare_perplexity(tiny, LayerScaling.identity(tiny.num_layers).key, TEXTS, 3, ledger)
    assert nothing["text"].tolist() == ["book", "facts"]
    assert (nothing[["change", "low", "high"]] == 0).all(axis=None)
    scaling = HeadScaling(gains=np.full((tiny.num_layers, 4), 3.0))
    table = objectives.compare_perplexity(tiny, scaling.key, TEXTS, 3, ledger)
    text = dividing.divide([], TEXTS, dict.fromkeys(("search", "validation", "test"), 4), 3, 0)["test"]
    before, after = score(tiny, text.text, [LayerScaling.identity(tiny.num_layers), scaling]).nll[:, :, 0]
    facts = text.kinds == "facts"
    assert table["change"].iloc[1] == pytest.approx(100 * np.expm1((after - before)[facts].mean()), rel=1e-4)


def test_a_search_gives_a_row_that_its_scaling_can_be_read_from(tiny, ledger, monkeypatch):
    monkeypatch.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
    monkeypatch.setattr(free_text, "OPENINGS", free_text.OPENINGS[:2])
    options = {"texts": TEXTS, "steps": 2, "contexts": (2, 2, 2), "stretches": 2}
    search = Search(tiny, ledger, tasks.general_tasks(SIZES), options, {"all, gains": {"space": "head_gains"}})
    pieces = search.list_pieces({"all": ["short", "copying"]}, 2)
    assert [*pieces] == ["all | 0", "all | 1"]
    [row] = pieces["all | 1"]().to_dict("records")
    assert (row["objective"], row["seed"]) == ("all", 1)
    assert objectives.read_key(row["scaling"]).key == row["scaling"]
    assert np.isfinite([row["book, change"], row["facts, high"], row["near repeats, greedy"]]).all()
    [other] = search.list_pieces({"all, gains": ["short", "copying"]}, 1)["all, gains | 0"]().to_dict("records")
    assert "temperatures" not in other["scaling"], "what differs in this way to search"


def test_scalings_are_judged_against_no_scaling(tiny, ledger, suites):
    gains = np.ones((tiny.num_layers, 4))
    gains[0, 0] = 3.0
    keys = {"all": HeadScaling(gains=gains).key, "nothing": LayerScaling.identity(tiny.num_layers).key}
    table = judge(tiny, keys, suites, 3, ledger).set_index(["objective", "test"])
    assert len(table) == 2 * len(suites)
    assert (table.loc["nothing", "points"] == 0).all()
    assert (table.loc["nothing", "nll"] == 0).all()
    exact = score(tiny, suites["short, 3"], [LayerScaling.identity(tiny.num_layers)]).exact
    assert table.loc[("all", "short, 3"), "no scaling"] == exact.mean()
    assert abs(table.loc[("all", "short, 3"), "nll"]) > 1e-4
    assert (table.loc["nothing", "fifths worse"].dropna() == 0).all()
    _, ax = plt.subplots()
    words = draw_gains(table.reset_index(), ax)
    assert words.startswith("searched on nothing, ")
    assert words.count("+0") == len(suites)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all", "nothing"]
    plt.close("all")


def test_a_fifth_that_every_context_loses_is_worse(tiny, ledger, suites, monkeypatch):
    def answer(lm, suite, scaling, answer_tokens, ledger):
        exact = np.ones((4, 5))
        exact[:, 3] = scaling.is_identity  # read without scaling, and lost with it
        return exact, np.zeros((4, 5))

    monkeypatch.setattr(objectives, "read_answers", answer)
    suite = tasks.kv_retrieval(5, 4, keys="short")
    [row] = judge(tiny, {"all": HeadScaling(gains=[[2.0]]).key}, {"short, 5": suite}, 3, ledger).to_dict("records")
    assert (row["by fifth"], row["fifths worse"]) == ("+0 +0 +0 -100 +0", 1)


def test_options_are_known_where_the_right_one_is_likeliest(tiny, ledger, suites):
    none = LayerScaling.identity(tiny.num_layers)
    verdicts, nll = read_answers(tiny, suites["capitals, closed book"], none, 3, ledger)
    [wanted] = score(tiny, suites["capitals, closed book"], [none]).nll
    assert verdicts[:, 0].tolist() == [float(row[0] == row.min()) for row in wanted]
    np.testing.assert_allclose(nll[:, 0], wanted[:, 0], rtol=1e-5)


def test_angles_between_tasks_are_those_of_their_gradients(tiny, ledger):
    short = partial(tasks.kv_retrieval, 3, keys="short")
    made = {"a": short, "same": short, "copying": partial(tasks.copying, 20)}
    table = measure_angles(tiny, made, "head_gains", 2, 0, ledger).set_index(["a", "b", "layer"])["cosine"]
    assert table["a", "same", -1] == pytest.approx(1)
    assert len(table) == 3 * (1 + tiny.num_layers)
    assert table["a", "copying", 0] == pytest.approx(table["same", "copying", 0])
    assert -1 <= table["a", "copying", -1] < 0.9999


def test_fifths_that_few_pages_ask_about_have_no_interval():
    exact = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, np.nan]])
    depths = np.array([[0.0, 1.0], [0.0, np.nan], [0.1, np.nan]])
    found = objectives.read_by_fifth(exact, depths)
    assert found.mean[0] == pytest.approx(2 / 3)
    assert np.isnan(found.mean[1:]).all()
    assert found.low[0] <= found.mean[0] <= found.high[0]


@pytest.mark.parametrize("key", ["heads", "layers"])
def test_temperatures_are_tried_on_top_of_a_scaling(tiny, ledger, suites, key):
    layers = LayerScaling((1.1, 1.0), "ntk", temperatures=(1.2, 1.0))
    scaling = HeadScaling(gains=[[1.3, 0.8, 1.0, 1.0]] * 2) if key == "heads" else layers
    table = objectives.try_temperatures(tiny, scaling.key, {"short": suites["short, 4"]}, [0.5, 2.0], ledger)
    assert table["temperatures times"].tolist() == [0.5, 2.0]
    twice = {
        "heads": HeadScaling(gains=scaling.gains, layers=LayerScaling((1, 1), temperatures=(2.0, 2.0)))
        if key == "heads"
        else None,
        "layers": LayerScaling((1.1, 1.0), "ntk", temperatures=(2.4, 2.0)),
    }[key]
    exact = score(tiny, suites["short, 4"], [twice]).exact.mean()
    assert table["accuracy"].iloc[1] == pytest.approx(exact)
