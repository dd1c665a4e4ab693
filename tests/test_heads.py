import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fitting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrs_utils import ExtendedScaling, HeadScaling, LayerScaling, load_lm, score, tasks
from lrs_utils.models.tiny import TINY
from lrs_utils.scaling.base import UNSCALED
from lrs_utils.scaling.products import _times_heads

FAMILIES = [name.removeprefix("tiny-") for name in TINY]
ONES = np.ones((2, 4))
TEMPERATURES = [[0.6, 1.0, 1.7, 1.2], [1.4, 0.8, 1.0, 0.5]]
GAINS = [[1.3, 0.7, 1.0, 2.0], [0.9, 1.6, 0.4, 1.1]]
MLP = [0.8, 1.3]
LAYERS = LayerScaling((1.3, 0.8), "ntk", (1.2, 0.9))
SHARED_NORM = ("qwen3", "gemma3")  # one weight normalises the queries of every head
SUITE = tasks.kv_retrieval(3, 2, keys="short")


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request):
    return rough(request.param)


def rough(family):
    """A tiny model whose biases and norms, of 0 and 1 in a new one, are none of them."""
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(3)
    for parameter in lm.model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return lm


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def scaled_logits(lm, scaling, ids):
    with scaling.applied_to(lm.model):
        return logits(lm.model, ids)


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.base_model.modules())


def test_a_family_with_biases_of_queries_is_among_those_tested():
    assert rough("qwen2").model.model.layers[0].self_attn.q_proj.bias.abs().min() > 1e-4


def test_numbers_of_one_are_the_untouched_model_bit_for_bit(lm, ids):
    scaling = HeadScaling(ONES, ONES, mlp_gains=[1, 1], layers=LayerScaling.identity(2))
    assert scaling.key == LayerScaling.identity(2).key
    assert scaling.settings == (UNSCALED, UNSCALED)
    assert scaling.is_identity
    assert torch.equal(scaled_logits(lm, scaling, ids), logits(lm.model, ids))
    both = score(lm, SUITE, [scaling, LayerScaling.identity(2)])
    np.testing.assert_array_equal(*both.nll)
    assert both.layers_run == both.layers_alone / 2  # to the trie they are one candidate


def test_equal_temperatures_of_heads_are_the_temperature_of_their_layer(lm, ids):
    for layer, without_positions in enumerate([False, "smollm3" in lm.name]):
        values = [1.0, 1.0]
        values[layer] = 1.7
        heads = scaled_logits(lm, HeadScaling([[t] * 4 for t in values]), ids)
        assert (heads - logits(lm.model, ids)).abs().max() > 1e-2
        if without_positions:  # the temperature of a layer acts through cos and sin, which this one doesn't read
            with pytest.raises(ValueError, match=r"temperatures\[1\] is 1.7, but in layer 1 of SmolLM3ForCausalLM"):
                scaled_logits(lm, LayerScaling((1, 1), temperatures=values), ids)
        else:
            close(heads, scaled_logits(lm, LayerScaling((1, 1), temperatures=values), ids))


@pytest.mark.parametrize("n_tokens", [70, 4])  # 4: as many tokens as heads, where a shape doesn't tell the axes
def test_a_temperature_multiplies_the_logits_of_its_own_head_and_no_other(lm, ids, n_tokens):
    ids, eager = ids[:, :n_tokens], copy.deepcopy(lm.model)
    eager.set_attn_implementation("eager")

    def weights(layer, temperatures):
        """Attention weights of a layer whose input no temperature changed."""
        rows = np.ones((2, 4))
        rows[layer] = temperatures
        with HeadScaling(rows).applied_to(eager), torch.no_grad():
            return eager(ids, output_attentions=True).attentions[layer].double()

    for layer in (0, 1):
        bare, scaled = weights(layer, [1.0, 1.0, 1.0, 1.0]), weights(layer, TEMPERATURES[layer])
        powers = bare ** torch.tensor(TEMPERATURES[layer])[:, None, None]  # exp(t z) = exp(z) ** t
        close(scaled, powers / powers.sum(-1, keepdim=True))
        assert (scaled - bare).abs().amax(dim=(0, 2, 3))[[t != 1 for t in TEMPERATURES[layer]]].min() > 1e-2


