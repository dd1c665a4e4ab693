"""A context with all its questions as one row of tokens, and how `attention` cuts such rows into blocks.

The context comes first, then a branch for each question, without padding. A branch goes on where the context ends and
sees only the context and itself, so the context is read once. Several contexts, and several copies of them for
candidates, may be laid end to end in one row: they don't see each other, and no bit of a result depends on what lies
next to it (`FixedRows`).
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrs_utils.models.load import LM
from lrs_utils.tasks import Probe

# oneDNN, which does a CPU's bfloat16 products, compiles code for every shape, most of a MiB each, and keeps
# 1,024 of them by default, while every context has a different length. A context needs a few dozen.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

# Query rows (tokens x heads that share a key head) in a block of attention: on a CPU few enough that logits over some
# thousand columns stay in the cache; anywhere no more than fit the bytes below.
_BLOCK_ROWS = {"cpu": 768}
_BLOCK_BYTES = 256 * 2**20
# Tokens in a matrix product: fewer are slower, more are mostly padding if little is asked (CHOICES.md).
PRODUCT_ROWS = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Packed:
    """A probe as a row of tokens, on the CPU."""

    ids: Tensor  # (tokens,)
    positions: Tensor  # like ids
    branch: Tensor  # like ids: 0 in the context, 1 and on in the branches; a branch sees the context before it
    predicted_at: Tensor  # (answer tokens of all questions,): where in the row each is predicted
    targets: Tensor  # like predicted_at: the token that should come
    owner: NDArray[np.int64]  # like predicted_at: its question

    @property
    def longest(self) -> int:
        """Tokens from the beginning of the context to the end of the longest branch."""
        return int(self.positions.max()) + 1


def pack(lm: LM, probe: Probe, where: str) -> Packed:
    """Tokenise every question with its context as it would be alone, and merge what they share.

    Raises
    ------
    ValueError
        An answer whose tokens don't follow its prompt's; `where` names the context.
    """
    texts = [probe.context + q.prompt + q.answer_prefix for q in probe.questions]
    texts += [text + q.answer for text, q in zip(texts, probe.questions, strict=True)]
    tokens = lm.tokenizer(texts)["input_ids"]
    prompts, wholes = tokens[: len(probe.questions)], tokens[len(probe.questions) :]
    for question, prompt, whole in zip(probe.questions, prompts, wholes, strict=True):
        if not prompt:
            raise ValueError(
                f"nothing stands before the answer {question.answer!r:.60} at position {question.position} in {where}; "
                "a model needs at least one token to go on from"
            )
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                f"the answer {question.answer!r} at position {question.position} in {where} merges with its prompt's "
                "last token; choose an answer_prefix that ends at a token boundary"
            )
        decoded = lm.tokenizer.decode(whole[len(prompt) :]) if question.prompt else question.answer  # a text goes on
        if lost := {c for c in question.answer if not c.isspace()} - {*decoded}:
            raise ValueError(
                f"the answer {question.answer!r:.60} at position {question.position} in {where} has characters that "
                f"the tokenizer can't encode ({' '.join(sorted(lost))}); choose another answer"
            )
    # the context's own tokens, whatever is asked: their number decides how they are rounded
    ids = lm.tokenizer(probe.context)["input_ids"] or [0]
    positions, branch = list(range(len(ids))), [0] * len(ids)
    context, predicted_at, targets, owner = ids.copy(), list[int](), list[int](), list[int]()
    for q, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        n = shared_prefix([context, prompt])  # its last token may merge with the question's first
        predicted_at += range(len(ids) + len(prompt) - n - 1, len(ids) + len(whole) - n - 1)
        targets += whole[len(prompt) :]
        owner += [q] * (len(whole) - len(prompt))
        ids += whole[n:-1]
        positions += range(n, len(whole) - 1)
        branch += [q + 1] * (len(whole) - 1 - n)
    tensor = torch.tensor
    return Packed(
        tensor(ids), tensor(positions), tensor(branch), tensor(predicted_at), tensor(targets), np.array(owner)
    )


def pack_text(ids: Tensor, n_predicted: int) -> Packed:
    """The tokens of a text, of which the last `n_predicted` are to be predicted, as one answer."""
    positions, owner = torch.arange(len(ids) - 1), np.zeros(n_predicted, np.int64)
    branch, predicted_at = torch.zeros_like(positions), positions[-n_predicted:]
    return Packed(ids[:-1], positions, branch, predicted_at, ids[-n_predicted:], owner)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own."""
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
    return min(same, min(map(len, prompts)) - 1)


