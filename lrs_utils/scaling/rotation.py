"""Attention that rotates queries and keys itself: for positions that depend on the head or on the distance.

A decoder layer's cos and sin are the same for all its heads and all pairs of tokens. Where they should differ, the
layer is given cos = 1 and sin = 0, which rotate nothing, and an attention function registered with transformers rotates
instead: each head by its own numbers, and once for each region of distances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lrs_utils.models.decode import known_window

ROTATING = "lrs_rotating"  # the attention function's name
_ROWS = 512  # query tokens at once


class Positions(NamedTuple):
    """What a token's position is read as: position / divisor, rounded down if `whole`, plus an offset."""

    divisors: tuple[float, ...] = (1.0,)  # one for all heads, or one for each
    offset: float = 0.0
    whole: bool = False

    def read(self, positions: Tensor) -> Tensor:
        """Positions (tokens,) as they are read, float32 (1 or heads, tokens)."""
        found = positions.float() / torch.tensor(self.divisors, device=positions.device)[:, None]
        return (found.floor() if self.whole else found) + self.offset


class Region(NamedTuple):
    """How queries and keys are read that are at least `since` tokens apart, up to where the next region begins."""

    since: int
    queries: Positions = Positions()
    keys: Positions = Positions()


PLAIN = Region(0)


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates in one forward pass.

    Attributes
    ----------
    regions : tuple of Region
        By growing `since`, the first at 0.
    at : int tensor, shape (tokens,)
        Positions of the tokens that the layer is given.
    tables : callable
        cos and sin, each (1 or heads, tokens, dim), for how positions are read, and the positions.
    """

    regions: tuple[Region, ...]
    at: Tensor
    tables: Callable[[Positions, Tensor], tuple[Tensor, Tensor]]

    @cached_property
    def has_gaps(self) -> bool:
        """Whether the tokens don't follow each other."""
        return not bool((self.at.diff() == 1).all())

    def rotate(self, query: Tensor, key: Tensor, seen: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Since which distance, queries and keys, for each region.

        Parameters
        ----------
        query, key : tensors, shape (batch, heads or key heads, tokens, dim)
            As they are before rotation.
        seen : int tensor, shape (key tokens,)
            Positions of the keys.

        Returns
        -------
        list of (int, query, key)
            If heads differ, keys are repeated for each of them.
        """
        tables = [(self.tables(r.queries, self.at), self.tables(r.keys, seen)) for r in self.regions]
        if any(len(cos) > 1 for pair in tables for cos, _ in pair):
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return [
            (region.since, _rotate(query, *of_queries), _rotate(key, *of_keys))
            for region, (of_queries, of_keys) in zip(self.regions, tables, strict=True)
        ]


def _rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimensions i and i + d / 2 of each token turned together."""
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-second, first], dim=-1) * sin


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | EllipsisType | None = ...,
    lrs_rotation: Rotation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the last tokens, (batch, heads, tokens, dim), to all keys, for a plain forward pass."""
    window = known_window(module, sliding_window, kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    seen = torch.arange(key.shape[2], device=key.device)
    at, parts = seen[-query.shape[2] :], [(0, query, key)]
    if lrs_rotation is not None:
        at = lrs_rotation.at
        seen = seen + (at[-1] + 1 - len(seen))  # a window's cache has the last ones only
        parts = lrs_rotation.rotate(query, key, seen)
    group = query.shape[1] // value.shape[1]
    values = value.repeat_interleave(group, dim=1)
    keys = [k.repeat_interleave(query.shape[1] // k.shape[1], dim=1) for _, _, k in parts]
    out = []
    for first in range(0, len(at), _ROWS):
        rows = slice(first, first + _ROWS)
        distance = at[rows, None] - seen
        logits = scale * parts[0][1][:, :, rows] @ keys[0].mT
        for (since, queries, _), further in zip(parts[1:], keys[1:], strict=True):
            logits = torch.where(distance >= since, scale * queries[:, :, rows] @ further.mT, logits)
        logits = logits.masked_fill((distance < 0) | (distance >= (window or math.inf)), -torch.inf)
        out.append(torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype) @ values)
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ROTATING, _attend)
