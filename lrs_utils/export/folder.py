"""A scaled model as a folder: written in the first form that is exact, read again and compared before it is there."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import AutoModelForCausalLM

from lrs_utils.arguments import instance
from lrs_utils.export.card import FACTORS, FIGURE, copy_terms, write_card
from lrs_utils.export.forms import FORMS, add_to_config, refuse_unexportable
from lrs_utils.models.load import LM
from lrs_utils.models.scaled import MARK, has_known_code
from lrs_utils.progress import no_progress_bars
from lrs_utils.scaling.applied import refuse_scaled
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import save_factors
from lrs_utils.scaling.trial import logits, some_tokens

N_TOKENS = 64
# How far logits may be from the hook's, as a share of their standard deviation. Weights of few bits round the numbers.
_EXACT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes
    ----------
    folder : Path
    form : str
        "stock", "granite" or "remote".
    error : float
        Largest difference between its logits and those of the scaled model, on some tokens, in the model's precision.
    refused : mapping of form to reason
        Better forms that were not exact.
    """

    folder: Path
    form: str
    error: float
    refused: Mapping[str, str]

    def __str__(self) -> str:
        reasons = "".join(f" Not {form}: {reason}." for form, reason in self.refused.items())
        return f"{self.folder}: form {self.form}, logits within {self.error:.1g} of the scaled model's.{reasons}"


def export(
    lm: LM,
    scaling: Scaling,
    folder: str | Path,
    form: str = "auto",
    *,
    provenance: Mapping[str, Any] | None = None,
    figure: Figure | None = None,
) -> Exported:
    """Save a scaled model as a folder that loads without lrs_utils, with its tokenizer, factor file and model card.

    Parameters
    ----------
    folder : path
        New or empty. It appears whole or not at all.
    form : str
        "stock": all numbers in the weights (temperatures, gains), which any engine loads. "granite": a GraniteSWA model
        with one base of RoPE a layer (factors of scheme "ntk"), a stock class of transformers, vLLM and SGLang.
        "remote": the model's own class with a file of code (`trust_remote_code`). "auto": the first of them that is
        exact.
    provenance : mapping, optional
        Where the scaling is from, as `save_factors` takes it; the card's table is of its "test".
    figure : Figure, optional
        For the card.

    Raises
    ------
    ValueError
        A folder that isn't empty, an unknown form, a scaling or family that has no exact form; says why for each.
    """
    instance("lm", lm, LM, "what `load_lm` returns")
    instance("scaling", scaling, Scaling, "a LayerScaling or a HeadScaling")
    if form not in ("auto", *FORMS):
        raise ValueError(f"form is {form!r}; choose one of auto, {', '.join(FORMS)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")
    refuse_unexportable(lm.model, scaling)
    refuse_scaled(lm.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        for name in FORMS if form == "auto" else [form]:
            target = Path(scratch) / f"{folder.name}-{name}"
            try:
                FORMS[name](lm.model, scaling, target)
                error = _compare(lm, scaling, target)
            except ValueError as reason:
                refused[name] = str(reason)
                continue
            _add_rest(lm, scaling, target, name, provenance or {}, figure)
            os.replace(target, folder)
            return Exported(folder, name, error, refused)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise ValueError(f"this scaling of {lm.name} can't be exported. {reasons}")


def _compare(lm: LM, scaling: Scaling, folder: Path) -> float:
    """The largest difference of logits between a scaled model and its folder, or an error if that is no rounding."""
    ids, at = some_tokens(lm.model, N_TOKENS), torch.arange(N_TOKENS)
    with torch.no_grad(), no_progress_bars():
        with scaling.applied_to(lm.model):
            wanted = logits(lm.model, ids, at)
        plain: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=lm.model.dtype, trust_remote_code=has_known_code(folder)
        )
        nn.Module.to(plain, lm.model.device)
        plain.train(False)
        off = logits(plain, ids, at) - wanted
    share = float(off.square().mean().sqrt() / wanted.std())
    if not share <= _EXACT.get(lm.model.dtype, 1e-4):
        raise ValueError(f"read again, its logits are off by {share:.1%} of their standard deviation")
    return float(off.abs().max())


def _add_rest(
    lm: LM, scaling: Scaling, folder: Path, form: str, provenance: Mapping[str, Any], figure: Figure | None
) -> None:
    """Tokenizer, factor file, card, and the mark that says that the model is scaled."""
    add_to_config(folder, **{MARK: FACTORS})
    lm.tokenizer.save_pretrained(folder)
    known = {"model": lm.name, "fingerprint": lm.fingerprint} | dict(provenance)
    save_factors(folder / FACTORS, scaling, **known)
    if figure is not None:
        figure.savefig(folder / FIGURE, bbox_inches="tight", dpi=150)
    copy_terms(lm, folder)
    write_card(lm, scaling, folder, form, known)
