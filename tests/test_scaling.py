import copy
import gc
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrs_utils import ExtendedScaling, LayerScaling, load_factors, load_lm, save_factors
from lrs_utils.scaling.base import Setting
from lrs_utils.scaling.rope import divide_by_band
from lrs_utils.scaling.tables import PositionTables


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def with_rope_of_transformers(lm, scheme, factor):
    """The same weights with transformers' own rope type in every layer; it knows NTK as a base already raised."""
    config = copy.deepcopy(lm.model.config)
    rope, rotary = config.rope_parameters, lm.model.model.rotary_emb
    for kind, parameters in rope.items() if "rope_type" not in rope else [("", rope)]:
        d = 2 * len(getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq"))
        window = config.max_position_embeddings
        parameters |= {
            "pi": {"rope_type": "linear", "factor": factor},
            "ntk": {"rope_theta": parameters["rope_theta"] * factor ** (d / (d - 2))},
            "yarn": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window},
        }[scheme]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(lm.model.state_dict())
    return model


def test_identity_is_bit_identical_to_the_bare_model(lm, ids):
    bare = logits(lm.model, ids)
    with LayerScaling.identity(2).applied_to(lm.model):
        assert torch.equal(logits(lm.model, ids), bare)


def test_bands_that_agree_are_the_factor_of_their_layer(lm, ids):
    bands = LayerScaling((1.0, 1.0), bands=[[1.3] * 4, [0.8] * 4])
    with bands.applied_to(lm.model):
        divided = lm.model(ids).logits
    with LayerScaling((1.3, 0.8)).applied_to(lm.model):
        torch.testing.assert_close(divided, lm.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert bands.reach == pytest.approx(0.8)
    assert LayerScaling((1.0, 1.0), bands=np.ones((2, 4))) == LayerScaling.identity(2)


def test_a_band_divides_its_own_frequencies(tiny):
    frequencies = torch.tensor([1.0, 0.5, 0.25, 0.125])
    assert divide_by_band(frequencies, [2.0, 4.0]).tolist() == [0.5, 0.25, 0.0625, 0.03125]
    scaling = LayerScaling((1.2, 0.9), "ntk", (1.1, 1.0), [[2.0, 0.5], [1.0, 1.5]])
    assert LayerScaling.from_key(scaling.key) == scaling
    assert scaling.at_dose(0.5).bands == ((1.41421, 0.70711), (1.0, 1.22474))
    with pytest.raises(ValueError, match="there are 5 bands, but only 4 frequencies to divide"):
        LayerScaling((1.0, 1.0), bands=np.full((2, 5), 1.1)).refuse_misfit(tiny.model)
    with pytest.raises(ValueError, match=r"bands has 1 rows of \[2\] for 2 layers"):
        LayerScaling((1.0, 1.0), bands=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="the factor of layer 0 changes cos and sin"):
        LayerScaling((1.0, 1.0), bands=[[1.0, 2.0], [1.0, 1.0]]).fold_into(tiny.model)


def test_one_layer_scales_that_one_and_refuses_one_that_is_not_there():
    assert LayerScaling.one_layer(1, 1.5, 3, "ntk") == LayerScaling((1.0, 1.5, 1.0), "ntk")
    for layer in (3, -1):
        with pytest.raises(ValueError, match=rf"layer {layer} is outside the 3 layers \(0 to 2\)"):
            LayerScaling.one_layer(layer, 1.5, 3)


@pytest.mark.parametrize("factor", [0.8, 1.5, 3.0])
def test_uniform_pi_equals_transformers_linear(lm, ids, factor):
    with LayerScaling.uniform(factor, 2).applied_to(lm.model):
        scaled = logits(lm.model, ids)
    assert torch.equal(scaled, logits(with_rope_of_transformers(lm, "pi", factor), ids))
    assert not torch.equal(scaled, logits(lm.model, ids))


@pytest.mark.parametrize("scheme", ["ntk", "yarn"])
@pytest.mark.parametrize("factor", [0.8, 1.5, 3.0])
def test_uniform_ntk_and_yarn_equal_transformers(lm, ids, scheme, factor):
    with LayerScaling.uniform(factor, 2, scheme).applied_to(lm.model):
        scaled = logits(lm.model, ids)
    theirs = logits(with_rope_of_transformers(lm, scheme, factor), ids)
    torch.testing.assert_close(scaled, theirs, rtol=1e-4, atol=1e-4)  # float32: powers taken in another order
    for other in {"pi", "ntk", "yarn"} - {scheme}:
        with LayerScaling.uniform(factor, 2, other).applied_to(lm.model):
            assert not torch.allclose(scaled, logits(lm.model, ids))


def with_short_window(lm, rope=None):
    """The same weights with a window of 32 tokens, so that 70 are beyond it."""
    config = copy.deepcopy(lm.model.config)
    config.max_position_embeddings = 32
    by_kind = config.rope_parameters
    for parameters in [by_kind] if "rope_type" in by_kind else by_kind.values():
        parameters |= rope or {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(lm.model.state_dict())
    return model


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_uniform_dynamic_ntk_equals_transformers_dynamic(lm, ids, factor):
    ours, theirs = with_short_window(lm), with_short_window(lm, {"rope_type": "dynamic", "factor": factor})
    for n in (70, 45, 20):  # longest first: transformers keeps the frequencies of the longest it has read
        for combine in ("multiply", "divide"):
            with ExtendedScaling.uniform(1, 2, "dynamic_ntk", extension=factor, combine=combine).applied_to(ours):
                scaled = logits(ours, ids[:, :n])
            fresh = with_short_window(lm, {"rope_type": "dynamic", "factor": factor})
            torch.testing.assert_close(scaled, logits(fresh, ids[:, :n]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours, ids), logits(theirs, ids))


@pytest.mark.parametrize("scheme", ["pi", "ntk", "yarn", "dynamic_ntk"])
def test_two_ways_to_put_layer_factors_on_an_extension(scheme, ids):
    model = with_short_window(load_lm("tiny-llama", dtype="float32", device="cpu"))
    results = {}
    for combine in ("multiply", "divide"):
        with ExtendedScaling((1.3, 0.9), scheme, extension=2.0, combine=combine).applied_to(model):
            results[combine] = logits(model, ids)
    assert torch.equal(*results.values()) == (scheme == "pi")
    static = "ntk" if scheme == "dynamic_ntk" else scheme
    stretches = [2.0 * s * (70 / 32 - 1) + 1 if scheme == "dynamic_ntk" else 2.0 * s for s in (1.3, 0.9)]
    with LayerScaling(stretches, static).applied_to(model):
        torch.testing.assert_close(results["multiply"], logits(model, ids))
    # divided: the extension alone, then positions further apart
    extended = ExtendedScaling.uniform(1, 2, scheme, extension=2.0)
    with PositionTables(model, length=70) as tables:
        divided = ExtendedScaling((1.3, 0.9), scheme, extension=2.0, combine="divide").settings
        for setting, factor in zip(divided, (1.3, 0.9), strict=True):
            own, base = tables.prepare(setting, 70), tables.prepare(extended.settings[0], 70)
            torch.testing.assert_close(own.inv_freq * factor, base.inv_freq)
            assert own.attention_scaling == base.attention_scaling, "YaRN's gain is the extension's"


@pytest.mark.parametrize("scheme", ["pi", "yarn"])
def test_divided_factors_are_pi_factors_on_a_model_that_transformers_extends(scheme, ids):
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    rope_type = {"pi": "linear", "yarn": "yarn"}[scheme]
    extended = with_short_window(lm, {"rope_type": rope_type, "factor": 2.0, "original_max_position_embeddings": 32})
    with LayerScaling((1.3, 0.9)).applied_to(extended):
        on_top = logits(extended, ids)
    model = with_short_window(lm)
    with ExtendedScaling((1.3, 0.9), scheme, extension=2.0, combine="divide").applied_to(model):
        torch.testing.assert_close(logits(model, ids), on_top, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", ["multiply", "divide"])
def test_generating_with_a_cache_reads_as_one_forward_pass_does(combine, ids):
    model = with_short_window(load_lm("tiny-llama", dtype="float32", device="cpu"))
    scaling = ExtendedScaling((1.3, 0.9), "dynamic_ntk", extension=1.5, combine=combine)
    prompt, n_new = ids[:1, :40], 20
    with scaling.applied_to(model):
        text = model.generate(prompt, max_new_tokens=n_new, do_sample=False, pad_token_id=0, eos_token_id=None)
    with scaling.applied_to(model, length=40), torch.no_grad():
        whole = model(text).logits[0]
    assert torch.equal(whole[39:-1].argmax(-1), text[0, 40:])
    longer = scaling.applied_to(model, length=60)  # the length that is known to come
    with longer, torch.no_grad():
        text = model.generate(prompt, max_new_tokens=n_new, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(model(text).logits[0, 39:-1].argmax(-1), text[0, 40:])


def test_a_key_names_an_extension_and_only_what_differs():
    extended = ExtendedScaling((1.5, 1.0), "ntk", (1.1, 1.0), extension=4, combine="divide")
    assert extended.key == "ntk x4.0 /|1.5,1.0|1.1,1.0"
    assert ExtendedScaling((1.5, 1.0), "ntk", extension=4).key == LayerScaling((6, 4), "ntk").key == "ntk|6.0,4.0"
    dynamic = ExtendedScaling((1.0, 1.5), "dynamic_ntk", extension=2)
    assert dynamic.key == "dynamic_ntk|2.0,3.0"
    for scaling in (extended, dynamic, ExtendedScaling((1.2, 1.0), extension=2), replace(dynamic, combine="divide")):
        again = ExtendedScaling.from_key(scaling.key)
        assert (again.key, again.settings) == (scaling.key, scaling.settings)
    assert ExtendedScaling((1.5, 1.0), "ntk", combine="divide").key == LayerScaling((1.5, 1.0)).key
    assert ExtendedScaling((1.5, 1.0), extension=2, combine="divide").key == LayerScaling((3, 2)).key
    for scheme in ("pi", "ntk", "yarn", "dynamic_ntk"):
        uniform = [ExtendedScaling.uniform(1, 2, scheme, extension=2, combine=c) for c in ("multiply", "divide")]
        assert uniform[0].key == uniform[1].key
        assert uniform[0].settings == uniform[1].settings
    assert ExtendedScaling((0.5, 0.5), "ntk", extension=2).key == LayerScaling.identity(2).key
    assert ExtendedScaling((1.0, 1.0), "dynamic_ntk").key != LayerScaling.identity(2).key
    assert ExtendedScaling((1.0, 1.0), extension=np.int64(2)).extension == 2.0
    with pytest.raises(ValueError, match=r"extension is 0\.5; it must be a number from 1 on"):
        ExtendedScaling((1.0,), extension=0.5)
    with pytest.raises(ValueError, match="combine 'add' is unknown; choose one of multiply, divide"):
        ExtendedScaling((1.0,), combine="add")


def test_a_length_is_for_dynamic_ntk_alone():
    model = load_lm("tiny-llama", device="cpu").model
    for scaling, length in ((ExtendedScaling((1.2, 1.0), "ntk"), 40), (ExtendedScaling((1.0, 1.0), "dynamic_ntk"), 0)):
        with (
            pytest.raises(ValueError, match=f"length is {length} with scheme"),
            scaling.applied_to(model, length=length),
        ):
            pass
    assert ExtendedScaling((0.5, 1.0), "dynamic_ntk", extension=2).reach == float("inf")
    assert ExtendedScaling((0.5, 1.0), "dynamic_ntk").reach == 1, (
        "beyond the window it stretches by less than is needed"
    )
    assert ExtendedScaling((0.5, 1.0), "dynamic_ntk", combine="divide").reach == 0.5


def test_schemes_differ_only_where_a_factor_does(ids):
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    assert LayerScaling((1.0, 1.0), "ntk").key == LayerScaling.identity(2).key
    assert LayerScaling((1.0, 1.2), "ntk").key != LayerScaling((1.0, 1.2)).key
    assert LayerScaling((1.0, 1.2), "ntk").settings[0] == LayerScaling((1.0, 1.2)).settings[0]
    with LayerScaling((1.0, 1.0), "yarn").applied_to(lm.model):
        assert torch.equal(logits(lm.model, ids), logits(load_lm("tiny-llama", dtype="float32").model, ids))


def test_each_layer_gets_its_own_factor(ids):
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    results = []
    for factors in [(1.0, 1.0), (1.5, 1.0), (1.0, 1.5), (1.5, 1.5)]:
        with LayerScaling(factors).applied_to(lm.model):
            results.append(logits(lm.model, ids))
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_cached_generation_equals_uncached(lm, ids):
    with LayerScaling((1.3, 0.8)).applied_to(lm.model):
        cached = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        uncached = ids
        for _ in range(12):
            uncached = torch.cat([uncached, logits(lm.model, uncached)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, uncached)


def test_temperature_multiplies_the_attention_logits_of_its_layer(ids):
    plain, hot = (load_lm("tiny-llama", dtype="float32", device="cpu") for _ in range(2))
    attention = hot.model.model.layers[1].self_attn
    attention.scaling *= 1.44
    with LayerScaling((1.2, 1.2), temperatures=(1.0, 1.44)).applied_to(plain.model):
        folded = logits(plain.model, ids)
    with LayerScaling((1.2, 1.2)).applied_to(hot.model):
        torch.testing.assert_close(folded, logits(hot.model, ids), rtol=1e-4, atol=1e-4)


def test_temperatures_of_one_are_the_same_scaling():
    assert LayerScaling((1.2, 1.0), temperatures=(1, 1)) == LayerScaling((1.2, 1.0))
    assert LayerScaling((1.2, 1.0), temperatures=(1, 1.1)).key != LayerScaling((1.2, 1.0)).key


def test_scaling_comes_off_after_the_block_and_after_an_error(lm, ids):
    bare = logits(lm.model, ids)
    with pytest.raises(KeyError), LayerScaling.uniform(1.5, 2).applied_to(lm.model):
        raise KeyError("inside")
    assert torch.equal(logits(lm.model, ids), bare)
    with LayerScaling.uniform(1.5, 2).applied_to(lm.model):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.model.modules())


def test_gradients_reach_a_scaled_model_with_checkpointing(ids):
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    lm.model.requires_grad_(True).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        lm.model.zero_grad()
        with LayerScaling((1.3, 0.8)).applied_to(lm.model):
            lm.model(ids, labels=ids).loss.backward()
        grads.append(lm.model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


def test_a_factor_keeps_one_small_copy_of_the_rotary_embedding(lm):
    kind = type(lm.model.model.rotary_emb)

    def living():
        gc.collect()
        return sum(type(thing) is kind for thing in gc.get_objects())

    with PositionTables(lm.model) as tables:
        before = living()
        for step in range(6):
            tables.prepare(Setting(0.9 - step / 10))
        assert living() == before + 6


def test_nested_use_is_refused(tiny, ids):
    scaling = LayerScaling.uniform(1.5, 2)
    with scaling.applied_to(tiny.model):
        with pytest.raises(ValueError, match="tiny-llama is already scaled"), scaling.applied_to(tiny.model):
            pass
        inside = logits(tiny.model, ids)
    with scaling.applied_to(tiny.model):  # the refusal left nothing behind
        assert torch.equal(logits(tiny.model, ids), inside)


def test_wrong_number_of_factors_is_refused(tiny):
    message = "factors has 30 values but tiny-llama has 2 layers"
    with pytest.raises(ValueError, match=message), LayerScaling.identity(30).applied_to(tiny.model):
        pass


@pytest.mark.parametrize("bad", [0, -1.5, math.nan, math.inf, "x", None])
def test_a_factor_that_is_no_positive_number_is_refused(bad):
    with pytest.raises(ValueError, match=r"factors\[1\] is .*positive finite"):
        LayerScaling((1.0, bad))
    with pytest.raises(ValueError, match=r"temperatures\[0\]"):
        LayerScaling((1.0, 1.0), temperatures=(bad, 1.0))


def test_unknown_scheme_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="scheme 'linear' is unknown; choose one of pi"):
        LayerScaling((1.0,), scheme="linear")
    with pytest.raises(ValueError, match="temperatures has 1 values but factors has 2"):
        LayerScaling((1.0, 1.0), temperatures=(1.0,))
    with pytest.raises(ValueError, match="factors is empty"):
        LayerScaling(())


@pytest.mark.parametrize(
    ("model_type", "family", "settings"),
    [
        ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("mpt", "MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("gptj", "GPTJForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    ],
)
def test_a_family_out_of_reach_is_refused_by_name(model_type, family, settings):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=300, **settings))
    with pytest.raises(ValueError, match=f"{family} can't be scaled"), LayerScaling.identity(2).applied_to(model):
        pass


def test_layers_that_take_no_position_embeddings_are_refused_by_name():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    lm.model.model.layers[1] = torch.nn.Linear(32, 32)
    with (
        pytest.raises(ValueError, match=r"LlamaForCausalLM can't be scaled .* take no `position_embeddings`"),
        LayerScaling.identity(2).applied_to(lm.model),
    ):
        pass


def test_a_family_with_layers_that_read_no_positions_is_refused_by_name():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("lfm2", vocab_size=300, layer_types=["conv", "full_attention"], **sizes)
    model = AutoModelForCausalLM.from_config(config)
    message = "Lfm2ForCausalLM can't be scaled by layer: its conv layers are no causal attention known here"
    with pytest.raises(ValueError, match=message), LayerScaling.uniform(1.5, 2).applied_to(model):
        pass


def test_a_layer_whose_positions_are_made_elsewhere_is_never_ignored_silently():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    rotary = copy.deepcopy(lm.model.model.rotary_emb)
    lm.model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            kwargs | {"position_embeddings": rotary(args[0], torch.arange(args[0].shape[1])[None])},
        ),
        with_kwargs=True,
    )
    with (
        pytest.raises(ValueError, match=r"LlamaForCausalLM can't be used here: .* factor would have been ignored"),
        LayerScaling.uniform(1.5, 2).applied_to(lm.model),
    ):
        pass


def test_rope_types_that_recompute_their_frequencies_are_refused():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    config = copy.deepcopy(lm.model.config)
    config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="rope type 'dynamic'"), LayerScaling.uniform(1.5, 2).applied_to(model):
        pass


