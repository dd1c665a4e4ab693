"""A scaled model as a folder: every form on every family, read again where lrs_utils can't be imported."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrs_utils import LM, HeadScaling, LayerScaling, export, load_factors, load_lm, score, tasks
from lrs_utils.export import Exported
from lrs_utils.export.__main__ import main
from lrs_utils.finding.recipe import find_scaling
from lrs_utils.models.scaled import CODE, MARK, has_known_code
from lrs_utils.models.tiny import TINY, character_tokenizer
from lrs_utils.peers import ReRoPE
from lrs_utils.scaling.extension import ExtendedScaling
from lrs_utils.scaling.files import read_factors, save_factors

GAINS = [[1.3, 0.7, 1.0, 1.0], [1.0, 1.2, 0.8, 1.0]]
SCALINGS = {
    "temperatures": LayerScaling((1, 1), temperatures=(1.3, 0.8)),
    "ntk": LayerScaling((1.3, 0.8), "ntk", temperatures=(1.2, 1.0)),
    "pi": LayerScaling((1.3, 0.8)),
    "yarn": LayerScaling((1.3, 1.8), "yarn"),
    "bands": LayerScaling((1, 1), bands=[[1.2, 0.8], [1.0, 1.3]]),
    "extended": ExtendedScaling((1.0, 1.1), "ntk", extension=2.0),
    "gains": HeadScaling(gains=GAINS),
    "gains and ntk": HeadScaling(gains=GAINS, layers=LayerScaling((1.3, 0.8), "ntk")),
    "head temperatures": HeadScaling(temperatures=GAINS),
    "mlp": HeadScaling(mlp_gains=[0.8, 1.2]),
}
FOLDS = {"temperatures", "gains", "head temperatures", "mlp"}
ONE_BASE = {"ntk", "extended", "gains and ntk"}  # for each layer
LIKE_LLAMA = {"tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-granite", "tiny-smollm3"}
SHARE_A_NORM = {"tiny-qwen3", "tiny-gemma3"}  # all heads, so their temperatures must be the same
NORM_THE_MLP = {"tiny-olmo2", "tiny-gemma3"}  # what it puts out, so a gain there changes nothing
CASES = [(family, name) for family in TINY for name in SCALINGS if (family, name) != ("tiny-smollm3", "temperatures")]


def expected_form(family, name):
    if name in FOLDS:
        return "stock"
    return "granite" if name in ONE_BASE and family in LIKE_LLAMA else "remote"


@pytest.fixture
def lm():
    return load_lm("tiny-llama", dtype="float32", device="cpu")


def fitting(family, scaling):
    """Without what a family can't have: SmolLM3's second layer has no rotation to carry a temperature."""
    if family == "tiny-smollm3" and isinstance(scaling, LayerScaling) and scaling.temperatures:
        return replace(scaling, temperatures=(scaling.temperatures[0], 1.0))
    return scaling


SUITE = tasks.kv_retrieval(4, 5, keys="short")
IDS = (torch.arange(60) * 37 + 5)[None] % 257


def generate(model):
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )


@pytest.mark.parametrize(("family", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_the_first_exact_form_computes_the_same(family, name, tmp_path):
    lm, scaling = load_lm(family, dtype="float32", device="cpu"), fitting(family, SCALINGS[name])
    if name == "head temperatures" and family in SHARE_A_NORM:
        with pytest.raises(ValueError, match=r"can't be exported.*stock: .*remote: .*one weight, so different temp"):
            export(lm, scaling, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    found = export(lm, scaling, tmp_path / "out")
    assert found.form == expected_form(family, name)
    assert list(found.refused) == ["stock", "granite"][: ["stock", "granite", "remote"].index(found.form)]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=found.form == "remote")
    with torch.no_grad():
        with scaling.applied_to(lm.model):
            wanted, tokens = lm.model(IDS).logits, generate(lm.model)
        torch.testing.assert_close(plain(IDS).logits, wanted, rtol=0, atol=1e-4)
        idle = name == "mlp" and family in NORM_THE_MLP
        assert idle or (lm.model(IDS).logits - wanted).abs().max() > 0.05, "the scaling changes something"
        assert torch.equal(generate(plain), tokens), "with a cache of keys and values too"
    assert found.error < 1e-4


@pytest.mark.parametrize("form", ["stock", "granite", "remote"])
def test_an_exported_folder_gives_the_same_answers_where_lrs_utils_is_not(lm, form, tmp_path):
    name = {"stock": "gains", "granite": "ntk", "remote": "pi"}[form]
    assert export(lm, SCALINGS[name], tmp_path / "out").form == form
    script = f"""
