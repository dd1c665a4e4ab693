"""cos and sin of a layer: a model's own rotary embedding with that layer's frequencies, by the formulas of `rope`."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lrs_utils.models.decode import model_name
from lrs_utils.scaling.base import UNSCALED, Setting, reachable_decoder
from lrs_utils.scaling.rope import DYNAMIC, divide_by_band, layer_frequencies
from lrs_utils.scaling.rotation import PLAIN, Positions, Region, Rotation

_COPIES_KEPT = 2048  # of a rotary embedding, some kilobytes each
_TABLES_KEPT = 64  # of one call of a rotary embedding; a layer's cos and sin are small beside its activations


class Stretch(Protocol):
    """How the factors of all layers enter the frequencies, as a `LayerScaling` tells it."""

    @property
    def scheme(self) -> str: ...

    @property
    def extension(self) -> float: ...

    @property
    def combine(self) -> str: ...


class PositionTables:
    """cos and sin under any setting, for all that a model's rotary embedding is asked while this is entered.

    Call it with the `position_embeddings` that a decoder layer was given and a setting; the result is that layer's own
    version of the same call. `UNSCALED` gives back what was given, bit for bit.

    Attributes
    ----------
    length : int or None
        Tokens that "dynamic_ntk" stretches for; None: those of the first forward pass of a sequence.

    Raises
    ------
    ValueError
        A rope type that recomputes its frequencies, or has none that the scheme can work with; position embeddings that
        the model's rotary embedding did not make.
    """

    def __init__(self, model: PreTrainedModel, *, length: int | None = None) -> None:
        self.length, self._read_first = length, 0
        self._name, self._decoder = model_name(model), reachable_decoder(model)
        self._rotary = self._decoder.rotary_emb
        rope_type = getattr(self._rotary, "rope_type", "default")
        for kind in rope_type.values() if isinstance(rope_type, dict) else [rope_type]:
            if "dynamic" in kind or kind == "longrope":
                raise ValueError(
                    f"{self._name} has rope type {kind!r}, which recomputes its frequencies in every forward pass from "
                    "whatever is read with it and would undo a layer's factor; load it with a static rope type"
                )
        self._window = int(model.config.get_text_config().max_position_embeddings)
        # copied while it has no hook: with it, every copy would hold a copy of all earlier ones
        self._unscaled = copy.deepcopy(self._rotary)
        self._scaled: dict[tuple[Setting, int], nn.Module] = {}
        # cos handed out by the rotary embedding -> how it was called and the tables made from that call so far. By
        # identity: several calls differ (Gemma 3 makes two kinds), and a layer receives the very cos of one of them.
        self._calls: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __enter__(self) -> "PositionTables":
        self._handles = [
            self._rotary.register_forward_hook(self._remember, with_kwargs=True),
            self._decoder.register_forward_pre_hook(self._entered, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, given: Any, setting: Setting) -> tuple[Tensor, Tensor]:
        setting = setting.positions
        if setting == UNSCALED:
            return given  # type: ignore[no-any-return]
        if given is None or given[0] not in self._calls:
            raise ValueError(
                f"{self._name} gave a layer position embeddings that its rotary_emb did not make, "
                "so the layer's factor would have been ignored"
            )
        args, kwargs, tables = self._calls[given[0]]
        if setting.rotates_itself:
            return self.rotates_nothing(given)
        if setting not in tables:
            if len(tables) >= _TABLES_KEPT:
                tables.clear()  # a search off the grid brings new factors without end
            tables[setting] = self.prepare(setting, self._stretched_for(setting.scheme, *args, **kwargs))(
                *args, **kwargs
            )
        return tables[setting]  # type: ignore[no-any-return]

    def rotates_nothing(self, given: Any) -> tuple[Tensor, Tensor]:
        """cos and sin that leave a layer's queries and keys as they are."""
        return torch.ones_like(given[0]), torch.zeros_like(given[1])

    def rotation(self, given: Any, setting: Setting) -> Rotation:
        """How a layer that was given these position embeddings rotates in its attention.

        The same for all layers with this setting, which share its tables.
        """
        args, kwargs, tables = self._calls[given[0]]
        setting = setting.positions
        if setting not in tables:
            if len(tables) >= _TABLES_KEPT:
                tables.clear()
            tables[setting] = self._make_rotation(args, kwargs, setting)
        return tables[setting]  # type: ignore[no-any-return]

    def _make_rotation(self, args: Any, kwargs: Any, setting: Setting) -> Rotation:
        length = self._stretched_for(setting.scheme, *args, **kwargs)
        factors = [setting.factor * head for head in setting.head_factors] or [setting.factor]
        rotaries = [self.prepare(setting._replace(factor=factor), length) for factor in factors]
        rotation = self._rotation_by(args, kwargs, setting.regions or (PLAIN,), rotaries, lambda rotary: rotary)
        made: dict[tuple[Positions, int], tuple[Tensor, Tensor]] = {}

        def keep(how: Positions, at: Tensor) -> tuple[Tensor, Tensor]:
            # in one forward pass as many positions are the same positions: those of the new tokens, or of all read
            if (how, len(at)) not in made:
                made[how, len(at)] = rotation.tables(how, at)
            return made[how, len(at)]

        return replace(rotation, tables=keep)

    def _rotation_by(
        self,
        args: Any,
        kwargs: Any,
        regions: tuple[Region, ...],
        rotaries: Sequence[nn.Module],
        called: Callable[[nn.Module], Callable[..., Any]],
    ) -> Rotation:
        call = inspect.signature(self._unscaled.forward).bind(*args, **kwargs)
        at = call.arguments["position_ids"]
        if not bool((at == at[:1]).all()):
            raise ValueError(f"{self._name} was given a batch of texts with different positions; give one at a time")

        def tables(how: Positions, at: Tensor) -> tuple[Tensor, Tensor]:
            positions = how.read(at)
            rows = positions if len(rotaries) == 1 else positions.expand(len(rotaries), -1)
            each = [rows] if len(rotaries) == 1 else rows[:, None]
            made = []
            for rotary, row in zip(rotaries, each, strict=True):
                call.arguments["position_ids"] = row
                made.append(called(rotary)(*call.args, **call.kwargs))
            cos, sin = zip(*made, strict=True)
            return torch.cat(cos), torch.cat(sin)

        return Rotation(regions, at[0], tables)

    def differentiable_rotation(
        self, given: Any, scaling: Stretch, factors: Tensor, temperature: Tensor, bands: Tensor | None
    ) -> Rotation:
        """A layer's rotation with a factor (tensor) for each head, for a gradient by them and by the others."""
        args, kwargs, _ = self._calls[given[0]]
        length = self._stretched_for(scaling.scheme, *args, **kwargs)
        rotaries = []
        for factor in factors:
            setting: Any = (factor, temperature, scaling.scheme, scaling.extension, scaling.combine, bands)
            rotaries.append(_scaled_rotary(self._unscaled, setting, self._window, length, name=self._name))

        def called(rotary: nn.Module) -> Callable[..., Any]:
            return partial(inspect.unwrap(type(rotary).forward), rotary)

        return self._rotation_by(args, kwargs, (PLAIN,), rotaries, called)

    def prepare(self, setting: Setting, length: int = 0) -> nn.Module:
        """The rotary embedding for a setting (and the tokens read, if that matters), or an error if there is none."""
        setting = setting.positions._replace(head_factors=(), regions=())
        if (setting, length) not in self._scaled:
            if len(self._scaled) >= _COPIES_KEPT:
                self._scaled.clear()
            scaled = _scaled_rotary(self._unscaled, setting, self._window, length, name=self._name)
            self._scaled[setting, length] = scaled
        return self._scaled[setting, length]

    def _entered(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            self._read_first = 0  # a new sequence

    def _stretched_for(self, scheme: str, _: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> int:
        if scheme != DYNAMIC:
            return 0
        if self.length is None and not self._read_first:
            self._read_first = int(position_ids.max()) + 1
        return self.length or self._read_first

    def differentiable(
        self, given: Any, scaling: Stretch, factor: Tensor, temperature: Tensor, bands: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tables of a layer whose factor, temperature (scalars) and bands are tensors, for a gradient by them."""
        args, kwargs, _ = self._calls[given[0]]
        setting: Any = (factor, temperature, scaling.scheme, scaling.extension, scaling.combine, bands)
        length = self._stretched_for(scaling.scheme, *args, **kwargs)
        rotary = _scaled_rotary(self._unscaled, setting, self._window, length, name=self._name)
        # transformers computes tables under `no_grad`, a decorator; beneath it is the formula
        tables = inspect.unwrap(type(rotary).forward)(rotary, *args, **kwargs)
        if not all(table.requires_grad for table in tables):
            raise ValueError(f"{self._name}: {type(rotary).__name__} lets no gradient through to layer factors")
        return tables  # type: ignore[no-any-return]

    def _remember(self, _: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._calls[output[0]] = (args, kwargs, {})


def _scaled_rotary(rotary: nn.Module, setting: Setting, window: int, length: int, *, name: str) -> nn.Module:
    """A copy of the model's rotary embedding (a few dozen numbers) with its frequencies and gain changed."""
    factor, temperature, scheme, extension, combine, bands = setting[:6]
    scaled = copy.deepcopy(rotary)
    found = {buffer: values for buffer, values in scaled.named_buffers(recurse=False) if buffer.endswith("inv_freq")}
    gains = [attribute for attribute in vars(scaled) if attribute.endswith("attention_scaling")]
    for buffer, inv_freq in found.items():
        try:
            frequencies, gain = layer_frequencies(
                inv_freq, factor, scheme, window, extension=extension, combine=combine, length=length
            )
            if bands is not None and len(bands):
                frequencies = divide_by_band(frequencies, bands)
        except ValueError as error:
            raise ValueError(f"{name} can't be scaled: {error}") from error
        setattr(scaled, buffer, frequencies)
    if not found or (not gains and (temperature, gain) != (1.0, 1.0)):
        raise ValueError(f"{name} can't be scaled: {type(rotary).__name__} has no `inv_freq` or `attention_scaling`")
    for attribute in gains:
        # q and k each carry sqrt(t), their product t
        setattr(scaled, attribute, getattr(scaled, attribute) * gain * temperature**0.5)
    return scaled
