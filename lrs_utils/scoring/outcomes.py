"""The engine: scores a model on a suite under each of many scalings.

A context is read once for all its questions (`packing`), and layers that candidates have in common are computed once
for all of them (`trie`). Greedy exactness needs no decoding: the answer is fed to the model and the arg-max compared at
each step, which by induction is the verdict of greedy decoding.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrs_utils.arguments import instance, whole
from lrs_utils.models.load import LM, load_lm
from lrs_utils.progress import Progress, SilentProgress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.forward import PackedForward, refuse_unscorable
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.trie import CPU_BATCH_TOKENS, Batch, Shared, TokenLimit, TrieWalk, next_batch
from lrs_utils.scoring.window import context_tokens, refuse_beyond_window
from lrs_utils.tasks import Suite

_TASK_CANDIDATES = 4  # of one batch of contexts in a task for an executor: enough tasks for many workers


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
    shared: Shared | None = None,
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
        does. Found automatically: on a GPU from the memory that the first context takes. Where memory runs out
        anyway, the limit is halved and scoring continues.
    shared : Shared, optional
        What earlier calls on the same model left to be shared.
    executor : concurrent.futures.Executor, optional
        Runs the model elsewhere, in tasks of a batch and a few candidates: processes of this machine (started by
        "spawn": torch does not survive a fork), or a cluster's (`Client.get_executor()` of Dask, the extra `cluster`).
        Workers load the model by its name onto a device of the same kind (the first that they see) and compute; only
        this process writes the ledger.

    An outcome depends on the model, the scaling, the context and the question alone, to the last bit, whatever else is
    asked and whatever is known already (`packing.FixedRows`), on one machine with one number of threads.

    Raises
    ------
    ValueError
        A prompt longer than the window after scaling, a wrong number of factors, an answer whose tokens don't follow
        its prompt's.
    """
    if batch_tokens is not None:
        whole("batch_tokens", batch_tokens, least=1)
    if isinstance(scalings, Scaling):
        raise ValueError("scalings is a single scaling; give a list: score(lm, suite, [scaling])")
    instance("lm", lm, LM, "what `load_lm` returns")
    instance("suite", suite, Suite, "a suite: tasks.kv_retrieval(20), say")
    for c, scaling in enumerate(scalings):
        instance(f"scalings[{c}]", scaling, Scaling, "a LayerScaling or a HeadScaling")
        scaling.refuse_misfit(lm.model)
    scoring = _Scoring(lm, suite, scalings, ledger, extrapolate, progress, shared or Shared(max_bytes=0))
    with scoring.bar.shown():
        scoring.bar.advance(scoring.n_found)
        if executor is not None:
            scoring.run_elsewhere(executor, batch_tokens)
        elif scoring.missing.any():
            scoring.run_here(batch_tokens)
    return scoring.collect()


