"""The numbers of a scaling, told and drawn."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.extension import ExtendedScaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.products import n_heads


def draw_numbers(scaling: Scaling, lm: LM, axes: Sequence[Axes]) -> None:
    """A scaling's numbers: a map of layers and heads for each kind, or factors and temperatures over layers."""
    if maps := list_maps(scaling, lm):
        for ax, ((name, of), numbers) in zip(axes, maps.items(), strict=True):
            values = np.log2(np.array(numbers)).T
            limit = float(np.abs(values).max())
            bar = {"label": f"log2 of {of} {name}"}
            sns.heatmap(values, cmap="vlag", vmin=-limit, vmax=limit, ax=ax, cbar_kws=bar, xticklabels=5)
            ax.tick_params(axis="x", rotation=0)
            ax.set(xlabel="layer", ylabel=of)
            ax.set_title(f"one {name} per {of}", loc="left")
        return
    [ax] = axes
    layers = scaling.layers if isinstance(scaling, HeadScaling) else scaling
    if isinstance(layers, LayerScaling):
        ax.plot(layers.factors, color="#0173b2")
        ax.annotate("factor", (len(layers.factors) - 1, layers.factors[-1]), color="#0173b2")
        if layers.temperatures:
            ax.plot(layers.temperatures, color="#de8f05")
            ax.annotate("temperature", (len(layers.factors) - 1, layers.temperatures[-1]), color="#de8f05")
    ax.set(xlabel="layer", ylabel="number")


def describe_numbers(scaling: Scaling, lm: LM) -> str:
    """How many numbers of which kinds a scaling has: "270 head gains"."""
    parts = [f"{np.size(numbers):,} {of} {name}s" for (name, of), numbers in list_maps(scaling, lm).items()]
    if isinstance(scaling, HeadScaling) and scaling.mlp_gains:
        parts.append(f"{len(scaling.mlp_gains)} gains of MLPs")
    layers = scaling.layers if isinstance(scaling, HeadScaling) else scaling
    if isinstance(layers, LayerScaling) and ({*layers.factors} != {1.0} or layers.temperatures):
        names = "factors and temperatures" if layers.temperatures else "factors"
        parts.append(f"{len(layers.factors)} {names} of layers")
    if isinstance(layers, ExtendedScaling) and layers.extension != 1.0:
        parts.append(f"an extension of the window by {layers.extension:g} ({layers.scheme})")
    return " and ".join(parts)


def list_maps(scaling: Scaling, lm: LM) -> dict[tuple[str, str], tuple[tuple[float, ...], ...]]:
    """Numbers of which a layer has several, (layers, numbers), by the name of one and what has it."""
    found, heads = {}, n_heads(lm.model)
    if isinstance(scaling, HeadScaling):
        of_heads = {
            "gain": (scaling.gains, "channel"), "temperature": (scaling.temperatures, "pair"),
            "factor": (scaling.factors, ""),
        }  # fmt: skip
        for name, (numbers, of) in of_heads.items():
            if numbers:
                found[name, "head" if len(numbers[0]) == heads else of] = numbers
    layers = scaling.layers if isinstance(scaling, HeadScaling) else scaling
    if isinstance(layers, LayerScaling) and layers.bands:
        found["factor", "band"] = layers.bands
    return found
