import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fitting
from test_packed import seen_densely
from transformers import AutoConfig, AutoModelForCausalLM

from lrs_utils import ExtendedScaling, GradientSearch, HeadScaling, LayerScaling, Ledger, load_lm, score, search, tasks
from lrs_utils.scaling.products import n_heads
from lrs_utils.scoring import attention
from lrs_utils.scoring.packing import pack
from lrs_utils.searchers import descent, gradient
from lrs_utils.searchers.gradient import fits_at_once, gradient_key, nll_gradient, sum_key, sum_nll_gradient
from lrs_utils.searchers.learned import HEAD_NUMBERS, LAYER_NUMBERS, SPACES, numbers_of, scaling_of
from lrs_utils.searchers.objectives import mixture

SUITE = tasks.kv_retrieval(2, 3, keys="short")


@pytest.mark.parametrize("scheme", ["pi", "ntk"])
def test_the_gradient_is_the_slope_of_what_score_measures(lm, scheme):
    idle = "smollm3" in lm.name  # its second layer reads no positions, so its temperature is 1
    values = np.array([[1.2, 0.9], [0.8, 1.0 if idle else 1.3]])
    scaling = LayerScaling(values[0], scheme, values[1])
    nll, gradient = nll_gradient(lm, SUITE.probes[0], scaling)
    suite = tasks.kv_retrieval(2, 1, keys="short")
    assert nll == pytest.approx(score(lm, suite, [scaling]).nll.mean(), abs=1e-5)
    h = 2e-4  # of a log: phases of some hundred radians must turn little, and nll is a float32
    sides = []
    for row, layer in np.ndindex(2, 2):
        for sign in (h, -h):
            moved = values.copy()
            moved[row, layer] *= 1.0 if idle and row and layer else np.exp(sign)
            sides.append(LayerScaling(moved[0], scheme, moved[1]))
    slopes = np.diff(score(lm, suite, sides).nll.mean(axis=(1, 2)).reshape(2, 2, 2)[..., ::-1])[..., 0] / (2 * h)
    np.testing.assert_allclose(gradient, slopes, atol=0.05 * np.abs(slopes).max() + 1e-3)
    assert np.abs(gradient).max() > 1e-3


HEADS = HeadScaling(
    [[0.7, 1.0, 1.4, 1.2], [1.3, 0.8, 1.0, 0.6]],
    [[1.3, 0.7, 1.0, 1.8], [0.9, 1.6, 0.5, 1.1]],
    mlp_gains=[0.8, 1.2],
    layers=LayerScaling((1.2, 0.9), "ntk", (0.9, 1.1)),
)


def with_numbers(values, lm):
    """The scaling of what `numbers_of` gives."""
    return scaling_of(values, HEADS, lm, [])


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # without and with a norm of queries
@pytest.mark.parametrize(
    "name", [*HEAD_NUMBERS, "pair_temperatures", "channel_gains", "factors", "bands_4", "head_factors"]
)
def test_the_gradient_by_numbers_of_heads_is_the_slope_of_what_score_measures(family, name):
    lm = load_lm(f"tiny-{family}", dtype="float64", device="cpu")
    suite = tasks.kv_retrieval(2, 1, keys="short")
    values = numbers_of(HEADS, lm, [name])
    assert with_numbers(values, lm).key == HEADS.key
    nll, gradient = nll_gradient(lm, suite.probes[0], HEADS, [name])
    assert nll == pytest.approx(score(lm, suite, [HEADS]).nll.mean(), abs=1e-5)
    rows = {
        "head_temperatures": 4,
        "head_gains": 4,
        "head_factors": 4,
        "pair_temperatures": 16,
        "channel_gains": 32,
        "bands_4": 4,
    }
    assert gradient.shape == values[name].shape == (rows.get(name, 1), 2)
    h = 2e-4 if name in ("factors", "bands_4", "head_factors") else 5e-3  # of a log
    sides = []
    for index in np.ndindex(values[name].shape):
        for sign in (h, -h):
            moved = values[name].copy()
            moved[index] *= np.exp(sign)
            sides.append(with_numbers(values | {name: moved}, lm))
    up, down = score(lm, suite, sides).nll.mean(axis=(1, 2)).reshape(-1, 2).T
    slopes = ((up - down) / (2 * h)).reshape(gradient.shape)
    np.testing.assert_allclose(gradient, slopes, atol=0.01 * np.abs(slopes).max() + 2e-4)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("numbers", [LAYER_NUMBERS, HEAD_NUMBERS])
