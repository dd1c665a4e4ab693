"""LaMPE (2508.02308): distances between near and far ones are compressed so that the whole fits a mapped length."""

import math

from lrs_utils.arguments import number, whole
from lrs_utils.peers.regions import RegionScaling
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.rotation import PLAIN, Positions, Region


class LaMPE(RegionScaling):
    """Three regions: near distances as they are, a middle that is compressed, far ones as far from the mapped end.

    With l = `length`, m = `mapped`, s1 = `near` and s2 = `far`, a distance r is read as r up to s1, as
    (m - s1 - s2) / (l - s1 - s2) * (r - s1) + s1 between, and as m - l + r from l - s2 on. The paper rounds the
    middle down, which no difference of two positions can (from a digest, as all here; not checked against its code).

    Parameters
    ----------
    length : int
        Tokens of the prompt. If it is at most `mapped`, nothing changes.
    mapped : float
        m; in the paper `map_length`, fitted to each model.
    """

    def __init__(
        self, num_layers: int, length: int, mapped: float, near: int, far: int, *, on: Scaling | None = None
    ) -> None:
        n, m = whole("length", length, least=1), number("mapped", mapped, above=0)
        s1, s2 = whole("near", near, least=1), whole("far", far, least=0)
        row = [PLAIN]
        if m < n:
            if s1 + s2 >= m:
                raise ValueError(f"near {s1} and far {s2} leave nothing of the mapped length {m:g} between them")
            slope = (m - s1 - s2) / (n - s1 - s2)
            middle = Positions((1 / slope,))
            row.append(Region(s1, middle._replace(offset=s1 - slope * s1), middle))
            if s2:
                row.append(Region(n - s2, Positions(offset=m - n)))
        super().__init__([row] * num_layers, on)


def map_length(length: int, window: int, slope: float, offset: float) -> float:
    """The paper's mapped length: window / (1 + exp(-(slope * length + offset)))."""
    return window / (1 + math.exp(-(slope * length + offset)))
