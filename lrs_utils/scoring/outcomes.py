"""The engine: scores a model on a suite under each of many scalings.

A context is read once for all its questions (`packing`), and layers that candidates have in common are computed once
for all of them. Greedy exactness needs no decoding: the answer is fed to the model and the arg-max compared at each
step, which by induction is the verdict of greedy decoding.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from lrs_utils.arguments import instance
from lrs_utils.models.load import LM, attending_by, decode, load_lm
from lrs_utils.progress import Progress
from lrs_utils.scaling.heads import multiplied, products
from lrs_utils.scaling.layers import UNSCALED, PositionTables, Scaling, Setting, reachable_decoder
from lrs_utils.scaling.trial import N_TOKENS, logits, same, some_tokens, tried
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.packing import PRODUCT_ROWS, Layout, Packed, laid_out, pack, rounding_alike, shared_prefix
from lrs_utils.tasks import Probe, Suite

_TASK_CANDIDATES = 4  # candidates with one batch of contexts in a task for an executor: enough tasks for many workers
_CPU_BATCH_TOKENS = 4096  # larger batches gain nothing there; smaller ones are slower if contexts are short
_CACHED_BYTES = 1440 * 2**20  # of keys and values of all answers decoded together; on a GPU half of what is free
_LOGITS_BYTES = {"cpu": 32 * 2**20}  # of logits over the vocabulary at once: what stays in a cache


@dataclass(frozen=True)
class Outcomes:
    """What was measured; axes are always (candidate, context, question).

    Attributes
    ----------
    exact : bool array
        Greedy decoding would emit exactly the answer; False where a context has fewer questions than others.
    nll : float array
        Mean negative log-likelihood of the answer's tokens, in nats; nan where a context has fewer questions.
    depths : float array, shape (questions,), or (contexts, questions) where they differ
        As `Suite.depths`.
    recomputed : int
        Outcomes for which the model was run; the others were found in the ledger.
    layers_run, layers_alone : int
        Decoder layers computed, and how many there would have been with each candidate scored on its own.
    """

    exact: NDArray[np.bool_]
    nll: NDArray[np.float64]
    depths: NDArray[np.float64]
    recomputed: int
    layers_run: int = 0
    layers_alone: int = 0


class Kept:
    """What calls of `score` on one model may share in memory: tokens, and outputs of first layers left unscaled.

    For code that scores the same contexts again and again, as `search` does.

    Parameters
    ----------
    max_bytes : int
        Limit for the layers' outputs; contexts that no longer fit are computed each time. Tokens take about 24 bytes
        each in addition.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self._room = max_bytes
        self._packs: dict[tuple[str, ...], Packed] = {}
        self._outputs: dict[tuple[str, ...], tuple[int, Tensor]] = {}

    def packed(self, lm: LM, probe: Probe, where: str) -> Packed:
        """The probe's tokens."""
        if probe.keys not in self._packs:
            self._packs[probe.keys] = pack(lm, probe, where)
        return self._packs[probe.keys]

    def after(self, contexts: tuple[str, ...], at_most: int) -> tuple[int, Tensor | None]:
        """How many unscaled layers of a batch are already computed, and their output."""
        layers, output = self._outputs.get(contexts, (0, None))
        return (layers, output) if layers <= at_most else (0, None)

    def keep(self, contexts: tuple[str, ...], layers: int, output: Tensor) -> None:
        """Keep the output of a batch's first layers if there is room."""
        _, before = self._outputs.pop(contexts, (0, None))
        self._room += before.nbytes if before is not None else 0
        if output.nbytes <= self._room:
            self._room -= output.nbytes
            self._outputs[contexts] = (layers, output)