def test_a_gain_multiplies_what_its_head_puts_out(lm, ids):
    by_hand = copy.deepcopy(lm.model)
    for layer, gains in zip(by_hand.model.layers, GAINS, strict=True):
        for head, gain in enumerate(gains):
            layer.self_attn.o_proj.weight.data[:, 8 * head : 8 * (head + 1)] *= gain
    scaled = scaled_logits(lm, HeadScaling(gains=GAINS), ids)
    close(scaled, logits(by_hand, ids))
    assert (scaled - logits(lm.model, ids)).abs().max() > 1e-2


def test_a_gain_of_a_channel_multiplies_that_channel_of_what_its_head_puts_out(lm, ids):
    gains = np.random.default_rng(0).uniform(0.4, 2.0, (2, 32))
    by_hand = copy.deepcopy(lm.model)
    for layer, row in zip(by_hand.model.layers, gains, strict=True):
        layer.self_attn.o_proj.weight.data *= torch.tensor(row, dtype=torch.float32)
    scaled = scaled_logits(lm, HeadScaling(gains=gains), ids)
    close(scaled, logits(by_hand, ids))
    close(logits(HeadScaling(gains=gains).fold_into(lm.model), ids), scaled)
    assert (scaled - logits(lm.model, ids)).abs().max() > 1e-2
    close(scaled_logits(lm, HeadScaling(gains=np.repeat(GAINS, 8, axis=1)), ids),
          scaled_logits(lm, HeadScaling(gains=GAINS), ids))  # fmt: skip


def test_a_temperature_of_a_pair_multiplies_what_that_pair_adds_to_the_logits(lm, ids):
    pairs = np.random.default_rng(0).uniform(0.4, 2.0, (2, 16))
    scaling = HeadScaling(temperatures=pairs)
    scaled = scaled_logits(lm, scaling, ids)
    assert (scaled - logits(lm.model, ids)).abs().max() > 1e-2
    equal = HeadScaling(temperatures=np.repeat(TEMPERATURES, 4, axis=1))
    close(scaled_logits(lm, equal, ids), scaled_logits(lm, HeadScaling(TEMPERATURES), ids))
    if any(name in lm.name for name in SHARED_NORM):
        with pytest.raises(ValueError, match="normalises the queries of all heads by one weight"):
            scaling.fold_into(lm.model)
        scaling = HeadScaling(temperatures=np.tile(pairs[:, :4], 4))  # the same in all heads, which one weight can hold
        scaled = scaled_logits(lm, scaling, ids)
    close(logits(scaling.fold_into(lm.model), ids), scaled)


def test_scalings_of_heads_and_of_channels_are_scored_in_one_call(tiny):
    wide = HeadScaling(gains=np.random.default_rng(0).uniform(0.4, 2.0, (2, 32)))
    scalings = [LayerScaling.identity(2), HeadScaling(gains=GAINS), wide, HeadScaling(TEMPERATURES, gains=wide.gains)]
    together = score(tiny, SUITE, scalings).nll
    alone = np.concatenate([score(tiny, SUITE, [scaling]).nll for scaling in scalings])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert HeadScaling.from_key(wide.key) == wide
    with pytest.raises(ValueError, match=r"gains has 12 values a layer but .* has 4 query heads of 8 channels"):
        HeadScaling(gains=np.full((2, 12), 1.5)).refuse_misfit(tiny.model)
    with pytest.raises(ValueError, match=r"temperatures has 32 values a layer but .* of 4 pairs of dimensions"):
        HeadScaling(temperatures=np.full((2, 32), 1.5)).refuse_misfit(tiny.model)


