import pytest
import torch

from lrs_utils import load_lm
from lrs_utils.models import EMBEDDED, LM

torch.set_num_threads(min(torch.get_num_threads(), 4))


@pytest.fixture(scope="session")
def tiny() -> LM:
    return load_lm("tiny-llama", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LM:
    """The real model in float32; `make model` has put it into the cache."""
    return load_lm(EMBEDDED, dtype="float32", device="cpu")
