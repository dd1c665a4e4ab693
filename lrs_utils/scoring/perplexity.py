"""Perplexity of long text in sliding windows (Press et al. 2021; the stride of 256 is YaRN's, 2309.00071)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrs_utils.arguments import whole
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.forward import PackedForward, refuse_unscorable
from lrs_utils.scoring.packing import Layout, pack_text


def window_nll(lm: LM, text: str, lengths: Sequence[int], **options: Any) -> NDArray[np.float64]:
    """`token_nll`, averaged over the tokens of a stretch: shape (lengths, windows).

    Perplexity is `np.exp(window_nll(...).mean(axis=1))`.
    """
    nll, _ = token_nll(lm, text, lengths, **options)
    return np.asarray(nll.mean(axis=2))


@torch.inference_mode()
def token_nll(
    lm: LM,
    text: str,
    lengths: Sequence[int],
    *,
    stride: int = 256,
    n_windows: int | None = None,
    first_end: int | None = None,
    scaling: Scaling | None = None,
    extrapolate: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """How well a model predicts stretches of a text from a given number of tokens before them.

    Every length is measured on the same stretches of `stride` tokens, each at the end of a window of that length, so
    that lengths and scalings can be compared token by token.

    Parameters
    ----------
    lengths : sequence of int
        Tokens in a window, the stretch included.
    n_windows : int, optional
        Stretches, spread evenly over the text; by default all, one after the other.
    first_end : int, optional
        Tokens of the text up to the end of the first stretch, by default the longest length: with the same one, calls
        for different lengths measure the same stretches.
    extrapolate : bool
        Allow windows longer than the model's. Otherwise they are refused.

    Returns
    -------
    nll : float array, shape (lengths, windows, stride)
        Negative log-likelihood of each token, in nats.
    ids : int array, shape (windows, longest length)
        The tokens of each window; its stretch is at the end.

    Raises
    ------
    ValueError
        A window beyond the model's, shorter than the stride, or longer than the text or than `first_end`.
    """
    scaling = LayerScaling.identity(lm.num_layers) if scaling is None else scaling
    whole("stride", stride, least=1)
    ids = _tokenize(lm.tokenizer, text)
    limit = lm.window * scaling.reach
    for length in lengths:
        if not stride < length <= len(ids):
            raise ValueError(f"length {length:,} is not between stride + 1 ({stride + 1}) and the text's {len(ids):,}")
        if length > limit and not extrapolate:
            raise ValueError(
                f"length {length:,} is beyond what {lm.name} reads, {int(limit):,} (window {lm.window:,} x "
                f"{scaling.reach:g}); use extrapolate=True to go beyond the window"
            )
    first_end = first_end or max(lengths)
    if not max(lengths) <= first_end <= len(ids):
        raise ValueError(
            f"first_end {first_end:,} is not between {max(lengths):,} (a length) and the text's {len(ids):,}"
        )
    ends = np.arange(first_end, len(ids) + 1, stride)
    if n_windows is not None:
        if not 1 <= n_windows <= len(ends):
            raise ValueError(f"n_windows is {n_windows}; the text has 1 to {len(ends)}")
        ends = ends[np.linspace(0, len(ends) - 1, n_windows).round().astype(int)]
    scaling.refuse_misfit(lm.model)
    refuse_unscorable(lm)
    nll = np.zeros((len(lengths), len(ends), stride))
    settings = scaling.settings
    with (
        PackedForward(lm, scaled=not scaling.is_identity) as forward,
        Progress(len(lengths) * len(ends), "perplexity").shown() as bar,
    ):
        for row, length in enumerate(lengths):
            for column, end in enumerate(ends):
                layout = Layout([pack_text(ids[end - length : end], stride)], lm.model.device)
                hidden = forward.embed(layout)
                for layer, setting in enumerate(settings):
                    hidden = forward.run(layer, hidden, [setting])
                logits = forward.logits(hidden[0, layout.predicted_at]).float()
                nll[row, column] = F.cross_entropy(logits, layout.targets, reduction="none").cpu().numpy()
                bar.advance(1)
    longest = max(lengths)
    return nll, np.stack([ids[end - longest : end].numpy() for end in ends])


@lru_cache(maxsize=16)
def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """A book takes longer to split than a small model to read a window of it."""
    return torch.tensor(tokenizer(text)["input_ids"])
