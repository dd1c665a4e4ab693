"""The thread behind the playground: what is measured next, how a measurement is cancelled, what came of it."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from lrs_utils.models.load import LM
from lrs_utils.models.turns import used_alone
from lrs_utils.playground.measured import MeasuredScaling, read_measured
from lrs_utils.playground.prediction import Surrogate, fit_surrogate
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import reachable_decoder
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import score
from lrs_utils.scoring.trie import Shared
from lrs_utils.tasks import Suite

_model_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()  # a model serves one measurement at a time
_latest_measurers: WeakKeyDictionary[Any, "weakref.ref[Measurer]"] = WeakKeyDictionary()  # by model


class Measurer:
    """Measures one scaling and the baseline in the background, context by context, and keeps what is known.

    A new measurement takes the place of the running one, which ends before its next layer. The callbacks serve what
    shows this; `lock` guards all that changes here, and may guard more that has to change together with it.

    Parameters
    ----------
    lm : LM
    ledger : Path
    remember_settled : function () -> None
        Called when a measurement begins, with the lock held.
    set_status : function (line) -> None
        Called with a line on progress, or with "" when a measurement has ended as expected; with the lock held.
    tell_change : function () -> None
        Called after every change, without the lock.

    Attributes
    ----------
    suite : Suite
    measured : dict of str to MeasuredScaling
        By scaling key, on this suite.
    surrogate : Surrogate or None
        Made from `measured` when the suite was set or the last measurement ended.
    """

    suite: Suite

    def __init__(
        self,
        lm: LM,
        ledger: Path,
        *,
        remember_settled: Callable[[], None],
        set_status: Callable[[str], None],
        tell_change: Callable[[], None],
    ) -> None:
        self._lm, self._ledger = lm, ledger
        self._remember_settled, self._set_status, self._tell_change = remember_settled, set_status, tell_change
        self.lock = threading.RLock()
        self.measured: dict[str, MeasuredScaling] = {}
        self.surrogate: Surrogate | None = None
        self._measurement = _Measurement()
        self._shared_outputs = Shared()
        self._model_in_use = _model_locks.setdefault(lm.model, threading.Lock())
        earlier = _latest_measurers[lm.model]() if lm.model in _latest_measurers else None
        if earlier is not None:
            earlier.stop()  # its notebook cell was run again
        _latest_measurers[lm.model] = weakref.ref(self)

    @property
    def busy(self) -> bool:
        """Whether something is measured, or about to be."""
        return not (self._measurement.ended.is_set() or self._measurement.cancelled.is_set())

    def set_suite(self, suite: Suite) -> None:
        """Measure on these contexts from now on; what the ledger knows of them is there at once."""
        self.stop()
        with Ledger(self._ledger) as ledger:
            measured = read_measured(ledger, self._lm.fingerprint, suite)
        surrogate = fit_surrogate(measured.values(), len(suite.probes))
        with self.lock:
            self.suite, self.measured, self.surrogate = suite, measured, surrogate

    def start(self, scaling: LayerScaling, delay: float) -> None:
        """Measure a scaling as far as it is not known, once `delay` seconds have passed without another call."""
        with self.lock:
            self.cancel()
            self._measurement = measurement = _Measurement()
            measurement.ended.clear()
            measurement.thread = threading.Thread(target=self._run, args=(measurement, scaling, delay), daemon=True)
            measurement.thread.start()

    def cancel(self) -> None:
        """Have the running measurement end soon; what was measured is kept."""
        with self.lock:
            self._measurement.cancelled.set()

    def wait(self) -> None:
        """Until the running measurement has ended."""
        with self.lock:
            thread = self._measurement.thread
        if thread is not None:
            thread.join()

    def stop(self) -> None:
        """Cancel and wait until the model is free."""
        self.cancel()
        self.wait()
        with self._model_in_use:  # one that was cancelled before may still be inside
            pass
        self._tell_change()

    def _run(self, measurement: "_Measurement", scaling: LayerScaling, delay: float) -> None:
        """In a thread of its own: wait until changes have settled and the model is free, then measure."""
        line = ""
        try:
            if measurement.cancelled.wait(delay):
                return
            with self._model_in_use:
                self._measure(measurement, scaling)
            self._refit_surrogate()
        except _Cancelled:
            line = "stopped; what was measured is kept"
        except Exception as error:  # no one waits for this thread, so no one else could catch it
            line = describe_error(error)
        finally:
            measurement.ended.set()
            with self.lock:
                if self._measurement is measurement:  # else the status is that of a later change
                    self._set_status(line)
            self._tell_change()

    def _measure(self, measurement: "_Measurement", scaling: LayerScaling) -> None:
        with self.lock:
            if measurement.cancelled.is_set():
                return
            self._remember_settled()
            suite, unmeasured = self.suite, self._list_unmeasured(scaling)
        began, n_answered = time.monotonic(), 0
        with Ledger(self._ledger) as ledger, _cancel_between_layers(self._lm, measurement.cancelled):
            for n_done, (context, measured) in enumerate(unmeasured, 1):
                one_context = replace(suite, probes=suite.probes[context : context + 1])
                outcomes = score(
                    self._lm,
                    one_context,
                    [measured],
                    ledger=ledger,
                    shared=self._shared_outputs,
                    progress=_HiddenProgress(1, ""),
                )
                n_answered += outcomes.recomputed
                seconds_left = (time.monotonic() - began) / n_done * (len(unmeasured) - n_done)
                with self.lock:
                    if self.suite is not suite or measurement.cancelled.is_set():
                        raise _Cancelled
                    self._add(measured, context, outcomes.exact[0, 0])
                    self._set_status(
                        f"context {context + 1} of {len(suite.probes)}, {n_answered} questions answered, "
                        f"{seconds_left:.0f} s left"
                    )
                self._tell_change()

    def _list_unmeasured(self, scaling: LayerScaling) -> list[tuple[int, LayerScaling]]:
        """Contexts that the scaling and the baseline still lack, in the order in which they are measured."""
        baseline = LayerScaling.identity(self._lm.num_layers)
        return [
            (context, wanted)
            for context in range(len(self.suite.probes))
            for wanted in dict.fromkeys((scaling, baseline))
            if wanted.key not in self.measured or context not in self.measured[wanted.key].exact
        ]

    def _add(self, scaling: LayerScaling, context: int, exact: NDArray[np.bool_]) -> None:
        before = self.measured.get(scaling.key, MeasuredScaling(scaling, {}))
        self.measured[scaling.key] = replace(before, exact={**before.exact, context: exact})

    def _refit_surrogate(self) -> None:
        with self.lock:
            suite, measured = self.suite, list(self.measured.values())
        surrogate = fit_surrogate(measured, len(suite.probes))  # takes a while: without the lock
        with self.lock:
            if self.suite is suite:
                self.surrogate = surrogate


def describe_error(error: BaseException) -> str:
    """An error in a line, with what was noted to it."""
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


class _Measurement:
    """One run of the measuring thread; as made, it has ended."""

    def __init__(self) -> None:
        self.cancelled, self.ended = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.ended.set()


class _Cancelled(Exception):
    """Raised inside the model to end a measurement."""


class _HiddenProgress(Progress):
    """Progress that the status line shows instead."""

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        yield self

    def advance(self, units: int, note: str | None = None) -> None:
        pass


@contextmanager
def _cancel_between_layers(lm: LM, cancelled: threading.Event) -> Iterator[None]:
    """Let this thread's measurement end before the next layer once `cancelled` is set: a context may take seconds."""
    measuring_thread = threading.get_ident()

    def check(*_: object) -> None:
        if cancelled.is_set() and threading.get_ident() == measuring_thread:
            raise _Cancelled

    with used_alone(lm.model):
        hooks = [layer.register_forward_pre_hook(check) for layer in reachable_decoder(lm.model).layers]
    try:
        yield
    finally:
        with used_alone(lm.model):
            for hook in hooks:
                hook.remove()
