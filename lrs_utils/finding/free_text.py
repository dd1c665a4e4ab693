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
    lm: LM,
    scaling: Scaling,
    *,
    openings: Sequence[str] | None = None,
    n_tokens: int = 64,
    seed: int = 0,
    ledger: Ledger | None = None,
) -> NDArray[np.int64]:
    """Tokens that a model writes after each opening: greedily, and drawn from its distribution.

    Decoding uses our own settings, whatever the model's generation config says: no penalty, no top-k or top-p, and no
    end-of-text token, so that all continuations have the same length.

    Parameters
    ----------
    openings : sequence of str, optional
        By default `OPENINGS`.

    Returns
    -------
    int array, shape (openings, 2, n_tokens)
    """
    openings = openings or OPENINGS
    asked = keys(seed, openings)
    found = {} if ledger is None else ledger.find_texts(lm.fingerprint, scaling.key, n_tokens)
    if not all(key in found for key in asked):
        texts = [" ".join(map(str, row)) for row in _generate(lm, scaling, openings, n_tokens, seed).tolist()]
        if ledger is not None:
            texts = ledger.record_texts(lm.fingerprint, scaling.key, n_tokens, asked, texts)
        found = dict(zip(asked, texts, strict=True))
    rows = [[int(token) for token in found[key].split()] for key in asked]
    return np.array(rows).reshape(len(openings), 2, n_tokens)


def keys(seed: int, openings: Sequence[str] | None = None) -> list[str]:
    """The keys of continuations in a ledger, in the order of the openings: of each the greedy one first."""
    return [f"continued {seed} {number} {opening}" for opening in openings or OPENINGS for number in range(2)]


def near_repeats(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of tokens that repeat one of the three before them; shape (..., tokens) -> (...)."""
    back = [tokens[..., _NEAR:] == tokens[..., _NEAR - k : -k] for k in range(1, _NEAR + 1)]
    return np.asarray(np.any(back, axis=0).mean(axis=-1))


def distinct_trigrams(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distinct runs of three tokens, as a share of all such runs; shape (..., tokens) -> (...)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).tolist()
    shares = [len(set(zip(row, row[1:], row[2:], strict=False))) / (len(row) - 2) for row in flat]
    return np.array(shares).reshape(tokens.shape[:-1])


class _GumbelNoise(LogitsProcessor):
    """Noise on the logits of every second row: its greedy decoding draws from the distribution, so that the greedy
    continuation and the drawn one go in one batch."""

    def __init__(self, seed: int) -> None:
        state = np.random.SeedSequence([seed, 0]).generate_state(1)[0]
        self._generator = torch.Generator().manual_seed(int(state))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores[1::2].shape).exponential_(generator=self._generator).log_().neg_()
        scores = scores.float()
        scores[1::2] += noise.to(scores.device)
        return scores


@torch.inference_mode()
def _generate(lm: LM, scaling: Scaling, openings: Sequence[str], n_tokens: int, seed: int) -> NDArray[np.int64]:
    """Tokens of each row, two for each opening; shape (rows, n_tokens)."""
    prompts: Sequence[list[int]] = [lm.tokenizer(opening)["input_ids"] for opening in openings]
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad or 0] * (longest - len(p)) + p for p in prompts], device=lm.model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.model.device)
    ids, mask = (values.repeat_interleave(2, dim=0) for values in (ids, mask))
    noise = LogitsProcessorList([_GumbelNoise(seed)])
    with scaling.applied_to(lm.model):
        tokens = decode(lm, ids, mask, n_tokens, to_the_end=True, logits_processor=noise)
    return np.asarray(tokens.cpu().numpy())
