"""How soon a model gains: minutes from nothing to a goal of points on held-out contexts, the last part of `make bench`.

    python tools/record.py --models smollm2-135m gemma3-270m

`find_scaling` is called with more and more steps, each time with an empty ledger, until it reaches the last goal.
Beside it stand the paper's genetic algorithm (its scheme, objective and bounds), and the same search where each answer
is decoded by `generate`, as public code does it, priced from measured seconds an answer. Minutes are of processor time
in one thread, which a busy machine changes little; they include the choice on validation contexts and the test.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from benchmark import describe_machine, generate_work
from result_tables import RESULTS, write_table

from lrs_utils import Found, GeneticSearch, LayerScaling, Ledger, find_scaling, load_lm, score, search, tasks
from lrs_utils.analysis.statistics import bootstrap_mean
from lrs_utils.models.load import LM
from lrs_utils.progress import SilentProgress
from lrs_utils.searchers.objectives import utilisation_then_nll

# Pairs that a model with no scaling gets right in part, and the goals, in points.
PAIRS = {("smollm2-135m", "short"): 40, ("gemma3-270m", "short"): 40}
PAIRS |= {("smollm2-135m", "uuid"): 12, ("gemma3-270m", "uuid"): 10}
GOALS = {"short": (25, 50), "uuid": (15,)}
STEPS = (8, 16, 32)
CONTEXTS = (16, 8, 16)
GENETIC: dict[str, Any] = {"population": 20, "parents": 10, "mutations": 5, "crossovers": 5}  # notebook 06's
CANDIDATES = 40
GENETIC_NAME, DECODED_NAME = "the paper's GA", "the paper's GA, decoding each answer"
_GAIN = {"points": "change", "low": "low", "high": "high"}  # columns here and in a Found's table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--keys", nargs="+", default=[*GOALS], choices=GOALS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for model in options.models:
        lm = load_lm(model, dtype="bfloat16")
        for keys in options.keys:
            with tempfile.TemporaryDirectory() as folder:
                rows = pd.DataFrame(time_methods(lm, PAIRS[model, keys], keys, Path(folder)))
            write_rows(rows.assign(model=lm.name, pairs=PAIRS[model, keys], keys=keys), lm)


def write_rows(rows: pd.DataFrame, lm: LM) -> None:
    """Write a model's rows of one task in place of earlier ones: a run that is killed keeps the tasks it has done."""
    path, same = RESULTS / "record.csv", ["model", "pairs", "keys"]
    rows = rows[[*same, *rows.columns.difference(same, sort=False)]]
    if path.exists():
        earlier = pd.read_csv(path, comment="#")
        rows = pd.concat([earlier[(earlier[same] != rows[same].iloc[0]).any(axis=1)], rows])
    print(rows.to_string(index=False), flush=True)
    write_table("record", rows, f"record.py | {describe_machine(lm)}", "%.4g")


def time_methods(lm: LM, pairs: int, keys: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each call of `find_scaling`, for the paper's search, and for that search decoded."""
    task = partial(tasks.kv_retrieval, pairs, keys=keys)
    for steps in STEPS:
        started = time.process_time()
        with Ledger(folder / f"{steps}.sqlite") as ledger:
            found = find_scaling(lm, task, steps=steps, contexts=CONTEXTS, ledger=ledger)
        minutes = (time.process_time() - started) / 60
        accuracy, text = found.row(found.judged.tasks[0].name, "accuracy"), found.row("text", "perplexity, not seen")
        gain = {"no scaling": accuracy["no scaling"], "accuracy": accuracy["found"]}
        gain |= {name: 100 * accuracy[column] for name, column in _GAIN.items()}
        rise = 100 * (text["found"] / text["no scaling"] - 1)
        answers = int(found.row("search", "answers")["found"])
        row = {"method": "find_scaling", "steps": steps, "answers": answers, "minutes": minutes}
        yield row | gain | {"perplexity %": rise}
        if gain["points"] >= max(GOALS[keys]):
            break
    yield from time_genetic(lm, task, pairs, found)


def time_genetic(lm: LM, task: Any, pairs: int, found: Found) -> Iterator[dict[str, Any]]:
    """The paper's search from its U, tested on the contexts that `find_scaling` was; its price scored and decoded."""
    suite = task(n_contexts=CONTEXTS[1], seed=1, positions=[0, (pairs - 1) // 2, pairs - 1])
    genetic = GeneticSearch(lm.num_layers, bounds=(1.0, 2.0), seed=0, **GENETIC)
    started = time.process_time()
    result = search(lm, suite, genetic, budget=CANDIDATES, objective=utilisation_then_nll)
    minutes = (time.process_time() - started) / 60
    before, after = score(lm, found.judged.tasks[0], [LayerScaling.identity(lm.num_layers), result.best]).exact
    interval = bootstrap_mean((after - before.astype(float)).mean(axis=1))
    gain = {"no scaling": before.mean(), "accuracy": after.mean()}
    gain |= {"points": 100 * float(np.mean(after) - np.mean(before))}
    gain |= {"low": 100 * float(interval.low), "high": 100 * float(interval.high)}
    answers = len(result.candidates) * int(suite.asked.sum())
    row = {"method": GENETIC_NAME, "steps": len(result.candidates), "answers": answers}
    yield row | {"minutes": minutes} | gain
    work = generate_work(lm, suite.probes[0], result.best, range(3))
    with torch.inference_mode():
        work.run(SilentProgress())  # warms up
        started = time.process_time()
        work.run(SilentProgress())
    decoded = (time.process_time() - started) / work.answers * answers / 60
    yield row | {"method": DECODED_NAME, "minutes": decoded} | gain


if __name__ == "__main__":
    main()
