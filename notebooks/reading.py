"""Does a scaling help a reader? Tokens of plain text that need what stands far before them, by how far."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lrs_utils import LM, LayerScaling
from lrs_utils.analysis.methods import label_ends
from lrs_utils.analysis.statistics import paired_change
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.perplexity import token_nll

_GAIN, _LIKELY = 2.0, 2.0  # nats: LongPPL's limits (2410.23771; the package longppl 0.3.0)


def find_key_tokens(
    lm: LM, text: str, scalings: Mapping[str, Scaling], *, length: int, short: int, stride: int, n_windows: int
) -> pd.DataFrame:
    """Tokens that a long context makes likely, where what they repeat stands outside a short one.

    A token is a key token, as in LongPPL (2410.23771), if a long context gains it more than 2 nats over a short one and
    leaves it less than 2. Here that may be so under any of the scalings, so that none is favoured by the choice; the
    short context is read without scaling.

    Parameters
    ----------
    scalings : mapping of name to scaling
        "no scaling" is added, and comes first.
    length, short, stride : int
        Tokens of the long and of the short context, both with the stretch of `stride` tokens that is judged.

    Returns
    -------
    DataFrame
        A row for each key token: "window", "distance" (tokens back to the nearest place before the short context where
        it stands, behind the same token if there is one) and its nll under each scaling, by name.
    """
    options: dict[str, Any] = {"stride": stride, "n_windows": n_windows, "first_end": length}
    scalings = {"no scaling": LayerScaling.identity(lm.num_layers), **scalings}
    read = {name: token_nll(lm, text, [length], scaling=scaling, **options) for name, scaling in scalings.items()}
    long = np.stack([nll[0] for nll, _ in read.values()])
    [near], _ = token_nll(lm, text, [short], **options)
    ids = read["no scaling"][1]
    key = ((near - long > _GAIN) & (long < _LIKELY)).any(axis=0)
    rows = []
    for window, at in zip(*np.nonzero(key), strict=True):
        place = length - stride + int(at)
        if distance := _distance(ids[window], place, length - short):
            nll = dict(zip(scalings, long[:, window, at].tolist(), strict=True))
            rows.append({"window": int(window), "distance": distance} | nll)
    return pd.DataFrame(rows, columns=["window", "distance", *scalings])


def _distance(ids: NDArray[np.int64], place: int, end: int) -> int:
    """Tokens from a place back to the nearest same token before `end`, behind the same one if it can be; 0 if none."""
    same = np.flatnonzero(ids[:end] == ids[place])
    behind = [at for at in same if at and ids[at - 1] == ids[place - 1]]
    found = behind or [*same]
    return place - int(found[-1]) if found else 0


def compare_by_distance(tokens: pd.DataFrame, edges: Sequence[int]) -> pd.DataFrame:
    """What each scaling changes in the nll of key tokens, by their distance; windows are the sampling unit.

    Parameters
    ----------
    tokens : DataFrame
        Of `find_key_tokens`, of several texts if it has a column "text".
    edges : sequence of int
        Of the bins of distance.

    Returns
    -------
    DataFrame
        A row for each scaling and bin: "scaling", "from" and "to" (tokens), "tokens" (how many), "change" of nll in
        nats with its interval, and "p".
    """
    names = [name for name in tokens.columns if name not in ("text", "window", "distance", "no scaling")]
    units, rows = [name for name in ("text", "window") if name in tokens], []
    for low, high in pairwise(edges):
        some = tokens[(tokens["distance"] >= low) & (tokens["distance"] < high)]
        means = some.groupby(units)[["no scaling", *names]].mean()
        for name in names if len(means) > 1 else []:
            change = paired_change(means["no scaling"], means[name])
            rows.append({"scaling": name, "from": low, "to": high, "tokens": len(some)} | change)
    return pd.DataFrame(rows, columns=["scaling", "from", "to", "tokens", "change", "low", "high", "p"])


def draw_by_distance(table: pd.DataFrame, ax: Axes) -> str:
    """Changes of nll over distance, a line for each "model" of a table; returns what it shows in words."""
    ends, said = {}, []
    colours = dict(zip(table["model"].unique(), sns.color_palette("colorblind"), strict=False))
    for name, rows in table.groupby("model", sort=False):
        at = np.sqrt(rows["from"] * rows["to"])
        errors = [rows["change"] - rows["low"], rows["high"] - rows["change"]]
        ax.errorbar(at, rows["change"], errors, marker="o", capsize=3, color=colours[name])
        ends[str(name)] = float(rows["change"].iloc[-1])
        bins = zip(rows["from"], rows["to"], rows["change"], strict=True)
        said.append(f"{name}: " + ", ".join(f"{low} to {high} tokens {change:+.2f}" for low, high, change in bins))
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(xscale="log", xlabel="tokens back to the same token", ylabel="change of nll (nats)")
    if ends:
        label_ends(ax, float(np.sqrt(table["from"] * table["to"]).max()), ends, colours)
    return "; ".join(said)
