from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from lrs_utils import HeadScaling, load_lm
from lrs_utils.models.download import cache_folder
from lrs_utils.models.embedded import DEFAULT
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling

torch.set_num_threads(min(torch.get_num_threads(), 4))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long first, so that two workers end together; the browser's before all, so that one has them all."""
    items.sort(key=lambda item: ("browser" not in str(item.path), "smoke" not in item.name))


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "smollm3", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request) -> LM:
    """A tiny model of every family that is tested."""
    return load_lm(f"tiny-{request.param}", dtype="float32", device="cpu")


def fitting(lm: LM, scaling: Scaling) -> Scaling:
    """The same with temperature 1 for the layer of tiny-smollm3 that reads no positions, where another is refused."""
    layers = scaling.layers if isinstance(scaling, HeadScaling) else scaling
    if "smollm3" not in lm.name or layers is None or layers.temperatures is None:
        return scaling
    layers = replace(layers, temperatures=(layers.temperatures[0], 1.0))
    if isinstance(scaling, HeadScaling):
        return HeadScaling(scaling.temperatures, scaling.gains, mlp_gains=scaling.mlp_gains, layers=layers)
    return layers


@pytest.fixture(scope="session")
def tiny() -> LM:
    return load_lm("tiny-llama", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LM:
    """The real model in float32; `make model` has put it into the cache."""
    return load_lm(DEFAULT, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def gemma3() -> LM:
    """The second real model in float32, where `make gemma` has fetched it (CI does)."""
    if not (cache_folder() / "gemma3-270m").exists():
        pytest.skip("gemma3-270m is not in the cache; make gemma fetches it (239 MB)")
    return load_lm("gemma3-270m", dtype="float32", device="cpu")


@pytest.fixture(
    params=[
        {"repetition_penalty": 1.7},
        {"num_beams": 3},
        {"use_cache": False},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1},
        {"suppress_tokens": list(range(200))},
        {"bad_words_ids": [[token] for token in range(200)]},
        {"max_length": 20, "forced_eos_token_id": 7},
        {"min_new_tokens": 3, "exponential_decay_length_penalty": (1, 9.0)},
        {"guidance_scale": 3.0},
    ],
    ids=lambda theirs: next(iter(theirs)),
)
def their_settings(request) -> GenerationConfig:
    """A generation config that ships with some model and would change what it writes."""
    return GenerationConfig(**{"eos_token_id": 256, "pad_token_id": 256} | request.param)
