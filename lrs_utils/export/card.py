"""The model card of an exported folder: what was changed, what it helps and costs, how to load it, whose licence."""

import math
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lrs_utils.analysis.numbers import describe_numbers
from lrs_utils.models.embedded import EMBEDDED, embedded_folder
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling

CARD, FACTORS, FIGURE = "README.md", "lrs_factors.json", "scaling.png"
_WHERE = {
    "stock": "in its weights, so it is an ordinary {family} and runs in any engine that runs one",
    "granite": "in the base of RoPE of each layer (`layer_rope_theta`), temperatures and gains in its weights: a "
    "{family} saved as GraniteSWA, which transformers, vLLM and SGLang have. Plain `granite` would ignore the bases. "
    "In transformers it attends without SDPA, so long texts need more memory",
    "remote": "in the frequencies of each layer, which `modeling_lrs.py` applies, temperatures and gains in its "
    "weights: load it with `trust_remote_code=True`",
}
_SHOWN = {"accuracy": "accuracy", "perplexity, not seen": "perplexity of text"}


def copy_terms(lm: LM, folder: Path) -> None:
    """Licences, notices and terms of the base model, which go with what is made of it."""
    embedded = EMBEDDED.get(lm.name)
    source = embedded_folder(lm.name) if embedded else Path(lm.name)
    for name in ("LICEN[CS]E*", "NOTICE*", "*TERMS*", "USE_POLICY*"):
        for file in source.glob(name) if source.is_dir() else ():
            shutil.copy(file, folder)


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
    title, numbers = embedded.title if embedded else Path(lm.name).name, describe_numbers(scaling, lm)
    text = _CARD.format(
        head="\n".join(f"{name}: {value}" for name, value in head.items() if value),
        title=title,
        numbers=numbers,
        where=_WHERE[form].format(family=type(lm.model).__name__.removesuffix("ForCausalLM")),
        test=_tell_test(provenance),
        figure=f"\n![What was changed: {numbers}]({FIGURE})\n" if (folder / FIGURE).exists() else "",
        trust=", trust_remote_code=True" if form == "remote" else "",
        base=base or title,
        version=version("lrs-utils"),
        terms=f" {embedded.notice}." if embedded and embedded.notice else "",
    )
    (folder / CARD).write_text(text, encoding="utf-8")


_CARD = """---
{head}
---

# {title}, scaled to read more of its context

Changed: {numbers}. They are {where}. No weight was trained. The numbers are in `lrs_factors.json`.

## What it helps, and what it costs

{test}
{figure}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # this one, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
```

## Where it comes from

Made from {base} with `export` of lrs_utils {version}, the reference implementation of layer-specific RoPE scaling
([2503.04355](https://arxiv.org/abs/2503.04355)).

## Licence

That of the model it was made from, {base}.{terms}
"""


def _hub_id(lm: LM) -> str | None:
    """The id that a model was loaded by, if it was one."""
    return lm.name if lm.name.count("/") == 1 and not Path(lm.name).exists() else None


def _tell_test(provenance: Mapping[str, Any]) -> str:
    """What the test of `find_scaling` measured, as a table."""
    rows = provenance.get("test")  # a file may hold anything there
    rows = [row for row in rows if isinstance(row, dict) and "measure" in row] if isinstance(rows, list) else []
    shown = [row for row in rows if str(row["measure"]).partition(":")[0] in _SHOWN]
    if not shown:
        return "Not measured when this folder was made. Measure it on your task before you rely on it."
    lines = []
    if other := provenance.get("found on"):
        lines = [f"Measured on {other['model']} (other weights or another precision), **not on this model**:", ""]
    lines += ["| contexts and texts that no search saw | no scaling | scaled | change, 95 % |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in shown:
        name, _, kind = str(row["measure"]).partition(":")
        of = f"{row['task']}, accuracy" if name == "accuracy" else f"{_SHOWN[name]}{kind and f',{kind}'}"
        low, high = (_figure(row.get(end)) for end in ("low", "high"))
        values = f"{_figure(row['no scaling'])} | {_figure(row['found'])} | {_figure(row['change'], '+')}"
        lines.append(f"| {of} | {values} [{low}, {high}] |")
    tested = (provenance.get("found") or {}).get("valid for", [])
    lengths = "; ".join(f"{of['task']}, {of['tokens'][0]} to {of['tokens'][1]} tokens" for of in tested)
    lines += ["", f"On other tasks and lengths it may help less, or harm.{lengths and f' Tested: {lengths}.'}"]
    return "\n".join(lines)


def _figure(value: float | None, sign: str = "") -> str:
    return "" if value is None or math.isnan(value) else format(value, f"{sign}.3g")