@dataclass(frozen=True)
class Block:
    """Query rows that are attended to together: part of a context, or one branch."""

    first: int  # of the context's columns that they see
    seen: int  # end of the columns that they see before their own
    rows: slice  # in the layout; also their own columns
    bias: Tensor  # 0 or -inf, (rows, last columns): nothing is hidden in the columns before
    is_branch: bool  # if so, its own columns don't follow those that it sees before


class Layout:
    """Packed probes laid end to end, in the form that attention needs."""

    def __init__(self, packs: Sequence[Packed], device: torch.device) -> None:
        *starts, self.length = accumulate((len(p.ids) for p in packs), initial=0)
        *owners, _ = accumulate((int(p.owner.max()) + 1 for p in packs), initial=0)  # questions before a probe's own
        self._packs = list(zip(packs, starts, strict=True))
        self.ids = torch.cat([p.ids for p in packs]).to(device)
        self.positions = torch.cat([p.positions for p in packs]).to(device)
        self.targets = torch.cat([p.targets for p in packs]).to(device)
        self.predicted_at = torch.cat([p.predicted_at + start for p, start in self._packs]).to(device)
        self.owner = np.concatenate([p.owner + first for p, first in zip(packs, owners, strict=True)])
        self.contexts = [slice(start, start + int((p.branch == 0).sum())) for p, start in self._packs]
        self._blocks: dict[tuple[Any, ...], list[Block]] = {}
        self._scratch = torch.empty(0)

    def blocks(self, group: int, heads: int, context: bool, window: int | None, like: Tensor) -> list[Block]:
        """Blocks that cover all branches and, if asked, the contexts, for `heads` key heads at once, each with a group
        of query heads. How a context is cut depends only on its own length."""
        key = (group, heads, context, window, like.device, like.dtype)
        if key not in self._blocks:
            self._blocks[key] = [
                block
                for packed, start in self._packs
                for block in _cut(packed, start, group, heads, context, window, like)
            ]
        return self._blocks[key]

    def scratch(self, *shape: int, like: Tensor) -> Tensor:
        """Two tensors of this shape to write to, in memory that is reused, since fresh pages are slow."""
        size = 2 * math.prod(shape)
        if self._scratch.numel() < size or self._scratch.dtype != like.dtype or self._scratch.device != like.device:
            self._scratch = torch.empty(0)  # release the old memory first
            self._scratch = like.new_empty(size)
        return self._scratch[:size].view(2, *shape)


def _cut(
    packed: Packed, start: int, group: int, heads: int, context: bool, window: int | None, like: Tensor
) -> Iterator[Block]:
    """Blocks of a probe that begins at `start` of the layout; `Layout.blocks` has the other arguments."""
    n, *ends = packed.branch.bincount().cumsum(0).tolist()  # of the context and of each branch
    most_bytes = _BLOCK_BYTES // (2 * like.element_size() * n * heads * group)
    most_rows = max(1, min(_BLOCK_ROWS.get(like.device.type, 8192) // group, most_bytes))
    cuts = [*range(0, n, most_rows)] if context else []
    for a, b in pairwise([*cuts, n, *ends]):
        seen = int(packed.positions[a])  # a branch may leave the context before its end
        first = 0 if window is None else max(0, seen - window + 1)
        # without a window only their own columns can be hidden from these rows
        columns = torch.cat([torch.arange(first if window is not None else seen, seen), torch.arange(a, b)])
        distance = packed.positions[a:b, None] - packed.positions[columns]
        visible = (distance >= 0) & (distance < (window or math.inf))
        bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        yield Block(start + first, start + seen, slice(start + a, start + b), bias.to(like), a >= n)


class FixedRows(TorchFunctionMode):
    """While this is entered, a token's numbers are the same to the last bit whatever tokens lie next to it.

    How a matrix product rounds a row depends on how many rows there are, since kernels differ by shape. So every
    projection multiplies `PRODUCT_ROWS` tokens at a time, the last block padded with zeros, and attention
    (`attention`) gets a context or one branch at a time.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return self._project(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _project(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, most = values.reshape(-1, values.shape[-1]), PRODUCT_ROWS.get(values.device.type, 2048)
        out = rows.new_empty(-(-len(rows) // most) * most, len(weight))
        for first in range(0, len(out), most):
            some = rows[first : first + most]
            if len(some) < most:
                some = torch.cat([some, some.new_zeros(most - len(some), some.shape[1])])
            if bias is None:
                torch.mm(some, weight.mT, out=out[first : first + most])
            else:
                torch.addmm(bias, some, weight.mT, out=out[first : first + most])
        return out[: len(rows)].view(*values.shape[:-1], len(weight))
