"""Factor files that the playground shows or compares."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lrs_utils.models.load import LM
from lrs_utils.playground.state import Grid, State
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.files import load_factors, read_factors, shipped


class Loaded(NamedTuple):
    """A factor file, what is shown of it, and a caution where it is another model's."""

    name: str
    state: State
    caution: str = ""


def load_state(path: str | Path, lm: LM, grid: Grid, present: State) -> Loaded:
    """Read the scaling of a factor file, or of one that ships by its name.

    Where the file holds no curve that its factors follow, the control points of the present state stay.

    Raises
    ------
    OSError, ValueError
        Of `load_factors`, or a scaling that doesn't fit the model.
    """
    scaling, caution = _load(path, lm)
    content = read_factors(path)
    try:
        state = present.show(scaling)
        grid.refuse_misfit(state)
        if drawn := content.get("curve"):
            curve = BezierCurve(drawn["layers"], drawn["values"])
            if grid.sample(curve) == state.layers.factors:
                state = replace(state, curve=curve)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be shown: {error}") from error
    return Loaded(str(path), state, caution)


def load_to_measure(path: str | Path, lm: LM) -> Scaling:
    """Read a scaling that need not be shown: numbers of pairs or bands can be measured too.

    Raises
    ------
    OSError, ValueError
        Of `load_factors`, or a scaling that doesn't fit the model.
    """
    scaling, _ = _load(path, lm)
    try:
        scaling.refuse_misfit(lm.model)
    except ValueError as error:
        raise ValueError(f"{path} can't be measured: {error}") from error
    return scaling


def _load(path: str | Path, lm: LM) -> tuple[Scaling, str]:
    """A scaling, and a caution where it is another model's."""
    with warnings.catch_warnings(record=True) as cautions:
        warnings.simplefilter("always", UserWarning)
        scaling = load_factors(path, lm)
    return scaling, ". ".join(str(caution.message) for caution in cautions)


def shipped_for(lm: LM) -> list[str]:
    """Names of the factor files that ship for a model."""
    return [name for name in shipped() if name.startswith(f"{lm.name.split('/')[-1]}/")]
