from functools import wraps

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from lrs_utils import GradientSearch, HeadScaling, LayerScaling, load_factors, load_lm, save_factors, score, tasks
from lrs_utils.models.decode import decode
from lrs_utils.peers import RegionScaling
from lrs_utils.scaling.rotation import PLAIN, Positions, Region
from lrs_utils.searchers import gradient
from lrs_utils.searchers.gradient import nll_gradient

SUITE = tasks.kv_retrieval(3, 2, keys="short")
REFUSED = ("smollm3",)  # a layer without positions would get some
FACTORS = [[1.2, 0.9, 1.0, 1.5], [0.8, 1.1, 1.3, 1.0]]
FITTING = [family for family in FAMILIES if family not in REFUSED]


@pytest.fixture(scope="module", params=FITTING)
def lm(request):
    return load_lm(f"tiny-{request.param}", dtype="float32", device="cpu")


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits


def scaled_logits(lm, scaling, ids):
    with scaling.applied_to(lm.model):
        return logits(lm.model, ids)


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def regions(*rows, on=None):
    return RegionScaling([list(rows)] * 2, on)


def test_regions_that_change_nothing_are_the_plain_model(lm, ids):
    plain = logits(lm.model, ids)
    assert torch.equal(scaled_logits(lm, regions(PLAIN), ids), plain)
    cut = regions(PLAIN, Region(5), Region(20))  # three regions that read alike
    close(scaled_logits(lm, cut, ids), plain)
    both = score(lm, SUITE, [cut, LayerScaling.identity(2)])
    np.testing.assert_allclose(*both.nll, atol=1e-5)
    assert regions(PLAIN).key == LayerScaling.identity(2).key != cut.key


@pytest.mark.parametrize("scheme", ["pi", "ntk"])
def test_heads_with_one_factor_are_a_layer_with_that_factor(lm, ids, scheme):
    layer = LayerScaling((1.3, 0.8), scheme)
    heads = HeadScaling(factors=[[1.3] * 4, [0.8] * 4], scheme=scheme)
    wanted = scaled_logits(lm, layer, ids)
    close(scaled_logits(lm, heads, ids), wanted)
    assert (wanted - logits(lm.model, ids)).abs().max() > 1e-3
    np.testing.assert_allclose(*score(lm, SUITE, [layer, heads]).nll, atol=1e-5)
    if scheme == "pi":  # which regions do as well
        divided = regions(Region(0, Positions((1.3,)), Positions((1.3,))))
        first = RegionScaling([divided.regions[0], [Region(0, Positions((0.8,) * 4), Positions((0.8,) * 4))]])
        # a position divided isn't rounded as a frequency divided
        close(scaled_logits(lm, first, ids), wanted, 1e-3)
        np.testing.assert_allclose(*score(lm, SUITE, [layer, first]).nll, atol=2e-4)


def test_a_factor_of_a_head_multiplies_that_of_its_layer(lm, ids):
    layers = LayerScaling((1.25, 0.8), "ntk", (1.3, 0.9))
    heads = HeadScaling(factors=[[0.8] * 4, [1.25] * 4], layers=layers)
    close(scaled_logits(lm, heads, ids), scaled_logits(lm, LayerScaling((1, 1), "ntk", (1.3, 0.9)), ids))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_each_head_reads_by_its_own_factor(family, ids):
    """Weights of a head depend on its factor alone: those of all heads under that factor."""
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    heads = 4
    found = {}
    for factor in {*FACTORS[0]}:
        found[factor] = _first_layer(lm, HeadScaling(factors=[[factor] * heads, [1.0] * heads]), ids)
    mixed = _first_layer(lm, HeadScaling(factors=[FACTORS[0], [1.0] * heads]), ids)
    dim = mixed.shape[2] // heads
    for head, factor in enumerate(FACTORS[0]):
        part = slice(head * dim, (head + 1) * dim)
        close(mixed[..., part], found[factor][..., part])
    assert (found[1.2] - found[0.9]).abs().max() > 1e-4


