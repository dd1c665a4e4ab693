"""The numbers of layers and heads that a search by gradient may learn, and which of them together."""

import numpy as np
from numpy.typing import NDArray

from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling, temperature_layers

LAYER_NUMBERS, HEAD_NUMBERS = ("factors", "temperatures"), ("head_temperatures", "head_gains", "mlp_gains")

# What may be learned together. A number of heads behind "=" is the same for all heads of a layer.
SPACES = {
    "factors": ("factors",),
    "pi_factors": ("factors",),  # the paper's own numbers: `find_scaling` starts from its scheme "pi", else from "ntk"
    "temperatures": ("temperatures",),
    "both": LAYER_NUMBERS,
    "head_temperatures": ("head_temperatures",),
    "head_gains": ("head_gains",),
    "heads": ("head_temperatures", "head_gains"),
    "outputs": ("=head_gains", "mlp_gains"),  # as many numbers as "both", none of positions: a control
}


def numbers_of(scaling: Scaling, lm: LM) -> dict[str, NDArray[np.float64]]:
    """A scaling's numbers by name, each of shape (rows, layers): one row for a number of a layer, one for each head."""
    layers = layers_of(scaling, lm)
    heads = scaling if isinstance(scaling, HeadScaling) else HeadScaling(layers=layers)
    given = {
        "factors": layers.factors,
        "temperatures": layers.temperatures,
        "head_temperatures": heads.temperatures,
        "head_gains": heads.gains,
        "mlp_gains": heads.mlp_gains,
    }
    n_heads = int(lm.model.config.get_text_config().num_attention_heads)
    rows = {"head_temperatures": n_heads, "head_gains": n_heads}
    return {
        name: np.ones((rows.get(name, 1), lm.num_layers))
        if values is None
        else np.atleast_2d(np.transpose(values)).astype(float)
        for name, values in given.items()
    }


def refuse_space(lm: LM, vary: str) -> None:
    """Raise the ValueError that names a family which can't have the numbers of a space."""
    unscaled = numbers_of(LayerScaling.identity(lm.num_layers), lm)
    twos = {name: np.full_like(values, 2.0).T for name, values in unscaled.items()}  # any number but 1 would do
    names = {name.removeprefix("=") for name in SPACES[vary]}
    if "temperatures" in names:
        obeyed = temperature_layers(lm.model)  # where they are idle there is no gradient, and they stay 1
        some = [2.0 if here or not any(obeyed) else 1.0 for here in obeyed]
        LayerScaling((1.0,) * lm.num_layers, temperatures=some).refuse_misfit(lm.model)
    heads = [twos[name] if name in names else None for name in ("head_temperatures", "head_gains")]
    if {*HEAD_NUMBERS} & names:
        HeadScaling(*heads, mlp_gains=twos["mlp_gains"][:, 0] if "mlp_gains" in names else None).refuse_misfit(lm.model)


def layers_of(scaling: Scaling, lm: LM) -> LayerScaling:
    """A scaling's part of layers; no scaling where it has none."""
    layers = scaling.layers if isinstance(scaling, HeadScaling) else scaling
    return layers if isinstance(layers, LayerScaling) else LayerScaling.identity(lm.num_layers)
