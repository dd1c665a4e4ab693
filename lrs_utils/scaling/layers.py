"""Per-layer scaling of rotary positions: the method itself (arXiv 2503.04355, Section 3).

Knows how a layer's factor (and temperature) becomes that layer's cos/sin tables, by the formulas of `rope`, and how to
hang those tables on an unmodified Hugging Face model. Per-head numbers are `heads`. Where numbers come from is `bezier`
and `search`; what they are worth is `scoring` and `metrics`; their files are `factors`.
"""

import copy
import inspect
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lrs_utils.models.load import used_alone
from lrs_utils.scaling.rope import COMBINATIONS, DYNAMIC, SCHEMES, layer_frequencies
from lrs_utils.scaling.trial import N_TOKENS, layers_with_temperatures, obeys_factors, tried


class Setting(NamedTuple):
    """A decoder layer's numbers: what cos and sin are made from (`rope.layer_frequencies`), and those of its heads."""

    factor: float = 1.0
    temperature: float = 1.0
    scheme: str = SCHEMES[0]
    extension: float = 1.0
    combine: str = COMBINATIONS[0]
    head_temperatures: tuple[float, ...] = ()  # none: 1 for every head
    head_gains: tuple[float, ...] = ()
    mlp_gain: float = 1.0

    @property
    def positions(self) -> "Setting":
        """What cos and sin depend on."""
        return Setting(*self[:5])


UNSCALED = Setting()
_MOST = 1e6  # of a factor or temperature: beyond it frequencies and logits overflow

_scaled_decoders: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by which thread; others wait
_COPIES_KEPT = 2048  # of a rotary embedding, some kilobytes each
_TABLES_KEPT = 64  # of one call of a rotary embedding; a layer's cos and sin are small beside its activations


class Scaling(ABC):
    """Numbers that change what a model computes, with no weight changed: `LayerScaling`, `heads.HeadScaling`."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Canonical text of what this scaling computes: those that compute the same have the same."""

    @property
    @abstractmethod
    def settings(self) -> tuple[Setting, ...]:
        """Setting of each layer: scalings that agree up to layer l compute the same up to there."""

    @property
    @abstractmethod
    def reach(self) -> float:
        """Tokens that may be read, in windows."""

    @abstractmethod
    def applied_to(self, model: PreTrainedModel, *, length: int | None = None) -> AbstractContextManager[None]:
        """Let `model` behave as scaled inside the `with` block: forward, `generate` and caches included."""

    @abstractmethod
    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError of `applied_to` where this scaling can't be put on the model as it is."""

    @abstractmethod
    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model whose weights hold the numbers, or a ValueError where that can't be exact."""

    @abstractmethod
    def at_dose(self, dose: float) -> "Scaling":
        """The same numbers to the power of `dose`: 0 is no scaling, 1 this one."""

    @property
    def is_identity(self) -> bool:
        """Nothing is changed."""
        return set(self.settings) == {UNSCALED}

    @property
    def stretches_by_length(self) -> bool:
        """Frequencies depend on how much is read."""
        return any(setting.scheme == DYNAMIC for setting in self.settings)


