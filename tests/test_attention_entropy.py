"""What notebook 02 measures and computes, on a tiny model and on made-up numbers."""

import attention_entropy as module
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lrs_utils import LayerScaling, tasks
from lrs_utils.analysis.attention import attention
from lrs_utils.analysis.methods import colour_of
from lrs_utils.analysis.statistics import Interval


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def suite():
    return tasks.kv_retrieval(4, 4, seed=0, keys="short")


def test_each_context_gets_one_question_and_all_depths_take_turns(tiny, suite):
    asked = module.ask_one_each(tiny, suite)
    for number, ((ids, n_context), probe) in enumerate(zip(asked, suite.probes, strict=True)):
        q = probe.questions[number]
        assert tiny.tokenizer.decode(ids) == probe.context + q.prompt + q.answer_prefix
        assert tiny.tokenizer.decode(ids[:n_context]) == probe.context


def test_even_attention_is_1_in_both_measures():
    n = 40
    even = np.log(np.arange(1, n + 1))
    np.testing.assert_allclose(module.relative(even.astype(np.float32)), 1, rtol=1e-6)
    naive = np.mean([[min(1, seen) / seen, max(0, min(9, seen - 1)) / seen] for seen in range(1, 11)], axis=0)
    np.testing.assert_allclose(module.even_shares([0, 1, 10]), naive)


def test_texts_are_measured_by_layer_and_by_head(tiny, suite):
    ids, n_context = module.ask_one_each(tiny, suite)[0]
    table = module.measure_texts(tiny, "key-value", [(ids, n_context)])
    assert len(table) == 2
    found = attention(tiny, ids)
    last = found.entropy[1, :, -1] / np.log(len(ids))
    row = table[table["layer"] == 1].iloc[0]
    assert [row[f"head {head}"] for head in range(4)] == pytest.approx(last.tolist(), abs=1e-4)
    assert row["last"] == pytest.approx(last.mean(), abs=1e-4)
    assert row[[f"last {part}" for part in module.PARTS]].sum() == pytest.approx(1, abs=1e-3)


def test_spans_hold_the_value_that_is_asked_for(tiny, suite):
    probe = suite.probes[1]
    q = probe.questions[2]
    ids = tiny.tokenizer(probe.context)["input_ids"]
    spans = module.find_spans(tiny, probe, q)
    first, after = spans.pop("gold")
    assert tiny.tokenizer.decode(ids[first:after]) == q.answer
    assert [*spans] == module.TENTHS
    assert spans["10 %"][0] == 1
    assert spans["100 %"][1] == len(ids)


def test_a_scaling_changes_what_is_measured_and_every_position_is_asked_in_turn(tiny, suite):
    plain, scaled = (
        module.measure_asked(tiny, suite, name, scaling)
        for name, scaling in (("a", LayerScaling.identity(2)), ("b", LayerScaling.uniform(2, 2)))
    )
    assert plain.groupby("text")["position"].first().tolist() == [0, 1, 2, 3]
    assert set(scaled["scaling"]) == {"b"}
    assert not np.allclose(plain["entropy"], scaled["entropy"])


def test_a_long_text_has_a_row_for_each_layer(tiny):
    found = module.measure_long(tiny, list(range(50)))
    assert found["layer"].tolist() == [0, 1]
    np.testing.assert_allclose(found["all"], found["last 256"])  # it has fewer queries than that


def test_entropy_that_falls_over_the_layers_has_a_correlation_of_minus_1():
    falling = np.array([[0.9, 0.7, 0.4, 0.2], [0.8, 0.6, 0.5, 0.1]])
    row = module.correlate_over_layers({("book", "all"): falling, ("book", "last"): -falling}).loc[("book", "all")]
    assert row.tolist() == pytest.approx([-1, -1, -1, 0.75, 0.3])


def test_spreads_tell_heads_from_layers():
    alike = pd.DataFrame([[1.0, 1.0], [3.0, 3.0]])
    assert module.find_spreads(alike) == (0, pytest.approx(np.sqrt(2)))
    assert module.find_spreads(alike.T) == (pytest.approx(np.sqrt(2)), 0)


def measured(name, gold, entropy):
    rows = [
        {"scaling": name, "text": text, "position": text, "layer": layer, "gold": gold, "entropy": entropy + layer}
        | dict.fromkeys(module.TENTHS, gold)
        for text in range(10)
        for layer in range(3)
    ]
    return pd.DataFrame(rows)


def test_effects_are_paired_differences_from_no_scaling():
    scaled = pd.concat([measured("no scaling", 0.01, 0.5), measured("one factor (1.2)", 0.03, 0.4)])
    on_gold, on_tenths, widths = module.find_effects(scaled).values()
    np.testing.assert_allclose(on_gold["no scaling"].mean, 1)
    np.testing.assert_allclose(on_gold["one factor (1.2)"].mean, 3)
    assert [*on_tenths] == [*widths] == ["one factor (1.2)"]
    np.testing.assert_allclose(on_tenths["one factor (1.2)"].mean, np.full(10, 2))
    np.testing.assert_allclose(widths["one factor (1.2)"].low, np.full(3, -0.1))


def test_a_scaling_has_one_colour_in_all_panels_and_factors_above_1_are_dashed():
    line = Interval(*[np.arange(3.0)] * 3)
    both = {"one factor (0.85)": line, "one factor (1.2)": line}
    figure = module.draw_scaled({("y", "depth"): {"no scaling": line} | both, ("y", "layer"): both})
    styles = [[(line.get_color(), line.get_linestyle()) for line in ax.lines] for ax in figure.axes]
    green = colour_of("one factor")
    assert styles[1] == [(green, "-"), (green, "--")]
    assert styles[0][1:] == styles[1]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 0.5, 1]


def test_one_layer_and_one_predictor_are_marked():
    figure = module.draw_layers({"entropy": [0.1, 0.2, 0.3], "harm": [0, 1, 0]}, marked=1)
    colours = [bar.get_facecolor() for bar in figure.axes[1].patches]
    assert colours[0] == colours[2] != colours[1]
    table = pd.DataFrame({"rank correlation": [0.1, 0.2], "low": 0, "high": 0.5}, index=["a", "b"])
    labels = module.draw_correlations(table, "b").axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["a", "b"]
    assert labels[0].get_color() != labels[1].get_color()
    assert len(module.draw_rows({"one": np.ones(4), "two": np.ones(4)}, (1, 2)).axes) == 2
    lines = dict.fromkeys(module.KIND_COLOURS, Interval(*[np.ones(3)] * 3))
    assert {text.get_text() for text in module.draw_entropy({"all": lines}).axes[0].texts} == {*module.KIND_COLOURS}
