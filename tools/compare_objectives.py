"""What a scaling is searched on decides where it helps: objectives of one task, of all, and of all but one.

    python tools/compare_objectives.py --model smollm2-135m --objectives all copying "all but keys"

Each objective is one `find_scaling` with the same budget a task; every scaling found is judged on the same held-out
contexts of all tasks, some longer than any that was searched on, on texts of three kinds and on capitals without any
context: a row of data/results/objectives.csv each. If it is killed, the same command resumes: outcomes are in the
ledger of the cache folder, and those of finished searches in data/results/objectives.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from result_tables import RESULTS, describe_origin, write_table

from lrs_utils import LM, Found, LayerScaling, Ledger, find_scaling, load_lm, save_factors, score, tasks
from lrs_utils.analysis.statistics import by_fifth, holm, paired_change
from lrs_utils.models.download import cache_folder
from lrs_utils.notebook import ROOT, versions
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.tasks.judging import best_subspan_em, judged

TABLE, OUTCOMES = RESULTS / "objectives.csv", RESULTS / "objectives"
KEYS = ("uuid", "short")  # the same prompt: left out together too
OBJECTIVES: dict[str, list[str]] = {
    "all": [*tasks.GENERAL],
    **{name: [name] for name in tasks.GENERAL},
    **{f"all but {name}": [other for other in tasks.GENERAL if other != name] for name in tasks.GENERAL},
    "all but keys": [name for name in tasks.GENERAL if name not in KEYS],
}
_SEED = 40_000  # of the contexts that everything is judged on
_POSITIONS = partial(tasks.positions_at, depths=[place / 9 for place in range(10)])
RECIPE: dict[str, Any] = {"contexts": (32, 8, 4), "steps": 48, "stretches": 24, "questions": 10, "text_weight": 4.0}


def make_tests(n_contexts: int) -> dict[str, tasks.Suite]:
    """Held-out contexts of every task, each asked at ten depths at most."""

    def pairs(n: int, keys: str) -> tasks.Suite:
        return tasks.kv_retrieval(n, n_contexts, _SEED, keys=keys, positions=_POSITIONS(n))

    return {
        "uuid, 10 pairs": pairs(10, "uuid"),
        "uuid, 20 pairs": pairs(20, "uuid"),
        "uuid, 40 pairs": pairs(40, "uuid"),
        "short, 40 pairs": pairs(40, "short"),
        "short, 100 pairs": pairs(100, "short"),
        "lines, 60": tasks.lines_retrieval(60, n_contexts, _SEED, positions=_POSITIONS(60)),
        "copying, 200 words": tasks.copying(200, n_contexts, _SEED),
        "documents, 10": tasks.mdqa(10, n_contexts, _SEED),
        "capitals, closed book": tasks.capitals(100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", help="outcomes are filed by precision")
    parser.add_argument("--objectives", nargs="+", default=[*OBJECTIVES], choices=OBJECTIVES)
    parser.add_argument("--space", default="auto")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--contexts", type=int, default=40)
    options = parser.parse_args()
    lm = load_lm(options.model, dtype=options.dtype)
    ledger = Ledger(cache_folder() / "objectives.sqlite")
    for file in OUTCOMES.glob("*.outcomes.csv.gz"):
        ledger.load(file)
    tests = make_tests(options.contexts)
    for seed in options.seeds:
        for objective in options.objectives:
            searched = [tasks.GENERAL[name] for name in OBJECTIVES[objective]]
            found = find_scaling(lm, searched, space=options.space, seed=seed, ledger=ledger, **RECIPE)
            print(f"{objective}, seed {seed}: {found}", flush=True)
            rows = pd.DataFrame(judge(lm, found, tests, ledger))
            rows = rows.assign(model=lm.name, objective=objective, seed=seed, space=found.about["space"])
            keep_scaling(lm, found, rows, f"{lm.name}-{objective.replace(' ', '-')}-{seed}", tests, ledger)
            write_rows(rows)


def judge(lm: LM, found: Found, tests: Mapping[str, tasks.Suite], ledger: Ledger) -> list[dict[str, Any]]:
    """A row for each test: points of accuracy, or per cent of perplexity, with the interval over contexts."""
    rows, scalings = [], [LayerScaling.identity(lm.num_layers), found.scaling]
    for name, suite in tests.items():
        before, after = (read_answers(lm, suite, scaling, ledger) for scaling in scalings)
        row = {"test": name, "measure": "accuracy", "no scaling": before.mean(), "found": after.mean()}
        row |= paired_change(100 * before.mean(axis=1), 100 * after.mean(axis=1))
        if before.shape[1] > 1:
            fifths = by_fifth(after, suite.depths).mean(axis=0) - by_fifth(before, suite.depths).mean(axis=0)
            row["by fifth"] = " ".join(f"{100 * change:+.0f}" for change in fifths)
        rows.append(row)
    for kind in found.about["texts"]:
        text = found.row("text", f"perplexity, not seen: {kind}")
        percent = {name: 100 * text[name] / text["no scaling"] for name in ("change", "low", "high")}
        values = {name: text[name] for name in ("no scaling", "found", "p")}
        rows.append({"test": kind, "measure": "perplexity %"} | values | percent)
    for kind in ("greedy", "drawn"):
        repeats = found.row("free text", f"near repeats, {kind}")
        values = {"no scaling": repeats["no scaling"], "found": repeats["found"], "change": 100 * repeats["change"]}
        rows.append({"test": f"free text, {kind}", "measure": "near repeats %"} | values)
    return rows


def read_answers(lm: LM, suite: tasks.Suite, scaling: Scaling, ledger: Ledger) -> np.ndarray:
    """Verdicts, shape (contexts, questions): of documents on free text, as their paper judges them; else exact ones."""
    if not suite.name.startswith("mdqa"):
        outcomes = score(lm, suite, [scaling], ledger=ledger)
        if suite.name.startswith("capitals"):  # the options are its questions, the right one first
            return np.array(outcomes.nll[0].argmin(axis=1) == 0, float)[:, None]
        return np.array(outcomes.exact[0], float)
    # a base model has no chat template, and is asked as it is
    asked = tasks.in_chat(suite, lm.tokenizer) if lm.tokenizer.chat_template else suite
    texts = generate_answers(lm, asked, scaling, max_new_tokens=30, ledger=ledger)
    return judged(asked, texts, best_subspan_em).astype(float)


def keep_scaling(
    lm: LM, found: Found, rows: pd.DataFrame, name: str, tests: Mapping[str, tasks.Suite], ledger: Ledger
) -> None:
    """Write the factor file, and the outcomes that the search and its rows stand on."""
    about = {"model": lm.name, "fingerprint": lm.fingerprint, "found": found.about}
    file = ROOT / "build" / "objectives" / f"{name}.json"
    command, test = "python tools/compare_objectives.py", rows.replace({np.nan: None}).to_dict("records")
    save_factors(file, found.scaling, **about, test=test, command=command, versions=versions())
    measured, asked = found.evidence
    keys = [key for suite in tests.values() for probe in suite.probes for key in probe.keys]
    ledger.export(
        OUTCOMES / f"{name}.outcomes.csv.gz", measured, [*asked, *keys], describe_origin("compare_objectives.py")
    )


def write_rows(rows: pd.DataFrame) -> None:
    """Write a search's rows in place of earlier ones of the same search; p is corrected over the whole table (Holm)."""
    same = ["model", "objective", "seed"]
    rows = rows.rename(columns={"p": "p alone"})
    if TABLE.exists():
        earlier = pd.read_csv(TABLE, comment="#")
        rows = pd.concat([earlier[(earlier[same] != rows[same].iloc[0]).any(axis=1)], rows])
    tested = rows["p alone"].notna()
    rows.loc[tested, "p"] = holm(rows.loc[tested, "p alone"])
    first = [*same, "space", "test", "measure"]
    write_table(
        TABLE.stem, rows[[*first, *rows.columns.difference(first, sort=False)]], "compare_objectives.py", "%.5g"
    )


if __name__ == "__main__":
    main()