def _first_layer(lm, scaling, ids):
    """What the heads of the first layer put out, side by side."""
    kept = []
    with scaling.applied_to(lm.model):
        hook = lm.model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        logits(lm.model, ids)
        hook.remove()
    return kept[0]


@pytest.mark.parametrize(
    "scaling",
    [
        HeadScaling(factors=FACTORS),
        HeadScaling([[0.7, 1, 1.4, 1.2]] * 2, [[1.3, 0.7, 1, 1.8]] * 2, factors=FACTORS, scheme="pi"),
        regions(PLAIN, Region(9, Positions((4.0,), 7.0, True), Positions((4.0,), whole=True))),
        regions(PLAIN, Region(9, Positions(offset=-5.0)), on=LayerScaling((1.2, 0.9), "ntk", (1.1, 1.2))),
        regions(
            Region(0, Positions((1.5, 1.2, 1.0, 0.8)), Positions((1.5, 1.2, 1.0, 0.8))), Region(30, Positions((2.0,)))
        ),
    ],
    ids=["factors of heads", "all of heads", "groups", "shift on factors", "heads, then far"],
)
def test_score_gives_the_verdicts_of_generate(lm, scaling):
    """The forward pass that a cache feeds token by token, and the packed one, are the same."""
    outcomes = score(lm, SUITE, [scaling])
    unscaled = score(lm, SUITE, [LayerScaling.identity(2)])
    assert np.abs(outcomes.nll - unscaled.nll).max() > 1e-4
    probe = SUITE.probes[1]
    for q, question in enumerate(probe.questions):
        prompt = probe.context + question.prompt + question.answer_prefix
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = lm.tokenizer(prompt + question.answer, return_tensors="pt")["input_ids"][:, ids.shape[1] :]
        with scaling.applied_to(lm.model), torch.no_grad():
            tokens = decode(lm, ids, torch.ones_like(ids), answer.shape[1], to_the_end=True, output_logits=True)
            whole = lm.model(torch.cat([ids, answer], 1)).logits[0, ids.shape[1] - 1 : -1]
            again = lm.model(torch.cat([ids, tokens], 1)).logits[0, ids.shape[1] - 1 : -1]
        nll = torch.nn.functional.cross_entropy(whole, answer[0])
        assert float(nll) == pytest.approx(outcomes.nll[0, 1, q], abs=2e-5)
        again[:, lm.tokenizer.eos_token_id] = -torch.inf  # never chosen, `to_the_end`
        assert again.argmax(-1).tolist() == tokens[0].tolist()


def test_what_attention_cannot_know_is_refused(tiny, ids):
    scaling = regions(PLAIN, Region(9, Positions(offset=-5.0)))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with scaling.applied_to(tiny.model):
        with pytest.raises(ValueError, match="the batch is padded"):
            logits(tiny.model, ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"positions \[0, 2, 4, .* have gaps"):
            logits(tiny.model, ids, position_ids=2 * torch.arange(70)[None])
        with pytest.raises(ValueError, match="already scaled"):
            scaling.refuse_misfit(tiny.model)
    assert tiny.model.config._attn_implementation == "sdpa"
    smollm3 = load_lm("tiny-smollm3", dtype="float32", device="cpu")
    for refused in (scaling, HeadScaling(factors=FACTORS)):
        with pytest.raises(ValueError, match="SmolLM3ForCausalLM can't have positions by head or by distance"):
            refused.refuse_misfit(smollm3.model)
    with pytest.raises(ValueError, match=r"factors has 3 values a layer but .* has 4 query heads"):
        HeadScaling(factors=[[2.0] * 3] * 2).refuse_misfit(tiny.model)
    with pytest.raises(ValueError, match=r"regions of layer 0 have 3 divisors, but .* has 4 heads"):
        regions(Region(0, Positions((1.0, 2.0, 3.0)))).refuse_misfit(tiny.model)
    with pytest.raises(ValueError, match="regions of layer 0 begin at"):
        regions(Region(3))
    with pytest.raises(ValueError, match="no weight holds"):
        scaling.fold_into(tiny.model)
    with pytest.raises(ValueError, match="changes cos and sin, which no weight"):
        HeadScaling(factors=FACTORS).fold_into(tiny.model)


