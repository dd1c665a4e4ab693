import copy
from dataclasses import replace

import controls
import numpy as np
import pytest
import torch
from controls import ControlRun, list_controls, shuffle_heads

from lrs_utils import HeadScaling, LayerScaling, Ledger, load_lm, score, tasks
from lrs_utils.finding import free_text
from lrs_utils.finding import parts as dividing
from lrs_utils.progress import SilentProgress
from lrs_utils.scaling.base import reachable_decoder
from lrs_utils.searchers.gradient import nll_gradient, nll_gradient_by

SUITE = tasks.kv_retrieval(3, 2, keys="short")
NAMES = ["4 random directions", "8 random directions", "LoRA r = 1", "input norms", "first two tokens"]
TEXTS = {name: " ".join(f"{name}{i % 50}" for i in range(200)) for name in ("book", "facts")}


def moved(control, seed=0, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    learned = tuple(
        {name: v + size * torch.randn(v.shape, generator=generator) for name, v in layer.items()}
        for layer in control.learned
    )
    return replace(control, learned=learned)


def nll(lm, control):
    with control.applied_to(lm.model):
        return score(lm, SUITE, [LayerScaling.identity(lm.num_layers)]).nll


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", NAMES)
def test_a_control_begins_as_no_change_and_comes_in_doses(family, name):
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    control = list_controls(lm, 0)[name]
    bare = score(lm, SUITE, [LayerScaling.identity(2)]).nll
    assert control.is_identity
    np.testing.assert_allclose(nll(lm, control), bare, atol=1e-6)
    other = moved(control)
    assert not other.is_identity
    assert np.abs(nll(lm, other) - bare).max() > 1e-4
    np.testing.assert_allclose(nll(lm, other.at_dose(0.0)), bare, atol=1e-6)
    assert other.at_dose(1.0).key == other.key != other.at_dose(0.5).key
    with pytest.raises(ValueError, match="is a control, which is not folded"):
        other.fold_into(lm.model)


def test_controls_have_as_many_numbers_as_they_say(tiny):
    counts = {name: control.count for name, control in list_controls(tiny, 0).items()}
    width = sum(m.out_features + m.in_features for m in controls._projections(tiny.model.model.layers[0]).values())
    assert counts == dict(zip(NAMES, [4, 8, 2 * width, 2 * 32, 2 * 32], strict=True))


@pytest.mark.parametrize("name", ["8 random directions", "LoRA r = 1"])
def test_low_rank_controls_are_changes_of_the_weights(tiny, name):
    control = moved(list_controls(tiny, 0)[name])
    plain = copy.deepcopy(tiny)
    for layer, of, numbers in zip(
        reachable_decoder(plain.model).layers, reachable_decoder(tiny.model).layers, control.learned, strict=True
    ):
        handles = control.hooks(of, numbers)
        for handle, (place, module) in zip(handles, controls._projections(of).items(), strict=True):
            eye = torch.eye(module.in_features)
            with torch.no_grad():
                after = module(eye)
                handle.remove()
                controls._projections(layer)[place].weight += (after - module(eye)).mT
    found = score(plain, SUITE, [LayerScaling.identity(2)]).nll
    np.testing.assert_allclose(found, nll(tiny, control), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_by_a_control_is_the_slope_of_what_score_measures(name):
    lm = load_lm("tiny-llama", dtype="float64", device="cpu")
    control = moved(list_controls(lm, 0)[name])
    learned = tuple({n: v.clone().requires_grad_() for n, v in layer.items()} for layer in control.learned)
    tensors = [v for layer in learned for v in layer.values()]
    with replace(control, learned=learned).applied_to(lm.model):
        value, gradients = nll_gradient_by(lm, SUITE.probes[0], tensors)
    assert value == pytest.approx(nll(lm, control)[0, 0].mean(), abs=1e-5)
    direction = moved(control, seed=1)
    slope = sum(
        float((gradient * (b - a)).sum())
        for gradient, a, b in zip(
            gradients,
            (v for layer in control.learned for v in layer.values()),
            (v for layer in direction.learned for v in layer.values()),
            strict=True,
        )
    )
    h, sides = 1e-2, []
    for sign in (h, -h):
        at = tuple(
            {n: v + sign * (other[n] - v) for n, v in layer.items()}
            for layer, other in zip(control.learned, direction.learned, strict=True)
        )
        sides.append(nll(lm, replace(control, learned=at))[0, 0].mean())
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=0.05, abs=1e-3)


def test_the_gradient_by_tensors_of_ones_own_is_that_of_the_same_numbers_of_heads(tiny):
    logs = torch.zeros(4, requires_grad=True)
    module = tiny.model.model.layers[0].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda _, given: (given[0] * logs.exp().repeat_interleave(8),))
    value, [gradient] = nll_gradient_by(tiny, SUITE.probes[0], [logs])
    handle.remove()
    wanted = nll_gradient(tiny, SUITE.probes[0], LayerScaling.identity(2), ["head_gains"])
    assert value == pytest.approx(wanted[0], abs=1e-6)
    np.testing.assert_allclose(gradient.numpy(), wanted[1][:, 0], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_control_is_learned_chosen_and_tested_as_a_scaling_is(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
    monkeypatch.setattr(free_text, "OPENINGS", free_text.OPENINGS[:2])
    task = [lambda n_contexts, seed: tasks.kv_retrieval(3, n_contexts, seed, keys="short")]
    parts = dividing.divide(task, TEXTS, {"search": 2, "validation": 2, "test": 2}, 2, 0)
    about = {"space": name, "seed": 0, "max_perplexity_rise": 0.01, "text_weight": 1.0, "questions": 3, "steps": 6}
    run = ControlRun(tiny, parts, about, Ledger(tmp_path / "ledger.sqlite"), SilentProgress())
    run.measure_unscaled()
    start = list_controls(tiny, 0)[name]
    stops = run.learn(start, rate=0.02)
    assert len(stops) == 2
    assert start.is_identity
    assert len({start.key, *(stop.key for stop in stops)}) == 3
    suite = parts["search"].tasks[0]
    losses = []
    for control in (start, stops[0]):
        with control.applied_to(tiny.model):
            losses.append(score(tiny, suite, [LayerScaling.identity(2)]).nll.mean())
    assert losses[1] < losses[0]
    found, choices = run.choose(stops)
    assert set(choices["stop"]) == {1, 2}
    assert run.test(found).outcomes[0][0].exact.shape == (1, 2, 3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.model.layers.modules())


def test_shuffled_heads_have_the_same_numbers_in_each_layer():
    scaling = HeadScaling(gains=np.arange(1.0, 13.0).reshape(2, 6))
    shuffled = shuffle_heads(scaling, 0)
    assert shuffled != scaling
    assert [sorted(row) for row in shuffled.gains] == [sorted(row) for row in scaling.gains]
