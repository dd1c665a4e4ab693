"""Layer factors on a model that is stretched to read beyond its window: PI, NTK, YaRN and Dynamic NTK."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrs_utils.scaling.base import Setting
from lrs_utils.scaling.layers import LayerScaling, finite, refuse_unknown
from lrs_utils.scaling.rope import COMBINATIONS, DYNAMIC, SCHEMES


@dataclass(frozen=True)
class ExtendedScaling(LayerScaling):
    """A `LayerScaling` on top of one stretch of all layers.

    "multiply" with "pi", "ntk" and "yarn" is a `LayerScaling` with factors s_l times the extension, and has the same
    key. "divide" is positions divided by s_l on a model that transformers itself stretches (`rope_parameters`).

    Parameters
    ----------
    factors, temperatures, bands
        As in `LayerScaling`; factor 1 leaves a layer with the extension alone.
    scheme : str
        One of `LayerScaling`'s, or "dynamic_ntk", which stretches by what is read (`applied_to`).
    extension : float
        L'/L, from 1 on: what the scheme stretches every layer by.
    combine : str
        How a factor comes on top of it (`rope.layer_frequencies`): "multiply", into the scheme, or "divide", after it.

    Raises
    ------
    ValueError
        As in `LayerScaling`; an extension below 1, an unknown way to combine.

    Notes
    -----
    `applied_to(model, length=n)` lets "dynamic_ntk" stretch for n tokens. By default it takes what the first forward
    pass of a sequence reads, and the same for what comes after it (one sequence at a time, not interleaved): keys in
    the cache keep the frequencies that they were rotated by, so the queries must too. (transformers changes them for
    each new token, and old keys no longer fit.)
    """

    extension: float = 1.0  # type: ignore[misc]
    combine: str = COMBINATIONS[0]  # type: ignore[misc]
    schemes = (*SCHEMES, DYNAMIC)

    def __init__(
        self,
        factors: Sequence[float],
        scheme: str = "pi",
        temperatures: Sequence[float] | None = None,
        bands: Sequence[Sequence[float]] | None = None,
        *,
        extension: float = 1.0,
        combine: str = COMBINATIONS[0],
    ) -> None:
        refuse_unknown("combine", combine, COMBINATIONS)
        if (finite(extension) or 0) < 1:
            raise ValueError(f"extension is {extension!r}; it must be a number from 1 on")
        super().__init__(factors, scheme, temperatures, bands)
        object.__setattr__(self, "extension", float(extension))
        object.__setattr__(self, "combine", combine)

    @property
    def key(self) -> str:
        """Canonical text of what this scaling computes: those that compute the same have the same."""
        divided = [setting.scheme for setting in self.settings if setting.combine == "divide"]
        return self._text(f"{divided[0]} x{self.extension!r} /", self.factors) if divided else super().key

    @classmethod
    def from_key(cls, key: str) -> "ExtendedScaling":
        """A scaling that computes what the key is of; an extension may have become part of its factors."""
        head, _, numbers = key.partition("|")
        scheme, *divided = head.split(" ")
        plain = LayerScaling.from_key(f"{SCHEMES[0]}|{numbers}")
        extension, combine = (float(divided[0][1:]), "divide") if divided else (1.0, COMBINATIONS[0])
        return cls(plain.factors, scheme, plain.temperatures, plain.bands, extension=extension, combine=combine)

    def _setting(self, factor: float, temperature: float) -> Setting:
        """The simplest setting that computes this layer."""
        if self.combine == "divide" and self.scheme != "pi" and factor != 1:
            if self.scheme != DYNAMIC and self.extension == 1:
                return Setting(factor, temperature)  # the division is all that is left
            return Setting(factor, temperature, self.scheme, self.extension, "divide")
        setting = super()._setting(factor * self.extension, temperature)
        return setting._replace(scheme=DYNAMIC) if self.scheme == DYNAMIC else setting

    @property
    def reach(self) -> float:
        """Tokens that may be read, in windows: a factor or band below 1 brings the end of the window nearer."""
        lowest = super().reach
        if self.scheme != DYNAMIC:
            return self.extension * lowest
        if self.combine == "divide":  # of what is stretched as it is read
            return math.inf if lowest >= 1 else lowest
        return math.inf if self.extension * lowest >= 1 else 1.0
