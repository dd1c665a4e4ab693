"""Which numbers are worth learning: every space searched by the same recipe, judged on contexts that nothing has seen.

    python tools/compare_spaces.py --tasks both --spaces head_gains heads --seeds 0 1 2 --contexts 100

Each row of data/results/spaces.csv is one `find_scaling` (a space, a seed, the tasks of its objective) with its
gains on 20 UUID pairs and on 40 short pairs; the scaling itself is in build/spaces. If it is killed, the same command
resumes: outcomes are in the ledger, and those of finished searches are exported to data/results/spaces, from where
another machine can continue too.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from result_tables import RESULTS, describe_origin, write_table

from lrs_utils import Found, LayerScaling, Ledger, find_scaling, load_lm, save_factors, score, tasks
from lrs_utils.analysis.statistics import bootstrap_mean, by_fifth, paired_test
from lrs_utils.models.download import cache_folder
from lrs_utils.notebook import ROOT, versions
from lrs_utils.searchers.learned import count_numbers

TABLE, OUTCOMES = RESULTS / "spaces.csv", RESULTS / "spaces"  # a file of outcomes for each search
SEARCHED = {
    "uuid": [partial(tasks.kv_retrieval, 12)],
    "short": [partial(tasks.kv_retrieval, 40, keys="short")],
    "both": [partial(tasks.kv_retrieval, 12), partial(tasks.kv_retrieval, 40, keys="short")],
}
TESTED = {"uuid": partial(tasks.kv_retrieval, 20), "short": partial(tasks.kv_retrieval, 40, keys="short")}
TEST_SEED = 30_000
RECIPE: dict[str, Any] = {"contexts": (16, 8, 2), "steps": 48, "stretches": 24, "questions": 12, "text_weight": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", help="outcomes are filed by precision")
    parser.add_argument("--tasks", nargs="+", default=["both"], choices=SEARCHED)
    parser.add_argument(
        "--spaces", nargs="+", default=["head_gains", "head_temperatures", "heads", "layers", "outputs"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--contexts", nargs=2, type=int, default=[24, 24], metavar=("UUID", "SHORT"))
    options = parser.parse_args()
    lm = load_lm(options.model, dtype=options.dtype)
    ledger = Ledger(cache_folder() / "spaces.sqlite")
    for file in OUTCOMES.glob("*.outcomes.csv.gz"):
        ledger.load(file)
    tested = {
        keys: task(n_contexts=n, seed=TEST_SEED)
        for (keys, task), n in zip(TESTED.items(), options.contexts, strict=True)
        if n
    }
    for seed in options.seeds:
        for searched in options.tasks:
            for space in options.spaces:
                found = find_scaling(lm, SEARCHED[searched], space=space, seed=seed, ledger=ledger, **RECIPE)
                print(f"{searched} {space} {seed}: {found}", flush=True)
                row = _judge(lm, found, tested, searched, space, seed, ledger)
                name = f"{searched}-{space}-{seed}"
                file = ROOT / "build" / "spaces" / f"{name}.json"
                about = {"model": lm.name, "fingerprint": lm.fingerprint, "found": found.about, "test": row}
                save_factors(
                    file, found.scaling, **about, command="python tools/compare_spaces.py", versions=versions()
                )
                _write_row(row)
                measured, asked = found.evidence
                tests = [key for suite in tested.values() for probe in suite.probes for key in probe.keys]
                origin = describe_origin("compare_spaces.py")
                ledger.export(OUTCOMES / f"{name}.outcomes.csv.gz", measured, [*asked, *tests], origin)


def _judge(
    lm: Any, found: Found, tested: dict[str, tasks.Suite], searched: str, space: str, seed: int, ledger: Ledger
) -> dict[str, Any]:
    row: dict[str, Any] = {"space": space, "searched on": searched, "seed": seed}
    row["numbers"] = count_numbers(lm, found.about["space"])
    row["dose"] = found.choices["dose"][found.choices["chosen"]].sum() if len(found.choices) else 0.0
    for keys, suite in tested.items():
        scalings = [LayerScaling.identity(lm.num_layers), found.scaling]
        outcomes = score(lm, suite, scalings, ledger=ledger)
        before, after = outcomes.exact.mean(axis=2)
        interval = bootstrap_mean(after - before)
        fifths = np.subtract(*(by_fifth(e, outcomes.depths).mean(axis=0) for e in outcomes.exact[::-1]))
        row |= {
            f"{keys}: contexts": len(suite.probes),
            f"{keys}: no scaling": before.mean(), f"{keys}: found": after.mean(),
            f"{keys}: points": 100 * interval.mean, f"{keys}: low": 100 * interval.low,
            f"{keys}: high": 100 * interval.high, f"{keys}: p": paired_test(after, before),
            f"{keys}: by fifth": " ".join(f"{100 * change:+.0f}" for change in fifths),
        }  # fmt: skip
    for measure, name in (("perplexity, not seen", "perplexity %"), ("perplexity, seen", "perplexity % of seen text")):
        text = found.row("text", measure)
        row[name] = 100 * text["change"] / text["no scaling"]
    for kind in found.about["texts"]:
        text = found.row("text", f"perplexity, not seen: {kind}")
        row[f"perplexity %: {kind}"] = 100 * text["change"] / text["no scaling"]
    for kind in ("greedy", "drawn"):
        row[f"near repeats %, {kind}"] = 100 * found.row("free text", f"near repeats, {kind}")["change"]
    return row | {"seconds": found.row("search", "seconds")["found"]}


def _write_row(row: dict[str, Any]) -> None:
    """Write a row in place of an earlier one of the same search."""
    same = ["space", "searched on", "seed"]
    rows = pd.DataFrame([row])
    if TABLE.exists():
        earlier = pd.read_csv(TABLE, comment="#")
        differs = (earlier[same] != [row[name] for name in same]).any(axis=1)
        rows = pd.concat([earlier[differs], rows])
    rows = rows.sort_values(["searched on", "space", "seed"])
    write_table(TABLE.stem, rows, "compare_spaces.py", "%.5g")


if __name__ == "__main__":
    main()