import sys
sys.modules["lrs_utils"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code={form == "remote"})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code={form == "remote"})
ids = tokenizer("A key, and its value: ", return_tensors="pt")["input_ids"]
print(ids.tolist(), model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0].tolist())
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    ids = lm.tokenizer("A key, and its value: ", return_tensors="pt")["input_ids"]
    with SCALINGS[name].applied_to(lm.model):
        tokens = lm.model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert run.stdout.strip() == f"{ids.tolist()} {tokens[0].tolist()}"


@pytest.mark.parametrize("name", ["gains", "ntk", "pi"])
def test_scored_again_an_exported_folder_gets_what_the_scaled_model_gets(lm, name, tmp_path):
    export(lm, SCALINGS[name], tmp_path / "out")
    again = load_lm(tmp_path / "out", dtype="float32", device="cpu")
    wanted = score(lm, SUITE, [SCALINGS[name]])
    found = score(again, SUITE, [LayerScaling.identity(2)])
    np.testing.assert_array_equal(found.exact, wanted.exact)
    np.testing.assert_allclose(found.nll, wanted.nll, atol=1e-4)
    assert again.fingerprint != lm.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gains", "ntk", "pi"])
def test_in_fewer_bits_a_folder_is_as_near_to_the_scaled_model_as_the_hook_is(dtype, name, tmp_path):
    whole, lm = load_lm("tiny-llama", dtype="float32", device="cpu"), load_lm("tiny-llama", dtype=dtype, device="cpu")
    export(lm, SCALINGS[name], tmp_path / "out")
    again = load_lm(tmp_path / "out", dtype=dtype, device="cpu")
    assert again.model.dtype == lm.model.dtype
    with torch.no_grad():
        with SCALINGS[name].applied_to(whole.model):
            wanted = whole.model(IDS).logits
        with SCALINGS[name].applied_to(lm.model):
            hooked = lm.model(IDS).logits.float()
        found = again.model(IDS).logits.float()
    assert (found - wanted).square().mean() < 2 * (hooked - wanted).square().mean()
    # in another precision than it was made in
    score(load_lm(tmp_path / "out", dtype="float32", device="cpu"), SUITE, [LayerScaling.identity(2)])


def test_a_family_that_is_only_like_llama_at_first_sight_is_not_taken_for_it(tmp_path):
    config = AutoConfig.for_model("olmo", vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, pad_token_id=256, initializer_range=0.3)  # fmt: skip
    lm = LM(AutoModelForCausalLM.from_config(config).eval(), character_tokenizer(), "olmo")
    found = export(lm, SCALINGS["ntk"], tmp_path / "out")
    assert found.form == "remote"
    assert found.refused["granite"] == "a olmo isn't known to compute what GraniteSWA does"


def test_biases_tied_embeddings_and_wide_heads_have_their_place_in_granite(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True,
                                  mlp_bias=True, tie_word_embeddings=True, initializer_range=0.3)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    lm = LM(model.requires_grad_(False), character_tokenizer(), "wide")
    assert export(lm, SCALINGS["ntk"], tmp_path / "out").form == "granite"
    texts = [[*range(60), *[256] * 20], [*range(100, 180)]]
    given = {"input_ids": torch.tensor(texts).flip(1), "attention_mask": (torch.tensor(texts) != 256).long().flip(1)}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), SCALINGS["ntk"].applied_to(model):
        wanted = model(**given).logits
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(plain(**given).logits[kept], wanted[kept], rtol=0, atol=1e-4)  # a padded batch


