import json
import shutil
import subprocess
import threading
import time
from functools import partial

import numpy as np
import pytest
from compare_predictions import leave_one_out, take_mean, take_nearest
from matplotlib.colors import to_hex
from scipy.interpolate import RBFInterpolator

from lrs_utils import (
    BezierCurve,
    ExtendedScaling,
    HeadScaling,
    LayerScaling,
    Ledger,
    load_factors,
    load_lm,
    score,
    tasks,
)
from lrs_utils.analysis.methods import colour_of
from lrs_utils.analysis.statistics import bootstrap_mean
from lrs_utils.models.tiny import TINY
from lrs_utils.playground.accuracies import choose_colours, describe_difference, list_accuracies
from lrs_utils.playground.comparison import find_difference
from lrs_utils.playground.editor import read_script
from lrs_utils.playground.improving import suite_to_learn
from lrs_utils.playground.measured import MeasuredScaling, read_measured
from lrs_utils.playground.playground import Playground
from lrs_utils.playground.prediction import Surrogate
from lrs_utils.playground.widget import show
from lrs_utils.scaling.files import save_factors

CURVE = BezierCurve((0, 2, 5, 7), (0.7, 1.0, 1.3, 1.1))


@pytest.fixture(scope="module")
def deep():
    """Eight tiny layers: four control points need room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "tiny-deep", ("llama", {"num_hidden_layers": 8}))
        return load_lm("tiny-deep", dtype="float32", device="cpu")


@pytest.fixture
def play(deep, tmp_path):
    made = Playground(
        deep, partial(tasks.kv_retrieval, keys="short"), 4, 5, ledger=tmp_path / "ledger.sqlite",
        bounds=(0.7, 1.3), step=0.05,
    )  # fmt: skip
    yield made
    made.stop()


def slowed(lm, seconds):
    """Let the last layer take its time."""
    return lm.model.model.layers[-1].register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_a_point_snaps_to_the_grid_and_stays_between_its_neighbours_and_in_bounds(play):
    play.drag(True)
    assert play.curve == BezierCurve((0, 2, 5, 7), (1.0,) * 4)
    play.move(1, 3.4, 1.137)
    assert (play.curve.layers[1], play.curve.values[1]) == (3, 1.15)
    play.move(1, 6.9, 9)
    assert (play.curve.layers[1], play.curve.values[1]) == (4, 1.3)
    play.move(0, -3, 0)
    assert (play.curve.layers[0], play.curve.values[0]) == (0, 0.7)
    play.move(3, 2, 1)
    assert play.curve.layers[3] == 6
    assert all(a < b for a, b in zip(play.curve.layers, play.curve.layers[1:], strict=False))


def test_a_released_drag_is_measured_context_by_context_into_the_ledger(play, deep, tmp_path):
    seen = []
    play.subscribe(lambda moved: seen.append(len(now.exact) if (now := play.measured.get(play.scaling.key)) else 0))
    play.drag(True)
    play.use(CURVE)
    time.sleep(0.5)
    assert not play.measured
    play.drag(False)
    play.wait()
    assert set(range(1, 6)) <= set(seen)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        direct = score(deep, play.suite, [play.scaling, play.unscaled], ledger=ledger)
    assert direct.recomputed == 0
    for scaling, exact in zip((play.scaling, play.unscaled), direct.exact, strict=True):
        np.testing.assert_array_equal([play.measured[scaling.key].exact[p] for p in range(5)], exact)
    assert "measured on 5 of 5 contexts" in play.status


def test_a_new_change_cancels_the_running_measurement_at_the_next_layer(play, deep):
    handle = slowed(deep, 0.4)
    try:
        play.use(CURVE)
        time.sleep(0.35)  # settled, and inside the first context
        first = play._thread
        began = time.monotonic()
        play.move(0, 0, 0.9)
        first.join()
        assert time.monotonic() - began < 0.9
        assert LayerScaling(CURVE.factors(8, 0, 0.05, (0.7, 1.3))).key not in play.measured
    finally:
        handle.remove()
    play.wait()
    assert len(play.measured[play.scaling.key].exact) == 5


def test_many_changes_in_a_row_are_one_measurement_and_one_step_to_undo(play):
    for value in (0.95, 0.9, 0.8, 0.75):
        play.move(2, 5, value)
    play.wait()
    assert len(play.measured) == 2  # the last curve, and no scaling
    play.undo()
    assert play.curve.values == (1.0,) * 4
    assert not play.can_undo
    play.redo()
    assert play.curve.values == (1.0, 1.0, 0.75, 1.0)
    assert not play.can_redo
    play.undo()
    play.use(CURVE)
    play.wait()
    assert not play.can_redo, "a new change forgets what was undone"


def test_stop_frees_the_model_and_keeps_what_was_measured(play, deep):
    handle = slowed(deep, 0.3)
    play.use(CURVE)
    time.sleep(0.8)
    play.stop()
    handle.remove()
    assert not play._thread.is_alive()
    assert "stopped" in play.status
    assert deep.model.config._attn_implementation != "lrs_packed"
    assert not any(layer._forward_pre_hooks for layer in deep.model.model.layers)
    kept = len(play.measured.get(play.scaling.key).exact) if play.scaling.key in play.measured else 0
    play.measure()
    play.wait()
    assert kept < len(play.measured[play.scaling.key].exact) == 5


def test_an_error_in_the_background_is_shown(play, deep):
    def broken(*_):
        raise RuntimeError("no such luck")

    handle = deep.model.model.layers[2].register_forward_pre_hook(broken)
    play.use(CURVE)
    play.wait()
    handle.remove()
    assert play.status == "RuntimeError: no such luck"


def test_what_the_ledger_knows_is_there_at_once_and_feeds_the_prediction(deep, tmp_path):
    suite = tasks.kv_retrieval(4, 5, keys="short")
    chance = np.random.default_rng(0)
    scalings = [LayerScaling(chance.choice([0.7, 0.85, 1.0, 1.15, 1.3], 8)) for _ in range(12)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        score(deep, suite, scalings, ledger=ledger)
    play = Playground(deep, partial(tasks.kv_retrieval, keys="short"), 4, 5, ledger=tmp_path / "ledger.sqlite")
    assert len(play.measured) == 12
    assert play.best.mean == max(measured.mean for measured in play.measured.values())
    predicted = play.prediction()
    assert predicted.shape == (4,)
    assert ((predicted >= 0) & (predicted <= 1)).all()
    assert {curve["kind"] for curve in list_accuracies(play)} == {"best", "prediction"}
    play.set_size(3, 2)
    assert play.measured == {}
    assert play.prediction() is None
    play.stop()


def test_leave_one_out_error_is_that_of_leaving_one_out():
    chance = np.random.default_rng(1)
    factors = chance.uniform(0.7, 1.3, (25, 8))
    accuracy = np.stack([factors.mean(1) - 0.5, factors[:, 0] / 2], axis=1) + chance.normal(scale=0.01, size=(25, 2))
    fitted = Surrogate(factors, accuracy)
    errors = []
    for smoothing in (0.01, 0.1, 1.0, 10.0):
        left_out = []
        for i in range(25):
            rest = np.arange(25) != i
            one = RBFInterpolator(factors[rest], accuracy[rest], kernel="linear", smoothing=smoothing, degree=0)
            left_out.append(one(factors[[i]])[0] - accuracy[i])
        errors.append(np.sqrt(np.mean(np.square(left_out))))
    assert fitted.error == pytest.approx(min(errors))
    assert fitted.error < 0.8 * fitted.error_of_mean
    alone = [accuracy[i] - np.delete(accuracy, i, axis=0).mean(axis=0) for i in range(25)]
    assert fitted.error_of_mean == pytest.approx(np.sqrt(np.mean(np.square(alone))))


def test_rivals_of_the_surrogate_are_judged_without_the_one_left_out():
    factors, accuracy = np.array([[1.0], [1.1], [1.3]]), np.array([[0.0, 0.5], [0.4, 0.5], [1.0, 0.2]])
    np.testing.assert_allclose(leave_one_out(take_nearest, factors, accuracy), [[0.4, 0], [-0.4, 0], [-0.6, 0.3]])
    error = leave_one_out(take_mean, factors, accuracy)
    np.testing.assert_allclose(error[0], [0.7, -0.15])
    assert np.sqrt(np.mean(error**2)) == pytest.approx(Surrogate(factors, accuracy).error_of_mean)


def test_saved_factors_are_those_shown(play, tmp_path):
    play.use(CURVE)
    play.wait()
    play.save(tmp_path / "mine.json")
    assert load_factors(tmp_path / "mine.json") == play.scaling
    content = json.loads((tmp_path / "mine.json").read_text())
    assert BezierCurve(**content["curve"]) == CURVE
    assert content["measured"]["contexts"] == 5


def test_a_file_is_shown_whole_and_a_control_point_takes_its_factors_along(play, tmp_path):
    factors, temperatures = [2.5, 0.3, 1, 1, 1, 1, 1.2, 1], [0.8, 1, 1, 1, 1, 1, 1, 1.4]
    mine = LayerScaling(factors, "ntk", temperatures)
    save_factors(tmp_path / "mine.json", mine)
    play.load(tmp_path / "mine.json")
    assert play.scaling == mine
    assert play.is_shown("temperatures")
    assert not play.follows_curve
    play.wait()
    assert len(play.measured[mine.key].exact) == 5
    assert play.prediction() is None
    play.move(0, 0, 1.1)
    assert play.follows_curve
    assert play.scaling.temperatures == mine.temperatures
    play.wait()
    play.undo()
    assert play.scaling == mine
    play.save(tmp_path / "again.json")
    assert load_factors(tmp_path / "again.json") == mine


def test_a_file_of_a_curve_brings_its_control_points_and_numbers_of_heads_are_kept(play, tmp_path):
    play.use(CURVE)
    play.save(tmp_path / "curve.json")
    play.use_preset("no scaling")
    play.load(tmp_path / "curve.json")
    assert play.curve == CURVE
    heads = HeadScaling(gains=np.full((8, 4), 1.1), layers=LayerScaling((1.2,) * 8))
    save_factors(tmp_path / "heads.json", heads)
    play.load(tmp_path / "heads.json")
    play.wait()
    assert play.scaling == heads
    assert len(play.measured[heads.key].exact) == 5
    play.move(0, 0, 0.9)
    assert play.scaling.gains == heads.gains
    play.use_preset("no scaling")
    assert play.scaling == play.unscaled


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no file; by name there are"),
        (LayerScaling((1.1,) * 4), "it is of 4 layers, and this model has 8"),
        (HeadScaling(gains=np.full((8, 2), 1.1)), "it is of 2 heads a layer, and this model has 4"),
        (ExtendedScaling((1.1,) * 8, extension=2.0, combine="divide"), "it reads beyond the window"),
        (
            LayerScaling((1.1,) * 8, bands=[[1.2, 0.9]] * 8),
            "it has numbers for bands, which the playground does not show",
        ),
        (HeadScaling(np.full((8, 16), 1.1)), "it has numbers of pairs or channels, which the playground does not show"),
        (HeadScaling(factors=np.full((8, 4), 1.1)), "it has factors of heads, which the playground does not show"),
        ("{}", "is not a factor file"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence_and_changes_nothing(play, tmp_path, content, said):
    file = tmp_path / "f.json"
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        save_factors(file, content)
    widgets = parts(show(play, save_to=file, editor=False))
    before = play.state
    widgets["Load factors"].click()
    assert said in play.status
    assert "Error" not in play.status
    assert play.state == before
    assert not play.busy


def test_a_file_of_another_model_is_shown_with_a_caution(play, tmp_path):
    save_factors(tmp_path / "f.json", LayerScaling((1.1,) * 8), model="another", fingerprint="0" * 16)
    play.load(tmp_path / "f.json")
    play.wait()
    assert "was found on another" in play.status
    play.move(0, 0, 0.9)
    play.wait()
    assert "was found on another" not in play.status


def test_what_ships_for_a_model_can_be_chosen_by_name(deep, tmp_path, monkeypatch):
    names = ["tiny-deep/mine", "another/mine"]
    monkeypatch.setattr("lrs_utils.playground.loading.shipped", lambda: names)
    play = Playground(deep, partial(tasks.kv_retrieval, keys="short"), 4, 2, ledger=tmp_path / "ledger.sqlite")
    widgets = parts(show(play))
    assert widgets["load"].options == ("", "tiny-deep/mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-deep").mkdir()
    save_factors("tiny-deep/mine", LayerScaling((1.1,) * 8, temperatures=(1.2,) * 8))
    widgets["load"].value = "tiny-deep/mine"
    assert play.scaling.temperatures == (1.2,) * 8
    assert widgets["temperatures"].value
    assert "temperatures=[1.2" in widgets["as Python"].value
    widgets["temperatures"].value = False
    assert play.scaling == LayerScaling((1.1,) * 8)
    assert widgets["load"].value == "", "it is another scaling now"
    play.stop()


def test_each_gradient_step_is_shown_and_measured_and_all_of_them_are_one_step_back(play):
    play.use(CURVE)
    play.wait()
    before, seen = play.state, []
    play.subscribe(lambda moved: seen.append((play.scaling.key, play.status)) if moved else None)
    play.improve("both", 3, n_contexts=2)
    play.wait()
    keys = [key for key, _ in seen]
    assert len({*keys, before.scaling.key}) == 4
    assert ["step 1 of 3" in seen[0][1], "step 3 of 3" in seen[2][1]] == [True, True]
    assert all("on other contexts" in said for _, said in seen)
    assert [len(play.measured[key].exact) for key in keys] == [2, 2, 5]
    assert "measured on 5 of 5 contexts" in play.status
    assert play.curve == CURVE
    assert not play.follows_curve
    assert play.is_shown("temperatures")
    after = play.state
    play.undo()
    assert play.state == before
    play.redo()
    assert play.state == after


def test_steps_follow_other_contexts_than_those_measured_where_there_are_any():
    suite = tasks.kv_retrieval(4, 3, keys="short")
    learned = suite_to_learn(partial(tasks.kv_retrieval, 4, keys="short"), suite)
    assert len(learned.probes) == 3
    assert not {probe.context for probe in learned.probes} & {probe.context for probe in suite.probes}
    assert suite_to_learn(lambda _: suite, suite) is suite


def test_numbers_of_heads_are_improved_and_the_scheme_stays(play):
    play.set_scheme("ntk")
    play.improve("heads", 1)
    play.wait()
    assert play.scaling.gains is not None
    assert play.scaling.temperatures is not None
    assert play.scheme == "ntk"
    with pytest.raises(ValueError, match="vary is 'all'"):
        play.improve("all")


def test_a_change_ends_the_steps_and_where_they_led_can_be_gone_back_to(play, deep):
    arrived = threading.Event()
    play.subscribe(lambda moved: arrived.set() if moved else None)
    handle = slowed(deep, 0.05)
    play.improve("factors", 50)
    arrived.wait(20)
    reached = play.state
    play.drag(True)
    assert not play.busy
    play.move(0, 0, 0.9)
    play.drag(False)
    handle.remove()
    play.wait()
    assert play.follows_curve
    play.undo()
    assert play.state == reached
    play.undo()
    assert play.scaling == play.unscaled


def test_steps_are_cancelled_between_layers_on_the_way_back_too(play, deep):
    passed = []
    last, first = deep.model.model.layers[-1], deep.model.model.layers[0]

    def note(layer, output):
        def passing(_):
            passed.append(layer)
            play._cancel()

        if output.requires_grad:
            output.register_hook(passing)

    handles = [layer.register_forward_hook(lambda of, _, output: note(of, output)) for layer in (first, last)]
    play.improve("both", 2)
    play.wait()
    for handle in handles:
        handle.remove()
    assert passed == [last]
    assert play.scaling == play.unscaled
    assert "stopped" in play.status
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in deep.model.model.layers)


def test_what_has_no_gradient_is_said(play):
    play.set_scheme("yarn")
    play.improve()
    play.wait()
    assert "scheme 'yarn' has no gradient" in play.status
    widgets = parts(show(play, editor=False))
    widgets["scheme"].value = "pi"
    widgets["space"].value = "factors"
    widgets["steps"].value = 1
    widgets["Improve"].click()
    play.wait()
    assert play.scaling != play.unscaled


def test_two_files_are_compared_context_by_context_and_the_scaling_shown_stays(play, tmp_path):
    hot, cold = (LayerScaling((1.0,) * 8, temperatures=(t,) * 8) for t in (1.5, 0.5))
    widgets = parts(show(play, save_to=tmp_path / "hot.json", editor=False))
    save_factors(tmp_path / "hot.json", hot)
    save_factors(tmp_path / "cold.json", cold)
    for name in ("hot", "cold"):
        widgets["file"].value = str(tmp_path / f"{name}.json")
        widgets["Load factors"].click()
    play.use(CURVE)
    shown = play.scaling
    widgets["compare"].value = str(tmp_path / "hot.json")
    assert play.comparison is None
    widgets["with"].value = str(tmp_path / "cold.json")
    play.wait()
    assert play.scaling == shown
    assert [len(play.measured[scaling.key].exact) for scaling in (hot, cold, shown)] == [5, 5, 5]
    assert [curve["kind"] for curve in list_accuracies(play)] == ["baseline", "first", "second", "current"]
    difference = describe_difference(play)
    first, second = (np.array([play.measured[of.key].exact[at] for at in range(5)], float) for of in (hot, cold))
    np.testing.assert_allclose(difference["mean"], (first - second).mean(axis=0), atol=1e-4)
    interval = bootstrap_mean((first - second).mean(axis=1))
    assert difference["name"] == (
        f"hot minus cold: {float(interval.mean):+.3f} [{float(interval.low):+.3f}, {float(interval.high):+.3f}], "
        "5 contexts"
    )
    widgets["with"].value = ""
    assert play.comparison is None
    assert describe_difference(play) is None


def test_what_can_not_be_shown_can_be_compared_if_it_fits(play, tmp_path):
    pairs = HeadScaling(np.linspace(0.9, 1.2, 8 * 16).reshape(8, 16))
    for name, scaling in {"pairs": pairs, "one": LayerScaling((1.1,) * 8), "other": LayerScaling((1.1,) * 4)}.items():
        save_factors(tmp_path / f"{name}.json", scaling)
    play.compare(tmp_path / "pairs.json", tmp_path / "one.json")
    play.wait()
    assert len(play.measured[pairs.key].exact) == 5
    before = play.comparison
    with pytest.raises(ValueError, match=r"other\.json can't be measured: .*4"):
        play.compare(tmp_path / "pairs.json", tmp_path / "other.json")
    assert play.comparison == before


def test_a_comparison_with_a_file_that_is_gone_changes_nothing(play, tmp_path):
    save_factors(tmp_path / "a.json", LayerScaling((1.1,) * 8))
    with pytest.raises(FileNotFoundError):
        play.compare(tmp_path / "a.json", tmp_path / "b.json")
    assert play.comparison is None
    assert not play.busy


def test_a_difference_has_an_interval_from_two_contexts_on_that_both_know():
    ones, zeros = np.ones(3, bool), np.zeros(3, bool)
    scaling = LayerScaling.identity(2)
    first = MeasuredScaling(scaling, {0: ones, 1: ones, 2: zeros})
    assert find_difference(first, MeasuredScaling(scaling, {0: zeros})) is None
    found = find_difference(first, MeasuredScaling(scaling, {1: zeros, 2: zeros, 5: ones}))
    assert found.n_contexts == 2
    assert float(found.mean.mean) == 0.5
    np.testing.assert_array_equal(found.by_depth.mean, [0.5] * 3)


def test_compared_files_have_the_colours_of_their_methods_where_they_differ():
    of = {name: to_hex(colour_of(name)) for name in ("GA", "layers")}
    assert choose_colours(("m/ga", "m/layers-best")) == (of["GA"], of["layers"])
    first, second = choose_colours(("m/layers-best", "m/layers-general"))
    assert first != second
    assert choose_colours(("mine.json", "m/ga"))[1] == of["GA"]


def test_numbers_of_single_layers_and_heads_are_set_on_the_grid(play):
    play.set_number("factors", 1.237, 3)
    play.set_number("temperatures", 40, 7)
    play.set_number("head_gains", 0.83, 2, head=1)
    assert play.scaling.layers == LayerScaling([1, 1, 1, 1.25, 1, 1, 1, 1], temperatures=[1] * 7 + [10])
    gains = np.ones((8, 4))
    gains[2, 1] = 0.85
    np.testing.assert_array_equal(play.scaling.gains, gains)
    play.set_number("head_gains", 1, 2, head=1)
    assert play.state.heads is None
    play.wait()


def test_the_editor_changes_numbers_of_layers_and_heads(play):
    shown = show(play)
    editor, widgets = shown.children[0], parts(shown)
    assert editor.numbers["head_gains"] is None
    assert editor.numbers["factors"] is None, "they follow the curve"
    widgets["heads"].value = True
    widgets["temperatures"].value = True
    assert play.scaling == play.unscaled
    assert np.array(editor.numbers["head_gains"]).shape == (8, 4)
    assert editor.numbers["temperatures"] == [1] * 8
    gains = [list(row) for row in editor.numbers["head_gains"]]
    gains[5][3] = 1.4
    editor.numbers = editor.numbers | {"head_gains": gains, "factors": [1.0] * 7 + [0.8]}
    assert play.scaling.gains[5][3] == 1.4
    assert play.state.layers.factors[7] == 0.8
    assert editor.state["numbers"] == editor.numbers
    assert "gains=[[1.0" in widgets["as Python"].value
    assert eval(widgets["as Python"].value) == play.scaling
    play.wait()
    widgets["heads"].value = False
    assert play.scaling == play.state.layers
    assert editor.numbers["head_gains"] is None
    play.wait()
    play.undo()
    assert widgets["heads"].value
    play.wait()


def test_a_model_with_too_few_layers_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="tiny-llama has 2 layers to scale"):
        Playground(tiny, tasks.kv_retrieval, 4, 5, ledger=tmp_path / "ledger.sqlite")


def parts(widget):
    """All widgets below one, by description."""
    found = {getattr(widget, "description", ""): widget}
    for child in getattr(widget, "children", ()):
        found |= parts(child)
    return found


def test_sliders_move_the_curve_and_follow_it(play, tmp_path):
    shown = show(play, save_to=tmp_path / "f.json", editor=False)
    widgets = parts(shown)
    widgets["P2 factor"].value = 1.2
    assert play.curve.values[1] == 1.2
    play.wait()
    play.use(CURVE)
    assert widgets["P3 layer"].value == 5
    assert widgets["P3 factor"].value == 1.3
    widgets["Undo"].click()
    play.wait()
    assert play.curve.values == (1.0, 1.2, 1.0, 1.0)
    widgets["preset"].value = "uniform"
    assert set(play.scaling.factors) == {0.7}
    widgets["scheme"].value = "ntk"
    assert play.scaling.scheme == "ntk"
    widgets["Save factors"].click()
    assert load_factors(tmp_path / "f.json") == play.scaling
    widgets["file"].value = str(tmp_path)
    widgets["Save factors"].click()
    assert "IsADirectoryError" in play.status
    play.wait()


def test_the_editor_and_the_playground_keep_each_other_up_to_date(play):
    editor = show(play).children[0]
    editor.dragging = True
    editor.numbers = editor.numbers | {"points": [[0, 0.7], [2, 1.0], [5, 1.3], [7, 1.1]]}
    assert play.curve == CURVE
    assert editor.state["factors"] == list(play.scaling.factors)
    assert not play.busy
    editor.dragging = False
    play.wait()
    assert {curve["kind"] for curve in editor.state["curves"]} >= {"baseline", "current"}
    play.undo()
    assert editor.numbers["points"][0] == [0, 1.0]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_browser_samples_curves_as_python_does(tmp_path):
    chance = np.random.default_rng(0)
    curves = []
    for _ in range(200):
        layers = np.sort(chance.choice(np.arange(2, 30), 4, replace=False)).tolist()
        curves.append(list(zip(layers, np.round(chance.integers(14, 25, 4) * 0.05, 2).tolist(), strict=True)))
    config = {"layers": 30, "first": 2, "step": 0.05, "low": 0.7, "high": 1.2}
    program = f"""
        import {{ sampleFactors }} from "./playground.mjs";
        console.log(JSON.stringify({json.dumps(curves)}.map((points) => sampleFactors(points, {json.dumps(config)}))));
    """
    (tmp_path / "playground.mjs").write_text(read_script())
    (tmp_path / "program.mjs").write_text(program)
    sampled = json.loads(subprocess.run(["node", tmp_path / "program.mjs"], capture_output=True, check=True).stdout)
    different = 0
    for points, found in zip(curves, sampled, strict=True):
        layers, values = zip(*points, strict=True)
        expected = BezierCurve(layers, values).factors(30, 2, 0.05, (0.7, 1.2))
        different += sum(a != b for a, b in zip(found, expected, strict=True))
        np.testing.assert_allclose(found, expected, atol=0.0501)  # a step, where a sample lies on a rounding edge
    assert different <= 0.01 * 200 * 30


def test_stop_waits_for_a_measurement_that_was_cancelled_before(play, deep):
    handle = slowed(deep, 0.5)
    play.use(CURVE)
    time.sleep(0.4)  # inside the first context
    older = play._thread
    play.move(0, 0, 0.9)
    play.stop()
    in_the_model = deep.model.config._attn_implementation == "lrs_packed"
    handle.remove()
    assert not in_the_model
    older.join(1)
    assert not older.is_alive()


def test_a_new_playground_of_a_model_stops_the_earlier_one(play, deep, tmp_path):
    handle = slowed(deep, 0.2)
    play.use(CURVE)
    time.sleep(0.4)
    again = Playground(deep, partial(tasks.kv_retrieval, keys="short"), 4, 5, ledger=tmp_path / "ledger.sqlite")
    assert not play.busy
    handle.remove()
    again.measure()
    again.wait()
    assert len(again.measured[again.unscaled.key].exact) == 5


def test_another_size_forgets_what_is_of_the_former_contexts(play, deep):
    handle = slowed(deep, 0.3)
    play.use(CURVE)
    time.sleep(0.4)
    play.move(0, 0, 0.9)
    play.set_size(6, 3)
    handle.remove()
    time.sleep(0.5)
    assert all(row.shape == (6,) for measured in play.measured.values() for row in measured.exact.values())
    assert "not measured yet" in play.status
    play.measure()
    play.wait()
    assert "measured on 3 of 3 contexts" in play.status
    assert not play.busy


def test_redo_does_not_lose_a_change_that_has_not_settled(play):
    play.use(CURVE)
    play.wait()
    play.undo()
    play.move(1, 3, 0.8)
    play.redo()
    assert play.curve.values[1] == 0.8, "a change forgets what could be redone"
    play.undo()
    assert play.curve.values == (1.0,) * 4


def test_a_slider_pushed_past_its_neighbour_comes_back_and_presets_are_named(play):
    widgets = parts(show(play, editor=False))
    widgets["P2 layer"].value = 6
    widgets["P2 layer"].value = 7
    assert play.curve.layers[1] == widgets["P2 layer"].value == 4
    widgets["preset"].value = "decreasing, as in the paper"
    assert widgets["preset"].value == "decreasing, as in the paper"
    widgets["P1 factor"].value = 0.8
    assert widgets["preset"].value == ""
    assert "LayerScaling([" in widgets["as Python"].value


def test_an_error_is_shown_with_its_advice(play, deep):
    def full(*_):
        error = RuntimeError("out of memory")
        error.add_note("use a device with more memory")
        raise error

    handle = deep.model.model.layers[2].register_forward_pre_hook(full)
    play.use(CURVE)
    play.wait()
    handle.remove()
    assert play.status == "RuntimeError: out of memory use a device with more memory"


def test_scalings_of_layers_and_heads_are_read_from_the_ledger_and_none_beyond_the_window(deep, tmp_path):
    suite = tasks.kv_retrieval(3, 1, keys="short")
    ones, layers = (1.0,) * 8, LayerScaling((1.2,) * 8, "ntk")
    gains = np.random.default_rng(0).uniform(0.9, 1.1, (8, 4))
    shown = [layers, HeadScaling(gains=gains), HeadScaling(gains**2, gains, mlp_gains=gains[:, 0], layers=layers)]
    scalings = [
        *shown,
        ExtendedScaling(ones, "dynamic_ntk"),
        HeadScaling(gains=gains, layers=ExtendedScaling(ones, "dynamic_ntk")),
        ExtendedScaling((0.9,) * 8, "yarn", extension=2, combine="divide"),
    ]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        score(deep, suite, scalings, ledger=ledger)
        assert {m.scaling for m in read_measured(ledger, deep.fingerprint, suite).values()} == {*shown}


def test_heads_that_were_found_are_the_best_so_far_after_a_restart_too(play, deep, tmp_path):
    found = HeadScaling(gains=np.full((8, 4), 1.1), layers=LayerScaling((1.1,) * 8))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for probe in play.suite.probes:
            n = len(probe.keys)
            ledger.record(deep.fingerprint, found.key, probe.keys, np.ones(n, bool), np.full(n, 0.1))
    again = Playground(deep, partial(tasks.kv_retrieval, keys="short"), 4, 5, ledger=tmp_path / "ledger.sqlite")
    assert again.best.scaling == found
    assert ("best", "best so far") in {(of["kind"], of["name"].partition(",")[0]) for of in list_accuracies(again)}
    again.stop()
