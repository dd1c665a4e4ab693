"""What notebook 01 measures and computes, on a tiny model and on lines that are known."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rope_decay

from lrs_utils import LayerScaling
from lrs_utils.analysis.attention import logits_by_distance
from lrs_utils.analysis.statistics import Interval

EDGES = np.array([1, 2, 4, 8, 16])
MIDDLES = np.sqrt(EDGES[:-1] * (EDGES[1:] - 1.0))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_decay_is_the_mean_logit_of_each_bin_by_text_and_by_head(tiny):
    texts = np.random.default_rng(0).integers(0, 256, (2, 40))
    table = rope_decay.measure_decay(tiny, "text", texts, EDGES, LayerScaling.identity(2))
    plain = np.array([logits_by_distance(tiny, text.tolist()) for text in texts])  # texts, layers, heads, distances
    of_layer = table[(table["text"] == 1) & (table["layer"] == 1) & (table["bin"] == 2)]
    assert of_layer["logit"].item() == pytest.approx(plain[1, 1, :, 4:8].mean(), abs=6e-4)
    of_head = table[(table["text"] == "mean") & (table["layer"] == 0) & (table["head"] == 3) & (table["bin"] == 3)]
    assert of_head["logit"].item() == pytest.approx(plain[:, 0, 3, 8:16].mean(), abs=6e-4)
    assert len(table) == 2 * 2 * 4 + 2 * 4 * 4


def test_a_scaled_layer_is_measured_over_texts_only_and_another_layer_s_factor_changes_it_not(tiny):
    texts = np.random.default_rng(0).integers(0, 256, (2, 40))
    plain, scaled = (
        rope_decay.measure_decay(tiny, "text", texts, EDGES, scaling)
        for scaling in (LayerScaling.identity(2), LayerScaling.one_layer(1, 1.5, 2))
    )
    assert set(scaled["text"]) == {"mean"}
    assert len(scaled) == 2 * 4
    over_texts = plain[plain["head"] == "mean"].groupby(["layer", "bin"])["logit"].mean().unstack()
    change = np.abs(over_texts - scaled.set_index(["layer", "bin"])["logit"].unstack()).max(axis=1)
    assert change[0] < 1e-3 < change[1]


def test_slopes_and_r2_of_known_lines():
    octaves = np.log2(MIDDLES)
    lines = np.array([-2 * octaves + 1, 0.5 * octaves])
    np.testing.assert_allclose(rope_decay.find_slopes(np.array([lines, lines + 3]), octaves), [[2, -0.5]] * 2)
    np.testing.assert_allclose(rope_decay.find_r2(lines, octaves), 1)
    assert rope_decay.find_r2(np.array([[0.0, 1, 0, 1]]), np.array([0.0, 0, 1, 1]))[0] == pytest.approx(0)


def test_a_straight_line_over_octaves_stretches_by_its_slope():
    before = -2 * np.log2(MIDDLES)
    stretched, inside = rope_decay.stretch(before, MIDDLES, 2.0)
    assert inside.tolist() == [False, True, True, True]
    np.testing.assert_allclose((stretched - before)[inside], 2)
    assert rope_decay.stretch(before, MIDDLES, 0.5)[1].tolist() == [True, True, True, False]


def test_a_change_that_is_a_stretch_is_explained_whole_and_one_that_is_not_is_not():
    before = -np.log2(MIDDLES)
    stretched, _ = rope_decay.stretch(before, MIDDLES, 2.0)
    change, predicted, numbers = rope_decay.explain_change(before, stretched, MIDDLES, 2.0)
    assert numbers == pytest.approx([1, 0, 1])
    assert np.isnan(predicted[0])
    np.testing.assert_allclose(predicted[1:], change[1:])
    assert rope_decay.explain_change(before, before - 1, MIDDLES, 2.0)[2] == pytest.approx([1, 2, -3])


def test_bins_hold_mean_least_and_most():
    found = rope_decay.in_bins(np.array([1.0, 3, 5, 7]), np.array([0, 1]))
    assert [values.tolist() for values in found] == [[1, 5], [1, 3], [1, 7]]


def test_an_angle_is_written_from_key_to_query_and_a_small_one_has_one_arrow():
    _, (wide, none) = plt.subplots(1, 2)
    rope_decay.draw_arrows(np.exp(3.5j), 1, "wide", wide)
    rope_decay.draw_arrows(1j, 1j, "none", none)
    assert wide.get_title() == f"wide\n{np.degrees(3.5):.0f}°"
    assert {text.get_text() for text in none.texts} == {"", "q, k"}


def test_panels_name_what_they_show():
    line = np.arange(4.0)
    bounds = {"a": {"no scaling": Interval(line, line, line), "factor 2": Interval(line, line, line)}}
    figure = rope_decay.draw_bounds(bounds, MIDDLES, "factor 2")
    assert {text.get_text() for text in figure.axes[0].texts} == {"no scaling", "factor 2"}
    decay = rope_decay.draw_decay({"text": np.array([line, -line, line / 2])}, MIDDLES, np.array([-1.0, 1, -0.5]))
    assert {text.get_text() for text in decay.axes[0].texts} == {"layer 1", "mean of layers", "layer 0"}
    changes = rope_decay.draw_changes({(8, 0.8): (line, line), (16, 0.8): (line, -line)}, MIDDLES)
    assert [ax.get_title() for ax in changes.axes] == ["layer 8", "layer 16"]
    assert [text.get_text() for text in changes.axes[1].texts] == ["0.8"]
