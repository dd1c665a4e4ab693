"""What a scaled model writes when it is not asked a question: how it continues plain openings, and how it repeats.

Perplexity doesn't show everything: gains that keep perplexity can still make greedy text loop (CHOICES.md).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, LogitsProcessorList

from lrs_utils.models.decode import decode
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.ledger import Ledger

OPENINGS = (
    "The old lighthouse keeper climbed the stairs every evening, and",
    "To repair a bicycle tyre, you first need to",
    "The meeting began at nine o'clock. The chairman said that",
    "Water boils when its temperature reaches",
    "My grandmother kept a garden behind the house, where she",
    "In the early years of the railway, most people",
    "The main difference between a frog and a toad is",
    "She opened the letter slowly and read the first line:",
)
_NEAR = 3  # preceding tokens: a token that is among them is a near repeat


def continue_freely(
    lm: LM, scaling: Scaling, *, n_tokens: int = 64, n_samples: int = 1, seed: int = 0, ledger: Ledger | None = None
) -> NDArray[np.int64]:
    """Tokens that a model writes after each opening: greedily, then `n_samples` times drawn from its distribution.

    Decoding uses our own settings, whatever the model's generation config says: no penalty, no top-k or top-p, and no
    end-of-text token, so that all continuations have the same length.

    Returns
    -------
    int array, shape (openings, 1 + n_samples, n_tokens)
    """
    asked = keys(seed, n_samples)
    found = {} if ledger is None else ledger.find_texts(lm.fingerprint, scaling.key, n_tokens)
    if not all(key in found for key in asked):
        tokens = _generate(lm, scaling, n_tokens, n_samples, seed).reshape(len(asked), n_tokens)
        texts = [" ".join(map(str, row)) for row in tokens.tolist()]
        if ledger is not None:
            texts = ledger.record_texts(lm.fingerprint, scaling.key, n_tokens, asked, texts)
        found = dict(zip(asked, texts, strict=True))
    rows = [[int(token) for token in found[key].split()] for key in asked]
    return np.array(rows).reshape(len(OPENINGS), 1 + n_samples, n_tokens)


def keys(seed: int = 0, n_samples: int = 1) -> list[str]:
    """The keys of continuations in a ledger, in the order of the openings."""
    return [f"continued {seed} {number} {opening}" for opening in OPENINGS for number in range(1 + n_samples)]


def near_repeats(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of tokens that repeat one of the three before them; shape (..., tokens) -> (...)."""
    back = [tokens[..., _NEAR:] == tokens[..., _NEAR - k : -k] for k in range(1, _NEAR + 1)]
    return np.asarray(np.any(back, axis=0).mean(axis=-1))


def distinct_trigrams(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distinct runs of three tokens, as a share of all such runs; shape (..., tokens) -> (...)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).tolist()
    shares = [len(set(zip(row, row[1:], row[2:], strict=False))) / (len(row) - 2) for row in flat]
    return np.array(shares).reshape(tokens.shape[:-1])


class _Drawn(LogitsProcessor):
    """Greedy decoding with Gumbel noise on the logits draws from the distribution, so all rows go in one batch.

    The first row of each opening gets no noise. Each sample has its own generator, so that it doesn't depend on how
    many samples there are.
    """

    def __init__(self, n_samples: int, seed: int) -> None:
        seeds = [np.random.SeedSequence([seed, number]).generate_state(1)[0] for number in range(n_samples)]
        self._generators = [torch.Generator().manual_seed(int(state)) for state in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float().reshape(-1, 1 + len(self._generators), scores.shape[-1])
        for number, generator in enumerate(self._generators, start=1):
            noise = torch.empty(scores[:, number].shape).exponential_(generator=generator).log_().neg_()
            scores[:, number] += noise.to(scores.device)
        return scores.flatten(0, 1)


@torch.inference_mode()
def _generate(lm: LM, scaling: Scaling, n_tokens: int, n_samples: int, seed: int) -> NDArray[np.int64]:
    prompts: Sequence[list[int]] = [lm.tokenizer(opening)["input_ids"] for opening in OPENINGS]
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad or 0] * (longest - len(p)) + p for p in prompts], device=lm.model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.model.device)
    ids, mask = (values.repeat_interleave(1 + n_samples, dim=0) for values in (ids, mask))
    drawn = LogitsProcessorList([_Drawn(n_samples, seed)])
    with scaling.applied_to(lm.model):
        tokens = decode(lm, ids, mask, n_tokens, to_the_end=True, logits_processor=drawn)
    return np.asarray(tokens.reshape(len(OPENINGS), 1 + n_samples, n_tokens).cpu().numpy())
