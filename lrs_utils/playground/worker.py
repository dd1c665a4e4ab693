"""The thread behind the playground: what is measured next, how a measurement is cancelled, what came of it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrs_utils.models.load import LM
from lrs_utils.models.turns import used_alone
from lrs_utils.playground.measured import MeasuredScaling, read_measured
from lrs_utils.playground.prediction import Surrogate, fit_surrogate
from lrs_utils.progress import SilentProgress
from lrs_utils.scaling.base import Scaling, reachable_decoder
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import score
from lrs_utils.scoring.trie import Shared
from lrs_utils.tasks import Suite

# By the id of the model, which no other object can have while the measurer keeps the model alive.
_latest_measurers: WeakValueDictionary[int, "Measurer"] = WeakValueDictionary()


class Measurer:
    """Measures one scaling and the baseline in the background, context by context, and keeps what is known.

    A new measurement takes the place of the running one, which ends before its next layer.

    Attributes
    ----------
    lm : LM
    suite : Suite
        The contexts that scalings are measured on.
    measured : mapping of str to MeasuredScaling
        All scalings of which anything is known on this suite, by key. Replaced, never changed, so that it can be read
        without a lock.
    surrogate : Surrogate or None
        Made from `measured` when the suite was set or the last measurement ended; None while too little is known.
    """

    suite: Suite

    def __init__(self, lm: LM, ledger: Path) -> None:
        self.lm, self._ledger = lm, ledger
        self.measured: Mapping[str, MeasuredScaling] = {}
        self.surrogate: Surrogate | None = None
        # of all that changes here and in subclasses; never held while listeners are told
        self._lock = threading.RLock()
        self._message = ""  # progress or an error; "" once a measurement has ended as expected
        self._listeners: list[Callable[[bool], None]] = []
        self._shared_outputs = Shared()
        self._measuring = threading.Lock()  # one measurement at a time
        self._thread: threading.Thread | None = None
        self._over = threading.Event()  # of the latest measurement: it was cancelled or has ended
        self._over.set()
        if (earlier := _latest_measurers.get(id(lm.model))) is not None:
            earlier.stop()  # its notebook cell was run again
        _latest_measurers[id(lm.model)] = self

    @property
    def busy(self) -> bool:
        """Whether something is measured, or about to be."""
        return not self._over.is_set()

    @property
    def unscaled(self) -> LayerScaling:
        """The baseline."""
        return LayerScaling.identity(self.lm.num_layers)

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """Have `listener` called after every change, with whether the curve moved; also from the measuring thread."""
        self._listeners.append(listener)

    def wait(self) -> None:
        """Until the running measurement has ended."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def stop(self) -> None:
        """Cancel the running measurement and wait until the model is free; what was measured is kept."""
        self._cancel()
        self.wait()
        with self._measuring:  # one that was cancelled before may still be inside
            pass
        self._tell_listeners(moved=False)

    def _remember_step(self) -> None:
        """For subclasses: called with the lock held when changes have settled and a measurement begins."""

    def _tell_listeners(self, moved: bool) -> None:
        for listener in self._listeners:
            listener(moved)

    def _set_suite(self, suite: Suite) -> None:
        """Measure on these contexts from now on; what the ledger knows of them is there at once."""
        self.stop()
        with Ledger(self._ledger) as ledger:
            measured = read_measured(ledger, self.lm.fingerprint, suite)
        surrogate = fit_surrogate(measured.values(), len(suite.probes))
        with self._lock:
            self.suite, self.measured, self.surrogate = suite, measured, surrogate

    def _start(self, scaling: Scaling, delay: float) -> None:
        """Measure a scaling as far as it is not known, once `delay` seconds have passed without another call."""
        self._begin(partial(self._measure, [scaling]), delay)

    def _begin(self, work: Callable[[threading.Event], None], delay: float) -> None:
        """Let `work` take the place of the running measurement; it may ask whether it is over, and ends by itself."""
        with self._lock:
            self._cancel()
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(work, delay, self._over), daemon=True)
            self._thread.start()

    def _cancel(self) -> None:
        """Have the running measurement end soon; what was measured is kept."""
        with self._lock:
            self._over.set()

    def _run(self, work: Callable[[threading.Event], None], delay: float, over: threading.Event) -> None:
        """In a thread of its own: wait until changes have settled and the model is free, then work."""
        message = ""
        try:
            if over.wait(delay):
                return
            with self._measuring, _cancel_between_layers(self.lm, over):
                with self._lock:
                    if over.is_set():
                        return
                    self._remember_step()
                work(over)
            self._refit_surrogate()
        except Cancelled:
            message = "stopped; what was measured is kept"
        except Exception as error:  # no one waits for this thread, so no one else could catch it
            message = describe_error(error)
        finally:
            over.set()
            with self._lock:
                if self._over is over:  # else the message is that of a later change
                    self._message = message
            self._tell_listeners(moved=False)

    def _measure(
        self, scalings: Sequence[Scaling], over: threading.Event, n_contexts: int | None = None, after: str = ""
    ) -> None:
        """Measure on the first so many contexts; `after` stands before the progress in the message."""
        with self._lock:
            suite, unmeasured = self.suite, self._list_unmeasured(scalings, n_contexts)
        began, n_answered = time.monotonic(), 0
        with Ledger(self._ledger) as ledger:
            for n_done, (context, measured) in enumerate(unmeasured, 1):
                one_context = replace(suite, probes=suite.probes[context : context + 1])
                outcomes = score(
                    self.lm,
                    one_context,
                    [measured],
                    ledger=ledger,
                    shared=self._shared_outputs,
                    progress=SilentProgress(),
                )
                n_answered += outcomes.recomputed
                seconds_left = (time.monotonic() - began) / n_done * (len(unmeasured) - n_done)
                with self._lock:
                    if self.suite is not suite or over.is_set():
                        raise Cancelled
                    self._add(measured, context, outcomes.exact[0, 0])
                    self._message = (
                        f"{after}context {context + 1} of {len(suite.probes)}, {n_answered} questions answered"
                    )
                    if n_contexts is None:
                        self._message += f", {seconds_left:.0f} s left"
                self._tell_listeners(moved=False)

    def _list_unmeasured(self, scalings: Sequence[Scaling], n_contexts: int | None) -> list[tuple[int, Scaling]]:
        """Contexts that the scalings and the baseline still lack, in the order in which they are measured."""
        return [
            (context, wanted)
            for context in range(len(self.suite.probes[:n_contexts]))
            for wanted in dict.fromkeys((*scalings, self.unscaled))
            if wanted.key not in self.measured or context not in self.measured[wanted.key].exact
        ]

    def _add(self, scaling: Scaling, context: int, exact: NDArray[np.bool_]) -> None:
        before = self.measured.get(scaling.key, MeasuredScaling(scaling, {}))
        after = replace(before, exact={**before.exact, context: exact})
        self.measured = {**self.measured, scaling.key: after}

    def _refit_surrogate(self) -> None:
        with self._lock:
            suite, measured = self.suite, self.measured
        surrogate = fit_surrogate(measured.values(), len(suite.probes))  # takes a while: without the lock
        with self._lock:
            if self.suite is suite:
                self.surrogate = surrogate


def describe_error(error: BaseException) -> str:
    """An error in a line, with what was noted to it."""
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


class Cancelled(Exception):
    """Raised inside the model to end a measurement."""


@contextmanager
def _cancel_between_layers(lm: LM, over: threading.Event) -> Iterator[None]:
    """Let this thread's work end before the next layer once `over` is set: a context may take seconds.

    On the way back, too, where a gradient is taken.
    """
    measuring_thread = threading.get_ident()

    def check(*_: object) -> None:
        if over.is_set() and threading.get_ident() == measuring_thread:
            raise Cancelled

    def check_on_the_way_back(_: object) -> None:
        if over.is_set():  # in whatever thread: only this thread's passes have this hook
            raise Cancelled

    def watch(_: object, __: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad and threading.get_ident() == measuring_thread:
            output.register_hook(check_on_the_way_back)  # type: ignore[no-untyped-call]

    with used_alone(lm.model):
        layers = reachable_decoder(lm.model).layers
        hooks = [layer.register_forward_pre_hook(check) for layer in layers]
        hooks += [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield
    finally:
        with used_alone(lm.model):
            for hook in hooks:
                hook.remove()
