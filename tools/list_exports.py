"""Exported models, compared with the hook that they were made from: every form, family and precision.

    python tools/list_exports.py

Each row of data/results/exports.csv is one export: its form, the largest difference of logits on a short text, whether
64 greedy tokens are the same, and for the real models the accuracy on 20 contexts, of the hook and of the folder.
"""

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from result_tables import write_table
from torch import Tensor

from lrs_utils import LM, HeadScaling, LayerScaling, export, load_factors, load_lm, score, tasks
from lrs_utils.models.decode import decode
from lrs_utils.models.tiny import TINY
from lrs_utils.progress import Progress, no_progress_bars
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.trial import some_tokens

_NUMBERS = [[1.3, 0.7, 1.0, 1.0], [1.0, 1.2, 0.8, 1.0]]
SCALINGS: dict[str, Scaling] = {
    "temperatures of layers": LayerScaling((1, 1), temperatures=(1.3, 1)),
    "gains of heads": HeadScaling(gains=_NUMBERS),
    "temperatures of heads": HeadScaling(temperatures=_NUMBERS),
    "ntk factors of layers": LayerScaling((1.3, 0.8), "ntk"),
    "gains of heads, ntk factors of layers": HeadScaling(gains=_NUMBERS, layers=LayerScaling((1.3, 0.8), "ntk")),
    "pi factors of layers": LayerScaling((1.3, 0.8)),
    "factors of bands": LayerScaling((1, 1), bands=[[1.2, 0.8], [1.0, 1.3]]),
    "factors of heads": HeadScaling(factors=_NUMBERS),
}
REAL = {  # factor files that ship, and what they were found on
    "smollm2-135m": {"kv-short-40": 40, "layers-kv-short-24": 24, "paper": 24},
    "gemma3-270m": {"gains-kv-short-40": 40, "layers-kv-short-40": 40},
}
N_TOKENS, N_CONTEXTS = 64, 20


def main() -> None:
    cases: list[tuple[str, str, str, Scaling | None]] = [
        (family, "float32", name, scaling) for family in TINY for name, scaling in SCALINGS.items()
    ]
    dtypes = ("float32", "bfloat16", "float16")
    cases += [(model, dtype, name, None) for model, files in REAL.items() for dtype in dtypes for name in files]
    rows = []
    with Progress(len(cases), "exports").shown() as bar:
        for model, dtype, name, scaling in cases:
            rows.append({"model": model, "precision": dtype, "scaling": name} | _try(model, dtype, name, scaling))
            bar.advance(1, f"{model}, {name}")
    write_table("exports", pd.DataFrame(rows), "list_exports.py")


def _try(model: str, dtype: str, name: str, scaling: Scaling | None) -> dict[str, Any]:
    lm = load_lm(model, dtype=dtype, device="cpu")
    if scaling is None:
        scaling = load_factors(f"{model}/{name}")
    with tempfile.TemporaryDirectory() as scratch, no_progress_bars():
        try:
            found = export(lm, scaling, Path(scratch) / "out")
        except ValueError as error:
            return {"form": "refused", "reason": str(error)}
        again = load_lm(found.folder, dtype=dtype, device="cpu")
        with scaling.applied_to(lm.model):
            wanted = _continue(lm)
        row = {"form": found.form, "error": found.error, "same tokens": bool(torch.equal(_continue(again), wanted))}
        if model in REAL and dtype == "float32":
            suite = tasks.kv_retrieval(REAL[model][name], N_CONTEXTS, 60_000, keys="short", positions=[0, 10, 20])
            row["accuracy, hook"] = float(score(lm, suite, [scaling]).exact.mean())
            row["accuracy, folder"] = float(score(again, suite, [LayerScaling.identity(lm.num_layers)]).exact.mean())
    return row


def _continue(lm: LM) -> Tensor:
    ids = some_tokens(lm.model, N_TOKENS)[None]
    return decode(lm, ids, torch.ones_like(ids), N_TOKENS, to_the_end=True)


if __name__ == "__main__":
    main()
