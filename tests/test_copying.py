"""Notebook 04's `copying`: heads that copy, what is left of them, and the pictures of both."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from copying import (
    ask_freely,
    compare_copying,
    draw_attention,
    draw_circuit,
    draw_layers,
    draw_losses,
    find_copy,
    score_copying,
    watch,
)  # fmt: skip

from lrs_utils import LayerScaling, tasks
from lrs_utils.analysis.attention import induction_scores
from lrs_utils.scoring.ledger import Ledger


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_copying_is_scored_with_no_scaling_and_with_one_layer_scaled(tiny):
    size = {"seed": 0, "n_tokens": 16, "n_texts": 1}
    heads = induction_scores(tiny, **size)
    score = partial(score_copying, tiny, heads, factor=1.5, **size)
    plain = score(None)
    assert plain["layer"].tolist() == list(range(tiny.num_layers))
    np.testing.assert_allclose(plain["previous token"], heads["previous token"].groupby("layer").max())
    assert plain["prefix matching"].iloc[0] == pytest.approx(heads["prefix matching"].nlargest(5).mean())
    scaled = score(1)
    assert scaled[["scaled", "layer"]].to_numpy().tolist() == [[1, 1]]
    assert scaled["previous token"].iloc[0] != plain["previous token"][1], "it is scaled"
    circuit = compare_copying(pd.concat([plain, *(score(layer) for layer in range(tiny.num_layers))]))
    assert circuit.columns.tolist() == ["previous", "previous scaled", "matching", "matching scaled"]
    assert circuit.loc[1, "previous scaled"] == scaled["previous token"].iloc[0]
    assert circuit["previous"].tolist() == plain["previous token"].tolist()


@pytest.mark.parametrize("keys", ["uuid", "short"])
def test_a_copy_is_found_where_the_context_has_the_answer(tiny, keys):
    [probe] = tasks.kv_retrieval(3, 1, keys=keys).probes
    question = probe.questions[1]
    copy = find_copy(tiny, probe.context, question)
    source, answer = (copy.ids[at : at + copy.length] for at in (copy.source, copy.copy))
    assert source == answer
    assert copy.source + copy.length <= copy.copy
    assert 1 <= copy.length <= 10
    text = tiny.tokenizer.decode(answer)
    assert text.strip() in question.answer, "tokens of this answer"
    assert len(find_copy(tiny, probe.context, question, most=2).ids) == len(copy.ids)
    assert find_copy(tiny, probe.context, question, most=2).length <= 2


def test_attention_of_a_head_is_watched_under_a_scaling(tiny):
    ids = [5, 6, 7, 8, 5, 6]
    plain = watch(tiny, ids, (1, 0), LayerScaling.identity(tiny.num_layers))
    np.testing.assert_allclose(plain.sum(1), 1, rtol=1e-5)
    assert np.triu(plain, 1).max() == 0, "no token looks ahead"
    scaled = watch(tiny, ids, (1, 0), LayerScaling.one_layer(1, 2.0, tiny.num_layers))
    assert not np.allclose(plain, scaled)


def test_an_answer_is_written_under_each_scaling_and_kept(tiny, tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    [probe] = tasks.kv_retrieval(2, 1, keys="short").probes
    scalings = {"none": LayerScaling.identity(tiny.num_layers), "2": LayerScaling.uniform(2.0, tiny.num_layers)}
    ask = partial(ask_freely, tiny, probe, probe.questions[0], scalings, ledger=ledger, max_new_tokens=4)
    suite, texts = ask()
    assert texts.keys() == scalings.keys()
    assert all('"' not in text and "\n" not in text for text in texts.values())
    assert suite.probes[0].questions[0].prompt.endswith(probe.questions[0].answer_prefix)
    assert ask()[1] == texts


def test_pictures_say_what_they_are_given():
    circuit = draw_circuit([("one", "does this"), ("two", "does that"), ("three", "ends")]).axes[0]
    headings = [text.get_text().partition("\n")[0] for text in circuit.texts if text.get_text()]
    assert headings == ["one", "two", "three"]
    assert sum(not text.get_text() for text in circuit.texts) == 2, "an arrow between each two"
    part = np.eye(3)
    left, right, _ = draw_attention({"a": part, "b": part}, "xyz", "xyz", xlabel="to", ylabel="from").axes
    assert (left.get_title(), right.get_title()) == ("a", "b")
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["x", "y", "z"]
    ax = plt.subplots()[1]
    draw_layers(pd.Series([0.0, 1.5, -0.1]), 1, ylabel="nats", title="one is tall", ax=ax)
    assert [text.get_text() for text in ax.texts] == ["layer 1: +1.5"]
    assert ax.patches[1].get_facecolor() != ax.patches[0].get_facecolor() == ax.patches[2].get_facecolor()


def test_losses_are_drawn_inside_their_panels_the_first_row_at_the_top():
    """Layer 16 was once cut off at the edge of the picture that is about it."""
    table = pd.DataFrame([[0.9, 0.5, 0.6, 0.3], [0.8, 0.6, 0.6, 0.6]], index=["layer 16", "layer 19"])
    figure = draw_losses(table, titles=["own", "induction"])
    own, induction = figure.axes
    assert [tick.get_text() for tick in own.get_yticklabels()] == ["layer 16", "layer 19"]
    assert own.get_yticks()[0] > own.get_yticks()[1]
    for ax, wanted in ((own, [0.9, 0.5]), (induction, [0.6, 0.3])):
        first = next(line for line in ax.lines if len(line.get_xdata()) == 2)
        assert list(first.get_xdata()) == wanted
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left < min(wanted) < max(wanted) < right
        assert bottom < 0 < 1 < top - 0.3, "marks have room above and below"
