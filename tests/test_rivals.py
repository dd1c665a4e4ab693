import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import rivals
from matplotlib import pyplot as plt
from rivals import METHODS, Contest, draw_comparison, draw_map, measure_cost
from two_models import Trial

from lrs_utils import HeadScaling, LayerScaling, Ledger, load_factors, load_lm, score, tasks
from lrs_utils.finding import parts as dividing

TEXTS = {name: " ".join(f"{name}{i % 50}" for i in range(400)) for name in ("book", "facts")}
SMALL = {  # values for contexts of some hundred tokens, and a model of two layers
    "Ms-PoE, fixed order": {"low": 1.2, "high": 1.8, "first_layer": 0},
    "Ms-PoE, order by prompt": {"low": 1.2, "high": 1.8, "first_layer": 0},
    "Self-Extend": {"window": 20, "group": 4},
    "ReRoPE": {"window": 20},
    "STRING": {"shift": 30, "local": 10},
    "Attention Buckets": {"bases": [1.0, 1.5]},
}


@pytest.fixture
def contest(monkeypatch, tmp_path):
    monkeypatch.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
    monkeypatch.setattr("two_models.default_texts", lambda: TEXTS)
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trial = Trial(lm, ledger, 4, (0.01,), (2, 2, 2), 4, 4, 4, (1.1,), (0.7, 1.2))
    return Contest(trial, budget=100, n_test_contexts=2, test_stretches=2)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_as_published_and_with_ours_below(contest, name):
    method, suite = METHODS[name], contest.trial.make_suite(2, 1)
    assert set(method.published) == set(method.grid)
    assert all(set(values) == set(method.grid) for values in method.list_values())
    values = SMALL.get(name, method.published)
    [plain] = score(contest.lm, suite, [LayerScaling.identity(2)]).nll
    _, nll = contest.read(name, values, suite)
    assert nll.shape == plain.shape
    assert not np.allclose(nll, plain, atol=1e-6)
    if name == "Attention Buckets":
        return
    gains = HeadScaling(gains=[[1.3, 0.8, 1.0, 1.1]] * 2)
    if name.startswith("one "):
        with pytest.raises(ValueError, match="not put on another scaling"):
            contest.read(name, values, suite, gains.key)
    else:
        _, together = contest.read(name, values, suite, gains.key)
        assert not np.allclose(together, nll, atol=1e-6)


def test_a_method_is_tuned_within_its_budget_and_the_best_values_come_first(contest, monkeypatch):
    monkeypatch.setitem(METHODS, "ReRoPE", replace(METHODS["ReRoPE"], grid={"window": [10, 20, 40]}))
    table = contest.tune("ReRoPE")
    assert (table["answers"] == 3 * 8 * 4).all()  # 8 contexts are what 100 answers allow
    assert table["contexts"].unique().tolist() == [8]
    order = list(zip(-table["accuracy"], table["nll"], strict=True))
    assert order == sorted(order)
    exact, nll = contest.read("ReRoPE", json.loads(table["values"][0]), contest.trial.make_suite(8, 80_000))
    assert (exact.mean(), nll.mean()) == pytest.approx((table["accuracy"][0], table["nll"][0]))


def test_methods_and_scalings_are_judged_alike(contest):
    [row] = contest.judge("one temperature", {"temperature": 1.5}).to_dict("records")
    scaling = LayerScaling.uniform(1.0, 2, "pi", temperatures=[1.5, 1.5])
    [ours] = contest.judge("ours", {}, scaling.key).to_dict("records")
    same = ("accuracy", "points", "low", "high", "p", "by fifth", "perplexity")
    assert [row[column] for column in same] == [ours[column] for column in same]
    assert row["perplexity"] != 0
    assert json.loads(row["values"]) == {"temperature": 1.5}
    with pytest.raises(ValueError, match="'ours' is no method; there are one factor"):
        contest.judge("ours", {})


@pytest.mark.parametrize("name", ["LaMPE", "ReRoPE", "ours"])
def test_documents_are_judged_on_free_text_one_question_at_a_time(contest, name):
    suite = tasks.kv_retrieval(3, 2, keys="short")
    longer = tuple(replace(q, prompt=q.prompt + "x" * n) for n, q in enumerate(suite.probes[0].questions))
    suite = replace(suite, probes=(replace(suite.probes[0], questions=longer), suite.probes[1]))
    on = LayerScaling((1.1, 0.9), "ntk").key if name == "ours" else None
    values = {"ReRoPE": {"window": 20}, "ours": {}, "LaMPE": METHODS["LaMPE"].published}[name]
    [row] = contest.judge_documents(name, values, suite, 3, on).to_dict("records")
    assert (row["test"], row["no scaling"], row["points"]) == (suite.name, row["accuracy"], 0.0)


def test_buckets_write_no_free_answers(contest):
    with pytest.raises(ValueError, match="Attention Buckets read one text at a time"):
        contest.judge_documents("Attention Buckets", {"bases": [1.0, 2.0]}, tasks.kv_retrieval(3, 2, keys="short"), 3)


def test_a_cost_is_measured_in_a_process_of_its_own():
    [row] = measure_cost("tiny-llama", "ReRoPE", {"window": 20}, "float32", 2).to_dict("records")
    assert row["method"] == "ReRoPE"
    assert row["seconds"] > 0
    assert row["MB"] >= 0


@pytest.mark.parametrize(("name", "times"), [("ReRoPE", 1), ("Ms-PoE, order by prompt", 1 + 3)])
def test_what_a_method_finds_out_about_each_context_counts(monkeypatch, capsys, name, times):
    made, method = [], METHODS[name]
    monkeypatch.setitem(METHODS, name, replace(method, make=lambda *of: made.append(of) or method.make(*of)))
    rivals.print_cost("tiny-llama", name, json.dumps(SMALL[name]), "float32", 2)
    assert len(made) == times
    assert len(capsys.readouterr().out.split()) == 2


def test_a_map_shows_what_distances_are_read_as(contest):
    _, ax = plt.subplots()
    [probe] = contest.trial.make_suite(1, 0).probes
    draw_map(METHODS["ReRoPE"], contest.lm, probe, {"window": 20}, 60, ax)
    near, far, _ = (line.get_xydata() for line in ax.lines)
    assert near.tolist() == [[r, r] for r in range(20)]
    assert far.tolist() == [[r, 20] for r in range(20, 60)]
    with pytest.raises(ValueError, match="no map of distances"):
        draw_map(METHODS["Attention Buckets"], contest.lm, probe, {"bases": [1.0]}, 60, ax)
    table = pd.DataFrame({"method": ["a", "b"], "points": [1.0, 2.0], "times": [1.0, 2.0], "ours": [True, False]})
    draw_comparison(table.assign(low=0.0, high=3.0), ax)
    assert {text.get_text() for text in ax.texts} == {"a", "b"}
    plt.close("all")


def test_ours_are_files_or_keys():
    key = LayerScaling((1.1, 0.9), "ntk").key
    assert rivals.read_ours(key) == key
    assert rivals.read_ours("smollm2-135m/paper") == load_factors("smollm2-135m/paper").key


def test_the_published_values_are_those_of_the_papers():
    assert rivals.METHODS["STRING"].published["shift"] == 8192 // 3  # a third of SmolLM2's window
    assert rivals.METHODS["Ms-PoE, fixed order"].published == {"low": 1.2, "high": 1.8}