def test_a_gain_of_an_mlp_multiplies_what_it_puts_out(lm, ids):
    by_hand = copy.deepcopy(lm.model)
    for layer, gain in zip(by_hand.model.layers, MLP, strict=True):
        layer.mlp.down_proj.weight.data *= gain
    close(scaled_logits(lm, HeadScaling(mlp_gains=MLP), ids), logits(by_hand, ids))


@pytest.mark.parametrize(
    "scaling",
    [
        HeadScaling(gains=GAINS),
        HeadScaling(mlp_gains=MLP),
        HeadScaling([[0.6] * 4, [1.4] * 4], GAINS, mlp_gains=MLP),
        HeadScaling(TEMPERATURES),
        HeadScaling(ONES),
    ],
    ids=["gains", "mlp", "all, equal temperatures", "temperatures", "none"],
)
def test_a_folded_model_is_a_plain_one_that_computes_the_same(lm, ids, scaling):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    if scaling == HeadScaling(TEMPERATURES) and lm.name.endswith(SHARED_NORM):
        with pytest.raises(ValueError, match="RMSNorm normalises the queries of all heads by one weight"):
            scaling.fold_into(lm.model)
    else:
        plain = scaling.fold_into(lm.model)
        assert type(plain) is type(lm.model)
        assert n_hooks(plain) == 0
        close(logits(plain, ids), scaled_logits(lm, scaling, ids))
        assert torch.equal(logits(plain, ids), logits(lm.model, ids)) == scaling.is_identity
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_temperatures_of_layers_fold_and_factors_do_not(lm, ids):
    temperatures = fitting(lm, LayerScaling((1, 1), temperatures=(0.6, 1.4)))
    close(logits(temperatures.fold_into(lm.model), ids), scaled_logits(lm, temperatures, ids))
    with pytest.raises(ValueError, match="changes cos and sin, which no weight of " + lm.name):
        HeadScaling(gains=GAINS, layers=fitting(lm, LAYERS)).fold_into(lm.model)
    with pytest.raises(ValueError, match="the factor of layer 1 changes cos and sin"):
        LayerScaling((1.0, 1.2)).fold_into(lm.model)


def test_what_is_no_plain_linear_layer_is_not_folded_into(ids):
    class Adapted(nn.Linear):
        pass

    lm = rough("llama")
    attention = lm.model.model.layers[1].self_attn
    for name, scaling in (("q_proj", HeadScaling(TEMPERATURES)), ("o_proj", HeadScaling(gains=GAINS))):
        plain = getattr(attention, name)
        adapted = Adapted(plain.in_features, plain.out_features, bias=False)
        adapted.weight = plain.weight
        setattr(attention, name, adapted)
        with pytest.raises(ValueError, match="Adapted is no plain linear layer, so nothing folds into it exactly"):
            scaling.fold_into(lm.model)
        setattr(attention, name, plain)


def test_nothing_is_folded_while_a_scaling_is_on_the_model(tiny):
    for outer in (HeadScaling(gains=GAINS), LAYERS):
        with outer.applied_to(tiny.model), pytest.raises(ValueError, match="already scaled"):
            HeadScaling(gains=GAINS).fold_into(tiny.model)


def teacher_forced(lm, suite):
    """Mean nll of each answer by a plain forward pass over its question alone."""
    rows = []
    for probe in suite.probes:
        rows.append([])
        for question in probe.questions:
            text = probe.context + question.prompt + question.answer_prefix
            n = len(lm.tokenizer(text)["input_ids"])
            ids = torch.tensor([lm.tokenizer(text + question.answer)["input_ids"]])
            rows[-1].append(F.cross_entropy(logits(lm.model, ids)[0, n - 1 : -1], ids[0, n:]).item())
    return np.array(rows)