def test_settings_of_sampling_that_transformers_does_not_write_are_no_obstacle(lm, tmp_path):
    lm.model.generation_config.temperature = 0.6  # without do_sample, as some published models have it
    found = export(lm, SCALINGS["gains"], tmp_path / "out")
    assert found.form == "stock"
    assert not lm.model.generation_config.do_sample
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_what_was_measured_on_another_model_is_told_as_such(lm, tmp_path):
    row = {"task": "pairs", "measure": "accuracy", "no scaling": 0.2, "found": 0.9, "change": 0.7}
    provenance = {"model": "org/other", "fingerprint": "other", "test": [row]}
    export(lm, SCALINGS["gains"], tmp_path / "out", provenance=provenance)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Measured on org/other (other weights or another precision), **not on this model**" in card
    content = read_factors(tmp_path / "out" / "lrs_factors.json")
    assert (content["model"], content["fingerprint"]) == ("tiny-llama", lm.fingerprint)
    assert content["found on"] == {"model": "org/other", "fingerprint": "other"}


def test_an_extension_alone_is_told(lm, tmp_path):
    export(lm, ExtendedScaling((1.0, 1.0), "ntk", extension=2.0), tmp_path / "out")
    assert "Changed: an extension of the window by 2 (ntk)." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["gains", "ntk", "pi"])
def test_a_model_that_was_exported_is_not_scaled_twice_by_accident(lm, name, tmp_path):
    export(lm, SCALINGS[name], tmp_path / "out")
    again = load_lm(tmp_path / "out", dtype="float32", device="cpu")
    for use in (
        lambda: export(again, SCALINGS["gains"], tmp_path / "twice"),
        lambda: score(again, tasks.kv_retrieval(4, 1, keys="short"), [SCALINGS["ntk"]]),
        lambda: find_scaling(again, tasks.kv_retrieval(4, 12, keys="short"), texts={"a": "words " * 3000}),
        lambda: ReRoPE(2, 8).refuse_misfit(again.model),
    ):
        with pytest.raises(ValueError, match=r"out holds a scaling already \(lrs_factors"):
            use()
    if name == "gains":  # on purpose
        del again.model.config.lrs_scaling
        export(again, SCALINGS["gains"], tmp_path / "twice")


@pytest.mark.parametrize("measured", [{"uuid: points": 64.6}, "well", ["well", {"accuracy": 1}], None])
def test_what_a_factor_file_says_otherwise_of_its_test_is_not_told(lm, tmp_path, measured):
    export(lm, SCALINGS["gains"], tmp_path / "out", provenance={"test": measured})
    assert "Not measured when this folder was made." in (tmp_path / "out" / "README.md").read_text()


def test_the_folder_holds_a_card_the_numbers_and_what_generation_needs(lm, tmp_path):
    rows = [
        {"task": "pairs", "measure": "accuracy", "no scaling": 0.2, "found": 0.75, "change": 0.55, "low": 0.5,
         "high": 0.6},
        {"task": "text", "measure": "perplexity, not seen: play", "no scaling": 30.0, "found": 30.3, "change": 0.3,
         "low": 0.1, "high": 0.5},
        {"task": "search", "measure": "seconds", "no scaling": 0, "found": 9, "change": 9, "low": None, "high": None},
    ]  # fmt: skip
    about = {"valid for": [{"task": "pairs", "tokens": [400, 500]}]}
    found = export(lm, SCALINGS["gains"], tmp_path / "out", provenance={"test": rows, "found": about})
    assert isinstance(found, Exported)
    assert str(found).startswith(f"{tmp_path / 'out'}: form stock, logits within ")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "lrs_factors.json", "config.json", "model.safetensors", "tokenizer.json",
            "generation_config.json"} <= names  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Changed: 8 head gains. They are in its weights, so it is an ordinary Llama" in card
    assert "| pairs, accuracy | 0.2 | 0.75 | +0.55 [0.5, 0.6] |" in card
    assert "| perplexity of text, play | 30 | 30.3 | +0.3 [0.1, 0.5] |" in card
    assert "Tested: pairs, 400 to 500 tokens." in card
    assert "seconds" not in card
    assert load_factors(tmp_path / "out" / "lrs_factors.json") == SCALINGS["gains"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())[MARK] == "lrs_factors.json"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == lm.tokenizer("ab")["input_ids"]


