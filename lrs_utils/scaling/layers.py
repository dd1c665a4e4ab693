"""Per-layer scaling of rotary positions: the method itself (arXiv 2503.04355, Section 3).

Puts the `tables` of each layer's factor (and temperature) on an unmodified Hugging Face model. Numbers of heads are
`heads`; reading beyond the window is `extension`. Where numbers come from is `bezier` and `searchers`; what they are
worth is `scoring`; their files are `files`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from lrs_utils.models.decode import model_name
from lrs_utils.models.scaled import refuse_exported
from lrs_utils.models.turns import used_alone
from lrs_utils.scaling.applied import positions_replaced, refuse_scaled
from lrs_utils.scaling.base import UNSCALED, Scaling, Setting, reachable_decoder
from lrs_utils.scaling.fold import fold
from lrs_utils.scaling.rope import COMBINATIONS, DYNAMIC, SCHEMES
from lrs_utils.scaling.tables import PositionTables
from lrs_utils.scaling.trial import N_TOKENS, layers_with_temperatures, obeys_factors, tried

_MOST = 1e6  # of a factor or temperature: beyond it frequencies and logits overflow


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
        the high ones (`rope.scaled_frequencies`).
    temperatures : sequence of float, shape (layers,), optional
        t_l > 0: the attention logits of layer l are multiplied by t_l. Our extension, not the paper's: YaRN's
        single softmax temperature, given to each layer. Costs nothing at inference, being folded into cos and sin.
    bands : array of float, shape (layers, bands), optional
        What the frequencies of each band of a layer are divided by, after its scheme (`rope.divide_by_band`). All equal
        to s, they are the factor s of "pi". Ours, not the paper's.

    Raises
    ------
    ValueError
        A value that is not a positive finite number, an unknown scheme, or lengths that differ.
    """

    factors: tuple[float, ...]
    scheme: str = "pi"
    temperatures: tuple[float, ...] | None = None
    bands: tuple[tuple[float, ...], ...] | None = None
    extension: ClassVar[float] = 1.0  # an `ExtendedScaling` has others
    combine: ClassVar[str] = COMBINATIONS[0]
    schemes: ClassVar[tuple[str, ...]] = SCHEMES

    def __init__(
        self,
        factors: Sequence[float],
        scheme: str = "pi",
        temperatures: Sequence[float] | None = None,
        bands: Sequence[Sequence[float]] | None = None,
    ) -> None:
        refuse_unknown("scheme", scheme, self.schemes)
        object.__setattr__(self, "factors", _positive("factors", factors))
        object.__setattr__(self, "scheme", scheme)
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
        object.__setattr__(self, "bands", None if bands is None else _check_bands(bands, len(self.factors)))

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
        scheme = next((setting.scheme for setting in settings if setting.scheme != UNSCALED.scheme), UNSCALED.scheme)
        return self._text(scheme, [setting.factor for setting in settings])

    def _text(self, scheme: str, factors: Sequence[float]) -> str:
        numbers = [factors] if self.temperatures is None else [factors, self.temperatures]
        parts = [scheme, *(",".join(map(repr, row)) for row in numbers)]
        if self.bands is not None:
            parts.append("bands " + "/".join(",".join(map(repr, row)) for row in self.bands))
        return "|".join(parts)

    @classmethod
    def from_key(cls, key: str) -> "LayerScaling":
        """A scaling that computes what the key is of."""
        plain, _, of_bands = key.partition("|bands ")
        scheme, factors, *temperatures = plain.split("|")
        values = [tuple(map(float, part.split(","))) for part in (factors, *temperatures)]
        bands = [tuple(map(float, row.split(","))) for row in of_bands.split("/")] if of_bands else None
        return cls(values[0], scheme, values[1] if temperatures else None, bands)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Setting of each layer: scalings that agree up to layer l compute the same up to there."""
        temperatures = self.temperatures or (1.0,) * len(self.factors)
        settings = tuple(map(self._setting, self.factors, temperatures))
        if self.bands is None:
            return settings
        return tuple(
            setting._replace(bands=row if set(row) != {1.0} else ())
            for setting, row in zip(settings, self.bands, strict=True)
        )

    def _setting(self, factor: float, temperature: float) -> Setting:
        """The simplest setting that computes this layer."""
        return Setting(factor, temperature, UNSCALED.scheme if factor == 1 else self.scheme)

    @property
    def reach(self) -> float:
        """Tokens that may be read, in windows: a factor or band below 1 brings the end of the window nearer."""
        bands = self.bands or ((1.0,),) * len(self.factors)
        return min(factor * min(row) for factor, row in zip(self.factors, bands, strict=True))

    @contextmanager
    def applied_to(self, model: PreTrainedModel, *, length: int | None = None) -> Iterator[None]:
        """Let `model` behave as scaled inside the `with` block: forward, `generate` and caches included.

        Hooks replace the `position_embeddings` that each decoder layer receives; no weight or buffer changes,
        and everything is removed again on exit, even after an error. Another thread that calls the model meanwhile
        waits. A cache of keys and values that was filled under another scaling is refused; one that was filled inside
        the block must not be used outside, where nothing could see it.

        Parameters
        ----------
        length : int, optional
            Only of an `ExtendedScaling` that stretches by what is read.

        Raises
        ------
        ValueError
            The number of factors is not the model's number of layers, the model is already scaled, or its
            family can't be reached this way (named in the message); a length that is not positive or that the scheme
            has no use for.
        """
        if length is not None and (length < 1 or self.scheme != DYNAMIC):
            raise ValueError(f"length is {length} with scheme {self.scheme!r}; give 1 or more, to {DYNAMIC!r} only")
        reachable_decoder(model)  # or an error, before anything that isn't a model gets a lock
        with used_alone(model):
            self.refuse_misfit(model)
            with positions_replaced(model, self.settings, length):
                yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError of `applied_to` where this scaling can't be put on the model as it is."""
        if not self.is_identity:
            refuse_exported(model)
        decoder = reachable_decoder(model)
        n_layers = len(decoder.layers)
        if len(self.factors) != n_layers:
            raise ValueError(f"factors has {len(self.factors)} values but {model_name(model)} has {n_layers} layers")
        refuse_scaled(model)
        if not self.is_identity:
            _refuse_ignored_factors(model)
        if self.temperatures is not None:
            _refuse_idle_temperatures(model, self.temperatures)
        if self.bands is not None:  # more than there are frequencies
            PositionTables(model).prepare(UNSCALED._replace(bands=self.bands[0]))

    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model whose own weights hold the temperatures; factors are refused (`fold.fold`)."""
        return fold(self, model)

    def at_dose(self, dose: float) -> "LayerScaling":
        """All numbers to the power of `dose`: 0 is no scaling, 1 this one."""
        return replace(
            self,
            factors=tuple(float(round(f**dose, 5)) for f in self.factors),
            temperatures=None if self.temperatures is None else tuple(round(t**dose, 5) for t in self.temperatures),
            bands=None if self.bands is None else tuple(tuple(round(b**dose, 5) for b in row) for row in self.bands),
        )


def _check_bands(bands: Sequence[Sequence[float]], n_layers: int) -> tuple[tuple[float, ...], ...] | None:
    """Positive numbers, as many in each layer; None where all are 1, which is the same scaling."""
    rows = tuple(_positive(f"bands[{layer}]", row) for layer, row in enumerate(bands))
    if len(rows) != n_layers or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"bands has {len(rows)} rows of {sorted({len(row) for row in rows})} for {n_layers} layers; give as many "
            "numbers for each layer"
        )
    return rows if any(number != 1.0 for row in rows for number in row) else None


def _positive(name: str, values: Sequence[float]) -> tuple[float, ...]:
    # a set or a mapping has no order, and layers have one
    if isinstance(values, str | bytes | Set | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} must be a sequence of numbers, one a layer, not {values!r}")
    checked = []
    for layer, value in enumerate(values):
        number = finite(value)
        if number is None or not 0 < number <= _MOST:
            raise ValueError(f"{name}[{layer}] is {value!r}; it must be a positive finite number, at most {_MOST:g}")
        checked.append(number)
    if not checked:
        raise ValueError(f"{name} is empty; give one value for each decoder layer")
    return tuple(checked)


def refuse_unknown(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError that names what may be chosen."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def finite(value: Any) -> float | None:
    """A finite number as a float, whatever type it comes in."""
    if isinstance(value, str | bytes | bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


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
