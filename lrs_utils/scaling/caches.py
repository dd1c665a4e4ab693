"""Caches of keys and values that know the scaling they were filled under, so that no text is read under two."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from lrs_utils.scaling.base import Setting


@contextmanager
def caches_marked(decoder: nn.Module, of: str, settings: Sequence[Setting]) -> Iterator[None]:
    """Let a decoder refuse a cache that was filled under other settings, and mark those that it fills.

    Parameters
    ----------
    of : str
        What the settings are of, "positions" or "heads": both may be put on a model, one inside the other.
    """
    name = f"_lrs_{of}"
    with ExitStack() as stack:
        check = partial(_refuse_other, name=name, settings=tuple(settings))
        stack.callback(decoder.register_forward_pre_hook(check, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(partial(_mark, name=name, settings=tuple(settings))).remove)
        yield


def _refuse_other(_: nn.Module, __: Any, given: dict[str, Any], *, name: str, settings: tuple[Setting, ...]) -> None:
    cache = given.get("past_key_values")
    if cache is None:
        return
    if cache.get_seq_length() and getattr(cache, name, None) != settings:
        raise ValueError(
            "past_key_values were filled under another scaling, or none, so this text would be read under two; "
            "read it again from its beginning"
        )
    setattr(cache, name, settings)


def _mark(_: nn.Module, __: Any, output: Any, *, name: str, settings: tuple[Setting, ...]) -> None:
    cache = getattr(output, "past_key_values", None)
    if cache is not None:  # made by the forward pass itself
        setattr(cache, name, settings)
