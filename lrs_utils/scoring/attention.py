"""Attention over packed rows, with a backward pass of its own.

Both passes go through a row block by block. The backward pass computes each block's weights again and adds to the
gradients of the keys and values that the block sees, so nothing of the size of all keys is made for a block: autograd,
through slices of the keys, would write zeros for all keys and add them, once for each block.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import EllipsisType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function
from transformers import AttentionInterface

from lrs_utils.models.decode import known_window
from lrs_utils.scaling.rotation import Rotation
from lrs_utils.scoring.packing import Layout

_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Rows of tokens are copies of `layout` while this is entered."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@wrap_torch_function(lambda _, query, key, value, *__, **___: (query, key, value))  # type: ignore[arg-type]
def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | EllipsisType | None = ...,
    lrs_rotations: Sequence[Rotation | None] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row: query (1, heads, tokens, dim), key and value (1, kv heads, tokens, dim).

    `lrs_rotations` has one for each copy of the layout; its queries and keys are rotated here.

    To a `TorchFunctionMode` (`packing.FixedRows`) this is one function: it isn't asked about the hundreds of calls
    inside.
    """
    window = known_window(module, sliding_window, kwargs)
    settings: tuple[Any, ...] = _layout.get(), window, query.shape[3] ** -0.5 if scaling is None else scaling
    if not any(lrs_rotations):
        return _PackedAttention.apply(query, key, value, *settings), None  # type: ignore[no-untyped-call]
    n = settings[0].length
    copies = zip(*(torch.split(x, n, dim=2) for x in (query, key, value)), lrs_rotations, strict=True)
    return torch.cat([_attend_copy(*copy, *settings) for copy in copies], dim=1), None


def _attend_copy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    layout: Layout,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of one copy of the layout, (1, tokens, heads, dim)."""
    if rotation is None:
        return _PackedAttention.apply(query, key, value, layout, window, scale)  # type: ignore[no-any-return, no-untyped-call]
    (_, query, key), *others = rotation.rotate(query, key, layout.positions)
    value = value.repeat_interleave(key.shape[1] // value.shape[1], dim=1)  # where each head has keys of its own
    if not others:
        return _PackedAttention.apply(query, key, value, layout, window, scale)  # type: ignore[no-any-return, no-untyped-call]
    pieces = _RegionPieces(query, key, value, others, layout, window, scale)
    return pieces.attend(pieces.empty(), contexts=True).flatten(1, 2)[None]


class _Piece(NamedTuple):
    """Query rows of some key heads, which are attended to together."""

    heads: slice  # of the key heads
    rows: slice  # tokens whose queries they are
    bias: Tensor  # as in `packing.Block`
    columns: list[slice]  # tokens that they see: one slice, or the context's and those of a branch


class _Pieces:
    """A row of queries, keys and values, cut into pieces: query heads that share a key head are laid end to end."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None, scale: float
    ) -> None:
        (_, heads, self.tokens, dim), self.kv_heads = query.shape, key.shape[1]
        self.group, self.layout, self.window, self.scale = heads // self.kv_heads, layout, window, scale
        # a power of two multiplies the queries without rounding, which are fewer than the logits; in float16 small ones
        # would lose digits
        exact = math.frexp(scale)[0] == 0.5 and query.dtype != torch.float16
        scaled, self.rest = (query * scale, 1.0) if exact else (query, scale)  # `rest`: what logits lack of the scale
        self.q = scaled.view(self.kv_heads, self.group, self.tokens, dim)
        self.k, self.v = key[0].contiguous(), value[0].contiguous()

    def cut(self, contexts: bool) -> Iterator[_Piece]:
        """Pieces that cover all branches of all copies of the layout and, if asked, the contexts."""
        # for a context on a CPU, one key head at a time: its logits stay in the cache
        whole = [slice(0, self.kv_heads)]
        parts = [slice(h, h + 1) for h in range(self.kv_heads)] if self.q.device.type == "cpu" else whole
        blocks = self.layout.blocks(self.group, parts[0].stop, contexts, self.window, self.q)
        for start in range(0, self.tokens, self.layout.length):
            for block in blocks:
                rows = slice(start + block.rows.start, start + block.rows.stop)
                seen = slice(start + block.first, start + block.seen)
                columns = [seen, rows] if block.is_branch else [slice(seen.start, rows.stop)]
                for heads in whole if block.is_branch else parts:
                    yield _Piece(heads, rows, block.bias, columns)

    def weights(self, piece: _Piece) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The queries, keys and attention weights of a piece, in reused memory, and as much again to write to.

        Shapes (key heads, group * rows, dim), (key heads, columns, dim), and (key heads, group * rows, columns) twice.
        """
        queries, keys = self.q[piece.heads, :, piece.rows].flatten(1, 2), self.seen(self.k, piece)
        logits, weights = self.layout.scratch(*queries.shape[:2], keys.shape[1], like=self.q)
        torch.baddbmm(logits, queries, keys.mT, beta=0, alpha=self.rest, out=logits)
        self.replace_logits(piece, logits)
        n_rows, n_hidden = piece.bias.shape
        # `+=` would copy the sum onto itself
        logits.view(-1, self.group, n_rows, logits.shape[2])[..., -n_hidden:].add_(piece.bias)
        return queries, keys, torch.softmax(logits, -1, out=weights), logits

    def replace_logits(self, piece: _Piece, logits: Tensor) -> None:
        """Write other logits where a piece needs them."""

    def empty(self) -> Tensor:
        """What attention puts out, to be filled: (tokens, key heads, group, dim)."""
        return self.q.new_empty(self.tokens, self.kv_heads, self.group, self.v.shape[2])

    def attend(self, out: Tensor, contexts: bool) -> Tensor:
        """`out` with the rows of all branches, and of the contexts if asked, filled."""
        for piece in self.cut(contexts):
            _, _, weights, _ = self.weights(piece)
            out[piece.rows, piece.heads] = self.by_token(torch.bmm(weights, self.seen(self.v, piece)))
        return out

    def seen(self, of_tokens: Tensor, piece: _Piece) -> Tensor:
        """The keys or values that a piece sees."""
        parts = [of_tokens[piece.heads, columns] for columns in piece.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def by_token(self, rows: Tensor) -> Tensor:
        """(key heads, group * rows, dim) to (rows, key heads, group, dim)."""
        return rows.view(len(rows), self.group, -1, rows.shape[2]).permute(2, 0, 1, 3)


class _RegionPieces(_Pieces):
    """Pieces whose logits between tokens far apart are those of other queries and keys (`rotation.Region`)."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        others: Sequence[tuple[int, Tensor, Tensor]],
        layout: Layout,
        window: int | None,
        scale: float,
    ) -> None:
        super().__init__(query, key, value, layout, window, scale)
        self._others = [(since, _Pieces(q, k, value, layout, window, scale)) for since, q, k in others]

    def replace_logits(self, piece: _Piece, logits: Tensor) -> None:
        at = self.layout.positions
        distance = at[piece.rows, None] - torch.cat([at[columns] for columns in piece.columns])
        by_row = logits.view(-1, *distance.shape)  # in memory, query heads that share a key head follow each other
        for since, other in self._others:
            far = distance >= since
            if bool(far.any()):
                queries, keys = other.q[piece.heads, :, piece.rows].flatten(1, 2), other.seen(other.k, piece)
                further = torch.bmm(queries, keys.mT).mul_(other.rest).view_as(by_row)
                torch.where(far, further, by_row, out=by_row)