def test_code_that_export_writes_is_known(lm, tmp_path):
    export(lm, SCALINGS["pi"], tmp_path / "out")
    assert has_known_code(tmp_path / "out")


def add_to(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def more_code(folder):
    (folder / CODE).write_text((folder / CODE).read_text() + "\nprint('more')\n")


def code_in_the_model_type(folder):
    model_type = 'lrs_llama"\n    print("more")\n    other = "'
    (folder / CODE).write_text((folder / CODE).read_text().replace("lrs_llama", model_type))
    add_to(folder / "config.json", model_type=model_type)


def another_file(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "more.py").write_text("print('more')\n")


def code_for_the_tokenizer(folder):
    add_to(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_lrs.Other"]})


def code_of_the_hub(folder):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    add_to(folder / "config.json", auto_map={name: f"org/repo--{of}" for name, of in auto_map.items()})


@pytest.mark.parametrize(
    "change", [more_code, code_in_the_model_type, another_file, code_for_the_tokenizer, code_of_the_hub]
)
def test_code_of_others_is_not_run(lm, tmp_path, change):
    export(lm, SCALINGS["pi"], tmp_path / "out")
    change(tmp_path / "out")
    assert not has_known_code(tmp_path / "out")
    if change is more_code:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_lm(tmp_path / "out", device="cpu")


def test_without_trust_a_remote_folder_is_refused_not_read_plain(lm, tmp_path):
    export(lm, SCALINGS["pi"], tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (LayerScaling.identity(2), "the scaling changes nothing; save the model itself"),
        (LayerScaling((1.2,) * 3), "factors has 3 values but tiny-llama has 2 layers"),
        (HeadScaling(factors=GAINS), "layer 0 reads positions in another way for each of the heads"),
        (ExtendedScaling((1.0, 1.0), "dynamic_ntk", extension=2.0), "stretches by what is read"),
        ("pi", "scaling is 'pi'; give a LayerScaling or a HeadScaling"),
    ],
)
def test_what_has_no_form_is_refused_and_nothing_is_written(lm, scaling, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(lm, scaling, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_wrong_form_or_a_full_folder_is_refused(lm, tmp_path):
    with pytest.raises(ValueError, match="form is 'gguf'; choose one of auto, stock, granite, remote"):
        export(lm, SCALINGS["pi"], tmp_path / "out", "gguf")
    with pytest.raises(
        ValueError, match=r"can't be exported\. granite: the frequencies of layer 0 are no powers of one"
    ):
        export(lm, SCALINGS["pi"], tmp_path / "out", "granite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine is not empty; give a new folder"):
        export(lm, SCALINGS["pi"], tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with SCALINGS["pi"].applied_to(lm.model), pytest.raises(ValueError, match="already scaled"):
        export(lm, SCALINGS["gains"], tmp_path / "out")


def test_the_command_exports_a_factor_file(lm, tmp_path, monkeypatch, capsys):
    save_factors(tmp_path / "mine.json", SCALINGS["ntk"], model="tiny-llama")
    arguments = ["export", str(tmp_path / "mine.json"), "--to", str(tmp_path / "out"), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert f"{tmp_path / 'out'}: form granite, logits within" in capsys.readouterr().out
    assert (tmp_path / "out" / "scaling.png").exists()
    monkeypatch.setattr(sys, "argv", [*arguments[:-3], str(tmp_path / "no" / "out"), "--form", "stock"])
    with pytest.raises(SystemExit, match="stock: the factor of layer 0 changes cos and sin"):
        main()
