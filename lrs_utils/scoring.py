"""The engine: what a model makes of a suite under each of many scalings.

A context is read once for all its questions: context and question branches travel in one packed sequence, and a branch
sees the context and itself only. Greedy exactness needs no decoding: the answer is fed to the model and the arg-max
compared at each step, which by induction is the verdict of greedy decoding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from itertools import pairwise, takewhile
from types import EllipsisType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from lrs_utils.ledger import Ledger
from lrs_utils.models import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling import LayerScaling, reachable_decoder
from lrs_utils.tasks import Probe, Suite

_BRANCH_BYTES = 256 * 2**20  # keys and values that one group of branches may copy


@dataclass(frozen=True)
class Outcomes:
    """What was measured, axes always (candidate, context, question).

    Attributes
    ----------
    exact : bool array
        Greedy decoding would emit exactly the answer.
    nll : float array
        Mean negative log-likelihood of the answer's tokens, in nats.
    depths : float array, shape (questions,)
    recomputed : int
        Outcomes that the model was run for; the others were found in the ledger.
    layers_run, layers_alone : int
        Decoder layers computed, and how many it would have been with each candidate on its own.
    """

    exact: NDArray[np.bool_]
    nll: NDArray[np.float64]
    depths: NDArray[np.float64]
    recomputed: int
    layers_run: int = 0
    layers_alone: int = 0


@torch.inference_mode()
def score(
    lm: LM,
    suite: Suite,
    scalings: Sequence[LayerScaling],
    *,
    ledger: Ledger | None = None,
    extrapolate: bool = False,
    progress: Progress | None = None,
) -> Outcomes:
    """Ask a model every question of a suite under each scaling.

    Parameters
    ----------
    scalings : sequence of LayerScaling, length candidates
    ledger : Ledger, optional
        Outcomes found there are not measured again; those measured are written as soon as their context is scored.
    extrapolate : bool
        Allow prompts longer than the window. Otherwise they are refused, never truncated.
    progress : Progress, optional
        Advanced by one for every context of every candidate; without it `score` shows its own.

    Raises
    ------
    ValueError
        A prompt longer than the window after scaling, a wrong number of factors, an answer whose tokens don't follow
        its prompt's.
    """
    shape = (len(scalings), len(suite.probes), len(suite.depths))
    exact, nll = np.zeros(shape, bool), np.full(shape, np.nan)
    recomputed = layers_run = 0
    if ledger is not None:
        for c, scaling in enumerate(scalings):
            found = ledger.find(lm.fingerprint, scaling.key)
            for p, probe in enumerate(suite.probes):
                for q, key in enumerate(probe.keys):
                    if key in found:
                        exact[c, p, q], nll[c, p, q] = found[key]
    missing = np.isnan(nll).any(axis=2)
    with _packed_attention(lm), (progress or Progress(missing.size, "scoring")).entered() as bar:
        bar.advance(int((~missing).sum()))
        for p, probe in enumerate(suite.probes):
            if not missing[:, p].any():
                continue
            where = f"context {p} of {suite.name}"
            groups: dict[tuple[int, ...], list[int]] = {}  # candidates by what they are asked: nearly always everything
            for c in map(int, np.flatnonzero(missing[:, p])):
                groups.setdefault(tuple(map(int, np.flatnonzero(np.isnan(nll[c, p])))), []).append(c)
            for asked, group in groups.items():
                packed = _pack(lm, replace(probe, questions=tuple(probe.questions[q] for q in asked)), where)
                keys = [probe.keys[q] for q in asked]
                group.sort(key=lambda c: scalings[c].layers)
                with _shared_layers(lm, [scalings[c].layers for c in group]) as next_candidate:
                    for c in group:
                        if not extrapolate:
                            _refuse_beyond_window(lm, packed.length, scalings[c], where)
                        layers_run += next_candidate()
                        exact[c, p, asked], nll[c, p, asked] = _forward(lm, packed, scalings[c])
                        recomputed += len(asked)
                        if ledger is not None:
                            standing = ledger.record(
                                lm.fingerprint, scalings[c].key, keys, exact[c, p, asked], nll[c, p, asked]
                            )
                            exact[c, p, asked], nll[c, p, asked] = zip(*standing, strict=True)
                        bar.advance(1)
    return Outcomes(exact, nll, suite.depths, recomputed, layers_run, int(missing.sum()) * lm.num_layers)


@torch.inference_mode()
def generate_answers(
    lm: LM, suite: Suite, scaling: LayerScaling, *, max_new_tokens: int = 100, extrapolate: bool = False
) -> list[list[str]]:
    """Let the model answer freely: greedy text for each question, without answer prefix (the authors' protocol).

    The context is read once; its questions are decoded together from copies of its cache.

    Returns
    -------
    list of list of str, shape (contexts, questions)
    """
    answers = []
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    with scaling.applied_to(lm.model), Progress(len(suite.probes), "answering").entered() as bar:
        for p, probe in enumerate(suite.probes):
            prompts = [lm.tokenizer(probe.context + q.prompt)["input_ids"] for q in probe.questions]
            n_context = _shared_prefix(prompts)
            longest = max(map(len, prompts))
            if not extrapolate:
                _refuse_beyond_window(lm, longest + max_new_tokens, scaling, f"context {p} of {suite.name}")
            # questions of different lengths are padded between context and question, where a mask hides it
            rows = [ids[:n_context] + [pad] * (longest - len(ids)) + ids[n_context:] for ids in prompts]
            masks = [[1] * n_context + [0] * (longest - len(ids)) + [1] * (len(ids) - n_context) for ids in prompts]
            cache = DynamicCache(config=lm.model.config)
            lm.model(
                torch.tensor([rows[0][:n_context]], device=lm.model.device), past_key_values=cache, logits_to_keep=1
            )
            cache.batch_repeat_interleave(len(rows))
            texts = lm.model.generate(  # type: ignore[operator]
                torch.tensor(rows, device=lm.model.device),
                attention_mask=torch.tensor(masks, device=lm.model.device),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # some models ship one, and it would forbid copying
                pad_token_id=pad,
            )
            answers.append(lm.tokenizer.batch_decode(texts[:, longest:], skip_special_tokens=True))
            bar.advance(1)
    return answers


def contains_answer(suite: Suite, answers: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """The authors' key-value metric: the value stands somewhere in the text, in any case; (contexts, questions)."""
    return np.array(
        [
            [question.answer.lower() in text.lower() for question, text in zip(probe.questions, texts, strict=True)]
            for probe, texts in zip(suite.probes, answers, strict=True)
        ]
    )


@dataclass(frozen=True)
class _Packed:
    """A probe as one sequence: the shared context, then a branch per question, each padded to the longest."""

    ids: Tensor  # (1, n_context + n_branches * branch_length)
    positions: Tensor  # like ids: every branch goes on where the context ends
    n_context: int
    n_branches: int
    branch_length: int
    judged: Tensor  # (answer tokens of all questions,): where in the sequence each is predicted
    targets: Tensor  # like judged: the token that should come
    owner: NDArray[np.int64]  # like judged: its question

    @property
    def length(self) -> int:
        """Tokens from the begin of the context to the end of the longest branch."""
        return self.n_context + self.branch_length


def _pack(lm: LM, probe: Probe, where: str) -> _Packed:
    prompts, answers = [], []
    for question in probe.questions:
        text = probe.context + question.prompt + question.answer_prefix
        prompt = lm.tokenizer(text)["input_ids"]
        whole = lm.tokenizer(text + question.answer)["input_ids"]
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                f"the answer {question.answer!r} at position {question.position} in {where} merges with its prompt's "
                "last token; choose an answer_prefix that ends at a token boundary"
            )
        prompts.append(prompt)
        answers.append(whole[len(prompt) :])
    n = _shared_prefix(prompts)
    branches = [prompt[n:] + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, branches))
    ids = prompts[0][:n]
    judged: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for b, (prompt, answer, branch) in enumerate(zip(prompts, answers, branches, strict=True)):
        ids += branch + [0] * (longest - len(branch))  # what follows a branch is seen by no token that is judged
        start = n + b * longest + len(prompt) - n - 1
        judged += range(start, start + len(answer))
        targets += answer
        owner += [b] * len(answer)
    positions = torch.cat([torch.arange(n), torch.arange(n, n + longest).repeat(len(branches))])
    device = lm.model.device
    return _Packed(
        torch.tensor([ids], device=device),
        positions[None].to(device),
        n,
        len(branches),
        longest,
        torch.tensor(judged, device=device),
        torch.tensor(targets, device=device),
        np.array(owner),
    )


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts open with, leaving each at least one of its own."""
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
    return min(same, min(map(len, prompts)) - 1)


def _refuse_beyond_window(lm: LM, length: int, scaling: LayerScaling, where: str) -> None:
    # layer l sees positions up to length / s_l, so the smallest factor decides
    limit = int(lm.window * min(scaling.factors))
    if length > limit:
        raise ValueError(
            f"{where} has {length:,} tokens with question and answer, but {lm.name} reads {limit:,} (window "
            f"{lm.window:,} x smallest factor {min(scaling.factors):g}); use fewer items, or extrapolate=True "
            "to go beyond the window"
        )


def _forward(lm: LM, packed: _Packed, scaling: LayerScaling) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    layout = _layout.set(packed)
    try:
        with scaling.applied_to(lm.model):
            logits = lm.model(
                packed.ids, position_ids=packed.positions, use_cache=False, logits_to_keep=packed.judged
            ).logits[0]
    finally:
        _layout.reset(layout)
    logits = logits.float()
    hit = (logits.argmax(-1) == packed.targets).cpu().numpy()
    loss = F.cross_entropy(logits, packed.targets, reduction="none").double().cpu().numpy()
    # summed on the CPU: a GPU adds in any order, and nll decides between candidates
    n_tokens = np.bincount(packed.owner)
    nll = (np.bincount(packed.owner, loss) / n_tokens).astype(np.float32).astype(float)  # as much as an export keeps
    if not np.isfinite(nll).all():
        raise FloatingPointError(f"{lm.name} gave a non-finite likelihood under {scaling}; try dtype float32")
    return np.bincount(packed.owner, hit) == n_tokens, nll


@contextmanager
def _shared_layers(lm: LM, paths: Sequence[tuple[tuple[float, float], ...]]) -> Iterator[Callable[[], int]]:
    """Let candidates, forwarded in the order of `paths` (sorted), compute their equal first layers once.

    A walk through the trie of candidates, depth first: where a candidate leaves the one before, it starts from the kept
    output of the last layer they share. The model's own forward runs; layers that are shared only hand on what is kept.

    Yields
    ------
    function () -> int
        To be called before each candidate's forward pass; gives the number of layers that will be computed.
    """
    layers = reachable_decoder(lm.model).layers
    agreed = [0] + [
        sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=True))) for a, b in pairwise(paths)
    ]
    kept: dict[int, Any] = {}  # output of a layer, only where a later candidate starts from it
    shared = 0
    turns = iter(agreed)

    def next_candidate() -> int:
        nonlocal shared
        shared = min(next(turns), len(layers))
        return len(layers) - shared

    def sharing(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def recall_or_compute(*args: Any, **kwargs: Any) -> Any:
            if index < shared:
                return kept[shared]
            output = forward(*args, **kwargs)
            if index + 1 in agreed:
                kept[index + 1] = output
            return output

        return recall_or_compute

    before = [vars(layer).get("forward") for layer in layers]  # accelerate puts its own on models spread over devices
    for index, layer in enumerate(layers):
        layer.forward = sharing(index, layer.forward)
    try:
        yield next_candidate
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward  # the instance's; the class's is back
            else:
                layer.forward = forward


_layout: ContextVar[_Packed] = ContextVar("layout")


@contextmanager
def _packed_attention(lm: LM) -> Iterator[None]:
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("lrs_packed")
    if lm.model.config._attn_implementation != "lrs_packed":
        raise ValueError(f"{type(lm.model).__name__} does not run on transformers' attention interface")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | EllipsisType | None = ...,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed probe: query (1, heads, tokens, dim), key and value (1, kv heads, tokens, dim)."""
    for unsupported in ("softcap", "s_aux"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"{type(module).__name__} uses {unsupported}, which packed scoring does not know")
    if isinstance(sliding_window, EllipsisType):  # not handed over: the family has it in its mask, or has none
        if getattr(getattr(module, "config", None), "sliding_window", None) is not None:
            raise ValueError(f"{type(module).__name__} hides its sliding window from packed scoring")
        sliding_window = None
    at = _layout.get()
    n = at.n_context
    head, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    group = head // kv_heads
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    for rows, columns, mask in _context_blocks(n, sliding_window, query.device):
        out[:, :, rows] = F.scaled_dot_product_attention(
            query[:, :, rows],
            key[:, :, columns],
            value[:, :, columns],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=group > 1,
        )
    # Branches as a batch, each against context + own keys. Query heads that share a key head are laid end to end, so
    # keys need no repeating: (branch, kv head, group * length, dim).
    length, count = at.branch_length, at.n_branches
    mask = _branch_mask(n, length, sliding_window, query.device).repeat(group, 1)
    q = query[:, :, n:].view(kv_heads, group, count, length, dim).permute(2, 0, 1, 3, 4)
    q = q.reshape(count, kv_heads, group * length, dim)
    bytes_each = (n + length) * kv_heads * (dim + value.shape[3]) * key.element_size()
    at_once = max(1, _BRANCH_BYTES // bytes_each)
    for first in range(0, count, at_once):
        part = slice(first, min(first + at_once, count))
        own = slice(n + part.start * length, n + part.stop * length)
        k, v = (
            torch.cat(
                [
                    x[:, :, :n].expand(part.stop - part.start, -1, -1, -1),
                    x[0, :, own].view(kv_heads, -1, length, x.shape[3]).transpose(0, 1),
                ],
                dim=2,
            )
            for x in (key, value)
        )
        branch = F.scaled_dot_product_attention(q[part], k, v, attn_mask=mask, scale=scaling)
        branch = branch.view(-1, kv_heads, group, length, value.shape[3]).permute(1, 2, 0, 3, 4)
        out[0, :, own] = branch.reshape(head, -1, value.shape[3])
    return out.transpose(1, 2).contiguous(), None


def _context_blocks(n: int, window: int | None, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows, the columns they may see, and the mask between (None: plain causal) for the context's own attention."""
    if window is None or n <= window:
        yield slice(0, n), slice(0, n), None
        return
    for start in range(0, n, window):  # blocks, so that no mask is larger than window x 2 windows
        rows = torch.arange(start, min(start + window, n), device=device)
        columns = torch.arange(max(0, start - window + 1), int(rows[-1]) + 1, device=device)
        distance = rows[:, None] - columns
        yield (
            slice(start, start + len(rows)),
            slice(int(columns[0]), start + len(rows)),
            (distance >= 0) & (distance < window),
        )


def _branch_mask(n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a branch's token may look, shape (length, n + length): columns are the context, then the branch."""
    distance = n + torch.arange(length, device=device)[:, None] - torch.arange(n + length, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


AttentionInterface.register("lrs_packed", _attend_packed)
