"""What attention does with a text, by layer and head, measured exactly and without T x T maps.

Entropy and mass of attention by query (the paper hypothesises that early layers aggregate and later ones filter; how it
measures that is not known, CHOICES.md), queries times keys by distance, and how much a head copies. Scaled models are
measured like any other: inside `scaling.applied_to(lm.model)`.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from lrs_utils.models.decode import attending_by, known_window
from lrs_utils.models.load import LM
from lrs_utils.scoring.forward import refuse_unscorable

_CHUNK_BYTES = 128 * 2**20  # of float32 logits of one layer at once, all heads

# Called for every layer in turn: query (heads, tokens, dim) already scaled by 1/sqrt(dim), key (kv heads, tokens, dim),
# both with positions and in float32, and the layer's sliding window.
Watcher = Callable[[Tensor, Tensor, int | None], None]


@dataclass(frozen=True)
class Attention:
    """Where each query of a text looks.

    Attributes
    ----------
    entropy : float array, shape (layers, heads, queries)
        Of the attention weights, in nats: 0 looks at one token, ln n evenly at n.
    mass : float array, shape (layers, heads, queries, parts)
        Attention on each part of the text; sums to 1 over parts.
    """

    entropy: NDArray[np.float32]
    mass: NDArray[np.float32]


def attention(
    lm: LM, ids: Sequence[int], *, edges: Sequence[int] | None = None, queries: int | None = None
) -> Attention:
    """Entropy of every query's attention, and its mass on the parts of a text.

    Parameters
    ----------
    ids : sequence of int, shape (tokens,)
    edges : sequence of int, optional
        Where parts begin, the first at 0; by default the first token, which many heads use as a sink, and ten equal
        parts of the rest.
    queries : int, optional
        Only this many last tokens; by default all.

    Returns
    -------
    Attention
        Axes (layers, heads, queries), all queries or the last ones, in the order of the text.

    Raises
    ------
    ValueError
        A text beyond the model's window, edges out of order, a family whose attention can't be watched.
    """
    n = len(ids)
    if edges is None:
        edges = [0, *np.linspace(1, n, 11)[:-1].round().astype(int).tolist()]
    if edges[0] != 0 or any(a >= b for a, b in zip(edges, [*edges[1:], n], strict=True)):
        raise ValueError(
            f"edges is {list(edges)}; it must begin with 0 and increase up to below {n}, the text's tokens"
        )
    first = 0 if queries is None else n - queries
    if not 0 <= first < n:
        raise ValueError(f"queries is {queries}; the text has 1 to {n}")
    part = torch.bucketize(torch.arange(n), torch.tensor(edges), right=True) - 1
    in_part = F.one_hot(part, len(edges)).float().to(lm.model.device)
    entropies: list[Tensor] = []  # of each layer
    masses: list[Tensor] = []

    def watch(query: Tensor, key: Tensor, window: int | None) -> None:
        heads, kv_heads = len(query), len(key)
        rows = max(1, _CHUNK_BYTES // (4 * heads * n))
        entropy_chunks, mass_chunks = [], []
        for a in range(first, n, rows):
            b = min(a + rows, n)
            grouped = query[:, a:b].reshape(kv_heads, -1, query.shape[2])  # heads that share a key, end to end
            logits = (grouped @ key[:, :b].mT).view(heads, b - a, b)
            # with a finite number, so that weight 0 times log weight is 0
            logits.masked_fill_(~_seen(a, b, window, key.device), torch.finfo(logits.dtype).min)
            logs = logits.log_softmax(-1)
            weights = logs.exp()
            mass_chunks.append((weights @ in_part[:b]).cpu())
            entropy_chunks.append(-logs.mul_(weights).sum(-1).cpu())
        entropies.append(torch.cat(entropy_chunks, dim=1))
        masses.append(torch.cat(mass_chunks, dim=1))

    _watch_attention(lm, ids, watch)
    return Attention(torch.stack(entropies).numpy(), torch.stack(masses).numpy())


def logits_by_distance(lm: LM, ids: Sequence[int]) -> NDArray[np.float32]:
    """Mean attention logit (q.k / sqrt(dim), positions included) at each distance, over the second half's queries.

    Every distance up to half the text has all these queries and as many keys, so that all distances are compared over
    the same queries; the first token, a sink, is never among the keys. All pairs are computed at once by correlation:
    the sum over m of q_m . k_(m-r) for every r is a product in Fourier space.

    Returns
    -------
    float array, shape (layers, heads, tokens // 2)
        The last axis is the distance.
    """
    n, half = len(ids), len(ids) // 2
    found: list[Tensor] = []  # of each layer

    def watch(query: Tensor, key: Tensor, window: int | None) -> None:
        later = query.clone()
        later[:, : n - half] = 0
        q, k = (torch.fft.rfft(x, 2 * n, dim=1) for x in (later, key))
        product = (q.unflatten(0, (len(key), -1)) * k.conj()[:, None]).sum(-1).flatten(0, 1)
        found.append((torch.fft.irfft(product, 2 * n, dim=1)[:, :half] / half).cpu())

    _watch_attention(lm, ids, watch)
    return torch.stack(found).numpy()


def induction_scores(lm: LM, *, n_tokens: int = 256, n_texts: int = 4, seed: int = 0) -> pd.DataFrame:
    """How much each head works as one of the two kinds that copy what followed this token before.

    Olsson et al. 2022 (2209.11895): a previous-token head tells every token what came before it, and a later induction
    head looks for the token that this one came before. Measured on a text of random tokens that comes twice, in the
    second copy: attention to the token just before (previous token), and to the one after the same token in the first
    copy (prefix matching). A score of 1 means always; chance gives about 1 / tokens.

    Returns
    -------
    DataFrame
        Index (layer, head), columns "previous token" and "prefix matching".
    """
    chance = np.random.default_rng(seed)
    special = set(lm.tokenizer.all_special_ids)
    allowed = np.array([token for token in range(len(lm.tokenizer)) if token not in special])
    at = np.arange(n_tokens)
    columns = {"previous token": n_tokens + at - 1, "prefix matching": at + 1}
    scores = []
    for _ in range(n_texts):
        once = chance.choice(allowed, n_tokens, replace=len(allowed) < n_tokens).tolist()
        mass = attention(lm, once * 2, edges=range(2 * n_tokens), queries=n_tokens).mass
        scores.append([mass[:, :, at, column].mean(axis=-1) for column in columns.values()])
    means = np.mean(scores, axis=0)
    index = pd.MultiIndex.from_product([range(n) for n in means.shape[1:]], names=["layer", "head"])
    return pd.DataFrame(means.reshape(2, -1).T, index=index, columns=list(columns))


def _seen(first: int, n: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `n` keys each query from `first` on sees, shape (queries, keys)."""
    distance = torch.arange(first, n, device=device)[:, None] - torch.arange(n, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


_watcher: ContextVar[Watcher] = ContextVar("watcher")


@torch.inference_mode()
def _watch_attention(lm: LM, ids: Sequence[int], watcher: Watcher) -> None:
    """Run the model over a text; every layer's queries and keys go past the watcher."""
    if len(ids) > lm.window:
        raise ValueError(f"the text has {len(ids):,} tokens, but {lm.name} reads {lm.window:,}; use a shorter one")
    refuse_unscorable(lm)
    with attending_by(lm.model, "lrs_watched"):
        token = _watcher.set(watcher)
        try:
            lm.model(torch.tensor([list(ids)], device=lm.model.device), use_cache=False, logits_to_keep=1)
        finally:
            _watcher.reset(token)


def _attend_watched(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | EllipsisType | None = ...,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    window = known_window(module, sliding_window, kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    _watcher.get()(query[0].float() * scale, key[0].float(), window)
    # keys are repeated for the heads that share them: torch would fall back to T x T maps of all heads
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    seen = None if window is None else _seen(0, query.shape[2], window, query.device)
    out = F.scaled_dot_product_attention(query, key, value, seen, is_causal=seen is None, scale=scale)
    return out.transpose(1, 2), None


AttentionInterface.register("lrs_watched", _attend_watched)