def test_temperatures_are_refused_where_only_a_part_of_the_head_is_rotated():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=300, num_key_value_heads=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    scaling = LayerScaling((1.0, 1.0), temperatures=(1.1, 1.1))
    with (
        pytest.raises(ValueError, match=r"temperatures\[0\] is 1.1, but in layer 0 of StableLmForCausalLM"),
        scaling.applied_to(model),
    ):
        pass


@pytest.mark.parametrize(
    "scaling",
    [
        LayerScaling((1.25, 0.9), temperatures=(1.0, 1.1)),
        ExtendedScaling((1.5, 0.9), "ntk", combine="divide"),
        ExtendedScaling((1.5, 0.9), "yarn", extension=2),
        ExtendedScaling((1.5, 0.9), "dynamic_ntk", extension=2, combine="divide"),
    ],
    ids=lambda scaling: scaling.scheme,
)
def test_factor_files_keep_scaling_and_provenance(tmp_path, scaling):
    save_factors(tmp_path / "new" / "f.json", scaling, model="tiny", held_out={"accuracy": 0.5, "interval": [0.4, 0.6]})
    assert load_factors(tmp_path / "new" / "f.json") == scaling
    content = json.loads((tmp_path / "new" / "f.json").read_text())
    assert content["version"] == 1
    assert content["held_out"]["interval"] == [0.4, 0.6]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.json"]


def test_a_failed_save_leaves_the_old_factor_file(tmp_path):
    path = tmp_path / "f.json"
    save_factors(path, LayerScaling((1.0,)))
    with pytest.raises(ValueError, match="Out of range"):
        save_factors(path, LayerScaling((2.0,)), accuracy=math.nan)
    with pytest.raises(ValueError, match="factors: the file format uses that name"):
        save_factors(path, LayerScaling((2.0,)), factors=1)
    assert load_factors(path) == LayerScaling((1.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a factor file"),
        ("[1, 2]", "is not a factor file"),
        ('{"format": "other"}', "is not a factor file"),
        ('{"format": "lrs-factors", "version": 9}', "version 9"),
        ('{"format": "lrs-factors", "version": 1, "scheme": "pi"}', "lacks the field 'factors'"),
        ('{"format": "lrs-factors", "version": 1, "scheme": "pi", "factors": [1, -1]}', r"factors\[1\] is -1"),
    ],
)
def test_a_bad_factor_file_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        load_factors(path)