class _Scoring:
    """One call of `score`: what is still missing, and where what is measured goes."""

    def __init__(
        self,
        lm: LM,
        suite: Suite,
        scalings: Sequence[Scaling],
        ledger: Ledger | None,
        extrapolate: bool,
        progress: Progress | None,
        shared: Shared,
    ) -> None:
        self._lm, self._suite, self._scalings, self._ledger = lm, suite, scalings, ledger
        self._extrapolate, self._shared, self._fingerprint = extrapolate, shared, lm.fingerprint
        self._dynamic = any(scaling.stretches_by_length for scaling in scalings)
        shape = (len(scalings), *suite.asked.shape)
        self.missing = np.broadcast_to(suite.asked, shape).copy()
        self._exact, self._nll = np.zeros(shape, bool), np.where(self.missing, 0.0, np.nan)
        if ledger is not None:
            self._look_up(ledger)
        unknown = self.missing.any(axis=2)  # (candidates, contexts)
        self._recomputed, self._n_unknown = int(self.missing.sum()), int(unknown.sum())
        self.n_found, self._layers_run = unknown.size - self._n_unknown, 0
        self.bar = progress or Progress(unknown.size, "scoring")

    def _look_up(self, ledger: Ledger) -> None:
        for c, scaling in enumerate(self._scalings):
            found = ledger.find(self._fingerprint, scaling.key)
            for p, probe in enumerate(self._suite.probes):
                for q, key in enumerate(probe.keys):
                    if key in found:
                        self._exact[c, p, q], self._nll[c, p, q] = found[key]
                        self.missing[c, p, q] = False

    def run_here(self, batch_tokens: int | None) -> None:
        """Measure all that is missing with this process's model."""
        refuse_unscorable(self._lm)
        paths = [scaling.settings for scaling in self._scalings]
        with PackedForward(self._lm, fixed_rows=True) as forward:
            limit = TokenLimit(self._lm.model.device, batch_tokens)
            while self.missing.any():
                batch = self._next_batch(self.missing, limit.tokens)
                if self._dynamic:
                    forward.stretch_for(context_tokens(self._lm, self._suite.probes[batch.contexts[0]]))
                walk = TrieWalk(self._lm, self._fingerprint, batch, paths, forward, self._shared)
                with limit.watched(batch):
                    for c, hits, losses in walk.measure(max(1, limit.tokens // batch.n_tokens)):
                        self._record(batch, c, hits, losses)
                self._layers_run += walk.layers_run

    def run_elsewhere(self, executor: Executor, batch_tokens: int | None) -> None:
        """Have all that is missing measured by an executor's workers, in tasks of a batch and a few candidates."""
        batches, missing = [], self.missing.copy()
        while missing.any():
            batch = self._next_batch(missing, batch_tokens or CPU_BATCH_TOKENS)
            missing[np.ix_(batch.candidates, batch.contexts)] = False
            # neighbours in the trie stay together
            ordered = sorted(batch.candidates, key=lambda c: self._scalings[c].settings)
            parts = (ordered[i : i + _TASK_CANDIDATES] for i in range(0, len(ordered), _TASK_CANDIDATES))
            batches += [replace(batch, candidates=part) for part in parts]
        lm = self._lm
        load = {"name": lm.name, "dtype": str(lm.model.dtype).removeprefix("torch."), "device": lm.model.device.type}
        options = {"extrapolate": self._extrapolate, "batch_tokens": batch_tokens}
        waiting = {}
        for batch in batches:
            suite = replace(self._suite, probes=tuple(batch.probes))
            scalings = [self._scalings[c] for c in batch.candidates]
            task = executor.submit(score_elsewhere, load, self._fingerprint, suite, scalings, options)
            waiting[task] = batch
        try:
            for done in as_completed(waiting):
                batch, (exact, nll, n_layers) = waiting[done], done.result()
                for c, hits, losses in zip(batch.candidates, exact, nll, strict=True):
                    self._record(batch, c, hits, losses)
                self._layers_run += n_layers
        finally:
            for future in waiting:  # after an error; no effect on those that are done
                future.cancel()

    def collect(self) -> Outcomes:
        """What was found and measured."""
        layers_alone = self._n_unknown * self._lm.num_layers
        return Outcomes(self._exact, self._nll, self._suite.depths, self._recomputed, self._layers_run, layers_alone)

    def _next_batch(self, missing: NDArray[np.bool_], tokens: int) -> Batch:
        # frequencies that depend on the length of a context need one that goes alone
        batch = next_batch(self._lm, self._suite, missing, 1 if self._dynamic else tokens, self._shared)
        if not self._extrapolate:
            for c, (p, packed) in product(batch.candidates, zip(batch.contexts, batch.packs, strict=True)):
                where = f"context {p} of {self._suite.name}"
                refuse_beyond_window(self._lm, packed.longest, self._scalings[c], where)
        return batch

    def _record(self, batch: Batch, c: int, hits: NDArray[np.bool_], losses: NDArray[np.float64]) -> None:
        """Keep what a candidate made of a batch, (contexts, questions)."""
        for p, probe, hit, loss in zip(batch.contexts, batch.probes, hits, losses, strict=True):
            if not np.isfinite(loss).all():
                question = probe.questions[int(np.isfinite(loss).argmin())]
                raise FloatingPointError(
                    f"{self._lm.name} gave a non-finite likelihood to the answer at position {question.position} in "
                    f"context {p} of {self._suite.name}, under {self._scalings[c]}; try dtype float32"
                )
            if self._ledger is not None:
                key = self._scalings[c].key
                hit, loss = zip(*self._ledger.record(self._fingerprint, key, probe.keys, hit, loss), strict=True)
            self._exact[c, p, batch.asked], self._nll[c, p, batch.asked] = hit, loss
            self.missing[c, p] = False
            self.bar.advance(1)


def score_elsewhere(
    load: Mapping[str, str],
    fingerprint: str,
    suite: Suite,
    scalings: Sequence[Scaling],
    options: Mapping[str, Any],
) -> tuple[NDArray[np.bool_], NDArray[np.float64], int]:
    """`score` in a worker process, which loads the model once: exact and nll (candidates, contexts, questions)."""
    with _one_at_a_time:  # threads of one process share the model
        lm = _load_once(**load)
        if (own := lm.fingerprint) != fingerprint:
            raise ValueError(
                f"this worker's {lm.name} has fingerprint {own}, the search's {fingerprint}; give all "
                "machines the same weights and tokenizer"
            )
        outcomes = score(lm, suite, scalings, progress=SilentProgress(), **options)
    return outcomes.exact, outcomes.nll, outcomes.layers_run


_one_at_a_time = threading.Lock()


@lru_cache(maxsize=1)
def _load_once(name: str, dtype: str, device: str) -> LM:
    return load_lm(name, dtype=dtype, device=device)