def test_score_measures_what_a_plain_forward_pass_of_the_scaled_model_gives(lm):
    scaling = fitting(lm, HeadScaling(TEMPERATURES, GAINS, mlp_gains=MLP, layers=LAYERS))
    with scaling.applied_to(lm.model):
        expected = teacher_forced(lm, SUITE)
    outcomes = score(lm, SUITE, [LayerScaling.identity(2), scaling])
    np.testing.assert_allclose(outcomes.nll[1], expected, atol=1e-4)
    assert np.abs(outcomes.nll[0] - expected).max() > 1e-2


def test_candidates_laid_end_to_end_and_in_a_trie_are_measured_as_each_alone(lm):
    first = (TEMPERATURES[0], GAINS[0], MLP[0])

    def with_second(temperatures, gains, mlp, layers=None):
        rows = [[a, b] for a, b in zip(first, (temperatures, gains, mlp), strict=True)]
        return HeadScaling(rows[0], rows[1], mlp_gains=rows[2], layers=layers)

    scalings = [
        with_second(TEMPERATURES[1], GAINS[1], 1.0),
        LayerScaling.identity(2),
        with_second(ONES[1], GAINS[1], 1.0),
        with_second(TEMPERATURES[1], ONES[1], 1.0),
        with_second(TEMPERATURES[1], GAINS[1], 1.3),
        with_second(TEMPERATURES[1], GAINS[1], 1.3, LayerScaling((1.0, 1.2))),
        LayerScaling((1.0, 1.2)),
        HeadScaling(gains=[ONES[0], GAINS[1]]),
    ]
    together = score(lm, SUITE, scalings)
    alone = [score(lm, SUITE, [scaling], batch_tokens=1) for scaling in scalings]
    np.testing.assert_allclose(together.nll, np.concatenate([one.nll for one in alone]), atol=2e-5)
    np.testing.assert_array_equal(together.exact, np.concatenate([one.exact for one in alone]))
    differ = [0, 1, 2, 3, 7]  # the others differ where some families are blind: the second layer's factor or MLP
    assert all(np.abs(together.nll[a] - together.nll[b]).max() > 1e-3 for a in differ for b in differ if a < b)
    # a context: the first layer with and without scaling, then a second layer for each candidate
    assert together.layers_run == 2 * (2 + len(scalings))


