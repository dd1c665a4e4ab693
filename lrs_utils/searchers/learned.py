"""The numbers of layers and heads that a search by gradient may learn, and which of them together: spaces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling, temperature_layers
from lrs_utils.scaling.products import head_dim, n_heads

LAYER_NUMBERS = ("factors", "temperatures")
HEAD_NUMBERS = ("head_temperatures", "head_gains", "mlp_gains")
# Those of a head and those of its channels, by which a head's is multiplied there.
OF_HEADS = {"temperatures": ("head_temperatures", "pair_temperatures"), "gains": ("head_gains", "channel_gains")}
BANDS = (4, 8, 32)  # in a layer

# What may be learned together. Behind "=" all heads of a layer have the same number, or the same for each pair.
SPACES: dict[str, tuple[str, ...]] = {
    "factors": ("factors",),
    "pi_factors": ("factors",),  # the paper's own numbers: `find_scaling` starts from its scheme "pi", else from "ntk"
    "temperatures": ("temperatures",),
    "both": LAYER_NUMBERS,
    **{f"bands_{n}": (f"bands_{n}",) for n in BANDS},
    "head_temperatures": ("head_temperatures",),
    "head_gains": ("head_gains",),
    "heads": ("head_temperatures", "head_gains"),
    "layers_and_heads": (*LAYER_NUMBERS, "head_temperatures", "head_gains"),
    "head_factors": ("head_factors",),
    "pair_temperatures": ("pair_temperatures",),
    "layer_pair_temperatures": ("=pair_temperatures",),  # where heads share a query norm, these fold into it
    "layer_pairs_and_gains": ("=pair_temperatures", "head_gains"),
    "channel_gains": ("channel_gains",),
    "outputs": ("=head_gains", "mlp_gains"),  # as many numbers as "both", none of positions: a control
}


def numbers_of(scaling: Scaling, lm: LM, also: Sequence[str] = ()) -> dict[str, NDArray[np.float64]]:
    """A scaling's numbers by name, each of shape (rows, layers): one row for a number of a layer, one for each head.

    Parameters
    ----------
    also : sequence of str
        Numbers of bands and channels, which few scalings have, to be there in any case.
    """
    layers = layers_of(scaling, lm)
    heads = scaling if isinstance(scaling, HeadScaling) else HeadScaling(layers=layers)
    found: dict[str, Any] = dict.fromkeys(also)
    found |= {"factors": layers.factors, "temperatures": layers.temperatures, "mlp_gains": heads.mlp_gains}
    found["head_factors"] = heads.factors
    if layers.bands is not None:
        found[f"bands_{len(layers.bands[0])}"] = layers.bands
    if len(cuts := [name for name in found if name.startswith("bands_")]) > 1:
        raise ValueError(f"a scaling has one number of bands, not {' and '.join(cuts)}; start from one without bands")
    for kind, names in OF_HEADS.items():
        values = getattr(heads, kind)
        found |= {names[0]: None}
        if values is not None:
            found[names[len(values[0]) > n_heads(lm.model)]] = values
    return {
        name: np.ones((count_rows(name, lm), lm.num_layers))
        if values is None
        else np.atleast_2d(np.transpose(values)).astype(float)
        for name, values in found.items()
    }


def scaling_of(
    values: Mapping[str, NDArray[np.float64]], start: Scaling, lm: LM, names: Sequence[str]
) -> LayerScaling | HeadScaling:
    """The scaling that has the numbers of `numbers_of`; its scheme and extension are those of `start`.

    Parameters
    ----------
    names : sequence of str
        Numbers that may differ from those of `start`: a `LayerScaling` is one still, if none of them is of heads.
    """
    bands = next((rows.T for name, rows in values.items() if name.startswith("bands_")), None)
    numbers: dict[str, Any] = {name: values[name][0] for name in LAYER_NUMBERS} | {"bands": bands}
    layers = replace(layers_of(start, lm), **numbers)
    if not isinstance(start, HeadScaling) and all(is_of_layer(name) for name in names):
        return layers
    of_heads = []
    for head, channel in OF_HEADS.values():
        rows, wide = values[head], values.get(channel)
        if wide is not None and (wide != 1).any():
            rows = np.repeat(rows, len(wide) // len(rows), axis=0) * wide
        of_heads.append(rows)
    more: dict[str, Any] = {"mlp_gains": values["mlp_gains"][0]}
    if "head_factors" in names or (values["head_factors"] != 1).any():
        more["factors"] = values["head_factors"].T
    return HeadScaling(*(rows.T for rows in of_heads), **more, layers=layers)


def is_of_layer(name: str) -> bool:
    """Whether a number acts on the positions of a layer, not on what its heads or MLP put out."""
    return name in LAYER_NUMBERS or name.startswith("bands_")


def count_rows(name: str, lm: LM) -> int:
    """How many numbers of a name a layer has."""
    if name.startswith("bands_"):
        return int(name.removeprefix("bands_"))
    heads, channels = zip(*OF_HEADS.values(), strict=True)
    if name in (*heads, "head_factors"):
        return n_heads(lm.model)
    if name in channels:
        return n_heads(lm.model) * head_dim(lm.model) // (2 if name == "pair_temperatures" else 1)
    return 1


def count_numbers(lm: LM, space: str) -> int:
    """How many numbers a space has on a model."""
    return lm.num_layers * sum(count_learned(entry, lm) for entry in SPACES[space])


def count_learned(entry: str, lm: LM) -> int:
    """How many numbers an entry of a space learns in a layer: behind "=" those of one head."""
    rows = count_rows(entry.removeprefix("="), lm)
    return rows // n_heads(lm.model) if entry.startswith("=") else rows


def refuse_space(lm: LM, vary: str) -> None:
    """Raise the ValueError that names a family which can't have the numbers of a space."""
    names = [name.removeprefix("=") for name in SPACES[vary]]
    values = numbers_of(LayerScaling.identity(lm.num_layers), lm, names)
    for name in names:  # any number but 1 would do
        values[name] = np.full_like(values[name], 2.0)
    if "temperatures" in names:
        obeyed = temperature_layers(lm.model)  # where they are idle there is no gradient, and they stay 1
        values["temperatures"] = np.array([[2.0 if here or not any(obeyed) else 1.0 for here in obeyed]])
    scaling_of(values, LayerScaling.identity(lm.num_layers), lm, names).refuse_misfit(lm.model)


def layers_of(scaling: Scaling, lm: LM) -> LayerScaling:
    """A scaling's part of layers; no scaling where it has none, or a ValueError where nothing of it can be learned."""
    if isinstance(scaling, LayerScaling):
        return scaling
    if not isinstance(scaling, HeadScaling):
        raise ValueError(f"a {type(scaling).__name__} has no numbers to learn; give a LayerScaling or a HeadScaling")
    return scaling.layers or LayerScaling.uniform(1.0, lm.num_layers, scaling.scheme)
