"""A small RoPE model made here, so that reading beyond a window and fine-tuning can be tried again in minutes.

`python -m lrs_utils.small` makes it: a tokenizer and a Llama of 3 million weights, window 256, from Shakespeare and
from the retrieval tasks in small, which it is taught (a model of this size would not read them otherwise). It ships in
data/small-rope with its losses; `load_lm("small-rope")` reads it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lrs_utils import tasks
from lrs_utils.cream import plain
from lrs_utils.finetune import Documents, Training, stretches, tokens_on_disk, train
from lrs_utils.models import LM, SMALL_FOLDER, cache_folder, fingerprint, load_lm

WINDOW = 256
N_TRAINING_TEXTS = 32  # of Shakespeare's; the other ten are for measuring
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": WINDOW, "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
TRAINING = Training(steps=4000, batch=16, rate=2e-3, warmup=100, weight_decay=0.1)


def measuring_texts() -> list[str]:
    """Texts that the model was not trained on."""
    return tasks.long_texts("shakespeare", 42)[N_TRAINING_TEXTS:]


def retrieval_text(rng: np.random.Generator, room: int) -> str:
    """One context of a retrieval task, of about `room` words, and all its questions with answers, in random order."""
    seed, kind = int(rng.integers(2**31)), rng.integers(3)
    if kind == 0:
        suite = tasks.kv_retrieval(int(rng.integers(2, max(3, room // 5))), 1, seed, keys="short")
    elif kind == 1:
        suite = tasks.lines_retrieval(int(rng.integers(1, max(2, room // 12))), 1, seed)
    else:
        [suite] = tasks.passkey(int(rng.integers(1, max(2, room // 25))), 1, seed, depths=[float(rng.random())])
    [probe] = suite.probes
    asked = (probe.questions[q] for q in rng.permutation(len(probe.questions)))
    ends = '"\n\n' if kind == 0 else ">\n\n" if kind == 1 else "\n\n"
    return probe.context + "".join(f"{q.prompt}{q.answer_prefix}{q.answer}{ends}" for q in asked)


def mixed(tokenizer: PreTrainedTokenizerBase, prose: NDArray[np.uint32], length: int) -> Documents:
    """Documents of `length` tokens: every second one prose, every other retrieval."""
    stretch = stretches(prose, length)

    def draw(n: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        documents = [*stretch(n, rng)]
        for i in range(1, n, 2):
            ids: list[int] = []
            while len(ids) < length:
                ids += tokenizer(retrieval_text(rng, length // 2))["input_ids"]
            documents[i] = np.array(ids[:length])
        return documents

    return draw


def make(folder: Path = SMALL_FOLDER) -> LM:
    """Make tokenizer and model and write them with their losses; a killed run goes on where it was."""
    work = cache_folder() / "small-rope"
    texts = tasks.long_texts("shakespeare", N_TRAINING_TEXTS)
    tokenizer = _tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    start = LM(model, tokenizer, "small-rope", fingerprint(model, tokenizer))
    prose = tokens_on_disk(start, texts, work / "prose.npy")
    about = {"documents": "mixed", "window": WINDOW}
    lm, losses = train(start, mixed(tokenizer, prose, WINDOW), plain(WINDOW), TRAINING, work, about=about)
    folder.mkdir(parents=True, exist_ok=True)
    nn.Module.to(lm.model, torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    every = np.arange(0, len(losses), 20)
    means = [losses[first : first + 20].mean() for first in every]
    pd.DataFrame({"step": every + 20, "loss": means}).to_csv(folder / "losses.csv", index=False, float_format="%.4f")
    return load_lm(str(folder), dtype="float32")


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE of 2,048 tokens, single digits apart, from the training texts and retrieval prompts."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )

    def examples() -> Iterator[str]:
        yield from texts
        rng = np.random.default_rng(0)
        yield from (retrieval_text(rng, 128) for _ in range(2_000))

    tokenizer.train_from_iterator(examples(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )


if __name__ == "__main__":
    print(make())
