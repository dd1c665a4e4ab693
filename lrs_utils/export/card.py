"""The model card of an exported folder: what was changed, what it helps and costs, how to load it, whose licence."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrs_utils.analysis.numbers import describe_numbers
from lrs_utils.models.embedded import EMBEDDED, embedded_folder
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling

CARD, FACTORS, FIGURE = "README.md", "lrs_factors.json", "scaling.png"
_WHERE = {
    "stock": "in its weights, so it is an ordinary {family} and runs in any engine that runs one",
    "granite": "in one base of RoPE for each layer (`layer_rope_theta`) and in its weights: a {family} saved as "
    "GraniteSWA, which transformers, vLLM and SGLang have. Plain `granite` would ignore the bases",
    "remote": "in the frequencies of each layer, which `modeling_lrs.py` applies, and in its weights: load it with "
    "`trust_remote_code=True`",
}
_SHOWN = {"accuracy": "share of answers right", "perplexity, not seen": "perplexity of text"}


def copy_terms(lm: LM, folder: Path) -> None:
    """What the base model's terms ask to be handed on with it."""
    embedded = EMBEDDED.get(lm.name)
    if embedded and embedded.terms:
        shutil.copy(embedded_folder(lm.name) / embedded.terms[2], folder)


def write_card(lm: LM, scaling: Scaling, folder: Path, form: str, provenance: Mapping[str, Any]) -> None:
    """Write README.md, which the Hub shows as the model's page."""
    embedded = EMBEDDED.get(lm.name)
    base = embedded.hub if embedded else _hub_id(lm)
    head = {
        "base_model": base,
        "license": embedded.licence if embedded else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": "[layer-specific-rope-scaling, long-context]",
    }
    lines = ["---", *(f"{name}: {value}" for name, value in head.items() if value), "---", ""]
    title = embedded.title if embedded else Path(lm.name).name
    lines += [f"# {title}, scaled to read more of its context", ""]
    where = _WHERE[form].format(family=type(lm.model).__name__.removesuffix("ForCausalLM"))
    numbers = describe_numbers(scaling, lm)
    lines += [
        f"Changed: {numbers}. They are {where}. No weight was trained. The numbers are in `{FACTORS}`.",
        "",
    ]
    lines += _tell_test(provenance.get("test") or [], provenance.get("found") or {})
    if (folder / FIGURE).exists():
        lines += [f"![Accuracy by depth, and the numbers of layers and heads]({FIGURE})", ""]
    lines += _tell_use(form), ""
    lines += ["## Where it comes from", ""]
    command = provenance.get("command", "`python -m lrs_utils.export`, or `found.export(folder)`")
    lines += [f"Made from {base or title} by lrs_utils, the reference implementation of layer-specific RoPE scaling "
              f"([2503.04355](https://arxiv.org/abs/2503.04355)): {command}.", ""]  # fmt: skip
    terms = f" {embedded.notice}." if embedded and embedded.notice else ""
    lines += ["## Licence", "", f"That of the model it was made from{f', {base}' if base else ''}.{terms}", ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _hub_id(lm: LM) -> str | None:
    """The id that a model was loaded by, if it was one."""
    return lm.name if lm.name.count("/") == 1 and not Path(lm.name).exists() else None


def _tell_test(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """What the test of `find_scaling` measured, as a table."""
    lines = ["## What it helps, and what it costs", ""]
    shown = [row for row in rows if str(row["measure"]).partition(":")[0] in _SHOWN]
    if not shown:
        return [*lines, "Not measured when this folder was made. Measure it on your task before you rely on it.", ""]
    lines += [
        "| contexts and texts that no search saw | before | after | change, 95 % |",
        "| --- | --- | --- | --- |",
    ]
    for row in shown:
        name, _, kind = str(row["measure"]).partition(":")
        of = f"{row['task']}, {_SHOWN[name]}" if name == "accuracy" else f"{_SHOWN[name]}{kind and f',{kind}'}"
        ends = [_figure(row.get(end)) for end in ("low", "high")]
        lines.append(
            f"| {of} | {_figure(row['no scaling'])} | {_figure(row['found'])} | {_figure(row['change'], '+')} "
            f"[{', '.join(ends)}] |"
        )
    lengths = "; ".join(f"{of['task']}: {of['tokens'][0]} to {of['tokens'][1]}" for of in found.get("valid for", []))
    tokens = f" It was tested on contexts of so many tokens: {lengths}." if lengths else ""
    return [*lines, "", f"On other tasks and lengths it may help less, or harm.{tokens}", ""]


def _figure(value: float | None, sign: str = "") -> str:
    return "" if value is None or math.isnan(value) else format(value, f"{sign}.3g")


def _tell_use(form: str) -> str:
    trust = ", trust_remote_code=True" if form == "remote" else ""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # this one, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
```"""
