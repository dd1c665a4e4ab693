"""Models from GGUF files: one as a user brings it, made here from a tiny random model; and the embedded Gemma 3."""

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

from lrs_utils import HeadScaling, LayerScaling, load_factors, load_lm, score, tasks
from lrs_utils.export import export_gguf
from lrs_utils.models.download import cache_folder
from lrs_utils.models.tiny import build_tiny


@pytest.fixture(scope="module")
def qwen2():
    return build_tiny("tiny-qwen2", torch.float32)


def write_gguf(path, model, *, architecture="qwen2", leave_out="", rope_scaling=None):
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if rope_scaling:
        writer.add_rope_scaling_type(rope_scaling)
        writer.add_rope_scaling_factor(4.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL])
    writer.add_token_scores([0.0] * 257)  # no merges: a token a byte
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if not (leave_out and leave_out in name):
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_another_family_loads_scales_and_scores(qwen2, tmp_path):
    lm = load_lm(write_gguf(tmp_path / "tiny.gguf", qwen2), dtype="float32", device="cpu")
    assert type(lm.model) is type(qwen2)
    assert all(torch.equal(tensor, qwen2.state_dict()[name]) for name, tensor in lm.model.state_dict().items())
    ids = torch.arange(40)[None]
    assert torch.equal(lm.model(ids).logits, qwen2(ids).logits)
    text = '{"key": "3f2a", "naïve": 東京}\n\n'
    assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text
    gains = HeadScaling(gains=np.linspace(0.5, 1.5, 8).reshape(2, 4))
    nll = score(lm, tasks.kv_retrieval(3, 1, keys="short"), [LayerScaling((1, 1)), LayerScaling((1.5, 2)), gains]).nll
    assert np.isfinite(nll).all()
    assert len(np.unique(nll.mean(axis=(1, 2)))) == 3
    assert load_lm(tmp_path, dtype="float32", device="cpu").fingerprint == lm.fingerprint  # the folder that holds it


def test_a_file_that_lacks_weights_is_refused(qwen2, tmp_path):
    path = write_gguf(tmp_path / "cut.gguf", qwen2, leave_out="layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"cut\.gguf lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight first"):
        load_lm(path)


def test_a_file_that_scales_positions_is_refused_since_that_would_be_lost(qwen2, tmp_path):
    path = write_gguf(tmp_path / "yarn.gguf", qwen2, rope_scaling=gguf.RopeScalingType.YARN)
    with pytest.raises(ValueError, match=r"it scales RoPE \(qwen2\.rope\.scaling\.type\), which transformers does not"):
        load_lm(path)


def test_a_file_of_an_unknown_family_is_refused_by_name(qwen2, tmp_path):
    with pytest.raises(ValueError, match=r"architecture rwkv7 is not supported yet\.\); convert it"):
        load_lm(write_gguf(tmp_path / "other.gguf", qwen2, architecture="rwkv7"))


def test_gemma3_is_itself_and_loads_offline_with_its_terms_beside_it(gemma3):
    config = gemma3.model.config
    assert (gemma3.num_layers, gemma3.window, config.sliding_window) == (18, 32_768, 512)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    bases = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert bases == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert "Gemma Terms of Use" in (cache_folder() / "gemma3-270m" / "GEMMA_TERMS.html").read_text()
    code = "from lrs_utils import load_lm; print(load_lm('gemma3-270m', dtype='float32', device='cpu').fingerprint)"
    environment = os.environ | {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    assert found.stdout.strip() == gemma3.fingerprint


BOTH = HeadScaling([[1.3, 0.7, 1.0, 1.0]] * 2, [[0.8, 1.0, 1.2, 1.0]] * 2, mlp_gains=[0.9, 1.0])


def test_a_scaling_goes_into_a_copy_of_the_file(qwen2, tmp_path):
    lm = load_lm(write_gguf(tmp_path / "tiny.gguf", qwen2), dtype="float32", device="cpu")
    export_gguf(lm, BOTH, tmp_path / "new" / "scaled.gguf")
    again = load_lm(tmp_path / "new" / "scaled.gguf", dtype="float32", device="cpu")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        with BOTH.applied_to(lm.model):
            wanted = lm.model(ids).logits
        found = again.model(ids).logits
        assert (lm.model(ids).logits - wanted).abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)  # changed weights have 16 bits
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("tiny.gguf", "new/scaled.gguf"))
    contents = [{name: f.contents() for name, f in r.fields.items() if "GGUF" not in name} for r in (before, after)]
    assert contents[0] == contents[1]
    same = [np.array_equal(a.data, b.data) for a, b in zip(before.tensors, after.tensors, strict=True)]
    changed = {t.name.split(".")[-2] for t, s in zip(before.tensors, same, strict=True) if not s}
    assert changed == {"attn_q", "attn_output", "ffn_down"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scaled.gguf"]


def test_rows_that_llama_has_side_by_side_find_their_place(smollm2, tmp_path):
    scaling = HeadScaling(np.linspace(0.8, 1.25, 270).reshape(30, 9))
    export_gguf(smollm2, scaling, tmp_path / "scaled.gguf")
    again = load_lm(tmp_path / "scaled.gguf", dtype="float32", device="cpu")
    ids = torch.arange(100, 140)[None]
    with torch.no_grad(), scaling.applied_to(smollm2.model):
        wanted = smollm2.model(ids).logits
    torch.testing.assert_close(again.model(ids).logits, wanted, rtol=0, atol=0.05)


def test_a_gguf_file_that_can_not_be_made_is_refused(tiny, qwen2, tmp_path):
    lm = load_lm(write_gguf(tmp_path / "tiny.gguf", qwen2), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"tiny\.gguf exists; give a new file"):
        export_gguf(lm, BOTH, tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="the factor of layer 0 changes cos and sin"):
        export_gguf(lm, LayerScaling((1.2, 1.0)), tmp_path / "scaled.gguf")
    with pytest.raises(ValueError, match=r"tiny-llama wasn't loaded from a \.gguf file"):
        export_gguf(tiny, BOTH, tmp_path / "scaled.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_llama_cpp_writes_what_the_scaled_model_writes(smollm2, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="its build takes ten minutes: pip install llama-cpp-python")
    scaling = load_factors("smollm2-135m/kv-short-40")
    export_gguf(smollm2, scaling, tmp_path / "scaled.gguf")
    [probe] = tasks.kv_retrieval(40, 1, seed=50_000, keys="short", positions=[5, 20, 35]).probes
    # it multiplies quantised weights by 8-bit activations, so tokens after the answer may part
    prompts = [probe.context + q.prompt + q.answer_prefix for q in probe.questions]
    engine = llama_cpp.Llama(str(tmp_path / "scaled.gguf"), n_ctx=2048, verbose=False, seed=0)
    for prompt in prompts:
        ids = smollm2.tokenizer(prompt)["input_ids"]
        with scaling.applied_to(smollm2.model):
            wanted = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
        engine.reset()
        found = [token for token, _ in zip(engine.generate(ids, temp=0.0), range(6), strict=False)]
        assert found == wanted.tolist()
