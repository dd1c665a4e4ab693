"""Kill real searches again and again: each must end where it would have.

    python tools/kill_searches.py

Each search runs once undisturbed, and again with `--kills` times SIGKILL, each after a random part of what was left.
Rows of data/results/kills.csv: whether every candidate, every fitness and every row of the ledger is the same to the
last bit.
"""

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from result_tables import write_table

from lrs_utils import GeneticSearch, GradientSearch, Ledger, load_lm, search, tasks
from lrs_utils.searchers.engine import SearchResult
from lrs_utils.searchers.objectives import mixture

METHODS = ("GeneticSearch", "GradientSearch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--kills", type=int, default=10, help="of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", nargs=3, metavar=("LEDGER", "METHOD", "DTYPE"), help="run one search and print it")
    options = parser.parse_args()
    if options.alone:
        print(_search(options.model, *options.alone), flush=True)
        return
    rows = []
    for dtype in options.dtypes:
        for method in METHODS:
            rows.append(_compare(options.model, method, dtype, options.kills, random.Random(options.seed)))
            print(rows[-1], flush=True)
    write_table("kills", pd.DataFrame(rows), "kill_searches.py")


def _search(model: str, path: str, method: str, dtype: str) -> str:
    lm, ledger = load_lm(model, dtype=dtype), Ledger(path)
    suite = tasks.kv_retrieval(16, n_contexts=4, seed=3, keys="short")
    if method == "GeneticSearch":
        genetic = GeneticSearch(lm.num_layers, population=10, parents=5, mutations=5, crossovers=5, seed=0)
        return _ending(search(lm, suite, genetic, budget=40, ledger=ledger))
    gradient = GradientSearch(lm, suite, steps=24, every=8, vary="head_gains", ledger=ledger)
    return _ending(search(lm, suite, gradient, budget=4, objective=mixture(1), ledger=ledger))


def _ending(result: SearchResult[Any]) -> str:
    return json.dumps([[candidate.key for candidate in result.candidates], repr(result.fitness)])


def _compare(model: str, method: str, dtype: str, kills: int, rng: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "undisturbed.sqlite", [Path(folder) / "killed-0.sqlite"]
        ending = _finish(_start(model, alone, method, dtype))
        whole = _count(alone)
        known: list[int] = []
        while len(known) < kills:
            victim, least = _start(model, killed[-1], method, dtype), _count(killed[-1])
            at = rng.randint(least + 1, max(least + 1, whole - 1))
            while _count(killed[-1]) < at and victim.poll() is None:
                time.sleep(0.005)
            victim.send_signal(signal.SIGKILL)
            if victim.wait() == -signal.SIGKILL:
                known.append(_count(killed[-1]))
            else:  # it ended before: kill another
                killed.append(Path(folder) / f"killed-{len(killed)}.sqlite")
        endings = [_finish(_start(model, path, method, dtype)) for path in killed]
        return {
            "method": method, "dtype": dtype, "searches": len(killed), "kills": kills, "rows of the ledger": whole,
            "known when it was killed": " ".join(map(str, known)),
            "same candidates": all(found[0] == ending[0] for found in endings),
            "same fitness": all(found[1] == ending[1] for found in endings),
            "same rows": all(_rows(path) == _rows(alone) for path in killed),
        }  # fmt: skip


def _start(model: str, path: Path, method: str, dtype: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--model", model, "--alone", str(path), method, dtype]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> Any:
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the search ended with status {process.returncode}:\n{errors[-2000:]}")
    return json.loads(out.splitlines()[-1])


def _count(path: Path) -> int:
    return len(_rows(path))


def _rows(path: Path) -> list[tuple[Any, ...]]:
    """Outcomes and gradients, in a fixed order."""
    if not path.exists():
        return []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as ledger:
        there = {name for (name,) in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        tables = [table for table in ("outcomes", "gradients") if table in there]
        query = "SELECT * FROM candidates JOIN {} ON candidate = id"
        rows = [(table, row) for table in tables for row in ledger.execute(query.format(table))]
    # without the candidate's number in this file
    return sorted((table, *map(str, row[1:3]), *map(str, row[4:])) for table, row in rows)


if __name__ == "__main__":
    main()
