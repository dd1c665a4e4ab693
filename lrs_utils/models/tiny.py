"""Small models without a download: random ones of two layers for tests, and where the one trained here is stored."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SMALL = "small-rope"
SMALL_FOLDER = Path(__file__).resolve().parent.parent / "data" / "small-rope"

# Random two-layer models, one for each family that the tests compare with transformers.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("llama", {}),
    "tiny-mistral": ("mistral", {"sliding_window": None}),
    "tiny-qwen2": ("qwen2", {}),
    "tiny-qwen3": ("qwen3", {"head_dim": 8}),
    "tiny-olmo2": ("olmo2", {}),
    "tiny-granite": ("granite", {}),
    "tiny-smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "tiny-gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def build_tiny(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of `TINY`, the same whenever it is built."""
    model_type, special = TINY[name]
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    # wide weights, so that attention and next tokens depend visibly on positions
    config = AutoConfig.for_model(model_type, **(sizes | heads | ids | {"initializer_range": 0.3} | special))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.config._name_or_path = name
    return model


def character_tokenizer() -> PreTrainedTokenizerBase:
    """One token a Latin-1 character and <eos> = 256: any tokens decode to text that encodes to them again."""
    tokenizer = Tokenizer(WordLevel({chr(i): i for i in range(256)} | {"<eos>": 256}, unk_token="?"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )
