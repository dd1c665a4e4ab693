from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import two_models
from model_layers import (
    describe_layers,
    describe_model,
    draw_layers,
    list_windows,
    split_by_kind,
    summarise_layers,
)
from two_models import MAIN, SPACES, Trial, correct, pick, pool, read_key
from verdicts import average_halves, give_verdicts, tell_rows

from lrs_utils import HeadScaling, LayerScaling, Ledger, load_factors, load_lm
from lrs_utils.scaling.files import read_factors


@pytest.fixture
def trial(tiny, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    return Trial(tiny, ledger, 3, (0.01, 1e6), (4, 4, 4), 8, 8, 4, (0.9, 1.0, 1.3), (0.7, 1.2))


@pytest.fixture
def fewer_texts(monkeypatch):
    text = " ".join(f"word{i % 97} and more" for i in range(900))
    monkeypatch.setattr("lrs_utils.finding.recipe.default_texts", lambda: {"book": text})
    monkeypatch.setattr(two_models, "default_texts", lambda: {"book": text})


def test_every_method_is_searched_and_the_main_ones_with_more_seeds(trial):
    searches = trial.list_searches(2)
    names = {name.partition(" | ")[0] for name in searches}
    assert {*SPACES, *MAIN, "one factor (pi)", "the paper's GA (bounds 0.7 to 1.2)"} <= names
    assert {name.partition(" | ")[0] for name in searches if name.endswith("| 1")} == {*MAIN}
    [uniform] = searches["one factor (ntk) | 0"]().to_dict("records")
    assert uniform["scaling"] in {LayerScaling.uniform(f, 2, "ntk").key for f in trial.grid}
    [evolved] = searches["the paper's GA | 1"]().to_dict("records")
    assert (evolved["method"], evolved["seed"]) == ("the paper's GA", 1)
    factors = LayerScaling.from_key(evolved["scaling"]).factors
    assert all(1 <= factor <= 2 for factor in factors)


def test_a_search_by_gradient_has_a_row_for_each_limit(trial, fewer_texts):
    rows = trial.descend("head_gains", 0)
    assert list(rows["limit"]) == [0.01, 1e6]
    assert (rows["minutes"] > 0).all()
    strict, free = rows["dose"]
    assert strict <= free


def test_all_are_judged_on_the_same_contexts_against_no_scaling(trial, fewer_texts):
    gains = HeadScaling(gains=np.linspace(0.4, 1.6, 8).reshape(2, 4))
    keys = [LayerScaling.identity(2).key, gains.key, gains.key]
    searches = pd.DataFrame({"method": ["a", "b", "c"], "seed": 0, "limit": 0.01, "scaling": keys})
    table = trial.judge(searches, 3, 2)
    assert list(table["method"]) == ["no scaling", "a", "b", "c"]
    assert (table.loc[:1, ["points", "low", "high", "perplexity"]] == 0).to_numpy().all()
    assert table.loc[2, "perplexity"] == table.loc[3, "perplexity"] != 0
    both = correct({"one": table, "other": table})
    assert len(both) == 8
    assert (both.loc[both["method"] != "no scaling", "p"] >= pd.concat([table["p"][1:]] * 2).to_numpy()).all()


def test_keys_of_both_kinds_are_read_back():
    layers = LayerScaling((1.2, 0.8), scheme="ntk", temperatures=(1.1, 1.0))
    for scaling in (layers, HeadScaling(temperatures=((1.0, 2.0), (1.5, 1.0)), layers=layers)):
        assert read_key(scaling.key) == scaling


def test_what_is_judged_on_is_neither_searched_nor_chosen_on(trial):
    make = partial(trial.make_suite, 4)
    seen = {probe.context for seed in (1000, 5000, 10_000) for probe in make(seed).probes}
    assert not seen & {probe.context for probe in make(two_models._JUDGED["contexts"]).probes}


def test_a_model_is_described_by_what_matters_for_positions(tiny):
    gemma = describe_model(load_lm("tiny-gemma3", dtype="float32", device="cpu"))
    assert gemma["tokens that the others see"] == "32"
    assert gemma["base of RoPE"] == "10,000, 1,000,000"
    assert gemma["norm of queries and keys"] == "yes"
    plain = describe_model(tiny)
    assert plain["layers that see the whole context"] == plain["layers"] == "2"
    assert plain["norm of queries and keys"] == "no"
    assert gemma.keys() == plain.keys()


def test_bars_of_layers_name_the_highest():
    figure, ax = plt.subplots()
    draw_layers(pd.Series([0.1, 0.5, 0.2]), [0, 32, 0], ylabel="nats", ax=ax)
    assert [text.get_text() for text in ax.texts] == ["layer 1"]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 2
    plt.close(figure)


def test_layers_are_described_with_what_they_see(tmp_path):
    lm = load_lm("tiny-gemma3", dtype="float32", device="cpu")
    assert list_windows(lm) == [32, 0]
    table = describe_layers(lm, Ledger(tmp_path / "x.sqlite"), 3, 1.5, n_contexts=3, n_texts=2, seed=0)
    assert list(table["sees"]) == [32, 0]
    assert table["entropy"].between(0, 1).all()
    assert (table[["pi, mean", "ntk, mean"]] != 0).all(axis=None)
    for scheme in ("pi", "ntk"):
        assert (table[f"{scheme}, low"] <= table[f"{scheme}, mean"]).all()
        assert (table[f"{scheme}, mean"] <= table[f"{scheme}, high"]).all()


def test_factors_of_one_kind_of_layers_leave_the_others_at_one(tmp_path):
    lm = load_lm("tiny-gemma3", dtype="float32", device="cpu")
    parts = split_by_kind(lm, LayerScaling((1.3, 0.7), scheme="ntk"))
    assert parts["the 1 sliding layers alone"].factors == (1.3, 1.0)
    assert parts["the 1 layers that see the whole context alone"].factors == (1.0, 0.7)
    assert {part.scheme for part in parts.values()} == {"ntk"}


def rows_of(points, factors, seed=0):
    """Judged rows of one search of every method: (points, half the width of their interval) by method."""
    layers = LayerScaling(factors, "ntk").key
    none = {"method": "no scaling", "seed": 0, "model": "m"}
    return pd.DataFrame(
        [none] * (seed == 0)
        + [
            {"method": method, "seed": seed, "limit": 0.01, "scaling": layers, "model": "m", "points": mean,
             "low": mean - wide, "high": mean + wide, "perplexity": 1.0}
            for method, (mean, wide) in points.items()
        ]
    )  # fmt: skip


def test_a_verdict_needs_every_seed_of_a_method():
    points = {"one factor (pi)": (-1, 0.5), "layers, pi factors": (1, 2)}
    points |= {MAIN[0]: (5, 1), MAIN[1]: (8, 1), MAIN[2]: (60, 2)}
    first = rows_of(points, (0.5, 0.5, 2.0, 2.0))
    second = rows_of({name: points[name] for name in MAIN} | {MAIN[0]: (-2, 1)}, (2.0, 2.0, 0.5, 0.5), seed=1)
    by_seed = {"m": [pick(pd.concat([first, second]), "m", 0.01, seed) for seed in (0, 1)]}
    halves = average_halves(by_seed)
    np.testing.assert_allclose(halves["m", "factor"], [(0.5, 2.0), (2.0, 0.5)])
    np.testing.assert_allclose(halves["m", "temperature"], [(1, 1), (1, 1)])
    facts = summarise_layers(
        pd.DataFrame({"layer": range(4), "pi, mean": [0.1, 0.7, 0.2, 0.1], "previous token": [0.9, 0.8, 0.1, 0.1],
                      "sees": [0, 512, 0, 0], "entropy": [4, 3, 2, 1]})
    )  # fmt: skip
    table = give_verdicts(by_seed, {"m": facts})
    answers = table["m"].str.partition(":")
    assert answers[0].to_dict() == {
        "one factor for all layers (pi) raises accuracy (points)": "no",
        "the paper's algorithm raises accuracy (points)": "no",
        "the paper's scheme by gradient raises accuracy (points)": "no",
        "ntk factors and temperatures of layers raise accuracy (points)": "yes",
        "gains of heads raise accuracy (points)": "yes",
        "gains of heads do more than these numbers of layers (difference of means)": "yes",
        "dividing one layer's positions costs more than the sum over all others (nats)": "yes",
        "the most harmful layer holds the best previous-token head (its rank)": "no",
        "early layers look more widely than late ones (rank correlation)": "yes",
        "useful factors rise from early to late layers (rank correlation)": "no",
        "useful temperatures rise from early to late layers (rank correlation)": "no",
    }
    assert answers[2]["the paper's algorithm raises accuracy (points)"] == " +5.0, -2.0"
    assert answers[2]["one factor for all layers (pi) raises accuracy (points)"] == " -1.0 [-1.5, -0.5]"
    assert answers[2]["gains of heads do more than these numbers of layers (difference of means)"] == " +52.0"
    rows = pool(by_seed["m"])
    assert rows.loc[MAIN[0], ["mean", "low", "high"]].tolist() == [1.5, -3, 6]
    assert "one factor (pi) -1.0 [-1.5, -0.5]" in tell_rows(rows)


def test_a_saved_scaling_says_what_it_is_valid_for(trial, fewer_texts, tmp_path):
    gains = HeadScaling(gains=np.linspace(0.4, 1.6, 8).reshape(2, 4))
    searches = pd.DataFrame({"method": ["heads, gains"], "seed": 0, "limit": 0.01, "scaling": [gains.key]}).assign(
        dose=0.5
    )
    row = trial.judge(searches, 2, 2).assign(model="m").pipe(pick, "m", 0.01).loc["heads, gains"]
    trial.save(tmp_path / "f.json", row, command="papermill")
    assert load_factors(tmp_path / "f.json") == gains
    content = read_factors(tmp_path / "f.json")
    [valid] = content["found"]["valid for"]
    [shortest, longest] = valid["tokens"]
    assert 0 < shortest <= longest
    assert valid["task"] == "kv-short-3"
    assert content["held_out"]["accuracy"] == row["accuracy"]
    assert (content["method"], content["command"]) == ("heads, gains", "papermill")
