"""What every scaling is: settings of layers, and how they are put on a model and taken off again.

Knows which part of an unmodified Hugging Face model they reach. `layers` and `heads` are the two kinds of scaling.
"""

import inspect
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lrs_utils.scaling.rope import COMBINATIONS, DYNAMIC, SCHEMES
from lrs_utils.scaling.rotation import Region


class Setting(NamedTuple):
    """A decoder layer's numbers: what cos and sin are made from (`rope.layer_frequencies`), and those of its heads."""

    factor: float = 1.0
    temperature: float = 1.0
    scheme: str = SCHEMES[0]
    extension: float = 1.0
    combine: str = COMBINATIONS[0]
    bands: tuple[float, ...] = ()  # none: 1 for every band
    head_temperatures: tuple[float, ...] = ()  # none: 1 for every head; or for every pair of its dimensions
    head_gains: tuple[float, ...] = ()  # none: 1 for every head; or for every channel
    mlp_gain: float = 1.0
    head_factors: tuple[float, ...] = ()  # none: 1 for every head; each multiplies the layer's
    regions: tuple[Region, ...] = ()  # none: every distance is read as it is

    @property
    def rotates_itself(self) -> bool:
        """Its attention rotates queries and keys (`rotation`), since one table for the layer wouldn't do."""
        return bool(self.head_factors or self.regions)

    @property
    def positions(self) -> "Setting":
        """What the rotation of queries and keys depends on."""
        return self._replace(head_temperatures=(), head_gains=(), mlp_gain=1.0)


UNSCALED = Setting()


class Scaling(ABC):
    """Numbers that change what a model computes, with no weight changed: `LayerScaling`, `HeadScaling`."""

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