class _PackedAttention(torch.autograd.Function):
    """softmax(scale q k^T + bias) v over a packed row, (1, heads, tokens, dim) to (1, tokens, heads, dim)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None, scale: float
    ) -> Tensor:
        """By torch's kernel where that is the faster one, else by pieces."""
        pieces = _Pieces(query, key, value, layout, window, scale)
        # torch's kernel for causal attention is slower in bfloat16 on a CPU (CHOICES.md), and knows no window
        fused = window is None and not (query.device.type == "cpu" and query.dtype == torch.bfloat16)
        out = pieces.empty()
        for start in range(0, pieces.tokens, layout.length) if fused else ():
            for context in layout.contexts:
                at = slice(start + context.start, start + context.stop)
                # keys are repeated for the heads that share them: not all of torch's fast kernels take them shared
                k, v = (x[:, at].repeat_interleave(pieces.group, 0)[None] for x in (pieces.k, pieces.v))
                whole = F.scaled_dot_product_attention(query[:, :, at], k, v, is_causal=True, scale=scale)
                out[at] = whole.view(pieces.kv_heads, pieces.group, -1, value.shape[3]).permute(2, 0, 1, 3)
        pieces.attend(out, contexts=not fused)
        ctx.save_for_backward(query, key, value, out)
        ctx.settings = layout, window, scale
        return out.flatten(1, 2)[None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With weights w and a row's out o: d logits = w (d out . v - d out . o), then products with q and k."""
        query, key, value, out = ctx.saved_tensors
        pieces = _Pieces(query, key, value, *ctx.settings)
        d_out = gradient.view_as(out)
        at_least_float32 = torch.promote_types(out.dtype, torch.float32)
        along = (d_out.to(at_least_float32) * out).sum(-1)  # (tokens, key heads, group)
        d_query, d_key, d_value = torch.empty_like(pieces.q), torch.zeros_like(pieces.k), torch.zeros_like(pieces.v)
        for piece in pieces.cut(contexts=True):
            queries, keys, weights, scratch = pieces.weights(piece)
            d_rows = d_out[piece.rows, piece.heads].permute(1, 2, 0, 3).flatten(1, 2)
            d_logits = torch.bmm(d_rows, pieces.seen(pieces.v, piece).mT, out=scratch)
            d_logits -= along[piece.rows, piece.heads].permute(1, 2, 0).flatten(1, 2)[..., None]
            d_logits *= weights
            d_queries = torch.bmm(d_logits, keys) * pieces.scale
            d_query[piece.heads, :, piece.rows] = d_queries.view(len(d_queries), pieces.group, -1, d_queries.shape[2])
            first = 0
            for columns in piece.columns:
                some = slice(first, first + columns.stop - columns.start)
                # one head at a time: a slice of several heads isn't contiguous, so it would be copied and copied back
                for nth, head in enumerate(range(piece.heads.start, piece.heads.stop)):
                    d_value[head, columns].addmm_(weights[nth, :, some].mT, d_rows[nth])
                    d_key[head, columns].addmm_(d_logits[nth, :, some].mT, queries[nth], alpha=pieces.rest)
                first = some.stop
        return d_query.view_as(query), d_key[None], d_value[None], None, None, None


AttentionInterface.register("lrs_packed", _attend_packed)