def test_cached_generation_equals_uncached(lm, ids):
    with fitting(lm, HeadScaling(TEMPERATURES, GAINS, mlp_gains=MLP, layers=LAYERS)).applied_to(lm.model):
        cached = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        uncached = ids
        for _ in range(12):
            uncached = torch.cat([uncached, logits(lm.model, uncached)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, uncached)
    bare = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert not torch.equal(cached, bare)


def test_factors_of_layers_may_be_given_or_applied_around_or_inside(lm, ids):
    heads, layers = HeadScaling(TEMPERATURES, GAINS, mlp_gains=MLP), fitting(lm, LAYERS)
    given = scaled_logits(lm, HeadScaling(TEMPERATURES, GAINS, mlp_gains=MLP, layers=layers), ids)
    for outer, inner in ((heads, layers), (layers, heads)):
        with outer.applied_to(lm.model):
            assert torch.equal(scaled_logits(lm, inner, ids), given)
            alone = logits(lm.model, ids)
        assert torch.equal(scaled_logits(lm, outer, ids), alone), "the inner block took off its own hooks and no others"
        assert not torch.equal(alone, given)
    assert n_hooks(lm.model) == 0


def test_a_length_reaches_the_factors(tiny, ids):
    short = copy.deepcopy(tiny.model)
    short.config.max_position_embeddings = 32
    layers = ExtendedScaling((1.3, 0.9), "dynamic_ntk")
    with HeadScaling(gains=GAINS, layers=layers).applied_to(short, length=60):
        given = logits(short, ids)
    with layers.applied_to(short, length=60), HeadScaling(gains=GAINS).applied_to(short):
        assert torch.equal(logits(short, ids), given)
    with HeadScaling(gains=GAINS, layers=layers).applied_to(short):
        assert not torch.equal(logits(short, ids), given)
    assert HeadScaling(gains=GAINS, layers=layers).stretches_by_length
    assert HeadScaling(gains=GAINS, layers=LAYERS).reach == LAYERS.reach == 0.8
    assert HeadScaling(gains=GAINS).reach == 1


def test_hooks_come_off_after_the_block_and_after_an_error(lm, ids):
    bare = logits(lm.model, ids)
    scaling = fitting(lm, HeadScaling(TEMPERATURES, GAINS, mlp_gains=MLP, layers=LAYERS))
    with scaling.applied_to(lm.model):
        assert n_hooks(lm.model) > 0
    assert n_hooks(lm.model) == 0
    with pytest.raises(KeyError), scaling.applied_to(lm.model):
        raise KeyError("inside")
    assert n_hooks(lm.model) == 0
    assert torch.equal(logits(lm.model, ids), bare)


def test_a_second_application_is_refused_and_leaves_the_first(tiny, ids):
    scaling, both = HeadScaling(gains=GAINS), HeadScaling(TEMPERATURES, layers=LAYERS)
    with scaling.applied_to(tiny.model):
        inside = logits(tiny.model, ids)
        for second in (scaling, HeadScaling(TEMPERATURES), both):
            with pytest.raises(ValueError, match="the heads of tiny-llama are already scaled; leave the other block"):
                scaled_logits(tiny, second, ids)
        assert torch.equal(logits(tiny.model, ids), inside)
    for outer, second in ((both, LAYERS), (LAYERS, both)):
        with outer.applied_to(tiny.model), pytest.raises(ValueError, match="tiny-llama is already scaled"):
            scaled_logits(tiny, second, ids)
    assert torch.equal(scaled_logits(tiny, scaling, ids), inside)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs temperatures, gains, mlp_gains, factors or layers; all are None"),
        ({"gains": [1.0, 2.0]}, r"gains has shape \(2,\); it must be \(layers, heads\)"),
        ({"mlp_gains": [[1.0, 2.0]]}, r"mlp_gains has shape \(1, 2\); it must be \(layers,\)"),
        ({"temperatures": []}, r"temperatures has shape \(0,\)"),
        ({"gains": [[]]}, r"gains has shape \(1, 0\)"),
        ({"gains": [[1.0, 2.0], [1.0]]}, r"gains must be numbers of shape \(layers, heads\)"),
        ({"gains": 2.0}, r"gains has shape \(\); it must be"),
        ({"gains": "x"}, r"gains must be numbers of shape \(layers, heads\)"),
        ({"gains": {"a": 1}}, r"gains must be numbers of shape \(layers, heads\)"),
        ({"temperatures": ONES, "gains": np.ones((3, 4))}, r"temperatures \(2, 4\), gains \(3, 4\)"),
        ({"temperatures": ONES, "gains": np.ones((2, 3))}, r"temperatures \(2, 4\), gains \(2, 3\)"),
        ({"gains": ONES, "mlp_gains": [1, 1, 2]}, r"gains \(2, 4\), mlp_gains \(3,\)"),
        ({"gains": ONES, "layers": LayerScaling.identity(3)}, r"gains \(2, 4\), layers \(3,\)"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused_with_their_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadScaling(**arguments)


@pytest.mark.parametrize("bad", [0, -1.5, math.nan, math.inf, "x", None])
def test_a_number_that_is_not_positive_is_refused_with_its_place(bad):
    for name in ("temperatures", "gains"):
        rows = [[1.0, 1.0, 1.0], [1.0, 1.0, bad]]
        with pytest.raises(ValueError, match=rf"{name}\[1\]\[2\] is .*; it must be a positive finite number"):
            HeadScaling(**{name: rows})
    with pytest.raises(ValueError, match=r"mlp_gains\[1\] is .*; it must be a positive finite number"):
        HeadScaling(mlp_gains=[1.0, bad])


def test_numbers_for_another_model_are_refused_by_score_too(tiny):
    for scaling, message in (
        (HeadScaling(gains=np.full((30, 4), 2.0)), "numbers for 30 layers but tiny-llama has 2"),
        (HeadScaling(gains=np.full((2, 9), 2.0)), "gains has 9 values a layer but tiny-llama has 4 query heads"),
        (HeadScaling(np.full((2, 2), 2.0)), "temperatures has 2 values a layer but tiny-llama has 4 query heads"),
        (HeadScaling(mlp_gains=[2.0]), "numbers for 1 layers but tiny-llama has 2"),
    ):
        with pytest.raises(ValueError, match=message), scaling.applied_to(tiny.model):
            pass
        with pytest.raises(ValueError, match=message):
            score(tiny, SUITE, [scaling])
    assert n_hooks(tiny.model) == 0


def of_family(model_type, **settings):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings = sizes | {"num_attention_heads": 4, "pad_token_id": 0} | settings
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()


def test_a_family_without_the_projection_is_refused_by_name(ids):
    fused, other = of_family("phi3", num_key_value_heads=4), of_family("gpt_neox")
    for model, scaling, message in (
        (fused, HeadScaling(TEMPERATURES), "Phi3DecoderLayer has no q_proj of its own, so its heads can't have temp"),
        (other, HeadScaling(TEMPERATURES), "GPTNeoXLayer has no q_proj"),
        (other, HeadScaling(gains=GAINS), "GPTNeoXLayer has no o_proj, so its heads can't have gains"),
    ):
        for refused in (scaling.refuse_misfit, scaling.fold_into, lambda m, s=scaling: s.applied_to(m).__enter__()):
            with pytest.raises(ValueError, match=message):
                refused(model)
        assert n_hooks(model) == 0
    with pytest.raises(ValueError, match="GPT2LMHeadModel can't be scaled"):
        HeadScaling(gains=GAINS).refuse_misfit(of_family("gpt2"))
    del other.gpt_neox.layers[1].mlp
    with pytest.raises(ValueError, match="GPTNeoXLayer has no mlp that could have a gain"):
        HeadScaling(mlp_gains=MLP).refuse_misfit(other)
    ids = ids.clamp(max=255)
    with HeadScaling(gains=GAINS).applied_to(fused):  # its o_proj is one as any other
        inside = logits(fused, ids)
    close(inside, logits(HeadScaling(gains=GAINS).fold_into(fused), ids))


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 7])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("each", [False, True])  # numbers for each token, or for all
@pytest.mark.parametrize("wide", [1, 8])  # of a head, or of each dimension
def test_heads_are_found_on_either_axis_of_normed_queries(n_tokens, heads, each, wide):
    values = torch.randn(2, n_tokens, heads * 8)
    by = torch.rand(n_tokens if each else 1, heads, wide) + 0.5
    expected = (values.view(2, n_tokens, heads, 8) * by).flatten(2)
    torch.testing.assert_close(_times_heads((values,), values, by), expected)
    for axis in (2, 1):  # Qwen 3's layout, then Gemma 3's
        split = values.view(2, n_tokens, heads, 8)
        split = split if axis == 2 else split.transpose(1, 2)
        normed = split * 1.0  # as a norm gives it: a new tensor, perhaps of another layout in memory
        result = _times_heads((split,), normed, by)
        torch.testing.assert_close((result if axis == 2 else result.transpose(1, 2)).flatten(2), expected)


