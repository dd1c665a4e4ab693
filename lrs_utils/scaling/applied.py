"""Settings of positions put on a model and taken off again, by hooks on its decoder layers."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from lrs_utils.models.decode import attending_by, model_name
from lrs_utils.scaling.base import UNSCALED, Setting, reachable_decoder
from lrs_utils.scaling.caches import caches_marked
from lrs_utils.scaling.rotation import PLAIN, ROTATING
from lrs_utils.scaling.tables import PositionTables
from lrs_utils.scaling.trial import N_TOKENS, logits, same, some_tokens, tried

_scaled_decoders: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by which thread; others wait


def refuse_scaled(model: PreTrainedModel) -> None:
    """Raise the ValueError of a model whose positions are scaled already."""
    if _scaled_decoders.get(reachable_decoder(model)) == threading.get_ident():
        raise ValueError(f"{model_name(model)} is already scaled; leave the other `applied_to` block first")


def refuse_unrotatable(model: PreTrainedModel) -> None:
    """Raise the ValueError that names a family whose queries and keys `rotation` doesn't rotate as the family does."""
    if not tried(model, "rotation", lambda: _rotates_alike(model), True):
        raise ValueError(
            f"{type(model).__name__} can't have positions by head or by distance: tried on {N_TOKENS} tokens, its "
            "attention computes something else than rotating each half of a head with the other"
        )


def _rotates_alike(model: PreTrainedModel) -> bool:
    positions = torch.arange(N_TOKENS)
    near, far = (logits(model, some_tokens(model), at) for at in (positions, 2 * positions))
    with positions_replaced(model, [UNSCALED._replace(regions=(PLAIN,))] * len(reachable_decoder(model).layers)):
        found = logits(model, some_tokens(model), positions)
    return same(found, near, far)


@contextmanager
def positions_replaced(
    model: PreTrainedModel, settings: Sequence[Setting], length: int | None = None
) -> Iterator[None]:
    """Let each layer of a model read positions by its setting; once at a time.

    Parameters
    ----------
    length : int, optional
        Tokens that "dynamic_ntk" stretches for.
    """
    decoder = reachable_decoder(model)
    with ExitStack() as stack:
        _scaled_decoders[decoder] = threading.get_ident()
        stack.callback(_scaled_decoders.pop, decoder)
        stack.enter_context(caches_marked(decoder, "positions", settings))
        if any(setting.rotates_itself for setting in settings):
            stack.enter_context(attending_by(model, ROTATING))
            stack.callback(decoder.register_forward_pre_hook(_refuse_padding, with_kwargs=True).remove)
        if any(setting.positions != UNSCALED for setting in settings):
            tables = stack.enter_context(PositionTables(model, length=length))
            for layer, setting in zip(decoder.layers, settings, strict=True):
                if setting.positions != UNSCALED:
                    tables.prepare(setting)
                    hook = partial(_replace, tables=tables, setting=setting)
                    stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _replace(
    _: nn.Module, args: Any, given: dict[str, Any], *, tables: PositionTables, setting: Setting
) -> tuple[Any, dict[str, Any]]:
    embeddings = given.get("position_embeddings")
    replaced = given | {"position_embeddings": tables(embeddings, setting)}
    if setting.rotates_itself:
        rotation = tables.rotation(embeddings, setting)
        if rotation.has_gaps:
            raise ValueError(
                f"positions {rotation.at.tolist()[:8]} ... have gaps, which regions of distances don't know"
            )
        replaced["lrs_rotation"] = rotation
    return args, replaced


def _refuse_padding(decoder: nn.Module, args: Any, given: dict[str, Any]) -> None:
    masks = given.get("attention_mask")
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
            raise ValueError(
                "the batch is padded or has a mask of its own, which attention by head or region doesn't know; give "
                "one text at a time, or texts of one length"
            )