@dataclass(frozen=True)
class LayerScaling(Scaling):
    """One factor (and optionally one temperature) for each decoder layer.

    Layer l reads position m as m / s_l, for both queries and keys, so relative distances shrink by s_l.

    Parameters
    ----------
    factors : sequence of float, shape (layers,)
        s_l > 0. Above 1 attention decays more slowly with distance, below 1 faster; exactly 1 leaves the
        layer's own tables in place, bit for bit. Layers without rotary positions (SmolLM3 has some) have
        nothing to scale, so their factor changes nothing.
    scheme : str
        How a factor enters the frequencies: "pi" (the paper's: all are divided by s_l), "ntk" or "yarn", which keep
        the high ones (`rope.scaled_frequencies`), or "dynamic_ntk", which stretches by what is read (`extension`).
    temperatures : sequence of float, shape (layers,), optional
        t_l > 0: the attention logits of layer l are multiplied by t_l. Our extension, not the paper's: YaRN's
        single softmax temperature, given to each layer. Costs nothing at inference, being folded into cos and sin.
    extension : float
        L'/L, from 1 on: what the scheme stretches every layer by, below the factors, so that a model reads beyond its
        window.
    combine : str
        How a factor comes on top of it (`rope.layer_frequencies`): "multiply", into the scheme, or "divide", after it.

    Raises
    ------
    ValueError
        A value that is not a positive finite number, an extension below 1, an unknown scheme or way to combine, or
        lengths that differ.
    """

    factors: tuple[float, ...]
    scheme: str = "pi"
    temperatures: tuple[float, ...] | None = None
    extension: float = 1.0
    combine: str = "multiply"

    def __init__(
        self,
        factors: Sequence[float],
        scheme: str = "pi",
        temperatures: Sequence[float] | None = None,
        *,
        extension: float = 1.0,
        combine: str = "multiply",
    ) -> None:
        for name, value, known in (("scheme", scheme, (*SCHEMES, DYNAMIC)), ("combine", combine, COMBINATIONS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        if (_number(extension) or 0) < 1:
            raise ValueError(f"extension is {extension!r}; it must be a number from 1 on")
        object.__setattr__(self, "factors", _positive("factors", factors))
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "extension", float(extension))
        object.__setattr__(self, "combine", combine)
        if temperatures is not None:
            temperatures = _positive("temperatures", temperatures)
            if len(temperatures) != len(self.factors):
                raise ValueError(
                    f"temperatures has {len(temperatures)} values but factors has {len(self.factors)}; "
                    "give one of each per layer"
                )
            if all(t == 1.0 for t in temperatures):
                temperatures = None  # the same scaling, so it must be the same value (and the same ledger key)
        object.__setattr__(self, "temperatures", temperatures)

    @classmethod
    def uniform(cls, factor: float, num_layers: int, scheme: str = "pi", **options: Any) -> "LayerScaling":
        """The same factor in each of `num_layers` layers; `options` as in `LayerScaling`."""
        return cls((factor,) * num_layers, scheme, **options)

    @classmethod
    def identity(cls, num_layers: int) -> "LayerScaling":
        """Factor 1 everywhere: the model as it was trained."""
        return cls.uniform(1.0, num_layers)

    @classmethod
    def one_layer(cls, layer: int, factor: float, num_layers: int, scheme: str = "pi") -> "LayerScaling":
        """Only one layer scaled (0-based), all others left unchanged."""
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is outside the {num_layers} layers (0 to {num_layers - 1})")
        return cls([factor if at == layer else 1.0 for at in range(num_layers)], scheme)

    @property
    def key(self) -> str:
        """Canonical text of what this scaling computes: those that compute the same have the same."""
        settings = self.settings
        divided = {setting.scheme for setting in settings if setting.combine == "divide"}
        if divided:
            [head], factors = divided, self.factors
            head += f" x{self.extension!r} /"
        else:
            factors = tuple(setting.factor for setting in settings)
            head = next((setting.scheme for setting in settings if setting.scheme != UNSCALED.scheme), UNSCALED.scheme)
        parts = [head, ",".join(map(repr, factors))]
        if self.temperatures is not None:
            parts.append(",".join(map(repr, self.temperatures)))
        return "|".join(parts)

    @classmethod
    def from_key(cls, key: str) -> "LayerScaling":
        """A scaling that computes what the key is of; an extension may have become part of its factors."""
        head, factors, *temperatures = key.split("|")
        values = [tuple(map(float, part.split(","))) for part in (factors, *temperatures)]
        scheme, *divided = head.split(" ")
        options: dict[str, Any] = {"extension": float(divided[0][1:]), "combine": "divide"} if divided else {}
        return cls(values[0], scheme, values[1] if temperatures else None, **options)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Setting of each layer: scalings that agree up to layer l compute the same up to there."""
        temperatures = self.temperatures or (1.0,) * len(self.factors)
        return tuple(map(self._setting, self.factors, temperatures))

    def _setting(self, factor: float, temperature: float) -> Setting:
        """The simplest setting that computes this layer."""
        if self.combine == "divide" and self.scheme != "pi" and factor != 1:
            if self.scheme != DYNAMIC and self.extension == 1:
                return Setting(factor, temperature)  # the division is all that is left
            return Setting(factor, temperature, self.scheme, self.extension, "divide")
        factor *= self.extension
        return Setting(factor, temperature, UNSCALED.scheme if factor == 1 and self.scheme != DYNAMIC else self.scheme)

    @property
    def reach(self) -> float:
        """Tokens that may be read, in windows: a factor below 1 brings the end of the window nearer."""
        lowest = min(self.factors)
        if self.scheme != DYNAMIC:
            return self.extension * lowest
        if self.combine == "divide":  # of what is stretched as it is read
            return math.inf if lowest >= 1 else lowest
        return math.inf if self.extension * lowest >= 1 else 1.0

    @contextmanager
    def applied_to(self, model: PreTrainedModel, *, length: int | None = None) -> Iterator[None]:
        """Let `model` behave as scaled inside the `with` block: forward, `generate` and caches included.

        Hooks replace the `position_embeddings` that each decoder layer receives; no weight or buffer changes,
        and everything is removed again on exit, even after an error. Another thread that calls the model meanwhile
        waits.

        Parameters
        ----------
        length : int, optional
            Of "dynamic_ntk": tokens that it stretches for. By default what the first forward pass of a sequence reads,
            also for what comes after it (one sequence after the other, not by turns): keys in the cache keep the
            frequencies that they were rotated by, so the queries must too. (transformers changes them for each new
            token, and old keys no longer fit.)

        Raises
        ------
        ValueError
            The number of factors is not the model's number of layers, the model is already scaled, or its
            family can't be reached this way (named in the message); a length that is not positive or that the scheme
            has no use for.
        """
        if length is not None and (length < 1 or self.scheme != DYNAMIC):
            raise ValueError(f"length is {length} with scheme {self.scheme!r}; give 1 or more, to {DYNAMIC!r} only")
        decoder = reachable_decoder(model)

        def replace_for(setting: Setting, tables: "PositionTables") -> Any:
            def replace(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return args, kwargs | {"position_embeddings": tables(kwargs.get("position_embeddings"), setting)}

            return replace

        with ExitStack() as stack:
            stack.enter_context(used_alone(model))
            self.refuse_misfit(model)
            _scaled_decoders[decoder] = threading.get_ident()
            stack.callback(_scaled_decoders.pop, decoder)
            if not self.is_identity:
                tables = stack.enter_context(PositionTables(model, length=length))
                for layer, setting in zip(decoder.layers, self.settings, strict=True):
                    if setting != UNSCALED:
                        tables.prepare(setting)
                        handle = layer.register_forward_pre_hook(replace_for(setting, tables), with_kwargs=True)
                        stack.callback(handle.remove)
            yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError of `applied_to` where this scaling can't be put on the model as it is."""
        decoder = reachable_decoder(model)
        n_layers = len(decoder.layers)
        if len(self.factors) != n_layers:
            raise ValueError(f"factors has {len(self.factors)} values but {model_name(model)} has {n_layers} layers")
        if _scaled_decoders.get(decoder) == threading.get_ident():
            raise ValueError(f"{model_name(model)} is already scaled; leave the other `applied_to` block first")
        if not self.is_identity:
            _refuse_ignored_factors(model)
        if self.temperatures is not None:
            _refuse_idle_temperatures(model, self.temperatures)

    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model whose weights hold the temperatures; factors act on cos and sin, which no weight holds.

        Raises
        ------
        ValueError
            A factor or an extension that changes anything; temperatures where `HeadScaling.fold_into` refuses them.
        """
        from lrs_utils.scaling.heads import HeadScaling  # which builds on this module

        changed = [at for at, setting in enumerate(self.settings) if setting._replace(temperature=1.0) != UNSCALED]
        if changed:
            raise ValueError(
                f"the factor of layer {changed[0]} changes cos and sin, which no weight of {model_name(model)} holds; "
                "use `applied_to`, or a scaling of head gains or temperatures"
            )
        self.refuse_misfit(model)
        heads = model.config.get_text_config().num_attention_heads
        return HeadScaling([[t] * heads for t in self.temperatures or (1.0,) * len(self.factors)]).fold_into(model)

    def at_dose(self, dose: float) -> "LayerScaling":
        """Factors and temperatures to the power of `dose`: 0 is no scaling, 1 this one."""
        return replace(
            self,
            factors=tuple(float(round(f**dose, 5)) for f in self.factors),
            temperatures=None if self.temperatures is None else tuple(round(t**dose, 5) for t in self.temperatures),
        )


class PositionTables:
    """cos and sin of any setting, of what a model's rotary embedding is asked while this is entered.

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
                tables.clear()  # a search off the grid brings ever new factors
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

    def differentiable(self, given: Any, scaling: LayerScaling, *values: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of a layer whose factor and temperature are tensors (scalars), for a gradient by them."""
        args, kwargs, _ = self._calls[given[0]]
        setting: Any = (*values, scaling.scheme, scaling.extension, scaling.combine)
        length = self._stretched_for(scaling.scheme, *args, **kwargs)
        rotary = _scaled_rotary(self._unscaled, setting, self._window, length, name=self._name)
        # transformers computes tables under `no_grad`, a decorator; beneath it stands the formula
        tables = inspect.unwrap(type(rotary).forward)(rotary, *args, **kwargs)
        if not all(table.requires_grad for table in tables):
            raise ValueError(f"{self._name}: {type(rotary).__name__} lets no gradient through to layer factors")
        return tables  # type: ignore[no-any-return]

    def _remember(self, _: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._calls[output[0]] = (args, kwargs, {})


def model_name(model: PreTrainedModel) -> str:
    """What to call the model in a message: its hub id or folder name, else its class."""
    path = getattr(model.config, "_name_or_path", "")
    return Path(path).name or type(model).__name__


def _positive(name: str, values: Sequence[float]) -> tuple[float, ...]:
    # a set or a mapping has no order, and layers have one
    if isinstance(values, str | bytes | Set | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} must be a sequence of numbers, one a layer, not {values!r}")
    checked = []
    for layer, value in enumerate(values):
        number = _number(value)
        if number is None or not 0 < number <= _MOST:
            raise ValueError(f"{name}[{layer}] is {value!r}; it must be a positive finite number, at most {_MOST:g}")
        checked.append(number)
    if not checked:
        raise ValueError(f"{name} is empty; give one value for each decoder layer")
    return tuple(checked)


def _number(value: Any) -> float | None:
    """A finite number as a float, whatever type it comes in."""
    if isinstance(value, str | bytes | bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def reachable_decoder(model: PreTrainedModel) -> Any:
    """The module that owns `layers` and `rotary_emb`, or an error that names the family and what it lacks."""
    if not isinstance(model, PreTrainedModel):
        hint = "give its .model" if hasattr(model, "model") else "give a causal language model of transformers"
        raise ValueError(f"a {type(model).__name__} can't be scaled; {hint}")
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    family = type(model).__name__
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise ValueError(f"{family} can't be scaled by layer: its decoder has no `layers` with a shared `rotary_emb`")
    strange = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        raise ValueError(
            f"{family} can't be scaled by layer: its {', '.join(sorted(strange))} layers are no causal attention known "
            "here"
        )
    if any("position_embeddings" not in inspect.signature(type(layer).forward).parameters for layer in layers):
        raise ValueError(f"{family} can't be scaled by layer: its layers take no `position_embeddings`")
    return decoder


def _refuse_ignored_factors(model: PreTrainedModel) -> None:
    decoder = reachable_decoder(model)
    halved = LayerScaling.uniform(2.0, len(decoder.layers)).applied_to(model)
    if not tried(model, "factors", lambda: obeys_factors(model, halved), True):
        raise ValueError(
            f"{type(model).__name__} can't be scaled by layer: tried on {N_TOKENS} tokens, a factor of 2 does not "
            "divide its positions by 2; it reads positions elsewhere than in the cos and sin that its layers get"
        )


def temperature_layers(model: PreTrainedModel) -> tuple[bool, ...]:
    """In which layers a temperature, put into cos and sin, multiplies the attention logits, tried on a few tokens.

    Not where there are no rotary positions, where a part of a head is rotated, or where a norm comes after rotation.
    """
    layers = reachable_decoder(model).layers

    def hot(layer: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        cos, sin = given["position_embeddings"]
        return layer.forward(*args, **given | {"position_embeddings": (2 * cos, 2 * sin)})

    trial = partial(layers_with_temperatures, model, layers, hot)
    return tried(model, "temperatures", trial, (True,) * len(layers))


def _refuse_idle_temperatures(model: PreTrainedModel, temperatures: Sequence[float]) -> None:
    for layer, (temperature, obeyed) in enumerate(zip(temperatures, temperature_layers(model), strict=True)):
        if temperature != 1 and not obeyed:
            raise ValueError(
                f"temperatures[{layer}] is {temperature:g}, but in layer {layer} of {type(model).__name__} it would "
                "not multiply the attention logits: cos and sin carry it, and that layer rotates no queries and keys, "
                "or a part, or normalises them afterwards; leave it 1, or give heads temperatures (HeadScaling)"
            )


def _scaled_rotary(rotary: nn.Module, setting: Setting, window: int, length: int, *, name: str) -> nn.Module:
    """A copy of the model's rotary embedding (a few dozen numbers) with its frequencies and gain changed."""
    factor, temperature, scheme, extension, combine = setting[:5]
    scaled = copy.deepcopy(rotary)
    found = {buffer: values for buffer, values in scaled.named_buffers(recurse=False) if buffer.endswith("inv_freq")}
    gains = [attribute for attribute in vars(scaled) if attribute.endswith("attention_scaling")]
    for buffer, inv_freq in found.items():
        try:
            frequencies, gain = layer_frequencies(
                inv_freq, factor, scheme, window, extension=extension, combine=combine, length=length
            )
        except ValueError as error:
            raise ValueError(f"{name} can't be scaled: {error}") from error
        setattr(scaled, buffer, frequencies)
    if not found or (not gains and (temperature, gain) != (1.0, 1.0)):
        raise ValueError(f"{name} can't be scaled: {type(rotary).__name__} has no `inv_freq` or `attention_scaling`")
    for attribute in gains:
        # q and k each carry sqrt(t), their product t
        setattr(scaled, attribute, getattr(scaled, attribute) * gain * temperature**0.5)
    return scaled
