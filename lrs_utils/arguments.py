"""Checks of arguments: a wrong one raises a ValueError that names the argument, its value and how to fix it."""

import math
import operator
from contextlib import suppress
from types import UnionType
from typing import Any


def number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> float:
    """A finite number within limits."""
    found = None
    if not isinstance(value, bool | str):
        with suppress(TypeError, ValueError, OverflowError):
            found = float(value)
    if found is None or not math.isfinite(found):
        raise ValueError(f"{name} is {value!r}; give a finite number{_limits(above, least, most)}")
    if (above is not None and found <= above) or not _within(found, least, most):
        raise ValueError(f"{name} is {value!r}; it must be{_limits(above, least, most)}")
    return found


def whole(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number within limits."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"{name} is {value!r}; give a whole number{_limits(None, least, most)}")
    if not _within(found, least, most):
        raise ValueError(f"{name} is {value!r}; it must be{_limits(None, least, most)}")
    return found


def instance(name: str, value: Any, kind: type | UnionType, fix: str) -> None:
    """Refuse a value that is not an instance of a type; `fix` says what to give instead."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {' '.join(repr(value).split()):.80}; give {fix}")


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _limits(above: float | None, least: float | None, most: float | None) -> str:
    lower = f" above {above:g}" if above is not None else f" at least {least:g}" if least is not None else ""
    upper = f" at most {most:g}" if most is not None else ""
    return " and".join(filter(None, (lower, upper)))
