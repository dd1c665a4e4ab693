"""A small RoPE model made here, so that reading beyond a window and fine-tuning can be repeated in minutes.

`python -m lrs_utils.training.small` makes it: a tokenizer and a Llama of a million weights, window 256, from
Shakespeare and from small versions of the retrieval tasks, which it is taught (a model of this size would not learn
them otherwise), on documents that grow to the window (on long ones alone it does not learn to look up in this time). It
ships with its losses in lrs_utils/data/small-rope; `load_lm("small-rope")` reads it.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lrs_utils import tasks
from lrs_utils.models.download import cache_folder
from lrs_utils.models.load import LM, load_lm
from lrs_utils.models.tiny import SMALL_FOLDER
from lrs_utils.training.finetune import Documents, Training, cast, stretches, tokens_on_disk, train
from lrs_utils.training.positions import plain

WINDOW = 256
N_TRAINING_TEXTS = 32  # works of Shakespeare; the other ten are for measuring
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": WINDOW, "rope_theta": 10_000.0,
    "tie_word_embeddings": True, "initializer_range": 0.07,
}  # fmt: skip
STAGES = {  # tokens of a document: how it is trained on such documents
    64: Training(steps=2000, batch=48, rate=3e-3, warmup=50, weight_decay=0.1),
    128: Training(steps=2000, batch=24, rate=2e-3, warmup=50, weight_decay=0.1),
    WINDOW: Training(steps=12_000, batch=16, rate=2e-3, warmup=50, weight_decay=0.1),
}


def training_texts() -> list[str]:
    """Texts that the model is trained on."""
    return tasks.long_texts("shakespeare", N_TRAINING_TEXTS)


def measuring_texts() -> list[str]:
    """Texts that the model was not trained on."""
    return tasks.long_texts("shakespeare", 42)[N_TRAINING_TEXTS:]


def retrieval_text(rng: np.random.Generator, n: int, kind: str) -> Iterator[tuple[str, str]]:
    """A context of `n` items and its questions in random order: text that is read, and what is to be predicted."""
    seed = int(rng.integers(2**31))
    if kind == "kv":
        suite = tasks.kv_retrieval(n, 1, seed, keys="short")
    elif kind == "lines":
        suite = tasks.lines_retrieval(n, 1, seed)
    else:
        [suite] = tasks.passkey(n, 1, seed, depths=[float(rng.random())])
    [probe] = suite.probes
    read, end = probe.context, {"kv": '"', "lines": ">", "passkey": "."}[kind]
    for q in rng.permutation(len(probe.questions)):
        question = probe.questions[q]
        yield read + question.prompt + question.answer_prefix, question.answer + end
        read = "\n\n"


def retrieval(tokenizer: PreTrainedTokenizerBase, length: int) -> Documents:
    """Documents of `length` tokens, filled with contexts and their questions; only answers need be predicted."""
    kinds = {"kv": (0.6, 13), "lines": (0.25, 20), "passkey": (0.15, 25)}  # how often, tokens an item
    names, (often, sizes) = [*kinds], zip(*kinds.values(), strict=True)

    def draw_problem(rng: np.random.Generator, n_left: int) -> list[int]:
        kind = int(rng.choice(len(names), p=often))
        n = int(max(1, n_left // sizes[kind]) ** rng.random())  # few as often as many: they teach first
        ids = list[int]()
        for read, predicted in retrieval_text(rng, n, names[kind]):
            parts = tokenizer([read, read + predicted])["input_ids"]
            if len(ids) + len(parts[1]) > n_left:
                break
            ids += [~i for i in parts[0]] + parts[1][len(parts[0]) :]
        return ids

    def draw(rng: np.random.Generator) -> NDArray[np.int64]:
        ids = list[int]()
        for _ in range(8):
            ids += draw_problem(rng, length - len(ids))  # none if it doesn't fit
        return np.array([~tokenizer.eos_token_id] * (length - len(ids)) + ids)

    return lambda n, rng: [draw(rng) for _ in range(n)]


def recalled(tokenizer: PreTrainedTokenizerBase, length: int) -> Documents:
    """Documents of `length` tokens: pairs of keys and values, then keys again and again, whose values are predicted.

    These have far more answers than `retrieval` has, and teach the model to look up.
    """

    def draw(rng: np.random.Generator) -> NDArray[np.int64]:
        n, seed = int((length // 20) ** rng.random()), int(rng.integers(2**31))
        [probe] = tasks.kv_retrieval(n, 1, seed, keys="short").probes
        pairs = re.findall(r'("\w+": ")(\d+")', probe.context)
        read = tokenizer("{" + ",\n ".join(key + value for key, value in pairs))["input_ids"]
        ids = [~i for i in read]
        while len(ids) < length:
            key, value = pairs[rng.integers(len(pairs))]
            before, whole = tokenizer([",\n " + key, ",\n " + key + value])["input_ids"]
            ids += [~i for i in before] + whole[len(before) :]
        return np.array(ids[:length])

    return lambda n, rng: [draw(rng) for _ in range(n)]


def mixed(tokenizer: PreTrainedTokenizerBase, prose: NDArray[np.uint32], length: int) -> Documents:
    """Documents of `length` tokens: one in eight is prose; half of the others teach to look up, half are retrieval.

    If they are too short for the tasks' instructions, there is no retrieval.
    """
    kinds = (stretches(prose, length), retrieval(tokenizer, length), recalled(tokenizer, length))

    def draw(n: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        n_prose = n // 8
        n_asked = (n - n_prose) // 2 if length >= 128 else 0
        counts = (n_prose, n_asked, n - n_prose - n_asked)
        return [document for kind, count in zip(kinds, counts, strict=True) for document in kind(count, rng)]

    return draw


def suites(task: str, length: int, n_contexts: int, seed: int, n_asked: int | None = None) -> list[tasks.Suite]:
    """Retrieval that fills `length` tokens of the small model, questions and answers included.

    Parameters
    ----------
    task : "pairs", "lines" or "pass key"
        "pass key" at five depths, one suite for each.
    n_asked : int, optional
        How many of a context's pairs or lines are asked for, evenly spread; by default all.
    """
    if task == "pass key":
        return tasks.passkey(max(1, (length - 80) // 25), n_contexts, seed)
    if task not in ("pairs", "lines"):
        raise ValueError(f"task is {task!r}; choose pairs, lines or pass key")
    n = (length - 45) // 14 if task == "pairs" else (length - 145) // 21
    positions = None if n_asked is None else np.unique(np.linspace(0, n - 1, n_asked).round().astype(int)).tolist()
    if task == "pairs":
        return [tasks.kv_retrieval(n, n_contexts, seed, keys="short", positions=positions)]
    return [tasks.lines_retrieval(n, n_contexts, seed, positions=positions)]


def make(folder: Path = SMALL_FOLDER, *, share: float = 1.0, **changed: Any) -> LM:
    """Make tokenizer and model and write them with their losses; a killed run resumes.

    Parameters
    ----------
    folder : Path
        Its name is also that of the unfinished training in the cache.
    share : float
        Of the steps of each stage.
    changed
        In place of `SIZES`: `rope_theta=1_000.0`.
    """
    work = cache_folder() / folder.name
    texts = training_texts()
    tokenizer = _train_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(SIZES | changed), bos_token_id=None, eos_token_id=0, pad_token_id=0))
    cast(model, torch.bfloat16)  # `train` keeps float32 weights, and bfloat16 products take half the time
    lm = LM(model, tokenizer, "small-rope")
    prose, losses = tokens_on_disk(lm, texts, work), []
    for length, stage in STAGES.items():
        training = replace(stage, steps=max(1, round(share * stage.steps)))
        about = {"documents": "prose, retrieval, recalled; answers judged", "length": length}
        lm, found = train(lm, mixed(tokenizer, prose, length), plain(length), training, work / str(length), about=about)
        losses += [{"length": length, "step": step, "loss": loss} for step, loss in enumerate(found, 1)]
    folder.mkdir(parents=True, exist_ok=True)
    lm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table = pd.DataFrame(losses)
    table["step"] = (table["step"] - 1) // 20 * 20 + 20
    means = table.groupby(["length", "step"], as_index=False)["loss"].mean()
    means.to_csv(folder / "losses.csv", index=False, float_format="%.4f")
    return load_lm(str(folder), dtype="float32")


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
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
        for n in range(1, 1_000):
            for kind in ("kv", "lines", "passkey"):
                yield from ("".join(parts) for parts in retrieval_text(rng, 1 + n % 10, kind))

    tokenizer.train_from_iterator(examples(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )


if __name__ == "__main__":
    print(make())