def test_queries_that_do_not_show_their_heads_are_never_guessed():
    for shape in ((2, 7, 5, 8), (4, 8)):
        queries = torch.randn(shape)
        with pytest.raises(RuntimeError, match="don't show which axis the 4 heads are on"):
            _times_heads((queries,), queries, torch.ones(1, 4, 1))


def test_a_gain_near_one_is_not_lost_in_bfloat16(ids):
    lm = load_lm("tiny-llama", dtype="bfloat16", device="cpu")
    outputs = []
    lm.model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, given, __: outputs.append(given[0]))
    bare = logits(lm.model, ids), outputs.pop()
    with HeadScaling(gains=np.full((2, 4), 1.003)).applied_to(lm.model):
        scaled = logits(lm.model, ids), outputs.pop()
    assert torch.tensor(1.003, dtype=torch.bfloat16) == 1
    assert scaled[0].dtype == torch.bfloat16
    assert (scaled[1] != bare[1]).float().mean() > 0.1
    assert torch.equal(scaled[1], (bare[1].float() * 1.003).bfloat16())


numbers = st.floats(0.2, 5).map(lambda v: round(v, 5))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def scalings(draw):
    n_layers, n_heads = draw(shapes)

    def rows(width):
        return draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=n_layers, max_size=n_layers))

    return HeadScaling(
        rows(n_heads) if draw(st.booleans()) else None,
        rows(n_heads) if draw(st.booleans()) else None,
        mlp_gains=[row[0] for row in rows(1)],
        layers=LayerScaling([row[0] for row in rows(1)], "ntk") if draw(st.booleans()) else None,
    )


