"""Does a small base of RoPE bear what a large one doesn't? The small model, made with several bases and then scaled."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lrs_utils import LM, LayerScaling, load_lm, score
from lrs_utils.training import small


def make_with_base(base: float, share: float, folder: Path) -> LM:
    """`training.small`'s model with another base, trained on the same data for a share of its steps.

    It is made once: the files in `folder` are used again.
    """
    made = folder / f"small-rope-base-{base:.0f}-{share:g}"
    if not (made / "losses.csv").exists():
        small.make(made, share=share, rope_theta=float(base))
    return load_lm(str(made), dtype="float32", device="cpu")


def scale_all_layers(lm: LM, factors: Sequence[float], *, n_contexts: int, seed: int, length: int) -> pd.DataFrame:
    """Accuracy and nll of pairs that fill `length` tokens, for one factor in all layers.

    Returns
    -------
    DataFrame
        A row for each scheme, factor and context.
    """
    [suite] = small.suites("pairs", length, n_contexts, seed)
    rows = []
    for scheme in ("pi", "ntk"):
        outcomes = score(lm, suite, [LayerScaling.uniform(factor, lm.num_layers, scheme) for factor in factors])
        for factor, exact, nll in zip(factors, outcomes.exact, outcomes.nll, strict=True):
            each = {"accuracy": exact.mean(axis=1), "nll": nll.mean(axis=1)}
            rows.append(pd.DataFrame({"scheme": scheme, "factor": factor} | each).rename_axis("context").reset_index())
    return pd.concat(rows)


def measure_base(
    base: float, share: float, folder: Path, factors: Sequence[float], n_contexts: int, seed: int, length: int
) -> pd.DataFrame:
    """The model with a base, made and scaled, and the wavelength of its slowest pair of dimensions in windows."""
    lm = make_with_base(base, share, folder)
    slowest = 2 * np.pi / float(lm.model.model.rotary_emb.inv_freq.min())
    rows = scale_all_layers(lm, factors, n_contexts=n_contexts, seed=seed, length=length)
    return rows.assign(base=base, slowest=slowest / lm.window)
