"""A scaled model as a folder: written in the first form that fits, read again and compared before it is there."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrs_utils.arguments import instance
from lrs_utils.export.card import FACTORS, FIGURE, copy_terms, write_card
from lrs_utils.export.forms import FORMS, add_to_config, refuse_unexportable
from lrs_utils.models.load import LM
from lrs_utils.models.scaled import MARK, has_known_code
from lrs_utils.progress import no_progress_bars
from lrs_utils.scaling.applied import refuse_scaled
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import save_factors
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.trial import logits

# Read by the scaled model and by its folder, to compare their logits: token after token, and spread over the window.
_TEXT = """A language model reads the beginning and the end of a long text better than its middle. A scaling changes how
its layers or heads attend, and here one text is read twice: by the scaled model, and by the folder that was made of it.
The numbers 1, 2, 3, 5, 8, 13, 21, 34 and 55 follow a rule; "keys" have "values"; and names such as Elizabeth recur."""
_N_TOKENS = 64
# How far logits may be off, as a share of their standard deviation: numbers put into weights are rounded with them. A
# model that computes something else is off by about 1.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes
    ----------
    folder : Path
    form : str
        "stock", "granite" or "remote".
    error : float
        Largest difference between its logits and those of the scaled model, on a short text, in the model's precision.
    refused : mapping of form to reason
        Better forms that don't fit.
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
        "remote": the model's own class with a file of code (`trust_remote_code`). "auto": the first of them that gives
        the scaled model's logits, up to rounding.
    provenance : mapping, optional
        Where the scaling is from, as `save_factors` takes it; the card's table is of its "test".
    figure : Figure, optional
        For the card.

    Raises
    ------
    ValueError
        A folder that isn't empty, an unknown form, a scaling or family that fits no form; says why for each.
    """
    instance("lm", lm, LM, "what `load_lm` returns")
    instance("scaling", scaling, Scaling, "a LayerScaling or a HeadScaling")
    if form not in ("auto", *FORMS):
        raise ValueError(f"form is {form!r}; choose one of auto, {', '.join(FORMS)}")
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")
    if folder == Path.cwd() or folder.is_mount():
        raise ValueError(f"{folder} is in use, so it can't be replaced as a whole; give a new folder in it")
    refuse_unexportable(lm.model, scaling)
    refuse_scaled(lm.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    refused: dict[str, str] = {}
    wanted = _read(lm, lm.model, scaling)
    if not all(bool(of.isfinite().all()) for of in wanted):
        raise ValueError(f"{lm.name} in {lm.model.dtype} gives logits that aren't finite; load it in float32")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        for name in FORMS if form == "auto" else [form]:
            target = Path(scratch) / f"{folder.name}-{name}"
            try:
                FORMS[name](lm.model, scaling, target)
                error = _compare(lm, target, wanted)
            except ValueError as reason:
                refused[name] = str(reason)
                continue
            _add_rest(lm, scaling, target, name, provenance or {}, figure)
            try:
                os.replace(target, folder)
            except OSError as reason:
                raise ValueError(f"{folder} can't be written ({reason}); give a new folder") from reason
            return Exported(folder, name, error, refused)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise ValueError(f"this scaling of {lm.name} can't be exported. {reasons}")


def _read(lm: LM, model: PreTrainedModel, scaling: Scaling) -> list[Tensor]:
    """Logits of the text under a scaling, read token after token and with its tokens spread over the window."""
    ids = torch.tensor(lm.tokenizer(_TEXT)["input_ids"][:_N_TOKENS])
    at = torch.arange(len(ids))
    with torch.no_grad(), scaling.applied_to(model):
        return [logits(model, ids, places) for places in (at, at * max(1, lm.window // len(ids)))]


def _compare(lm: LM, folder: Path, wanted: Sequence[Tensor]) -> float:
    """The largest difference of the text's logits from those of the scaled model, or an error if it isn't rounding."""
    with no_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=lm.model.dtype, output_loading_info=True, trust_remote_code=has_known_code(folder)
        )
    plain, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(f"read again, it lacks {len(missing)} weights, {missing[0]} first")
    nn.Module.to(plain, lm.model.device)
    plain.train(False)
    found = _read(lm, plain, LayerScaling.identity(lm.num_layers))
    for of, places in zip(zip(found, wanted, strict=True), ("", " where its tokens lie far apart"), strict=True):
        share = float((of[0] - of[1]).square().mean().sqrt() / of[1].std())
        if not share <= _ROUNDING.get(lm.model.dtype, 1e-4):
            raise ValueError(f"read again, its logits are off by {share:.1%} of their standard deviation{places}")
    return float((found[0] - wanted[0]).abs().max())


def _add_rest(
    lm: LM, scaling: Scaling, folder: Path, form: str, provenance: Mapping[str, Any], figure: Figure | None
) -> None:
    """Tokenizer, factor file, card, and the mark that says that the model is scaled."""
    add_to_config(folder, **{MARK: FACTORS})
    lm.tokenizer.save_pretrained(folder)
    name = Path(lm.name).name if Path(lm.name).exists() else lm.name
    of_model: dict[str, Any] = {"model": name, "fingerprint": lm.fingerprint}
    if provenance.get("fingerprint", lm.fingerprint) != lm.fingerprint:
        of_model["found on"] = {"model": provenance.get("model"), "fingerprint": provenance["fingerprint"]}
    known = {**provenance, **of_model}
    save_factors(folder / FACTORS, scaling, **known)
    if figure is not None:
        figure.savefig(folder / FIGURE, bbox_inches="tight", dpi=150)
    copy_terms(lm, folder)
    write_card(lm, scaling, folder, form, known)
