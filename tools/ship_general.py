"""The general scalings as factor files, from what notebook 11 measured: `python tools/ship_general.py`.

Reads its settings and data/results/objectives_<n>_*.csv; writes lrs_utils/data/factors/<model>/general.json.
"""

import json
from typing import Any

import pandas as pd
from result_tables import RESULTS

from lrs_utils import save_factors
from lrs_utils.notebook import ROOT, parameters_of
from lrs_utils.scaling.files import read_key

FACTORS = ROOT / "lrs_utils" / "data" / "factors"
_NOTEBOOK = "11_general"


def main() -> None:
    values = parameters_of(_NOTEBOOK, "cpu")
    for number, model in enumerate(values["models"]):
        ship(number, model, values["settings"])


def ship(number: int, model: str, settings: dict[str, Any]) -> None:
    """The longest search's scaling at the dose that the notebook chose, how it was found and what it was tested on."""
    about, searches = _read(f"objectives_{number}_ways")
    _, judged = _read(f"objectives_{number}_judged")
    _, perplexity = _read(f"objectives_{number}_perplexity")
    longest, objective = searches.iloc[-1], judged["objective"].iloc[-1]
    dose = float(objective.removeprefix(f"{longest['objective']}, dose "))
    found = {**settings["find"][number], **settings["ways"][number][longest["objective"]]}
    found["dose"] = round(dose * float(longest["dose"]), 3)
    rows = [
        {"task": row["test"], "measure": "accuracy", "no scaling": row["no scaling"], "found": row["found"]}
        | {name: row[column] / 100 for name, column in (("change", "points"), ("low", "low"), ("high", "high"))}
        for row in judged[judged["objective"] == objective].to_dict("records")
    ]
    for row in perplexity.to_dict("records"):
        before = row["perplexity"]
        change = {name: before * row[name] / 100 for name in ("change", "low", "high")}
        rows.append(
            {"task": "text", "measure": f"perplexity, not seen: {row['text']}", "no scaling": before}
            | {"found": before + change["change"]}
            | change
        )
    scaling = read_key(longest["scaling"]).at_dose(dose)
    save_factors(
        FACTORS / model / "general.json", scaling, model=model, fingerprint=about["model"],
        found={**found, "searched on": settings["sizes"]}, test=rows, command="python tools/ship_general.py",
    )  # fmt: skip


def _read(name: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """A table, and the settings in its first line."""
    path = RESULTS / f"{name}.csv"
    settings, _ = json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8")[2:])
    return settings, pd.read_csv(path, skiprows=1)


if __name__ == "__main__":
    main()