def test_the_gradient_is_that_of_dense_attention_by_autograd(lm, monkeypatch, numbers):
    start, probe = fitting(lm, HEADS), SUITE.probes[0]
    ours = nll_gradient(lm, probe, start, numbers)

    def attend_densely(query, key, value, layout, window, scale):
        seen = seen_densely([packed for packed, _ in layout._packs], 1, window)
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return ((scale * query @ keys.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)

    monkeypatch.setattr(attention._PackedAttention, "apply", attend_densely)
    dense = nll_gradient(lm, probe, start, numbers)
    assert ours[0] == pytest.approx(dense[0], rel=1e-5)
    np.testing.assert_allclose(ours[1], dense[1], rtol=1e-4, atol=1e-4 * np.abs(dense[1]).max())


def test_several_numbers_are_differentiated_at_once_as_each_alone(tiny):
    names = ["mlp_gains", "factors", "head_gains", "head_temperatures"]
    together = nll_gradient(tiny, SUITE.probes[0], HEADS, names)
    alone = [nll_gradient(tiny, SUITE.probes[0], HEADS, [name]) for name in names]
    assert together[1].shape == (10, 2)
    np.testing.assert_allclose(together[1], np.concatenate([gradient for _, gradient in alone]), rtol=1e-3, atol=1e-5)
    # multiplying by a gain of 1 takes another path through the kernels, which may move the last bit
    np.testing.assert_allclose([nll for nll, _ in alone], together[0], rtol=1e-6)


@pytest.mark.parametrize("start", [LayerScaling((1.2, 0.9), "pi", (1.3, 0.8)), HEADS], ids=["layers", "heads"])
def test_the_gradient_by_a_layers_temperature_is_the_sum_over_its_heads(lm, start):
    start = fitting(lm, start)
    _, of_layers = nll_gradient(lm, SUITE.probes[0], start, ["temperatures"])
    _, of_heads = nll_gradient(lm, SUITE.probes[0], start, ["head_temperatures"])
    if "smollm3" in lm.name:  # its second layer reads no cos and sin, which carry the layer's
        assert of_layers[0, 1] == 0
        of_layers, of_heads = of_layers[:, :1], of_heads[:, :1]
    np.testing.assert_allclose(of_heads.sum(axis=0), of_layers[0], rtol=1e-3, atol=1e-4)
    assert np.abs(of_layers).max() > 1e-3


@pytest.mark.parametrize("numbers", [LAYER_NUMBERS, HEAD_NUMBERS])
def test_activations_that_are_kept_or_compute_twice_give_the_same(lm, monkeypatch, numbers):
    calls = []
    twice = gradient._compute_twice
    monkeypatch.setattr(gradient, "_compute_twice", lambda *args: calls.append(args[0].__name__) or twice(*args))
    start = fitting(lm, HEADS)
    kept = nll_gradient(lm, SUITE.probes[0], start, numbers)
    assert "run_with" not in calls
    monkeypatch.setattr(gradient, "_KEPT_BYTES", 0)
    computed = nll_gradient(lm, SUITE.probes[0], start, numbers)
    assert calls.count("run_with") == 2
    assert computed[0] == kept[0]
    np.testing.assert_allclose(computed[1], kept[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scheme", "combine"), [("ntk", "divide"), ("dynamic_ntk", "multiply"), ("pi", "multiply")])
def test_the_gradient_goes_through_an_extension(tiny, scheme, combine):
    def scaled(factor):
        return ExtendedScaling((factor, 0.9), scheme, extension=2.0, combine=combine)

    suite, h = tasks.kv_retrieval(2, 1, keys="short"), 2e-4
    _, gradient = nll_gradient(tiny, suite.probes[0], scaled(1.2))
    sides = [scaled(1.2 * np.exp(sign)) for sign in (h, -h)]
    up, down = score(tiny, suite, sides).nll.mean(axis=(1, 2))
    assert gradient[0, 0] == pytest.approx((up - down) / (2 * h), rel=0.1, abs=5e-3)
    searcher = GradientSearch(tiny, suite, start=scaled(1.0), steps=2, every=2)
    assert {
        (c.scheme, c.extension, c.combine)
        for c in search(tiny, suite, searcher, budget=2, objective=mixture(1)).candidates
    } == {(scheme, 2.0, combine)}


def test_without_any_factor_the_gradient_still_depends_on_the_scheme(tiny, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    found = {}
    for scheme in ("pi", "ntk"):
        for _ in range(2):  # the second time from the ledger
            nll, gradient = nll_gradient(tiny, SUITE.probes[0], LayerScaling((1.0, 1.0), scheme), ledger=ledger)
            assert found.setdefault(scheme, (nll, gradient.tolist())) == (nll, gradient.tolist())
    assert found["pi"][0] == found["ntk"][0]
    assert found["pi"][1][0] != found["ntk"][1][0]
    assert found["pi"][1][1] == pytest.approx(found["ntk"][1][1], rel=1e-3)


def test_what_has_no_gradient_is_refused(tiny):
    with pytest.raises(ValueError, match="scheme 'yarn' has no gradient"):
        nll_gradient(tiny, SUITE.probes[0], LayerScaling((1.5, 1.0), "yarn"))
    with pytest.raises(ValueError, match="factors has 3 values"):
        nll_gradient(tiny, SUITE.probes[0], LayerScaling((1.5, 1.0, 1.0)))
    with pytest.raises(ValueError, match="vary is 'all'"):
        GradientSearch(tiny, SUITE, vary="all")
    with pytest.raises(ValueError, match="weights has 1 values for 2 suites"):
        GradientSearch(tiny, [SUITE, SUITE], weights=[1.0])
    for settings, message in (
        ({"steps": 0}, "steps is 0"),
        ({"every": 0}, "every is 0"),
        ({"bounds": (2, 1)}, "bounds is"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientSearch(tiny, SUITE, **settings)
    with pytest.raises(ValueError, match="beyond the window"):
        nll_gradient(tiny, tasks.kv_retrieval(400, 1, keys="short").probes[0], LayerScaling((0.1, 1.0)))


@pytest.mark.parametrize("start", [None, ExtendedScaling((1.0, 1.0), "dynamic_ntk", combine="divide")])
def test_a_factor_does_not_fall_until_a_context_no_longer_fits(tiny, monkeypatch, start):
    suite = tasks.kv_retrieval(12, 3, keys="short")
    low = 1.1 * max(pack(tiny, probe, "").longest for probe in suite.probes) / tiny.window
    monkeypatch.setattr(descent, "nll_gradient", lambda *_, **__: (1.0, np.ones((2, 2))))  # down, always
    searcher = GradientSearch(tiny, suite, start=start, steps=4, every=2, rate=3.0)
    result = search(tiny, suite, searcher, budget=3, objective=mixture(1))
    assert result.candidates[-1].factors == pytest.approx((low, low), abs=1e-4)


def descended(lm, ledger=None, vary="both", steps=12):
    searcher = GradientSearch(
        lm, SUITE, vary=vary, steps=steps, every=5, rate=0.05, temperature_rate=0.05, ledger=ledger
    )
    return searcher, search(lm, SUITE, searcher, budget=100, objective=mixture(1), ledger=ledger)


def test_following_the_gradient_lowers_the_nll(tiny):
    searcher, result = descended(tiny)
    assert len(searcher.nll) == 12
    assert result.candidates[0] == LayerScaling.identity(2)
    assert len(result.candidates) == 4  # the start, and after 5, 10 and 12 steps
    assert result.fitness[-1][0] > result.fitness[0][0] + 0.01
    # 3 contexts of 2 questions for each candidate, and each step a gradient of 2 questions
    assert result.answers == [6, 12 + 5 * 8, 18 + 10 * 8, 24 + 12 * 8]


def test_what_is_not_varied_stays(tiny):
    assert descended(tiny, vary="factors")[1].candidates[-1].temperatures is None
    only_temperatures = descended(tiny, vary="temperatures")[1].candidates[-1]
    assert set(only_temperatures.factors) == {1.0}
    assert only_temperatures.temperatures is not None


def numbers_changed(scaling, start, lm):
    """Fields of the layers' settings that differ."""
    pairs = zip(start.settings, scaling.settings, strict=True)
    changed = {name for one, other in pairs for name in one._fields if getattr(one, name) != getattr(other, name)}
    return changed - {"scheme"}


FIELDS = {
    "factors": "factor", "temperatures": "temperature", "bands_4": "bands", "head_temperatures": "head_temperatures",
    "pair_temperatures": "head_temperatures", "head_gains": "head_gains", "channel_gains": "head_gains",
    "mlp_gains": "mlp_gain", "head_factors": "head_factors",
}  # fmt: skip
FITTING = [space for space in SPACES if space not in ("bands_8", "bands_32")]  # four frequencies are four bands at most


@pytest.mark.parametrize("vary", FITTING)
@pytest.mark.parametrize("start", [None, HEADS], ids=["no scaling", "scaled"])
def test_a_space_is_searched_downhill_and_nothing_else_moves(tiny, vary, start):
    if vary == "outputs" and start is not None:
        start = replace(start, gains=[[1.3] * 4, [0.9] * 4])

    def ended():
        rate = 0.004 if vary == "bands_4" else 0.05  # of high frequencies, which turn much when they change a little
        searcher = GradientSearch(
            tiny, SUITE, start=start, vary=vary, steps=12, rate=rate, temperature_rate=rate, every=12
        )
        first, [last] = searcher.ask()[0], searcher.ask()
        assert searcher.ask() == []
        return first, last, searcher

    first, last, searcher = ended()
    names = {name.removeprefix("=") for name in SPACES[vary]}
    assert numbers_changed(last, first, tiny) == {FIELDS[name] for name in names}
    assert first == (LayerScaling.identity(2) if start is None else start)
    before, after = score(tiny, SUITE, [first, last]).nll.mean(axis=(1, 2))
    assert after < before - 0.003
    again = ended()
    assert again[1].key == last.key
    assert again[2].nll == searcher.nll
    heads = n_heads(tiny.model)
    for name in (entry.removeprefix("=") for entry in SPACES[vary] if entry.startswith("=")):
        for after, before in zip(last.settings, first.settings, strict=True):
            now, then = (np.ravel(getattr(setting, FIELDS[name]) or 1.0) for setting in (after, before))
            changes = (now.reshape(heads, -1) / (then.reshape(heads, -1) if len(then) > 1 else then)).round(4)
            assert len(np.unique(changes, axis=0)) == 1, "the same for all heads of a layer"
    if {"head_gains"} & {*SPACES[vary]}:
        values = numbers_of(last, tiny)["head_gains"]
        assert len(np.unique(values)) == values.size


def test_bands_that_can_not_be_are_refused(tiny):
    with pytest.raises(ValueError, match="there are 8 bands, but only 4 frequencies"):
        GradientSearch(tiny, SUITE, vary="bands_8")
    start = LayerScaling((1.0, 1.0), bands=[[1.1, 0.9], [1.2, 1.0]])
    with pytest.raises(ValueError, match="a scaling has one number of bands, not bands_4 and bands_2"):
        GradientSearch(tiny, SUITE, vary="bands_4", start=start)


def test_bands_stay_within_bounds(tiny):
    searcher = GradientSearch(tiny, SUITE, vary="bands_4", steps=3, rate=0.1, every=3, bounds=(0.98, 1.02))
    searcher.ask()
    [last] = searcher.ask()
    numbers = {number for row in last.bands for number in row}
    assert {min(numbers), max(numbers)} == {0.98, 1.02}


@pytest.mark.parametrize("vary", FITTING)
def test_a_search_begins_at_its_start(tiny, vary):
    searcher = GradientSearch(tiny, SUITE, start=HEADS, vary=vary, steps=2)
    assert searcher.scaling.key == HEADS.key


def test_another_seed_takes_contexts_in_another_order(tiny):
    suite, orders = tasks.kv_retrieval(2, 8, keys="short"), []
    for seed in (0, 0, 1):
        searcher = GradientSearch(tiny, suite, vary="head_gains", steps=4, every=4, seed=seed)
        searcher.ask(), searcher.ask()
        orders.append(searcher.nll)
    assert orders[0] == orders[1] != orders[2]


def test_a_step_asks_some_questions_spread_over_depth(tiny, monkeypatch):
    suite, few = tasks.kv_retrieval(9, 4, keys="short"), tasks.kv_retrieval(2, 4, keys="short")
    asked = []

    def noted(lm, probe, *_, **__):
        asked.append(probe)
        return 1.0, np.zeros((4, 2))

    monkeypatch.setattr(descent, "nll_gradient", noted)
    searcher = GradientSearch(tiny, [suite, few], vary="head_gains", steps=30, every=30, questions=3)
    searcher.ask(), searcher.ask()
    positions = [[q.position for q in probe.questions] for probe in asked[::2]]
    assert all([p // 3 for p in some] == [0, 1, 2] for some in positions), "one of each third of the depths"
    assert {p for some in positions for p in some} == set(range(9))
    assert all(len(probe.questions) == 2 for probe in asked[1::2])  # no more than there are
    assert searcher.answers == gradient.PRICE * 30 * (3 + 2)
    whole = {probe.context: probe for probe in suite.probes}
    assert all({*probe.questions} < {*whole[probe.context].questions} for probe in asked[::2])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="questions is 0; it must be at least 1"):
        GradientSearch(tiny, suite, questions=0)


def test_a_search_of_heads_that_was_interrupted_goes_on_from_the_ledger(tmp_path, monkeypatch):
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    calls, computed = [], descent.nll_gradient
    nll_gradient(lm, SUITE.probes[0], HEADS)  # a new model is tried first
    lm.model.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def ended(ledger):
        searcher = GradientSearch(lm, SUITE, vary="heads", steps=9, every=4, rate=0.05, questions=1, ledger=ledger)
        candidates = []
        while asked := searcher.ask():
            candidates += asked
        return [c.key for c in candidates], searcher.nll, [g.tolist() for g in searcher.gradients]

    undisturbed = ended(Ledger(tmp_path / "undisturbed.sqlite"))
    each, rest = divmod(len(calls), 9)  # forward passes of a gradient
    assert (each > 0, rest) == (True, 0)
    ledger, steps = Ledger(tmp_path / "killed.sqlite"), []

    def killed(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return computed(*args, **kwargs)

    monkeypatch.setattr(descent, "nll_gradient", killed)
    with pytest.raises(KeyboardInterrupt):
        ended(ledger)
    calls.clear()
    assert ended(ledger) == undisturbed
    assert len(calls) == 4 * each  # the five steps before were known
    calls.clear()
    assert ended(ledger) == undisturbed
    assert calls == []


def test_gradients_by_other_numbers_are_filed_apart(tiny, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for _ in range(2):  # the second time from the ledger
        for names in (LAYER_NUMBERS, ("temperatures",), ("head_gains",), ("head_temperatures",), HEAD_NUMBERS):
            shape = (sum(4 if name.startswith("head") else 1 for name in names), 2)
            filed = nll_gradient(tiny, SUITE.probes[0], HEADS, names, ledger=ledger)[1]
            assert filed.shape == shape
            np.testing.assert_allclose(
                filed, nll_gradient(tiny, SUITE.probes[0], HEADS, names)[1], rtol=1e-3, atol=1e-6
            )


def test_a_family_without_the_projections_is_refused_by_name_before_a_step():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    del lm.model.model.layers[1].self_attn.q_proj
    for vary in ("heads", "head_temperatures"):
        with pytest.raises(ValueError, match="LlamaDecoderLayer has no q_proj"):
            GradientSearch(lm, SUITE, vary=vary)
    GradientSearch(lm, SUITE, vary="head_gains")
    with pytest.raises(ValueError, match="numbers for 3 layers but tiny-llama has 2"):
        nll_gradient(lm, SUITE.probes[0], HeadScaling(gains=np.full((3, 4), 2.0)))


def test_a_mixture_follows_the_weighted_sum(tiny):
    other = tasks.kv_retrieval(3, 2, seed=5, keys="short")
    searcher = GradientSearch(tiny, [SUITE, other], weights=[1.0, 0.5], steps=1, every=1)
    result = search(tiny, [SUITE, other], searcher, budget=2, objective=mixture(1.0, 0.5))
    expected = sum(
        weight * nll_gradient(tiny, suite.probes[next(i for i in order)], LayerScaling.identity(2))[1]
        for suite, weight, order in zip(
            (SUITE, other), (1.0, 0.5), [rng.permutation(n) for rng, n in _streams(3, 2)], strict=True
        )
    )
    np.testing.assert_allclose(searcher.gradients[0], expected)
    means = [score(tiny, suite, result.candidates).nll.mean(axis=(1, 2)) for suite in (SUITE, other)]
    np.testing.assert_allclose([f[0] for f in result.fitness], -(means[0] + 0.5 * means[1]))


def test_contexts_that_are_read_at_once_give_the_weighted_sum_of_their_gradients(lm):
    start, weights = fitting(lm, HEADS), [1.0, 0.5, 0.25]
    probes = [tasks.kv_retrieval(n, 1, seed=n, keys="short").probes[0] for n in (3, 1)]
    probes += tasks.continuations("a road that goes on and on; " * 40, 1, words=12, judged=5).probes
    for numbers in (LAYER_NUMBERS, HEAD_NUMBERS):
        each = [nll_gradient(lm, probe, start, numbers) for probe in probes]
        nll, total = sum_nll_gradient(lm, probes, weights, start, numbers)
        wanted = sum(weight * one for weight, (_, one) in zip(weights, each, strict=True))
        assert nll == pytest.approx(sum(weight * one for weight, (one, _) in zip(weights, each, strict=True)), rel=1e-5)
        np.testing.assert_allclose(total, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_where_there_is_room_a_step_reads_its_contexts_at_once(tiny, tmp_path, monkeypatch):
    other, ledger = tasks.kv_retrieval(3, 2, seed=5, keys="short"), Ledger(tmp_path / "ledger.sqlite")

    def ended(ledger=None):
        searcher = GradientSearch(
            tiny, [SUITE, other], weights=[1, 0.5], vary="heads", steps=4, every=4, rate=0.05, ledger=ledger
        )
        searcher.ask()
        [last] = searcher.ask()
        return searcher, last

    apart, one = ended()
    monkeypatch.setattr(descent, "fits_at_once", lambda *_: True)
    at_once, same = ended(ledger)
    np.testing.assert_allclose(at_once.gradients, apart.gradients, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(at_once.nll, np.dot(apart.nll, [[1], [0.5]]), rtol=1e-4)
    np.testing.assert_allclose(same.gains, one.gains, rtol=1e-3)
    assert len(at_once.gradient_keys) == 4
    assert len(apart.gradient_keys) == 8
    for scaling, key in zip(at_once.visited, at_once.gradient_keys, strict=True):
        assert ledger.find_gradient(tiny.fingerprint, scaling.key, key) is not None
    monkeypatch.setattr(gradient, "_differentiate", lambda *_: pytest.fail("it is known"))
    assert ended(ledger)[1].key == same.key


def test_contexts_are_read_at_once_on_a_gpu_that_has_room_only(tiny, monkeypatch):
    probes, none = SUITE.probes[:2], LayerScaling.identity(2)
    assert not fits_at_once(tiny, probes, none)
    stretched = ExtendedScaling((1.0, 1.0), "dynamic_ntk", extension=2.0)
    with pytest.raises(ValueError, match="take the gradient of one context at a time"):
        sum_nll_gradient(tiny, probes, [1, 1], stretched)
    sizes = SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: sizes)
    monkeypatch.setattr(type(tiny.model), "device", torch.device("cuda"))
    assert fits_at_once(tiny, probes, none)
    assert not fits_at_once(tiny, probes, stretched)
    sizes.total_memory = 2**20
    assert not fits_at_once(tiny, probes, none)


def test_sums_of_other_contexts_or_weights_are_filed_apart():
    keys = [gradient_key(probe, "pi") for probe in SUITE.probes]
    names = {sum_key(some, weights) for some in (keys[:2], keys[1:]) for weights in ([1, 1], [1, 0.5])}
    assert len(names) == 4
    assert sum_key(keys[:2], [1, 1]) == sum_key(keys[:2], [1.0, 1.0])


def _streams(*sizes):
    rng = np.random.default_rng(0)
    return [(rng.spawn(1)[0], n) for n in sizes]


def test_a_family_that_rotates_a_part_is_refused_temperatures_by_name():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=257, num_key_value_heads=4, **sizes)
    lm = replace(lm, model=AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    with pytest.raises(ValueError, match=r"temperatures\[0\] is 2, but in layer 0 of StableLmForCausalLM"):
        GradientSearch(lm, SUITE, vary="temperatures")
    GradientSearch(lm, SUITE, vary="factors")


KILLED = """
import sys
from lrs_utils import GradientSearch, Ledger, load_lm, search, tasks
from lrs_utils.searchers.objectives import mixture
lm = load_lm("tiny-llama", dtype="float32", device="cpu")
suite = tasks.kv_retrieval(6, 5, keys="short")
ledger = Ledger(sys.argv[1])
print("ready", flush=True)
searcher = GradientSearch(lm, suite, steps=60, every=20, rate=0.05, ledger=ledger)
result = search(lm, suite, searcher, budget=9, objective=mixture(1), ledger=ledger)
print([c.key for c in result.candidates], result.fitness, flush=True)
"""


def test_a_killed_gradient_search_ends_as_an_undisturbed_one(tmp_path):
    def start(name):
        return subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / name], stdout=subprocess.PIPE, text=True)

    def known(name):
        with sqlite3.connect(tmp_path / name) as db:
            return db.execute("SELECT count(*) FROM gradients").fetchone()[0]

    victim = start("killed")
    victim.stdout.readline()
    while known("killed") < 25 and victim.poll() is None:
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 25 <= known("killed") < 60
    endings = [start(name).communicate(timeout=300)[0].splitlines()[-1] for name in ("undisturbed", "killed")]
    assert endings[0] == endings[1]
    assert known("undisturbed") == known("killed") == 60  # none lost, none twice


def test_gradients_ship_with_outcomes(tiny, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    searcher, result = descended(tiny, ledger)
    keys = [key for probe in SUITE.probes for key in (*probe.keys, gradient_key(probe, "pi"))]
    candidates = [(tiny.fingerprint, scaling.key) for scaling in [*searcher.visited, *result.candidates]]
    rows = ledger.export(tmp_path / "out.csv.gz", candidates, keys, "about")
    fresh = Ledger(tmp_path / "fresh.sqlite")
    assert fresh.load(tmp_path / "out.csv.gz") == rows == 4 * 6 + 12
    again = descended(tiny, fresh)[1]
    assert again.recomputed == 0
    assert again.fitness == result.fitness
