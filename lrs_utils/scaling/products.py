"""What a decoder layer's queries, head outputs and MLP output are multiplied by, and the hooks that do it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrs_utils.models.decode import model_name
from lrs_utils.scaling.base import Setting, reachable_decoder
from lrs_utils.scaling.caches import caches_marked
from lrs_utils.scaling.trial import layers_with_temperatures, tried

_scaled_decoders: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by which thread; others wait


@contextmanager
def heads_multiplied(model: PreTrainedModel, settings: Sequence[Setting]) -> Iterator[None]:
    """Let each layer of a model multiply by the numbers of its setting; once at a time."""
    decoder = reachable_decoder(model)
    with ExitStack() as stack:
        _scaled_decoders[decoder] = threading.get_ident()
        stack.callback(_scaled_decoders.pop, decoder)
        stack.enter_context(caches_marked(decoder, "heads", settings))
        for layer, setting in zip(decoder.layers, settings, strict=True):
            stack.enter_context(multiplied(layer, *products([setting], 1, model)))
        yield


def refuse_unreachable_heads(model: PreTrainedModel, settings: Sequence[Setting]) -> None:
    """Raise the ValueError of a model whose layers can't multiply by the numbers of their settings, or already do."""
    decoder, hot = reachable_decoder(model), any(setting.head_temperatures for setting in settings)
    needed = {
        queries_of: hot,
        output_of: any(setting.head_gains for setting in settings),
        mlp_of: any(setting.mlp_gain != 1.0 for setting in settings),
    }
    for layer in decoder.layers:
        for reach in (reach for reach, needs in needed.items() if needs):
            reach(layer)
    if _scaled_decoders.get(decoder) == threading.get_ident():
        raise ValueError(f"the heads of {model_name(model)} are already scaled; leave the other block first")
    if hot:
        _refuse_idle_temperatures(model, settings)


