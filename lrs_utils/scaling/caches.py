"""Caches of keys and values that know the scaling they were filled under, so that no text is read under two."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from lrs_utils.scaling.base import UNSCALED, Setting


@contextmanager
def caches_marked(decoder: nn.Module, of: str, settings: Sequence[Setting]) -> Iterator[None]:
    """Let a decoder refuse a cache that was filled under other settings, and mark those that it fills.

    Parameters
    ----------
    of : str
        What the settings are of, "positions" or "heads": both may be put on a model, one inside the other.
    """
    mark = None if set(settings) == {UNSCALED} else tuple(settings)  # no scaling is what an unmarked cache has
    given: dict[str, Any] = {"name": f"_lrs_{of}", "mark": mark}
    with ExitStack() as stack:
        stack.callback(decoder.register_forward_pre_hook(partial(_refuse_other, **given), with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(partial(_mark, **given), with_kwargs=True).remove)
        yield


def _refuse_other(_: nn.Module, __: Any, given: dict[str, Any], *, name: str, mark: Any) -> None:
    cache = given.get("past_key_values")
    n_tokens = 0 if cache is None else int(cache.get_seq_length())
    under, marked = getattr(cache, name, (None, n_tokens))
    if n_tokens and (under != mark or n_tokens > marked):  # more than were marked: some were read outside the block
        raise ValueError(
            "past_key_values were filled under another scaling, or none, so this text would be read under two; "
            "read it again from its beginning"
        )


def _mark(_: nn.Module, __: Any, given: dict[str, Any], output: Any, *, name: str, mark: Any) -> None:
    cache = getattr(output, "past_key_values", None)
    cache = given.get("past_key_values") if cache is None else cache
    if cache is not None:
        setattr(cache, name, (mark, int(cache.get_seq_length())))
