"""The trie of candidates: layers that candidates have in common are computed once for all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lrs_utils.models.load import LM
from lrs_utils.scaling.base import UNSCALED, Setting
from lrs_utils.scoring.forward import PackedForward
from lrs_utils.scoring.packing import PRODUCT_ROWS, Layout, Packed, pack
from lrs_utils.tasks import Probe, Suite

CPU_BATCH_TOKENS = 4096  # larger batches gain nothing there, smaller ones lose where contexts are short
_LOGITS_BYTES = {"cpu": 32 * 2**20}  # of logits over the vocabulary at once
_JUDGED_BYTES = {"cpu": 4 * 2**20}  # of those in float32 at once: what stays in a cache


class Shared:
    """What calls of `score` on one model may share, in memory: tokens, and outputs of first layers left unscaled.

    For callers that score the same contexts again and again, as `search` does.

    Parameters
    ----------
    max_bytes : int
        Limit for the layers' outputs; contexts that no longer fit are computed each time. Tokens, about 24 bytes each,
        come on top.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self._bytes_left = max_bytes
        self._packs: dict[tuple[str, ...], Packed] = {}
        self._outputs: dict[tuple[str, ...], tuple[int, Tensor]] = {}

    def pack(self, lm: LM, probe: Probe, where: str) -> Packed:
        """The probe's tokens, as `packing.pack` makes them."""
        if probe.keys not in self._packs:
            self._packs[probe.keys] = pack(lm, probe, where)
        return self._packs[probe.keys]

    def find_output(self, contexts: tuple[str, ...], at_most: int) -> tuple[int, Tensor | None]:
        """Through how many unscaled layers, at most `at_most`, a batch has gone before, and their output."""
        layers, output = self._outputs.get(contexts, (0, None))
        return (layers, output) if layers <= at_most else (0, None)

    def keep_output(self, contexts: tuple[str, ...], layers: int, output: Tensor) -> None:
        """Keep the output of a batch's first layers if there is room."""
        _, before = self._outputs.pop(contexts, (0, None))
        self._bytes_left += before.nbytes if before is not None else 0
        if output.nbytes <= self._bytes_left:
            self._bytes_left -= output.nbytes
            self._outputs[contexts] = (layers, output)


@dataclass(frozen=True)
class Batch:
    """What is scored together: contexts that lack the same answers to the same questions of the same candidates."""

    contexts: list[int]
    candidates: list[int]
    asked: list[int]
    probes: list[Probe]  # each context with the questions that are asked
    packs: list[Packed]

    @property
    def n_tokens(self) -> int:
        return sum(len(packed.ids) for packed in self.packs)


def next_batch(lm: LM, suite: Suite, missing: NDArray[np.bool_], room: int, shared: Shared) -> Batch:
    """The first context that lacks anything, and more like it while there is room."""
    first = int(missing.any(axis=(0, 2)).argmax())
    asked = missing[missing[:, first].any(axis=1).argmax(), first]
    alike = (missing == asked).all(axis=2)  # (candidates, contexts): nearly always all that lack anything
    candidates, questions = np.flatnonzero(alike[:, first]).tolist(), np.flatnonzero(asked).tolist()
    batch = Batch([], candidates, questions, [], [])
    for p in np.flatnonzero((alike == alike[:, [first]]).all(axis=0)).tolist():
        probe = replace(suite.probes[p], questions=tuple(suite.probes[p].questions[q] for q in questions))
        packed = shared.pack(lm, probe, f"context {p} of {suite.name}")
        if batch.packs and batch.n_tokens + len(packed.ids) > room:
            break
        batch.contexts.append(p)
        batch.probes.append(probe)
        batch.packs.append(packed)
    return batch


class TokenLimit:
    """How many tokens may go through a layer together."""

    def __init__(self, device: torch.device, tokens: int | None) -> None:
        self._device = device
        self._measured = device.type != "cuda" or tokens is not None
        self.tokens = tokens or (0 if device.type == "cuda" else CPU_BATCH_TOKENS)

    @contextmanager
    def watched(self, batch: Batch) -> Iterator[None]:
        """Learn from a batch: the memory that the first one takes, and what did not fit."""
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
            # what these tokens took at most, branches waiting in the walk included; some is left for fragmentation
            each = (torch.cuda.max_memory_allocated(self._device) - before) / batch.n_tokens
            reserved = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            free = torch.cuda.mem_get_info(self._device)[0] + reserved
            self.tokens, self._measured = int(0.7 * free / each), True