@torch.inference_mode()
def score(
    lm: LM,
    suite: Suite,
    scalings: Sequence[Scaling],
    *,
    ledger: Ledger | None = None,
    extrapolate: bool = False,
    progress: Progress | None = None,
    batch_tokens: int | None = None,
    kept: Kept | None = None,
    executor: Executor | None = None,
) -> Outcomes:
    """Ask a model every question of a suite under each scaling.

    Parameters
    ----------
    scalings : sequence of LayerScaling or HeadScaling, length candidates
    ledger : Ledger, optional
        Outcomes found there are not measured again; those measured are written as soon as they are known.
    extrapolate : bool
        Allow prompts longer than the window. Otherwise they are refused, never truncated.
    progress : Progress, optional
        Advanced by one for every context of every candidate; without it `score` shows its own.
    batch_tokens : int, optional
        Tokens, of contexts times candidates, that go through a layer together; one context with its questions always
        does. Found automatically, on a GPU from the memory that the first context takes. If memory still runs
        out, the limit is halved and scoring continues.
    kept : Kept, optional
        What earlier calls on the same model left for sharing.
    executor : concurrent.futures.Executor, optional
        Runs the model elsewhere, in tasks of a batch and a few candidates: processes of this machine (started by
        "spawn": torch does not survive a fork), or a cluster's (`Client.get_executor()` of Dask, the extra `cluster`).
        Workers load the model by its name onto a device of the same kind (the first that they see) and compute; only
        this process writes the ledger.

    An outcome depends only on the model, the scaling, the context and the question, to the last bit, whatever else is
    asked and whatever is known already (`packing.rounding_alike`), on one machine with one number of threads.

    Raises
    ------
    ValueError
        A prompt longer than the window after scaling, a wrong number of factors, an answer whose tokens don't follow
        its prompt's.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; give 1 or more, or None to have it found")
    if isinstance(scalings, Scaling):
        raise ValueError("scalings is a single scaling; give a list: score(lm, suite, [scaling])")
    instance("lm", lm, LM, "what `load_lm` returns")
    instance("suite", suite, Suite, "a suite: tasks.kv_retrieval(20), say")
    for c, scaling in enumerate(scalings):
        instance(f"scalings[{c}]", scaling, Scaling, "a LayerScaling or a HeadScaling")
        scaling.refuse_misfit(lm.model)
    fingerprint = lm.fingerprint
    dynamic = any(scaling.stretches_by_length for scaling in scalings)
    kept = Kept(max_bytes=0) if kept is None else kept
    shape = (len(scalings), *suite.asked.shape)
    missing = np.broadcast_to(suite.asked, shape).copy()
    exact, nll = np.zeros(shape, bool), np.where(missing, 0.0, np.nan)
    if ledger is not None:
        for c, scaling in enumerate(scalings):
            found = ledger.find(fingerprint, scaling.key)
            for p, probe in enumerate(suite.probes):
                for q, key in enumerate(probe.keys):
                    if key in found:
                        exact[c, p, q], nll[c, p, q] = found[key]
                        missing[c, p, q] = False
    recomputed, unknown, layers_run = int(missing.sum()), int(missing.any(axis=2).sum()), 0
    bar = progress or Progress(missing[..., 0].size, "scoring")

    def next_batch(missing: NDArray[np.bool_], tokens: int) -> _Batch:
        # frequencies that depend on the length of a context need it to go alone
        batch = _next_batch(lm, suite, missing, 1 if dynamic else tokens, kept)
        if not extrapolate:
            for c, (p, packed) in product(batch.candidates, zip(batch.contexts, batch.packs, strict=True)):
                refuse_beyond_window(lm, packed.longest, scalings[c], f"context {p} of {suite.name}")
        return batch

    def known(batch: _Batch, c: int, hits: NDArray[np.bool_], losses: NDArray[np.float64]) -> None:
        for p, keys, hit, loss in zip(batch.contexts, batch.keys, hits, losses, strict=True):
            if not np.isfinite(loss).all():
                q = batch.asked[int(np.isfinite(loss).argmin())]
                raise FloatingPointError(
                    f"{lm.name} gave a non-finite likelihood to the answer at position "
                    f"{suite.probes[p].questions[q].position} in context {p} of {suite.name}, under {scalings[c]}; try "
                    "dtype float32"
                )
            if ledger is not None:
                hit, loss = zip(*ledger.record(fingerprint, scalings[c].key, keys, hit, loss), strict=True)
            exact[c, p, batch.asked], nll[c, p, batch.asked] = hit, loss
            missing[c, p] = False
            bar.advance(1)

    with bar.entered():
        bar.advance(missing[..., 0].size - unknown)
        if executor is not None:
            batches, unasked = [], missing.copy()
            while unasked.any():
                batch = next_batch(unasked, batch_tokens or _CPU_BATCH_TOKENS)
                unasked[np.ix_(batch.candidates, batch.contexts)] = False
                # neighbours in the trie stay together
                ordered = sorted(batch.candidates, key=lambda c: scalings[c].settings)
                parts = (ordered[i : i + _TASK_CANDIDATES] for i in range(0, len(ordered), _TASK_CANDIDATES))
                batches += [replace(batch, candidates=part) for part in parts]
            options = {"extrapolate": extrapolate, "batch_tokens": batch_tokens}
            waiting = {
                executor.submit(scored_elsewhere, *_task(lm, fingerprint, suite, scalings, b), options): b
                for b in batches
            }
            try:
                for done in as_completed(waiting):
                    batch, (hits, losses, n_layers) = waiting[done], done.result()
                    for c, *rows in zip(batch.candidates, hits, losses, strict=True):
                        known(batch, c, *rows)
                    layers_run += n_layers
            finally:
                for future in waiting:  # after an error; finished ones are not affected
                    future.cancel()
        elif unknown:
            refuse_unscorable(lm)
            with attending_by(lm, "lrs_packed"), PositionTables(lm.model) as tables, rounding_alike():
                room = _Room(lm.model.device, batch_tokens)
                while missing.any():
                    batch = next_batch(missing, room.tokens)
                    tables.length = context_tokens(lm, suite.probes[batch.contexts[0]]) if dynamic else None
                    walk = _Walk(lm, fingerprint, batch, [scaling.settings for scaling in scalings], tables, kept)
                    with room.watched(batch):
                        for c, *rows in walk.outcomes(max(1, room.tokens // batch.n_tokens)):
                            known(batch, c, *rows)
                    layers_run += walk.layers_run
    return Outcomes(exact, nll, suite.depths, recomputed, layers_run, unknown * lm.num_layers)


def scored_elsewhere(
    load: tuple[str, str, str],
    fingerprint: str,
    suite: Suite,
    scalings: Sequence[Scaling],
    options: Mapping[str, Any],
) -> tuple[NDArray[np.bool_], NDArray[np.float64], int]:
    """`score` in a worker process, which loads the model once: exact and nll (candidates, contexts, questions)."""
    with _one_at_a_time:  # threads of one process share the model
        lm = _loaded(*load)
        if (own := lm.fingerprint) != fingerprint:
            raise ValueError(
                f"this worker's {lm.name} has fingerprint {own}, the search's {fingerprint}; give all "
                "machines the same weights and tokenizer"
            )
        outcomes = score(lm, suite, scalings, progress=Progress(0, ""), **options)
    return outcomes.exact, outcomes.nll, outcomes.layers_run


_one_at_a_time = threading.Lock()


@lru_cache(maxsize=1)
def _loaded(name: str, dtype: str, device: str) -> LM:
    return load_lm(name, dtype=dtype, device=device)


def _task(
    lm: LM, fingerprint: str, suite: Suite, scalings: Sequence[Scaling], batch: "_Batch"
) -> tuple[tuple[str, str, str], str, Suite, list[Scaling]]:
    """What `scored_elsewhere` needs to measure a batch."""
    probes = [
        replace(probe, questions=tuple(probe.questions[q] for q in batch.asked))
        for probe in (suite.probes[p] for p in batch.contexts)
    ]
    load = (lm.name, str(lm.model.dtype).removeprefix("torch."), lm.model.device.type)
    return load, fingerprint, replace(suite, probes=tuple(probes)), [scalings[c] for c in batch.candidates]


@torch.inference_mode()
def generate_answers(
    lm: LM,
    suite: Suite,
    scaling: Scaling,
    *,
    max_new_tokens: int = 100,
    ledger: Ledger | None = None,
    extrapolate: bool = False,
) -> list[list[str]]:
    """Let the model answer freely: greedy text for each question, without answer prefix (the authors' protocol).

    Decoding uses our own settings, whatever the model's generation config says. The context is read once; its
    questions are decoded together from copies of its cache.

    Parameters
    ----------
    ledger : Ledger, optional
        Texts found there are not generated again; those generated are written as soon as they are known.

    Returns
    -------
    list of list of str, shape (contexts, questions)
    """
    answers = []
    with Progress(len(suite.probes), "answering").entered() as bar:
        fingerprint = lm.fingerprint
        found = {} if ledger is None else ledger.find_texts(fingerprint, scaling.key, max_new_tokens)
        for p, probe in enumerate(suite.probes):
            if any(key not in found for key in probe.keys):
                # all questions, known or not: the batch that is decoded together decides the rounding
                prompts = [lm.tokenizer(probe.context + q.prompt)["input_ids"] for q in probe.questions]
                if not extrapolate:
                    longest = max(map(len, prompts)) + max_new_tokens
                    refuse_beyond_window(lm, longest, scaling, f"context {p} of {suite.name}")
                length = context_tokens(lm, probe) if scaling.stretches_by_length else None
                with scaling.applied_to(lm.model, length=length):
                    texts = _decoded_together(lm, prompts, max_new_tokens)
                if ledger is not None:
                    texts = ledger.record_texts(fingerprint, scaling.key, max_new_tokens, probe.keys, texts)
                found |= zip(probe.keys, texts, strict=True)
            answers.append([found[key] for key in probe.keys])
            bar.advance(1)
    return answers


def _decoded_together(lm: LM, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy text after each of some prompts with the same beginning; what they share is read once."""
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    n_context, longest = shared_prefix(prompts), max(map(len, prompts))
    device = lm.model.device
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CACHED_BYTES
    read = DynamicCache(config=lm.model.config)
    shared = torch.tensor([prompts[0][:n_context]], device=device)
    lm.model(shared, past_key_values=read, logits_to_keep=1)
    kept = [tensor for layer in read.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
    bytes_a_token = sum(tensor.nbytes for tensor in kept) / n_context
    at_once = max(1, int(room / (bytes_a_token * (longest + max_new_tokens))))
    texts: list[str] = []
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        # questions of different lengths are padded between context and question, where a mask hides it
        rows = [ids[:n_context] + [pad] * (longest - len(ids)) + ids[n_context:] for ids in some]
        masks = [[1] * n_context + [0] * (longest - len(ids)) + [1] * (len(ids) - n_context) for ids in some]
        cache = copy.deepcopy(read) if first + at_once < len(prompts) else read
        cache.batch_repeat_interleave(len(rows))
        ids, mask = (torch.tensor(x, device=device) for x in (rows, masks))
        tokens = decode(lm, ids, mask, max_new_tokens, past_key_values=cache)
        texts += lm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


@dataclass(frozen=True)
class _Batch:
    """Batches to score together: contexts that lack the same answers to the same questions of the same candidates."""

    contexts: list[int]
    candidates: list[int]
    asked: list[int]
    packs: list[Packed]
    keys: list[tuple[str, ...]]  # of the asked questions of each context

    @property
    def n_tokens(self) -> int:
        return sum(len(packed.ids) for packed in self.packs)


def _next_batch(lm: LM, suite: Suite, missing: NDArray[np.bool_], room: int, kept: Kept) -> _Batch:
    """The first context that lacks anything, and further ones like it, as many as there is room for."""
    first = int(missing.any(axis=(0, 2)).argmax())
    asked = missing[missing[:, first].any(axis=1).argmax(), first]
    alike = (missing == asked).all(axis=2)  # (candidates, contexts): nearly always all that lack anything
    candidates, questions = np.flatnonzero(alike[:, first]).tolist(), np.flatnonzero(asked).tolist()
    batch = _Batch([], candidates, questions, [], [])
    for p in np.flatnonzero((alike == alike[:, [first]]).all(axis=0)).tolist():
        probe = replace(suite.probes[p], questions=tuple(suite.probes[p].questions[q] for q in questions))
        packed = kept.packed(lm, probe, f"context {p} of {suite.name}")
        if batch.packs and batch.n_tokens + len(packed.ids) > room:
            break
        batch.contexts.append(p)
        batch.packs.append(packed)
        batch.keys.append(probe.keys)
    return batch


def context_tokens(lm: LM, probe: Probe) -> int:
    """The length that "dynamic_ntk" stretches for: the context, whatever is asked about it, so that an outcome doesn't
    depend on which other questions are asked. A text that is continued, without a question, is read to its end."""
    [first, *others] = probe.questions
    continued = "" if first.prompt or others else first.answer
    return len(lm.tokenizer(probe.context + continued)["input_ids"])


def refuse_beyond_window(lm: LM, length: int, scaling: Scaling, where: str) -> None:
    """Raise the ValueError of a prompt that is longer than the window after scaling."""
    # layer l sees positions up to length / s_l, so the smallest factor decides
    limit = lm.window * scaling.reach
    if length > limit:
        raise ValueError(
            f"{where} has {length:,} tokens with question and answer, but {lm.name} reads {int(limit):,} (window "
            f"{lm.window:,} x {scaling.reach:g}); use fewer items, or extrapolate=True "
            "to go beyond the window"
        )


class _Room:
    """How many tokens may go through a layer together."""

    def __init__(self, device: torch.device, tokens: int | None) -> None:
        self._device = device
        self._measured = device.type != "cuda" or tokens is not None
        self.tokens = tokens or (0 if device.type == "cuda" else _CPU_BATCH_TOKENS)

    @contextmanager
    def watched(self, batch: _Batch) -> Iterator[None]:
        """Learn from a batch how much memory the first one takes, and what did not fit."""
        if not self._measured:
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        together = batch.n_tokens * max(1, min(self.tokens // batch.n_tokens, len(batch.candidates)))
        try:
            yield
        except torch.OutOfMemoryError as error:
            if together == len(batch.packs[0].ids):
                error.add_note(
                    f"a context takes {together:,} tokens with its {len(batch.asked)} questions; ask it at fewer "
                    "positions, or use a device with more memory"
                )
                raise
            self.tokens, self._measured = together // 2, True
            return
        if not self._measured:
            # the most that these tokens took, waiting branches of the walk included; some is left for fragmentation
            each = (torch.cuda.max_memory_allocated(self._device) - before) / batch.n_tokens
            reserved = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            free = torch.cuda.mem_get_info(self._device)[0] + reserved
            self.tokens, self._measured = int(0.7 * free / each), True


class _Walk:
    """The trie of candidates over one batch of contexts, walked depth first.

    The model's own forward embeds the tokens and judges the output of the last layer. In between, its layers are called
    from here, once for every branch of the trie, up to `width` branches at a time, laid end to end.
    """

    def __init__(
        self,
        lm: LM,
        fingerprint: str,
        batch: _Batch,
        paths: Sequence[tuple[Setting, ...]],
        tables: PositionTables,
        kept: Kept,
    ) -> None:
        self._lm, self._batch, self._paths, self._tables, self._kept = lm, batch, paths, tables, kept
        self._fingerprint = fingerprint
        self._layers = reachable_decoder(lm.model).layers
        self._layout = Layout(batch.packs, lm.model.device)
        self._given: list[dict[str, Any]] = []
        self.layers_run = 0

    def outcomes(self, width: int) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.float64]]]:
        """Each candidate with its verdicts and nll, shape (contexts, questions), in the order of the walk."""
        group = sorted(self._batch.candidates, key=self._paths.__getitem__)
        unscaled = [all(self._paths[c][layer] == UNSCALED for c in group) for layer in range(len(self._layers))]
        contexts = sum(self._batch.keys, (self._fingerprint,))
        n_first = [*unscaled, False].index(False)
        depth, hidden = self._kept.after(contexts, n_first)
        embedded, self._given = entered(self._lm, self._layout)
        hidden = embedded if hidden is None else hidden
        for layer in range(depth, n_first):
            hidden = self._layer(layer, hidden, [(0, UNSCALED)])
        if depth < n_first:
            self._kept.keep(contexts, n_first, hidden)
        yield from self._descend(n_first, hidden, [group], width)

    def _descend(
        self, layer: int, hidden: Tensor, groups: list[list[int]], width: int
    ) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.float64]]]:
        """From the input of a layer, a copy of the batch for each group of candidates that agree so far."""
        while layer < len(self._layers):
            children = [
                (copy, setting, list(members))
                for copy, group in enumerate(groups)
                for setting, members in groupby(group, key=lambda c: self._paths[c][layer])
            ]
            for first in range(0, len(children), width):
                some = children[first : first + width]
                output = self._layer(layer, hidden, [(copy, setting) for copy, setting, _ in some])
                groups = [members for *_, members in some]
                if len(children) > width:
                    yield from self._descend(layer + 1, output, groups, width)
            if len(children) > width:
                return
            layer, hidden = layer + 1, output
        for group, *rows in zip(groups, *self._judged(hidden), strict=True):
            for c in group:
                yield c, *rows

    def _layer(self, index: int, hidden: Tensor, children: list[tuple[int, Setting]]) -> Tensor:
        """One layer over the copies that `children` name, each with its setting."""
        given, n = self._given[index], self._layout.length
        if [copy for copy, _ in children] != list(range(hidden.shape[1] // n)):
            hidden = hidden.view(-1, n, hidden.shape[2])[[copy for copy, _ in children]].view(1, -1, hidden.shape[2])
        tables = [self._tables(given.get("position_embeddings"), setting) for _, setting in children]
        if len(children) > 1:
            given = {
                name: value.repeat(1, len(children)) if isinstance(value, Tensor) and value.shape == (1, n) else value
                for name, value in given.items()
            }
            tables = [tuple(torch.cat(part, dim=1) for part in zip(*tables, strict=True))]  # type: ignore[list-item]
        self.layers_run += len(children) * len(self._batch.packs)
        layer, numbers = self._layers[index], products([setting for _, setting in children], n, self._lm.model)
        with laid_out(self._layout), multiplied(layer, *numbers):
            return _only_hidden(layer, layer(hidden, **given | {"position_embeddings": tables[0]}))

    def _judged(self, hidden: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Verdicts and nll, (copies, contexts, questions), by the model's own last norm and head."""
        at = self._layout.judged.to(hidden.device)
        states = hidden.view(-1, self._layout.length, hidden.shape[2])[:, at].flatten(0, 1)
        targets = self._layout.targets.repeat(hidden.shape[1] // self._layout.length)
        vocabulary = self._lm.model.config.get_text_config().vocab_size
        rows = PRODUCT_ROWS.get(hidden.device.type, 2048)
        at_once = max(1, _LOGITS_BYTES.get(hidden.device.type, 2**30) // (4 * vocabulary * rows)) * rows
        hits, losses = [], []
        for some, wanted in zip(*(torch.split(x, at_once) for x in (states, targets)), strict=True):
            logits = judged(self._lm, some)
            hits.append(logits.argmax(-1) == wanted)
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hit, loss = (torch.cat(parts).double().cpu().numpy() for parts in (hits, losses))
        # summed on the CPU: a GPU adds in no fixed order, and nll decides between candidates
        shape = (-1, len(self._batch.packs), len(self._batch.asked))
        owner = self._layout.owner
        owner = np.add.outer(np.arange(len(targets) // len(owner)) * shape[1] * shape[2], owner).ravel()
        n_tokens = np.bincount(owner)
        nll = (np.bincount(owner, loss) / n_tokens).astype(np.float32).astype(float)  # as much as an export keeps
        return (np.bincount(owner, hit) == n_tokens).reshape(shape), nll.reshape(shape)


def refuse_unscorable(lm: LM) -> None:
    """Raise the ValueError that names a family whose packed rows differ from its plain forward pass."""
    if not tried(lm.model, "score", lambda: _packed_as_plain(lm), True):
        raise ValueError(
            f"{type(lm.model).__name__} can't be scored: tried on a few tokens, a context packed with two questions "
            "gives other logits than the model's own forward pass; its attention does more than causal softmax"
        )


def _packed_as_plain(lm: LM) -> bool:
    ids, n, context = some_tokens(lm.model, N_TOKENS + 3), N_TOKENS, N_TOKENS - 3
    texts = ids[:n], torch.cat([ids[:context], ids[n:]])  # a context of five tokens and two branches of three
    plain = [logits(lm.model, text, torch.arange(n)) for text in texts]
    positions = torch.cat([torch.arange(n), torch.arange(context, n)])
    branch = torch.tensor([0] * context + [1] * 3 + [2] * 3)
    packed = Packed(ids, positions, branch, torch.arange(len(ids)), ids, np.zeros(len(ids), np.int64))
    layout = Layout([packed], lm.model.device)
    with attending_by(lm, "lrs_packed"), rounding_alike(), laid_out(layout):
        hidden, given = entered(lm, layout)
        # not by a call, whose hooks would scale again what `entered` noted after scaling
        for layer, options in zip(reachable_decoder(lm.model).layers, given, strict=True):
            hidden = _only_hidden(layer, layer.forward(hidden, **options))
        found = judged(lm, hidden[0])
    wanted = torch.cat([plain[0], plain[1][context:]])
    return same(found, wanted, wanted.roll(1, 0))


def _only_hidden(layer: nn.Module, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"{type(layer).__name__} gives more than a tensor, which `score` would lose")
    return output


def entered(lm: LM, layout: Layout) -> tuple[Tensor, list[dict[str, Any]]]:
    """The first layer's input for a row of tokens, and what the model gives each layer besides its input.

    From the model's own forward, with layers that only take notes.
    """

    def note(hidden: Tensor, *more: Any, **given: Any) -> Tensor:
        if more:
            raise ValueError("its layers are given more than their input by place, which is not known here")
        inputs.append(hidden)
        notes.append(given)
        return hidden

    inputs: list[Tensor] = []
    notes: list[dict[str, Any]] = []
    with _layers_replaced(reachable_decoder(lm.model).layers, note):
        # its hooks stay out: a gradient computes some things twice, in another thread, which would wait for this one
        lm.model.forward(layout.ids[None], position_ids=layout.positions[None], use_cache=False, logits_to_keep=1)
    return inputs[0], notes


def judged(lm: LM, states: Tensor) -> Tensor:
    """Logits (states, vocabulary) for outputs of the last layer (states, hidden), by the model's own norm and head."""
    with _layers_replaced(reachable_decoder(lm.model).layers, lambda *_, **__: states[None]):
        tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return lm.model.forward(tokens, use_cache=False).logits[0].float()  # type: ignore[no-any-return]


@contextmanager
def _layers_replaced(layers: nn.ModuleList, stand_in: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model's forward call `stand_in` for every layer."""
    before = [vars(layer).get("forward") for layer in layers]  # accelerate puts its own on models spread over devices
    for layer in layers:
        layer.forward = stand_in
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward  # the instance's; the class's is back
            else:
                layer.forward = forward
