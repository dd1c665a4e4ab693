from dataclasses import replace

import ladder
import numpy as np
import pandas as pd
import pytest
import torch
from ladder import Ladder, correlate_heads, draw_ladder, keep_largest, keep_side, summarise, trace_heads, watch_values
from matplotlib import pyplot as plt
from two_models import Trial

from lrs_utils import HeadScaling, LayerScaling, Ledger, load_lm, score, tasks
from lrs_utils.finding import free_text
from lrs_utils.finding import parts as dividing

TEXTS = {name: " ".join(f"{name}{i % 50}" for i in range(400)) for name in ("book", "facts")}
GAINS = [[1.3, 0.7, 1.0, 1.05], [1.0, 1.2, 0.98, 1.0]]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A ladder on a random model, with small texts."""
    monkeypatch.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
    monkeypatch.setattr(free_text, "OPENINGS", free_text.OPENINGS[:2])
    for module in ("ladder", "two_models", "lrs_utils.finding.recipe"):
        monkeypatch.setattr(f"{module}.default_texts", lambda: TEXTS)
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    trial = Trial(lm, ledger, 4, (0.01, 10.0), (2, 2, 2), 4, 4, 4, (1.1,), (0.7, 1.2))
    return Ladder(trial, 3, 2, questions=4, stretches=2)


def test_every_search_of_the_ladder_gives_a_judged_row_for_each_limit(small):
    names = ["layers: factors, pi", "heads: gains", "control: shuffled heads", "control: LoRA r = 1"]
    table = pd.concat([piece() for piece in small.list_pieces(dict.fromkeys(names, 1)).values()], ignore_index=True)
    assert table.groupby("method", sort=False).size().to_dict() == dict.fromkeys(names, 2)
    assert set(table["limit"]) == {0.01, 10.0}
    assert {"numbers", "points", "low", "high", "p", "by fifth", "perplexity", "dose", "scaling"} <= {*table}
    counts = table.groupby("method")["numbers"].first()
    assert (counts["layers: factors, pi"], counts["heads: gains"], counts["control: shuffled heads"]) == (2, 8, 8)
    unchanged = table[table["dose"] == 0]
    assert (unchanged["points"] == 0).all()
    assert (unchanged["perplexity"] == 0).all()
    with pytest.raises(ValueError, match="'gains' is no space or control; there are layers: factors, pi"):
        small.list_pieces({"gains": 1})


def test_a_control_is_judged_under_its_hooks(small):
    control = ladder.list_controls(small.trial.lm, 0)["first two tokens"]
    moved = replace(control, learned=tuple({n: v + 3 for n, v in layer.items()} for layer in control.learned))
    row = small._compare(moved)
    assert row["perplexity"] != 0
    suite = small.trial.make_judged(3)
    identity = LayerScaling.identity(2)
    with moved.applied_to(small.trial.lm.model):
        exact = score(small.trial.lm, suite, [identity]).exact.mean()
    assert row["accuracy"] == pytest.approx(exact)


def test_where_nothing_helped_the_gains_of_heads_are_one(tiny):
    rows = pd.DataFrame({"method": "heads: gains", "seed": [0, 0, 1], "limit": [0.0, 0.01, 0.01]})
    rows["scaling"] = [s.key for s in (LayerScaling.identity(2), HeadScaling(gains=GAINS), LayerScaling.identity(2))]
    assert ladder.take_heads(rows, 0.01, tiny) == HeadScaling(gains=GAINS)
    none = ladder.take_heads(rows, 0.0, tiny)
    assert none == keep_largest(none, 3) == HeadScaling(gains=np.ones((2, 4)))
    scores = pd.DataFrame({"layer": [0, 1], "head": [0, 0], "induction": [0.1, 0.2]})
    assert correlate_heads(none, scores).empty


def test_the_heads_that_moved_farthest_are_kept():
    scaling = HeadScaling(gains=GAINS)
    assert keep_largest(scaling, 2).gains == ((1.3, 0.7, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))
    assert keep_largest(scaling, 8) == scaling
    both = HeadScaling(GAINS, np.ones((2, 4)) * 1.01)
    assert keep_largest(both, 1).temperatures == ((1.0, 0.7, 1.0, 1.0), (1.0,) * 4)
    assert keep_side(scaling, True).gains == ((1.3, 1.0, 1.0, 1.05), (1.0, 1.2, 1.0, 1.0))
    assert keep_side(scaling, False).gains == ((1.0, 0.7, 1.0, 1.0), (1.0, 1.0, 0.98, 1.0))


def test_parts_of_a_scaling_are_compared_with_no_scaling(tiny, tmp_path):
    suite = tasks.kv_retrieval(4, 3, keys="short")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    table = trace_heads(tiny, HeadScaling(gains=GAINS), suite, [1, 3], ledger)
    assert table["kept"].tolist() == ["1 heads", "3 heads", "all", "gains above 1", "gains below 1"]
    assert table["numbers"].tolist() == [1, 3, 5, 3, 2]
    exact = score(tiny, suite, [LayerScaling.identity(2), HeadScaling(gains=GAINS)]).exact.mean(axis=(1, 2))
    assert table.set_index("kept").loc["all", "points"] == pytest.approx(100 * (exact[1] - exact[0]))


def test_ranks_of_heads_are_compared_with_their_numbers():
    scores = pd.DataFrame([(layer, head, GAINS[layer][head], 0.1 * head) for layer in (0, 1) for head in range(4)],
                          columns=["layer", "head", "same", "other"])  # fmt: skip
    table = correlate_heads(HeadScaling(gains=GAINS), scores).set_index(["score", "of"])
    assert table.loc[("same", "its log"), "rho"] == pytest.approx(1)
    assert abs(table.loc[("other", "its log"), "rho"]) < 0.9


def test_attention_on_the_value_is_what_the_layers_give_it():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    suite = tasks.kv_retrieval(3, 1, keys="short", positions=[1])
    scaling = HeadScaling(temperatures=GAINS)
    [[found]] = watch_values(lm, suite, scaling)
    [probe] = suite.probes
    [question] = probe.questions
    text = probe.context + question.prompt + question.answer_prefix
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]  # a token a character
    at = probe.context.index(f'"{question.answer}"') + 1
    lm.model.set_attn_implementation("eager")
    with torch.no_grad(), scaling.applied_to(lm.model):
        weights = lm.model(ids, output_attentions=True).attentions
    wanted = [layer[0, :, -1, at : at + len(question.answer)].sum(-1).numpy() for layer in weights]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_figure_has_a_point_for_each_method_and_hollow_ones_for_controls():
    rows = [
        {"method": method, "seed": seed, "limit": 0.01, "numbers": n, "points": p + seed, "low": p - 1, "high": p + 2,
         "p": 0.01, "perplexity": 0.5}
        for method, n, p in (("heads: gains", 270, 60), ("control: outputs", 60, 10)) for seed in (0, 1)
    ]  # fmt: skip
    table = summarise(pd.DataFrame(rows))
    assert table["seeds"].tolist() == [2, 2]
    assert table["points"].tolist() == [60.5, 10.5]
    figure, ax = plt.subplots()
    draw_ladder(table, 0.01, ax)
    assert [text.get_text() for text in ax.texts] == ["heads: gains", "outputs"]
    assert ax.get_xscale() == "log"
    plt.close(figure)
