import pytest
import torch

from lrs_utils import load_lm
from lrs_utils.models import EMBEDDED, LM

torch.set_num_threads(min(torch.get_num_threads(), 4))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long first, so that two workers end together; the browser's before all, so that one has them all."""
    items.sort(key=lambda item: ("browser" not in str(item.path), "smoke" not in item.name))


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "smollm3", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request) -> LM:
    """A tiny model of every family that is tested."""
    return load_lm(f"tiny-{request.param}", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny() -> LM:
    return load_lm("tiny-llama", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LM:
    """The real model in float32; `make model` has put it into the cache."""
    return load_lm(EMBEDDED, dtype="float32", device="cpu")