class TrieWalk:
    """The trie of candidates over one batch of contexts, walked depth first.

    The model's own forward embeds the tokens and judges what the last layer puts out; in between its layers are called
    from here, once for every branch of the trie, for several branches laid end to end.
    """

    def __init__(
        self,
        lm: LM,
        fingerprint: str,
        batch: Batch,
        paths: Sequence[tuple[Setting, ...]],
        forward: PackedForward,
        shared: Shared,
    ) -> None:
        self._lm, self._batch, self._paths, self._forward, self._shared = lm, batch, paths, forward, shared
        self._fingerprint = fingerprint
        self._layout = Layout(batch.packs, lm.model.device)
        self.layers_run = 0

    def measure(self, width: int) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.float64]]]:
        """Each candidate with its verdicts and nll, shape (contexts, questions), in the order of the walk."""
        group = sorted(self._batch.candidates, key=self._paths.__getitem__)
        unscaled = [all(self._paths[c][layer] == UNSCALED for c in group) for layer in range(self._lm.num_layers)]
        contexts = (self._fingerprint, *(key for probe in self._batch.probes for key in probe.keys))
        n_first = [*unscaled, False].index(False)
        depth, kept = self._shared.find_output(contexts, n_first)
        embedded = self._forward.embed(self._layout)  # in any case: it notes what the layers are given
        hidden = embedded if kept is None else kept
        for layer in range(depth, n_first):
            hidden = self._run_layer(layer, hidden, [(0, UNSCALED)])
        if depth < n_first:
            self._shared.keep_output(contexts, n_first, hidden)
        yield from self._descend(n_first, hidden, [group], width)

    def _descend(
        self, layer: int, hidden: Tensor, groups: list[list[int]], width: int
    ) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.float64]]]:
        """From the input of a layer, a copy of the batch for each group of candidates that agree so far.

        A loop as long as all branches go on together, so that no layer's input is kept longer than needed; it calls
        itself only where there are more branches than `width`.
        """
        while layer < self._lm.num_layers:
            children = [
                (copy, setting, list(members))
                for copy, group in enumerate(groups)
                for setting, members in groupby(group, key=lambda c: self._paths[c][layer])
            ]
            for first in range(0, len(children), width):
                some = children[first : first + width]
                output = self._run_layer(layer, hidden, [(copy, setting) for copy, setting, _ in some])
                groups = [members for *_, members in some]
                if len(children) > width:
                    yield from self._descend(layer + 1, output, groups, width)
            if len(children) > width:
                return
            layer, hidden = layer + 1, output
        for group, *rows in zip(groups, *self._judge(hidden), strict=True):
            for c in group:
                yield c, *rows

    def _run_layer(self, index: int, hidden: Tensor, children: list[tuple[int, Setting]]) -> Tensor:
        """One layer over the copies that `children` name, each with its setting."""
        n = self._layout.length
        if [copy for copy, _ in children] != list(range(hidden.shape[1] // n)):
            hidden = hidden.view(-1, n, hidden.shape[2])[[copy for copy, _ in children]].view(1, -1, hidden.shape[2])
        self.layers_run += len(children) * len(self._batch.packs)
        return self._forward.run(index, hidden, [setting for _, setting in children])

    def _judge(self, hidden: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Verdicts and nll, (copies, contexts, questions), by the model's own last norm and head."""
        at = self._layout.predicted_at.to(hidden.device)
        states = hidden.view(-1, self._layout.length, hidden.shape[2])[:, at].flatten(0, 1)
        targets = self._layout.targets.repeat(hidden.shape[1] // self._layout.length)
        of_token = 4 * self._lm.model.config.get_text_config().vocab_size
        rows = PRODUCT_ROWS.get(hidden.device.type, 2048)
        at_once = max(1, _LOGITS_BYTES.get(hidden.device.type, 2**30) // (of_token * rows)) * rows
        few = max(1, _JUDGED_BYTES.get(hidden.device.type, 2**30) // of_token)
        hits, losses = [], []
        for some, wanted in zip(*(torch.split(x, at_once) for x in (states, targets)), strict=True):
            for part, tokens in zip(*(torch.split(x, few) for x in (self._forward.logits(some), wanted)), strict=True):
                logits = part.float()
                hits.append(logits.argmax(-1) == tokens)
                losses.append(F.cross_entropy(logits, tokens, reduction="none"))
        hit, loss = (torch.cat(parts).double().cpu().numpy() for parts in (hits, losses))
        # summed on the CPU: a GPU adds in any order, and nll decides between candidates
        shape = (-1, len(self._batch.packs), len(self._batch.asked))
        copies = np.arange(hidden.shape[1] // self._layout.length)
        owner = np.add.outer(copies * shape[1] * shape[2], self._layout.owner).ravel()  # numbered on, copy after copy
        n_tokens = np.bincount(owner)
        nll = (np.bincount(owner, loss) / n_tokens).astype(np.float32).astype(float)  # as much as an export keeps
        return (np.bincount(owner, hit) == n_tokens).reshape(shape), nll.reshape(shape)
