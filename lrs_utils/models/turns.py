"""Turns at a model: one thread at a time uses it or changes how it behaves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making_locks = threading.Lock()


@contextmanager
def used_alone(model: nn.Module) -> Iterator[None]:
    """One thread at a time: another that wants to use the model, or calls it, waits until this block is left.

    While a model is scaled or attends by another function, or its layers are called one by one, a forward pass of
    somebody else would be wrong with no error.
    """
    with _making_locks:
        lock = _locks.get(model)
        if lock is None:
            lock = _locks[model] = threading.RLock()
            model.register_forward_pre_hook(_wait_for_turn, prepend=True)
            model.register_forward_hook(_end_turn, always_call=True)
    with lock:
        yield


def _wait_for_turn(model: nn.Module, _: Any) -> None:
    if (lock := _locks.get(model)) is not None:  # a copy of a model has the hooks, and no lock yet
        lock.acquire()


def _end_turn(model: nn.Module, _: Any, __: Any) -> None:
    if (lock := _locks.get(model)) is not None:
        lock.release()