def products(
    settings: Sequence[Setting], n_tokens: int, model: PreTrainedModel
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a layer's queries, head outputs and MLP output are multiplied by, for `multiplied`; None where that is 1.

    Parameters
    ----------
    settings : sequence of Setting
        One for each copy of a row of `n_tokens` tokens, laid end to end.

    Returns
    -------
    temperatures, gains : float32 tensors, shape (copies * n_tokens, heads, 1 or dimensions of a head), or None
    mlp : float32 tensor, shape (copies * n_tokens, 1), or None
    """
    heads, one = n_heads(model), torch.ones((), device=model.device)

    def laid_out(rows: Sequence[Sequence[float]], shaped: Callable[[Tensor], Tensor]) -> Tensor | None:
        if all({*row} <= {1.0} for row in rows):
            return None
        numbers = [shaped(torch.tensor(row, device=model.device)) if {*row} - {1.0} else one for row in rows]
        wide = torch.broadcast_tensors(*numbers)  # type: ignore[no-untyped-call]
        return torch.stack(wide).repeat_interleave(n_tokens, dim=0)

    return (
        laid_out([setting.head_temperatures for setting in settings], partial(by_head, heads=heads, pairs=True)),
        laid_out([setting.head_gains for setting in settings], partial(by_head, heads=heads)),
        laid_out([(setting.mlp_gain,) for setting in settings], lambda number: number),
    )


def by_head(numbers: Tensor, heads: int, *, pairs: bool = False) -> Tensor:
    """Numbers of heads, or of each channel of every head, with an axis for heads.

    Parameters
    ----------
    numbers : tensor, shape (..., heads or heads * channels)
    pairs : bool
        A channel is a pair of dimensions that rotate together, i and i + d / 2: each number comes twice.

    Returns
    -------
    tensor, shape (..., heads, 1 or dimensions of a head)
    """
    found = numbers.reshape(*numbers.shape[:-1], heads, -1)
    return torch.cat([found, found], dim=-1) if pairs and found.shape[-1] > 1 else found


@contextmanager
def multiplied(layer: nn.Module, queries: Tensor | None, outputs: Tensor | None, mlp: Tensor | None) -> Iterator[None]:
    """Let a decoder layer multiply its queries, what its heads put out, and what its MLP puts out.

    Parameters
    ----------
    queries, outputs : tensor, shape (tokens or 1, heads, 1 or dimensions of a head), or None
    mlp : tensor, shape (tokens or 1, 1), or None
    """
    with ExitStack() as stack:
        if queries is not None:
            module, numbers = queries_of(layer), queries
            hook = module.register_forward_hook(lambda _, given, output: _times_heads(given, output, numbers))
            stack.callback(hook.remove)
        if outputs is not None:
            gains = outputs
            handle = output_of(layer).register_forward_pre_hook(
                lambda _, given: (_times(by_head(given[0], gains.shape[1]), gains).flatten(-2),)
            )
            stack.callback(handle.remove)
        if mlp is not None:
            factor = mlp
            stack.callback(mlp_of(layer).register_forward_hook(lambda _, __, output: _times(output, factor)).remove)
        yield


def _times(values: Tensor, by: Tensor) -> Tensor:
    # in float32, rounded once: in bfloat16 a gain of 1.003 would be 1
    return (values.float() * by.to(values.device)).to(values.dtype)


def _times_heads(given: Any, output: Tensor, by: Tensor) -> Tensor:
    """The output of a query projection or norm, whichever axis its heads are on."""
    heads = by.shape[1]
    if output.dim() == 3:  # (batch, tokens, heads * dim)
        return _times(by_head(output, heads), by).flatten(-2)
    like, dim = given[0], output.shape[-1]
    # (batch, tokens, heads, dim) or (batch, heads, tokens, dim): where both would fit, the layout in memory tells
    fit = [axis for axis in (1, 2) if output.dim() == 4 and output.shape[axis] == heads]
    if len(fit) == 2:
        fit = [2] if heads == 1 else [axis for axis in fit if like.stride(axis) == dim]
    if len(fit) != 1:
        raise RuntimeError(f"queries of shape {tuple(output.shape)} don't show which axis the {heads} heads are on")
    return _times(output, by if fit == [2] else by.transpose(0, 1))


def n_heads(model: PreTrainedModel) -> int:
    """Number of query heads of a layer."""
    return int(model.config.get_text_config().num_attention_heads)


def head_dim(model: PreTrainedModel) -> int:
    """Dimensions of a head."""
    output: Any = output_of(reachable_decoder(model).layers[0])
    return int(output.in_features) // n_heads(model)


def queries_of(layer: nn.Module) -> nn.Module:
    """The module whose output is a layer's queries, before or after rotation."""
    attention: Any = getattr(layer, "self_attn", None)
    projection = getattr(attention, "q_proj", None)
    if not isinstance(projection, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no q_proj of its own, so its heads can't have temperatures")
    norm = getattr(attention, "q_norm", None)
    return norm if isinstance(norm, nn.Module) else projection


def output_of(layer: nn.Module) -> nn.Module:
    """The projection that takes in what a layer's heads put out."""
    output = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    if not isinstance(output, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no o_proj, so its heads can't have gains")
    return output


def mlp_of(layer: nn.Module) -> nn.Module:
    """A layer's MLP."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no mlp that could have a gain")
    return mlp


def _refuse_idle_temperatures(model: PreTrainedModel, settings: Sequence[Setting]) -> None:
    layers, heads = reachable_decoder(model).layers, n_heads(model)

    def hot(layer: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        with multiplied(layer, torch.full((1, heads, 1), 4.0), None, None):
            return layer.forward(*args, **given)

    obeyed = tried(
        model, "head temperatures", lambda: layers_with_temperatures(model, layers, hot), (True,) * len(layers)
    )
    for layer, setting in enumerate(settings):
        if setting.head_temperatures and not obeyed[layer]:
            raise ValueError(
                f"heads of layer {layer} of {type(model).__name__} can't have temperatures: tried on a few tokens, "
                "multiplied queries don't multiply the attention logits (a norm after rotation, say); leave them 1"
            )
