"""Ms-PoE (2403.04797): every head divides positions by a ratio of its own, ordered by how it attends."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrs_utils.models.load import LM
from lrs_utils.peers.regions import RegionScaling
from lrs_utils.scaling.base import Scaling, reachable_decoder
from lrs_utils.scaling.products import n_heads
from lrs_utils.scaling.rotation import PLAIN, Positions, Region, Rotation

_OUTLIER = 3  # attention above this many times the mean counts, as in the authors' code


class MsPoE(RegionScaling):
    """Positions of head h divided by a ratio between `low` and `high`, in all layers but the first.

    Parameters
    ----------
    orders : int array, shape (layers, heads), optional
        Which ratio each head takes, 0 the lowest. By default the last head takes the lowest: the fixed order of the
        authors' script. `for_prompt` finds their other order.
    low, high : float
        The lowest ratio, and the one that the highest comes near to: low + (high - low) * h / heads.
    first_layer : int
        Layers before it stay as they are.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        orders: Sequence[Sequence[int]] | None = None,
        *,
        low: float = 1.2,
        high: float = 1.8,
        first_layer: int = 2,
        on: Scaling | None = None,
    ) -> None:
        rows = [list(reversed(range(num_heads)))] * num_layers if orders is None else [list(row) for row in orders]
        if len(rows) != num_layers or any(sorted(row) != list(range(num_heads)) for row in rows):
            raise ValueError(f"orders must be {num_layers} permutations of 0 to {num_heads - 1}, one for each layer")
        regions = [[Region(0, *[_divided(low, high, row)] * 2)] if at >= first_layer else [PLAIN]
                   for at, row in enumerate(rows)]  # fmt: skip
        super().__init__(regions, on)

    @classmethod
    def for_prompt(cls, lm: LM, prompt: str, *, low: float = 1.2, high: float = 1.8, first_layer: int = 2) -> "MsPoE":
        """Heads ordered by how they attend to a prompt, layer by layer in one forward pass, as the authors' code does.

        A head's score is minus the share of tokens that get more than three times the mean attention of the
        prompt's last token, before rotation, at scale 1 / sqrt(dimensions). Head h takes ratio number
        `argsort(scores)[h]`, which is not its rank.
        """
        heads, decoder = n_heads(lm.model), reachable_decoder(lm.model)
        orders = np.tile(np.arange(heads), (lm.num_layers, 1))
        options: dict[str, Any] = {"low": low, "high": high, "first_layer": first_layer}
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(cls(lm.num_layers, heads, **options).applied_to(lm.model))
            for layer in range(first_layer, lm.num_layers):
                hook = partial(_put_in_order, low=low, high=high, order=orders[layer])
                stack.callback(decoder.layers[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
            ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"].to(lm.model.device)
            lm.model(ids, use_cache=False)
        return cls(lm.num_layers, heads, orders.tolist(), **options)


def _divided(low: float, high: float, order: Sequence[int]) -> Positions:
    return Positions(tuple(low + (high - low) * nth / len(order) for nth in order))


@dataclass(frozen=True)
class _Ordering:
    """A rotation that first finds the order of its heads."""

    rotation: Rotation
    low: float
    high: float
    order: np.ndarray  # (heads,), filled here

    @property
    def at(self) -> Tensor:
        return self.rotation.at

    def rotate(self, query: Tensor, key: Tensor, seen: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = (query[0, :, -1:] * query.shape[3] ** -0.5) @ keys[0].mT
        weights = logits.float().softmax(-1)[:, 0]  # (heads, tokens)
        scores = -(weights > _OUTLIER * weights.mean(-1, keepdim=True)).float().mean(-1)
        self.order[:] = scores.argsort(stable=True).cpu().numpy()
        regions = (Region(0, *[_divided(self.low, self.high, self.order.tolist())] * 2),)
        return Rotation(regions, self.rotation.at, self.rotation.tables).rotate(query, key, seen)


def _put_in_order(
    _: nn.Module, args: Any, given: dict[str, Any], *, low: float, high: float, order: np.ndarray
) -> tuple[Any, dict[str, Any]]:
    return args, given | {"lrs_rotation": _Ordering(given["lrs_rotation"], low, high, order)}