@settings(max_examples=50, deadline=None)
@given(scalings())
def test_no_dose_is_no_scaling_and_the_whole_dose_the_same(scaling):
    assert scaling.at_dose(0).is_identity
    assert scaling.at_dose(0).key == LayerScaling.identity(scaling.num_layers).key
    assert scaling.at_dose(1) == scaling
    half = scaling.at_dose(0.5)
    for name in ("temperatures", "gains", "mlp_gains"):
        whole = getattr(scaling, name)
        np.testing.assert_allclose(1.0 if whole is None else whole, np.square(getattr(half, name) or 1.0), rtol=1e-3)
    if scaling.layers is not None:
        assert (half.layers or LayerScaling.identity(scaling.num_layers)).factors == scaling.layers.at_dose(0.5).factors


@settings(max_examples=50, deadline=None)
@given(scalings(), scalings())
def test_scalings_are_equal_as_their_keys_are_and_survive_pickling(one, other):
    again = pickle.loads(pickle.dumps(one))
    assert again == one
    assert hash(again) == hash(one)
    assert (again.key, again.settings) == (one.key, one.settings)
    assert (one == other) == (one.key == other.key)
    assert (one.settings == other.settings) == (one.key == other.key)
    assert HeadScaling.from_key(one.key).settings == one.settings


def test_values_of_one_make_no_other_scaling():
    assert HeadScaling(ONES, GAINS) == HeadScaling(None, np.array(GAINS), layers=LayerScaling.identity(2))
    assert HeadScaling(GAINS).key != HeadScaling(gains=GAINS).key
    assert len({HeadScaling(gains=GAINS), HeadScaling(gains=GAINS, mlp_gains=[1, 1]), HeadScaling(GAINS)}) == 2
    assert HeadScaling(layers=LAYERS).key == LAYERS.key
    assert replace(HeadScaling(gains=GAINS), mlp_gains=MLP) == HeadScaling(gains=GAINS, mlp_gains=MLP)


class Pickling(ThreadPoolExecutor):
    """Workers that get what another process would."""

    def submit(self, function, /, *args):
        return super().submit(function, *pickle.loads(pickle.dumps(args)))


def test_workers_elsewhere_measure_the_same(tiny):
    candidates = [HeadScaling(TEMPERATURES, GAINS), HeadScaling(gains=GAINS, mlp_gains=MLP, layers=LAYERS)]
    here = score(tiny, SUITE, candidates, batch_tokens=1)
    with Pickling(2) as executor:
        elsewhere = score(tiny, SUITE, candidates, batch_tokens=1, executor=executor)
    np.testing.assert_array_equal(elsewhere.nll, here.nll)
