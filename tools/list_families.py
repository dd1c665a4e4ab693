"""Which model families of transformers a scaling works on: every causal language model type, built tiny and tried.

    python tools/list_families.py

Each row of data/results/families.csv is a model type. A verdict is "exact" if the scaling gave the same as another
computation: for factors, transformers' own `linear` rope type (or divided frequencies, if the family has another type
of its own); for temperatures, attention's own scale; for gains, the output projection's weight; for score, a plain
forward pass for each question; for generate, a forward pass for each token.
Otherwise it is "refused", with what `lrs_utils` says, or "wrong", which `tests/test_families.py` forbids.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from result_tables import RESULTS, write_table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrs_utils import HeadScaling, LayerScaling, score, tasks
from lrs_utils.models.load import LM
from lrs_utils.models.tiny import character_tokenizer
from lrs_utils.progress import Progress, SilentProgress

TABLE = RESULTS / "families.csv"
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_WEIGHTS = 6_000_000
SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 256,
    "pad_token_id": 256, "initializer_range": 0.3, "d_model": 32, "n_layer": 2, "n_layers": 2, "n_head": 4,
    "n_heads": 4, "n_embd": 32, "ffn_dim": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_num_experts": 4, "moe_intermediate_size": 32,
    "vocab_size_per_layer_input": 257, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
OF_TYPE: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0]}, "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 8}, "codegen": {"rotary_dim": 8}, "dots1": {"n_shared_experts": 1},
}  # fmt: skip
LAYERED = {"jamba", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma"}


def main() -> None:
    rows = []
    with Progress(len(TYPES), "families").shown() as bar:
        for model_type in TYPES:
            rows.append(verdicts(model_type))
            bar.advance(1, model_type)
            gc.collect()
    table = pd.DataFrame(rows)
    write_table(TABLE.stem, table, "list_families.py")
    kinds = table.iloc[:, 2:].map(lambda verdict: str(verdict).partition(":")[0])
    print(kinds.apply(pd.Series.value_counts).fillna(0).astype(int))


def build(model_type: str) -> PreTrainedModel:
    """A random model of two layers (four where layers of one kind come fourth), or an error."""
    config = AutoConfig.for_model(model_type).get_text_config()
    given = SIZES | OF_TYPE.get(model_type, {})
    if model_type != "falcon":
        given |= {"head_dim": 8}
    if "kv_lora_rank" in config.to_dict():  # a key for every head is made from the compressed ones
        given |= {"num_key_value_heads": 4}
    if model_type in LAYERED:
        given |= {"num_hidden_layers": 4}
    config = type(config)(**{name: value for name, value in given.items() if name in config.to_dict()})
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n_weights > MOST_WEIGHTS:
        raise ValueError(f"{n_weights / 1e6:.0f} million weights at the smallest sizes tried")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.parameters():  # some families start from zeros, or values close to zero
            weight += 0.3 * torch.randn_like(weight) if weight.dim() == 1 else torch.randn_like(weight) * 0.3 - weight
    return model.eval().requires_grad_(False)


def verdicts(model_type: str) -> dict[str, str]:
    """A row of the table."""
    row = {"type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    try:
        lm = LM(build(model_type), character_tokenizer(), model_type)
        _logits(lm.model)
    except Exception as error:  # a family's own errors are of any kind
        return row | {"factors": f"not built: {_short(error)}"}
    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                row[name] = "exact" if check(lm) else "wrong"
        except ValueError as error:
            row[name] = f"refused: {_short(error)}"
        except Exception as error:
            row[name] = f"wrong: {type(error).__name__}: {_short(error)}"
    return row


def _factors(lm: LM) -> bool:
    with LayerScaling.uniform(1.7, lm.num_layers).applied_to(lm.model):
        found = _logits(lm.model)
    config = copy.deepcopy(lm.model.config)
    kinds = config.rope_parameters
    ropes = [kinds] if "rope_type" in kinds else list(kinds.values())
    if all(rope["rope_type"] == "default" for rope in ropes):
        for rope in ropes:
            rope |= {"rope_type": "linear", "factor": 1.7}
        twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        twin.load_state_dict(lm.model.state_dict())
    else:  # another type by default, which `linear` would replace
        twin = copy.deepcopy(lm.model)
        for name, frequencies in twin.get_decoder().rotary_emb.named_buffers():
            if name.endswith("inv_freq"):
                frequencies /= 1.7
    return _close(found, _logits(twin)) and not _close(found, _logits(lm.model))


def _temperatures(lm: LM) -> bool:
    scaling = LayerScaling.uniform(1.0, lm.num_layers, temperatures=(1.6,) * lm.num_layers)
    return _as_edited(lm, scaling, lambda attention: setattr(attention, "scaling", attention.scaling * 1.6))


def _head_temperatures(lm: LM) -> bool:
    scaling = HeadScaling([[1.6] * _heads(lm)] * lm.num_layers)
    return _as_edited(lm, scaling, lambda attention: setattr(attention, "scaling", attention.scaling * 1.6))


def _head_gains(lm: LM) -> bool:
    gains = [0.6, *[1.6] * (_heads(lm) - 1)]  # equal ones are lost where a norm comes next

    def edit(attention: Any) -> None:
        weight = attention.o_proj.weight
        weight *= torch.tensor(gains).repeat_interleave(weight.shape[1] // len(gains))

    return _as_edited(lm, HeadScaling(gains=[gains] * lm.num_layers), edit)


def _score(lm: LM) -> bool:
    suite = tasks.kv_retrieval(3, 1, keys="short")
    [probe] = suite.probes
    found = score(lm, suite, [LayerScaling.identity(lm.num_layers)], progress=SilentProgress()).nll[0, 0]
    for question, nll in zip(probe.questions, found, strict=True):
        prompt = probe.context + question.prompt + question.answer_prefix
        ids = torch.tensor(lm.tokenizer(prompt + question.answer)["input_ids"])
        logits = lm.model(ids[None], use_cache=False).logits[0]
        n = len(lm.tokenizer(prompt)["input_ids"])
        if abs(F.cross_entropy(logits[n - 1 : -1], ids[n:]).item() - nll) > 1e-3:
            return False
    return True


def _generate(lm: LM) -> bool:
    ids = (torch.arange(30) * 37 % 200)[None]
    with LayerScaling.uniform(1.3, lm.num_layers).applied_to(lm.model):
        cached = lm.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        plain = ids
        for _ in range(8):
            logits = lm.model(plain, use_cache=False).logits[:, -1]
            logits[:, 256] = -torch.inf  # the end of a text
            plain = torch.cat([plain, logits.argmax(-1, keepdim=True)], dim=1)
    return torch.equal(cached, plain)


CHECKS: dict[str, Callable[[LM], bool]] = {
    "factors": _factors, "temperatures": _temperatures, "head temperatures": _head_temperatures,
    "head gains": _head_gains, "score": _score, "generate": _generate,
}  # fmt: skip


def _as_edited(lm: LM, scaling: LayerScaling | HeadScaling, edit: Callable[[Any], Any]) -> bool:
    """Whether a scaling does the same as an edit of every layer's attention, and has any effect."""
    with scaling.applied_to(lm.model):
        found = _logits(lm.model)
    edited = copy.deepcopy(lm.model)
    for layer in edited.get_decoder().layers:
        edit(layer.self_attn)
    return _close(found, _logits(edited)) and not _close(found, _logits(lm.model))


def _heads(lm: LM) -> int:
    return int(getattr(lm.model.config.get_text_config(), "num_attention_heads", 4))


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model((torch.arange(40) * 37 % 250)[None], use_cache=False).logits.float()


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())


def _short(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:160]


if __name__ == "__main__":
    main()
