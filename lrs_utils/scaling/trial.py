"""Trials of a model on a few tokens: what it would ignore, or do wrong, is refused by name and never measured.

Each trial compares the model with itself, computed in another way that can't be ignored. The result is kept as
long as the model lives, so that it costs a few forward passes of eight tokens once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrs_utils.models.turns import used_alone

N_TOKENS = 8
_ALIKE = 0.1  # of how far the other result is: rounding in bfloat16 is a few hundredths, another function about 1
_Result = TypeVar("_Result")

_results: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def tried(model: PreTrainedModel, name: str, trial: Callable[[], _Result], meanwhile: _Result) -> _Result:
    """The result of a trial, made once for a model; `meanwhile` is what it is while the trial itself runs.

    Raises
    ------
    ValueError
        Whatever the trial raised, with the family's name before it.
    """
    with used_alone(model):  # another thread would see `meanwhile`, or a scale that a trial has changed
        results = _results.setdefault(model, {})
        if name not in results:
            results[name] = meanwhile
            try:
                if model.device.type == "meta":
                    raise ValueError("its weights are on the meta device, so there are none; load it on a CPU or GPU")
                with _undisturbed(model):
                    results[name] = trial()
            except BaseException as error:  # even Ctrl-C: nothing was found out
                del results[name]
                if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                    raise
                raise ValueError(f"{type(model).__name__} can't be used here: {_sentence(error)}") from error
        return results[name]  # type: ignore[no-any-return]


def obeys_factors(model: PreTrainedModel, halved: AbstractContextManager[None]) -> bool:
    """Whether positions 0, 2, 4, ... under a factor of 2 in every layer, put on by `halved`, are 0, 1, 2, ..."""
    positions = torch.arange(N_TOKENS)
    near, far = (logits(model, some_tokens(model), at) for at in (positions, 2 * positions))
    with halved:
        found = logits(model, some_tokens(model), 2 * positions)
    return same(found, near, far)


def layers_with_temperatures(
    model: PreTrainedModel, layers: nn.ModuleList, hot: Callable[[nn.Module, Any, dict[str, Any]], Any]
) -> tuple[bool, ...]:
    """For which layers `hot(layer, args, kwargs)`, the layer at temperature 4, is what attention's own scale times 4
    makes of it. A power of two, so that both are rounded the same way."""
    calls: dict[nn.Module, Any] = {}

    def note(layer: nn.Module, args: Any, given: dict[str, Any]) -> None:
        calls[layer] = args, given

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        logits(model, some_tokens(model), torch.arange(N_TOKENS))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_multiplies_logits(layer, hot, *calls[layer]) for layer in layers)


def _multiplies_logits(layer: Any, hot: Callable[..., Any], args: Any, given: dict[str, Any]) -> bool:
    attention: Any = getattr(layer, "self_attn", None)
    scale = getattr(attention, "scaling", None)
    if not isinstance(scale, float):
        return False
    plain, found = layer.forward(*args, **given), hot(layer, args, given)
    attention.scaling = 4 * scale
    try:
        wanted = layer.forward(*args, **given)
    finally:
        attention.scaling = scale
    return same(*(x[0] if isinstance(x, tuple) else x for x in (found, wanted, plain)))


def some_tokens(model: PreTrainedModel, n: int = N_TOKENS) -> Tensor:
    """Token ids that a model of any vocabulary has, shape (n,)."""
    return (37 * torch.arange(n) + 11) % int(model.config.get_text_config().vocab_size)


def logits(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits of a plain forward pass, shape (tokens, vocabulary), in float32."""
    row = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    # with a mask, a gap in positions doesn't begin another text
    row = {name: values[None].to(model.device) for name, values in row.items()}
    return model.forward(**row, use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def same(found: Tensor, wanted: Tensor, other: Tensor) -> bool:
    """Whether `found` is `wanted`, measured by how far `other` is from it."""
    if not bool(wanted.isfinite().all()):
        return True  # where a model gives no numbers, what measures it says so
    off, apart = ((x - wanted).float().square().mean().sqrt() for x in (found, other))
    return bool(apart > 0) and bool(off <= _ALIKE * apart)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients, and without dropout where the model is being trained."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
