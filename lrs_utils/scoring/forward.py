"""One forward pass over packed rows: attention, position tables, layout, and the model's own layers, called one by one.

`score`, `nll_gradient` and `window_nll` all read through `PackedForward`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrs_utils.models.decode import attending_by
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Setting, reachable_decoder
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.products import multiplied, products
from lrs_utils.scaling.rotation import Rotation
from lrs_utils.scaling.tables import PositionTables
from lrs_utils.scaling.trial import N_TOKENS, logits, same, some_tokens, tried
from lrs_utils.scoring.attention import laid_out
from lrs_utils.scoring.packing import FixedRows, Layout, Packed


class PackedForward:
    """A model's layers over a packed row, each layer under any setting, while this is entered.

    The model's own forward embeds the tokens (`embed`) and makes logits of what the last layer puts out (`logits`); in
    between its layers are called from outside (`run`), on copies of the row laid end to end.

    Parameters
    ----------
    scaled : bool
        Whether any layer's positions are scaled. If not, families whose tables can't be made again are read too.
    fixed_rows : bool
        Multiply a fixed number of tokens at a time, so that a token's numbers are the same to the last bit whatever
        lies next to it (`packing.FixedRows`).
    """

    def __init__(self, lm: LM, *, scaled: bool = True, fixed_rows: bool = False) -> None:
        self._lm, self._scaled, self._fixed_rows = lm, scaled, fixed_rows
        self._layers = reachable_decoder(lm.model).layers
        self._tables: PositionTables | None = None

    def __enter__(self) -> "PackedForward":
        with ExitStack() as stack:
            stack.enter_context(attending_by(self._lm.model, "lrs_packed"))
            if self._scaled:
                self._tables = stack.enter_context(PositionTables(self._lm.model))
            if self._fixed_rows:
                stack.enter_context(FixedRows())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def stretch_for(self, length: int | None) -> None:
        """Let "dynamic_ntk" stretch for so many tokens from now on, as `PositionTables` has it."""
        if self._tables is not None:
            self._tables.length = length

    def embed(self, layout: Layout) -> Tensor:
        """The first layer's input for a row, (1, tokens, hidden).

        From the model's own forward, with layers that only note what they are given besides their input.
        """

        def note(hidden: Tensor, *more: Any, **given: Any) -> Tensor:
            if more:
                raise ValueError("its layers are given more than their input by place, which is not known here")
            inputs.append(hidden)
            self._given.append(given)
            return hidden

        self._layout, self._given = layout, list[dict[str, Any]]()
        none = torch.empty(0, dtype=torch.long, device=layout.ids.device)
        inputs: list[Tensor] = []
        with laid_out(layout), _layers_replaced(self._layers, note):
            # without its hooks: a gradient computes some things twice, in another thread, which would wait for this
            self._lm.model.forward(
                layout.ids[None], position_ids=layout.positions[None], use_cache=False, logits_to_keep=none
            )
        return inputs[0]

    def table(self, index: int, setting: Setting) -> tuple[Tensor, Tensor] | None:
        """cos and sin of a layer under a setting; None where nothing is scaled."""
        return None if self._tables is None else self._tables(self._given[index].get("position_embeddings"), setting)

    def differentiable_table(
        self, index: int, scaling: LayerScaling, factor: Tensor, temperature: Tensor, bands: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of a layer, which let a gradient through to its factor, temperature and bands."""
        assert self._tables is not None
        given = self._given[index]["position_embeddings"]
        return self._tables.differentiable(given, scaling, factor, temperature, bands)

    def differentiable_rotation(
        self,
        index: int,
        scaling: LayerScaling,
        factors: Tensor,
        temperature: Tensor,
        bands: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], Rotation]:
        """cos and sin that rotate nothing, and a rotation that lets a gradient through to each head's factor."""
        assert self._tables is not None
        given = self._given[index]["position_embeddings"]
        return self._tables.rotates_nothing(given), self._tables.differentiable_rotation(
            given, scaling, factors, temperature, bands
        )

    def run(self, index: int, hidden: Tensor, settings: Sequence[Setting]) -> Tensor:
        """One layer over copies of the row laid end to end, each under its setting."""
        tables = [self.table(index, setting) for setting in settings]
        if len(tables) > 1 and self._tables is not None:
            tables = [tuple(torch.cat(part, dim=1) for part in zip(*tables, strict=True))]  # type: ignore[list-item]
        rotations = [self._rotation(index, setting) for setting in settings]
        numbers = products(settings, self._layout.length, self._lm.model)
        return self.run_with(index, hidden, tables[0], rotations, *numbers)

    def _rotation(self, index: int, setting: Setting) -> Rotation | None:
        """How a layer rotates in its attention, where its setting says that it does."""
        if self._tables is None or not setting.rotates_itself:
            return None
        return self._tables.rotation(self._given[index].get("position_embeddings"), setting)

    def run_with(
        self,
        index: int,
        hidden: Tensor,
        table: tuple[Tensor, Tensor] | None,
        rotations: Sequence[Rotation | None],
        *numbers: Tensor | None,
    ) -> Tensor:
        """One layer with a table for all copies, a rotation for each, and numbers of heads as `products.multiplied`
        takes them."""
        layer, given, n = self._layers[index], self._given[index], self._layout.length
        if (copies := hidden.shape[1] // n) > 1:
            given = {
                name: value.repeat(1, copies) if isinstance(value, Tensor) and value.shape == (1, n) else value
                for name, value in given.items()
            }
        if table is not None:
            given = given | {"position_embeddings": table}
        if any(rotation is not None for rotation in rotations):
            given = given | {"lrs_rotations": rotations}
        # the layout is set here, since a gradient's second computation may run in another thread
        with laid_out(self._layout), multiplied(layer, *numbers):
            return _require_tensor(layer, layer(hidden, **given))

    def run_unhooked(self, hidden: Tensor) -> Tensor:
        """All layers by their plain forward: hooks would scale again what `embed` noted scaled."""
        for layer, given in zip(self._layers, self._given, strict=True):
            with laid_out(self._layout):
                hidden = _require_tensor(layer, layer.forward(hidden, **given))
        return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Logits (states, vocabulary) of last-layer outputs (states, hidden), by the model's own norm and head.

        In the model's precision.
        """
        with _layers_replaced(self._layers, lambda *_, **__: states[None]):
            tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            return self._lm.model.forward(tokens, use_cache=False).logits[0]  # type: ignore[no-any-return]


def refuse_unscorable(lm: LM) -> None:
    """Raise the ValueError that names a family whose packed rows are not what its plain forward pass makes of them."""
    if not tried(lm.model, "score", lambda: _packed_as_plain(lm), True):
        raise ValueError(
            f"{type(lm.model).__name__} can't be scored: tried on a few tokens, a context packed with two questions "
            "gives other logits than the model's own forward pass; its attention does more than causal softmax"
        )


def _packed_as_plain(lm: LM) -> bool:
    ids, n, context = some_tokens(lm.model, N_TOKENS + 3), N_TOKENS, N_TOKENS - 3
    texts = ids[:n], torch.cat([ids[:context], ids[n:]])  # a context of five tokens and two branches of three
    plain = [logits(lm.model, text, torch.arange(n)) for text in texts]
    positions = torch.cat([torch.arange(n), torch.arange(context, n)])
    branch = torch.tensor([0] * context + [1] * 3 + [2] * 3)
    packed = Packed(ids, positions, branch, torch.arange(len(ids)), ids, np.zeros(len(ids), np.int64))
    with PackedForward(lm, scaled=False, fixed_rows=True) as forward:
        hidden = forward.run_unhooked(forward.embed(Layout([packed], lm.model.device)))
        found = forward.logits(hidden[0]).float()
    wanted = torch.cat([plain[0], plain[1][context:]])
    return same(found, wanted, wanted.roll(1, 0))


def _require_tensor(layer: nn.Module, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"{type(layer).__name__} gives more than a tensor, which `score` would lose")
    return output


@contextmanager
def _layers_replaced(layers: nn.ModuleList, stand_in: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model's forward call `stand_in` for every layer."""
    before = [vars(layer).get("forward") for layer in layers]  # accelerate puts its own on models spread over devices
    for layer in layers:
        layer.forward = stand_in
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward  # the instance's; the class's is back
            else:
                layer.forward = forward
