"""Recipes for the demo: keys, pairs, steps, rate and weight of text, each tried by the same call of `find_scaling`.

    python tools/try_recipes.py

A row of data/results/recipes.csv is one recipe, with what it gains on test contexts and what it costs. The first is
that of `make demo`; the others differ from it as their names say. If it is killed, the same command resumes.
"""

from functools import partial
from typing import Any

import pandas as pd
from result_tables import write_table

from lrs_utils import Ledger, find_scaling, load_lm, tasks
from lrs_utils.models.download import cache_folder

FIRST: dict[str, Any] = {"keys": "short", "n_pairs": 24, "steps": 12, "rate": 0.05, "text_weight": 3.0, "questions": 8}
TRIED: dict[str, dict[str, Any]] = {
    "the demo's": {},
    "gains alone": {"space": "head_gains"},
    "temperatures alone": {"space": "head_temperatures"},
    "text weight 1": {"text_weight": 1.0},
    "6 steps": {"steps": 6},
    "24 steps": {"steps": 24},
    "rate 0.1": {"rate": 0.1},
    "text weight 6": {"text_weight": 6.0},
    "16 search contexts": {"contexts": (16, 6, 12)},
    "40 pairs": {"n_pairs": 40},
    "10 UUID pairs": {"keys": "uuid", "n_pairs": 10},
}
SIZES: dict[str, Any] = {"contexts": (8, 6, 12), "stretches": 5}


def main() -> None:
    lm = load_lm("smollm2-135m", dtype="bfloat16")
    ledger = Ledger(cache_folder() / "recipes.sqlite")
    rows = []
    for name, changed in TRIED.items():
        recipe = FIRST | changed
        task = partial(tasks.kv_retrieval, recipe.pop("n_pairs"), keys=recipe.pop("keys"))
        found = find_scaling(lm, task, ledger=ledger, **(SIZES | recipe))
        print(f"{name}: {found}", flush=True)
        accuracy = found.row(found.judged.tasks[0].name, "accuracy")
        text = found.row("text", "perplexity, not seen")
        rows.append(
            {"recipe": name, "task": found.judged.tasks[0].name}
            | {column: accuracy[column] for column in ("no scaling", "found")}
            | {column: 100 * accuracy[column] for column in ("change", "low", "high")}
            | {"perplexity %": 100 * text["change"] / text["no scaling"]}
            | {
                "dose": found.choices["dose"][found.choices["chosen"]].sum(),
                "seconds": found.row("search", "seconds")["found"],
            }
        )
        write_table("recipes", pd.DataFrame(rows), "try_recipes.py", "%.5g")


if __name__ == "__main__":
    main()