def test_factors_of_heads_are_kept_in_keys_and_files(tmp_path):
    scaling = HeadScaling(gains=FACTORS, factors=FACTORS, scheme="pi", layers=LayerScaling((1.5, 1.0)))
    assert HeadScaling.from_key(scaling.key) == scaling
    assert scaling.key != HeadScaling(gains=FACTORS, factors=FACTORS, scheme="ntk").key
    save_factors(tmp_path / "f.json", scaling)
    assert load_factors(tmp_path / "f.json") == scaling
    alone = HeadScaling(factors=FACTORS)
    save_factors(tmp_path / "g.json", alone)
    assert load_factors(tmp_path / "g.json") == alone
    assert alone.at_dose(0).is_identity
    assert alone.at_dose(1) == alone
    assert alone.reach == 0.8
    assert HeadScaling(factors=[[2.0] * 4] * 2).reach == LayerScaling((2.0, 2.0)).reach


@pytest.mark.parametrize("scheme", ["pi", "ntk"])
def test_a_gradient_by_factors_of_heads_is_the_same_computed_twice(lm, monkeypatch, scheme):
    scaling = HeadScaling([[0.7, 1, 1.4, 1.2]] * 2, factors=FACTORS, scheme=scheme)
    kept = nll_gradient(lm, SUITE.probes[0], scaling, ["head_factors"])
    monkeypatch.setattr(gradient, "_KEPT_BYTES", 0)
    twice = nll_gradient(lm, SUITE.probes[0], scaling, ["head_factors"])
    assert kept[0] == twice[0] == pytest.approx(score(lm, SUITE, [scaling]).nll[0, 0].mean(), abs=1e-5)
    np.testing.assert_allclose(twice[1], kept[1], rtol=1e-4, atol=1e-6)
    # together they are the layer's factor
    [of_layer, _] = nll_gradient(lm, SUITE.probes[0], scaling)[1]
    np.testing.assert_allclose(kept[1].sum(axis=0), of_layer, rtol=1e-3, atol=1e-4)
    assert np.abs(kept[1]).max() > 1e-4


def test_layers_with_one_setting_share_their_tables(tiny, ids):
    calls, rotary = [], type(tiny.model.model.rotary_emb)
    forward = rotary.forward

    @wraps(forward)
    def counted(*args, **given):
        calls.append(1)
        return forward(*args, **given)

    scaling = regions(PLAIN, Region(9, Positions(offset=-5.0)))
    scaling.refuse_misfit(tiny.model)  # a new model is tried first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary, "forward", counted)
        scaled_logits(tiny, scaling, ids)
    assert len(calls) == 1 + 2  # the model's own, and two ways to read positions for both layers


def test_regions_have_no_gradient_and_no_file(tiny, tmp_path):
    scaling = regions(PLAIN, Region(9, Positions(offset=-5.0)))
    for refused in (
        lambda: nll_gradient(tiny, SUITE.probes[0], scaling),
        lambda: GradientSearch(tiny, SUITE, start=scaling),
    ):
        with pytest.raises(ValueError, match="a RegionScaling has no numbers to learn"):
            refused()
    with pytest.raises(ValueError, match="a RegionScaling has no factor file"):
        save_factors(tmp_path / "f.json", scaling)
    assert not (tmp_path / "f.json").exists()
    smollm3 = load_lm("tiny-smollm3", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="can't have positions by head or by distance"):
        nll_gradient(smollm3, SUITE.probes[0], LayerScaling.identity(2), ["head_factors"])


def test_factors_of_heads_stay_within_bounds_and_a_start_within_them(tiny):
    searcher = GradientSearch(tiny, SUITE, vary="head_factors", steps=3, rate=0.1, every=3, bounds=(0.98, 1.02))
    searcher.ask()
    [last] = searcher.ask()
    numbers = np.array(last.factors)
    assert (numbers.min(), numbers.max()) == (0.98, 1.02)
    low = HeadScaling(factors=[[0.05, 1, 1, 1], [1, 1, 1, 1]])
    assert GradientSearch(tiny, SUITE, vary="head_factors", start=low)._bounds[0] == 0.05
