"""cos and sin of a layer: a model's own rotary embedding with that layer's frequencies, by the formulas of `rope`."""

import copy
import inspect
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lrs_utils.scaling.base import UNSCALED, Setting, model_name, reachable_decoder
from lrs_utils.scaling.rope import DYNAMIC, divide_by_band, layer_frequencies

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
        if given is None or given[0] not in self._calls:
            raise ValueError(
                f"{self._name} gave a layer position embeddings that its rotary_emb did not make, "
                "so the layer's factor would have been ignored"
            )
        args, kwargs, tables = self._calls[given[0]]
        setting = setting.positions
        if setting == UNSCALED:
            return given  # type: ignore[no-any-return]
        if setting not in tables:
            if len(tables) >= _TABLES_KEPT:
                tables.clear()  # a search off the grid brings new factors without end
            tables[setting] = self.prepare(setting, self._stretched_for(setting.scheme, *args, **kwargs))(
                *args, **kwargs
            )
        return tables[setting]  # type: ignore[no-any-return]

    def prepare(self, setting: Setting, length: int = 0) -> nn.Module:
        """The rotary embedding for a setting (and the tokens read, if that matters), or an error if there is none."""
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
