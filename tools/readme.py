"""The READMEs' tables, from data/results and the notebooks, and each notebook's first screen and badge, so that nothing
is copied by hand: `python tools/readme.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what it shows is a function here. The repository's
address is `Repository` in pyproject.toml's project.urls; while it is unset there are no badges, and a notebook is
opened from a clone.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from first_screen import fill_first_screen
from record import DECODED_NAME, GENETIC_NAME, GOALS

from lrs_utils.finding.recipe import AUTO
from lrs_utils.notebook import ROOT

_MODELS = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
_TABLE = re.compile(r"<!-- table (\w+) -->\n.*?<!-- end -->", re.DOTALL)
READMES = tuple(ROOT / folder / "README.md" for folder in ("", "data/results", "notebooks"))


def _rows(name: str) -> list[dict[str, Any]]:
    if not (ROOT / "data" / "results" / f"{name}.csv").exists():
        return []  # to be measured: the table says so
    return pd.read_csv(ROOT / "data" / "results" / f"{name}.csv", comment="#").to_dict("records")  # type: ignore[return-value]


def _test() -> list[dict[str, str]]:
    return [
        {
            "searcher, scheme, what varies, objective": r["method"],
            "accuracy": f"{r['accuracy']:.3f}",
            "points gained": f"{100 * r['gain']:+.1f} [{100 * r['gain_low']:+.1f}, {100 * r['gain_high']:+.1f}]",
            "p": "" if r["method"] == "no scaling" else f"{r['p_no_scaling']:.2g}",
            "depths better, worse": f"{r['depths_better']}, {r['depths_worse']}",
            "U": f"{r['U']:.3f}",
            "nll": f"{r['nll']:.3f}",
            "perplexity": f"{r['perplexity']:+.1f} %",
        }
        for r in _rows("test")
    ]


def _best() -> list[dict[str, str]]:
    """From the test: the paper's algorithm as it is and as chosen, its scheme at its best, and the best by numbers of
    layers, which took four times the others' budget."""
    meaning = {
        "no scaling": "no scaling",
        "GA, pi, factors, U": "the paper's algorithm: GA, pi, factors, U",
        "paper": "the same, the seed of three that validation chose",
        "gradient, pi, factors, nll": "the paper's scheme by gradient: pi, factors, nll",
        "+1 %": "factors and temperatures by gradient: ntk, nll + text, four times the budget",
    }
    by, *columns = [*[*_test()[0]][:5], "perplexity"]
    rows = {row[by]: row for row in _test()}
    return [{"method": text} | {column: rows[name][column] for column in columns} for name, text in meaning.items()]


def _expect() -> list[dict[str, str]]:
    """What `find_scaling` gave, a row for each model and task, from notebook 00 and from the comparison of spaces."""
    found = {(row["task"], row["measure"]): row for row in _rows("found")}
    [task] = {task for task, measure in found if measure == "accuracy"}
    accuracy, text = found[task, "accuracy"], found["text", "perplexity, not seen"]
    rows = [
        _expected(
            task, accuracy["no scaling"], accuracy["found"], [100 * accuracy[n] for n in ("change", "low", "high")],
            100 * text["change"] / text["no scaling"], found["search", "seconds"]["found"],
        )
    ]  # fmt: skip
    together = [
        row for row in _rows("spaces") if (row["space"], row["searched on"], row["seed"]) == (AUTO[0], "both", 0)
    ]
    for row in together:
        for keys, task in {"uuid": "kv-uuid-20, together", "short": "kv-short-40, together"}.items():
            values = [row[f"{keys}: {name}"] for name in ("no scaling", "found", "points", "low", "high")]
            rows.append(_expected(task, values[0], values[1], values[2:], row["perplexity %"], row["seconds"]))
    calls = [r for r in _rows("record") if r["method"] == "find_scaling" and r["model"] != "smollm2-135m"]
    for r in {(r["model"], r["keys"]): r for r in calls}.values():  # the last call of each, with the most steps
        points = [r[n] for n in ("points", "low", "high")]
        task, model = f"kv-{r['keys']}-{r['pairs']}", _MODELS[r["model"]]
        row = _expected(task, r["no scaling"], r["accuracy"], points, r["perplexity %"], 60 * r["minutes"])
        rows.append(row | {"model": model})
    return rows


def _general() -> list[dict[str, str]]:
    """What the general scaling of each model gains in each test, and what it changes in the perplexity of each text."""
    names = {"uuid": "{} UUID pairs", "short": "{} short pairs", "copying": "{} made-up words, copied"}
    table: dict[str, dict[str, str]] = {}
    for number, model in enumerate(_MODELS.values()):
        judged = _rows(f"objectives_{number}_judged")
        for r in judged:
            if r["objective"] == judged[-1]["objective"]:
                task, _, size = r["test"].partition(", ")
                name = names.get(
                    task, f"{{}} {task}" if size.isdigit() else r["test"].replace("pages", "whole pages")
                ).format(size)
                row = table.setdefault(name, {"test": name})
                gained = _points(r["points"], r["low"], r["high"])
                row[model] = f"{100 * r['no scaling']:.0f} % to {100 * r['found']:.0f} %, {gained}"
        for r in _rows(f"objectives_{number}_perplexity"):
            row = table.setdefault(f"perplexity, {r['text']}", {"test": f"perplexity, {r['text']}"})
            row[model] = f"{r['change']:+.1f} % [{r['low']:+.1f}, {r['high']:+.1f}]"
    return [*table.values()]


def _found() -> list[dict[str, str]]:
    """Notebook 00's table."""
    return [
        {
            "": f"{r['task']}: {r['measure']}", "no scaling": f"{r['no scaling']:.3g}", "found": f"{r['found']:.3g}",
            "change": f"{r['change']:+.3g}" + ("" if pd.isna(r["low"]) else f" [{r['low']:+.3g}, {r['high']:+.3g}]"),
            "p": "" if pd.isna(r["p"]) else f"{r['p']:.2g}",
        }
        for r in _rows("found")
        if r["task"] != "search"
    ]  # fmt: skip


def _spaces() -> list[dict[str, str]]:
    """Each space on both kinds of keys: those searched on both first, then those that gain most."""
    table = []
    for r in sorted(_rows("spaces"), key=lambda r: (r["searched on"], r["seed"], -r["uuid: points"])):
        row = {
            "space": r["space"],
            "numbers": str(r["numbers"]),
            "searched on": f"{r['searched on']}, seed {r['seed']}",
        }
        for keys, name in {"uuid": "20 UUID pairs", "short": "40 short pairs"}.items():
            points = [r[f"{keys}: {column}"] for column in ("points", "low", "high")]
            row[name] = f"{r[f'{keys}: no scaling']:.2f} to {r[f'{keys}: found']:.2f}, " + _points(*points)
        row["UUID by fifth"] = r["uuid: by fifth"]
        row["perplexity"] = ", ".join(f"{r[f'perplexity %: {kind}']:+.1f}" for kind in ("book", "facts", "play")) + " %"
        table.append(row)
    return table


def _recipes() -> list[dict[str, str]]:
    """Recipes of the demo."""
    return [
        {
            "recipe": r["recipe"], "task": r["task"],
            "no scaling": f"{r['no scaling']:.2f}", "found": f"{r['found']:.2f}",
            "points": _points(r["change"], r["low"], r["high"]), "perplexity": f"{r['perplexity %']:+.1f} %",
            "dose": f"{r['dose']:g}",
        }
        for r in _rows("recipes")
    ]  # fmt: skip


def _families() -> list[dict[str, str]]:
    """Model types with the same verdicts in one row, those with the most "exact" first."""
    verdicts = pd.DataFrame(_rows("families")).set_index("type").drop(columns="class").fillna("not built")
    verdicts = verdicts.map(lambda verdict: verdict.partition(":")[0])
    rows = [
        (list(map(str, pattern)), ", ".join(map(str, of.index)))
        for pattern, of in verdicts.groupby([*verdicts], sort=False)
        if "not built" not in pattern
    ]
    rows.sort(key=lambda row: (-row[0].count("exact"), row[0]))
    table = [{"model types": types} | dict(zip(map(str, verdicts), pattern, strict=True)) for pattern, types in rows]
    unbuilt = ", ".join(verdicts.index[verdicts["factors"] == "not built"])
    return [*table, {"model types": unbuilt} | {str(name): "not tried" for name in verdicts}]


def _exports() -> list[dict[str, str]]:
    """Random models: a row for each kind of numbers, a column for each family."""
    table: dict[str, dict[str, str]] = {}
    for r in _rows("exports"):
        if r["model"] not in _MODELS:
            row = table.setdefault(r["scaling"], {"numbers": r["scaling"]})
            form, error = r["form"], "" if pd.isna(r["error"]) else f", {r['error']:.0e}"
            row[r["model"].removeprefix("tiny-")] = form + error
    return [*table.values()]


def _exports_real() -> list[dict[str, str]]:
    return [
        {
            "model": _MODELS[r["model"]], "factor file": r["scaling"], "precision": r["precision"], "form": r["form"],
            "largest difference": "" if pd.isna(r["error"]) else f"{r['error']:.0e}",
            "same 64 tokens": {True: "yes", False: "no"}.get(r["same tokens"], ""),
            "accuracy, scaled and folder": ""
            if pd.isna(r["accuracy, hook"])
            else f"{100 * r['accuracy, hook']:.1f} %, {100 * r['accuracy, folder']:.1f} %",
        }
        for r in _rows("exports")
        if r["model"] in _MODELS
    ]  # fmt: skip


def _points(change: float, low: float, high: float) -> str:
    return f"{change:+.0f} [{low:+.0f}, {high:+.0f}]"


def _expected(
    task: str, before: float, after: float, points: Sequence[float], perplexity: float, seconds: float
) -> dict[str, str]:
    return {
        "model": "SmolLM2-135M", "task": task, "from": f"{100 * before:.0f} %", "to": f"{100 * after:.0f} %",
        "points": _points(*points), "perplexity": f"{perplexity:+.1f} %",
        "minutes": f"{seconds / 60:.0f}",
    }  # fmt: skip


def _front() -> list[dict[str, str]]:
    rows = sorted(_rows("front"), key=lambda row: -row["gain at +5 %"])
    numbers = ["gain at +1 %", "gain at +5 %", "gain", "perplexity"]
    return [
        {"searcher, scheme, what varies, objective": r["method"]} | {n: f"{r[n]:+.1f}" for n in numbers} for r in rows
    ]


def _transfer() -> list[dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for r in _rows("transfer"):
        if r["scaling"] == "no scaling":
            table[r["on"]] = {"": r["on"], "no scaling": f"{r['value']:.2f}"}
        else:
            star = " *" if r["p"] < 0.05 else ""
            table[r["on"]][r["scaling"]] = f"{r['change']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]{star}"
    return [*table.values()]


def _held_out() -> list[dict[str, str]]:
    def interval(r: dict[str, Any], name: str) -> str:
        return f"{r[name]:.3f} [{r[f'{name}_low']:.3f}, {r[f'{name}_high']:.3f}]"

    def p(r: dict[str, Any], name: str) -> str:
        return "" if r["method"] == "no scaling" else f"{r[f'{name}_p']:.2g}"

    return [
        {"": r["method"], "U": interval(r, "U"), "p (U)": p(r, "U")}
        | {"mean accuracy": interval(r, "accuracy"), "p (accuracy)": p(r, "accuracy")}
        | {name: f"{r[f'at {at}']:.2f}" for name, at in {"first": 0, "middle": 9, "last": 19}.items()}
        for r in _rows("held_out")
    ]


def _extrapolation(model: str) -> list[dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for r in _rows("extrapolation"):
        if (r["model"], r["against"]) == (model, "the scheme alone"):
            interval = "" if pd.isna(r["p"]) else f" [{r['low']:+.1f}, {r['high']:+.1f}]{' *' * (r['p'] < 0.05)}"
            change = f", {r['change']:+.1f} %{interval}" if pd.notna(r["change"]) and r["change"] else ""
            row = table.setdefault(r["method"], {"scheme, layer factors": r["method"]})
            row[f"{r['length']:,} tokens"] = f"{r['perplexity']:.1f}{change}"
    return [*table.values()]


def _cream() -> list[dict[str, str]]:
    """What the small model reads after each tuning, with YaRN for its longest target."""
    table: dict[str, dict[str, str]] = {}
    rows = [r for r in _rows("cream") if r["scheme"] == "YaRN"]
    far = max(r["factor"] for r in rows)
    for r in rows:
        if r["factor"] == far and "," not in r["sampler"] and r["length"] > 256 and "middle" not in r["measure"]:
            spread = f" ({r['least']:.3g} to {r['most']:.3g})" if r["least"] < r["most"] else ""
            row = table.setdefault(r["sampler"], {"positions": r["sampler"]})
            row[f"{r['measure']}, {r['length']:,}"] = f"{r['mean']:.1f}{spread}"
    wanted = ["pairs, 512", "pairs, 1,024", "lines, 512", "pass key, 1,024", "pass key, 2,048", "perplexity, 2,048"]
    return [{"positions": name} | {w: row[w] for w in wanted} for name, row in table.items()]


def _cream_large() -> list[dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    rows = pd.DataFrame(_rows("cream_large"))
    for method, of in rows.groupby("method", sort=False):
        row = table[str(method)] = {"positions, scheme": str(method)}
        for length, nll in of[of["task"] == "text"].groupby("length")["nll"]:
            row[f"perplexity, {length:,} tokens"] = f"{np.exp(nll.mean()):.1f}"
        for _, key in of[of["task"] == "pass key"].sort_values("depth").iterrows():
            row[f"pass key at depth {key['depth']:g}"] = "found" if key["right"] else f"no ({key['nll']:.1f} nats)"
        pairs = of[of["task"] == "pairs"]
        row["20 pairs"] = f"{pairs['right'].mean():.0f} % ({pairs['nll'].mean():.3f} nats)"
    return [*table.values()]


def _bench() -> list[dict[str, str]]:
    """What an answer costs, a row for each line of the benchmark that a reader needs."""
    lines = {
        ("generate", 20): "`model.generate`, one by one",
        ("score, one question", 20): "`score`, one question a context",
        ("score, three positions", 20): "`score`, the paper's three positions",
        ("score, all positions", 20): "`score`, all 20 positions",
        ("score, all positions", 75): "`score`, all of 75 pairs",
        ("score, all positions", 140): "`score`, all of 140 pairs",
        ("generation, each candidate alone", 20): "a generation of notebook 06's search, one candidate after another",
        ("generation of the search", 20): "the same, its candidates together",
        ("search of U: trie", 20): "notebook 06's search of U, shared layers computed once",
        ("search of all depths: trie", 20): "notebook 06's search of all depths, shared layers computed once",
    }
    measured = {(row["line"], row["pairs"]): row for row in _rows("benchmark")}
    return [
        {
            "": name, "times faster an answer": f"{float(format(measured[key]['times_faster'], '.2g')):g}",
            "seconds an answer": f"{measured[key]['seconds_an_answer']:.2g}",
            "of the limit": f"{100 * measured[key]['share_of_limit']:.0f} %",
        }
        for key, name in lines.items()
        if key in measured
    ]  # fmt: skip


def _gradient() -> list[dict[str, str]]:
    """What a gradient costs."""
    return [
        {
            "context": f"{r['pairs']} {'UUID' if r['keys'] == 'uuid' else 'short'} pairs",
            "numbers of": r["numbers of"],
            "`score` (seconds)": f"{r['score, seconds']:.1f}",
            "a gradient, in contexts scored": f"{r['price']:.1f} ({r['least']:.1f} to {r['most']:.1f})",
        }
        for r in _rows("gradient_prices")
    ]


def _record() -> list[dict[str, str]]:
    """Minutes to a goal of points: the first call of `find_scaling` that reaches it; the paper's search beside it."""
    table, rows = [], pd.DataFrame(_rows("record"))
    for (model, keys, pairs), of in rows.groupby(["model", "keys", "pairs"], sort=False) if len(rows) else ():
        calls = of[of["method"] == "find_scaling"]
        row = {"model": str(model), "task": f"{pairs} {'UUID' if keys == 'uuid' else 'short'} pairs"}
        for goal in sorted({goal for goals in GOALS.values() for goal in goals}):
            reached = calls[calls["points"] >= goal]
            row[f"minutes to +{goal}"] = "" if goal not in GOALS[str(keys)] else "not reached"
            if len(reached) and goal in GOALS[str(keys)]:
                first = reached.iloc[0]
                row[f"minutes to +{goal}"] = f"{first['minutes']:.1f} ({first['points']:+.0f})"
        genetic, decoded = (of[of["method"] == name].iloc[0] for name in (GENETIC_NAME, DECODED_NAME))
        row["the paper's GA: minutes (points)"] = f"{genetic['minutes']:.1f} ({genetic['points']:+.0f})"
        row["the same, decoding each answer"] = f"{decoded['minutes']:.0f}"
        table.append(row)
    return table


def _two_models() -> list[dict[str, str]]:
    """Every method of notebook 10: points of each search at the limit, and what they took of perplexity."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    rows = [r for r in _rows("two_models") if r["method"] != "no scaling"]
    repeated = {r["method"] for r in rows if r["seed"]}
    for r in rows:
        limit = "" if pd.isna(r["limit"]) else f"{100 * r['limit']:g} %"
        row = table.setdefault((r["method"], limit), {"method": r["method"], "limit": limit})
        interval = "" if r["method"] in repeated else f" [{r['low']:+.1f}, {r['high']:+.1f}]"
        new = {"": f"{r['points']:+.1f}{interval}", ": perplexity (%)": f"{r['perplexity']:+.1f}"}
        for name, text in new.items():
            column = _MODELS[r["model"]] + name
            row[column] = f"{row[column]}, {text}" if column in row else text
    return [*table.values()]


def _verdicts() -> list[dict[str, str]]:
    return [
        {_MODELS.get(name, name): "" if pd.isna(value) else str(value) for name, value in r.items()}
        for r in _rows("two_models_verdicts")
    ]


def _notebooks(folder: str, thumbnails: bool) -> list[dict[str, str]]:
    """Name and question of every notebook, with the figure of its name, else the first figure that a README shows."""
    rows, shown = [], "".join(_TABLE.sub("", path.read_text(encoding="utf-8")) for path in READMES)
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source  # type: ignore[no-untyped-call]
        question = re.search(r"^\*\*(.+?)\*\*$", first, re.MULTILINE | re.DOTALL)
        if question is None:
            raise ValueError(f"{path.name} asks no question: write it **in bold** below the title")
        row = {"notebook": f"[{path.stem}]({folder}{path.name})", "question": " ".join(question[1].split())}
        figures = re.findall(rf"figures/{path.stem[:2]}_\w+\.\w+", shown)
        figures += [f"figures/{file.name}" for file in sorted((ROOT / "figures").glob(f"{path.stem[:2]}_*"))]
        figures.sort(key=lambda figure: Path(figure).stem != path.stem)
        rows.append(row | ({"": f'<img src="{figures[0]}" width="180" alt="">'} if thumbnails else {}))
    return rows


TABLES: dict[str, Callable[[], list[dict[str, str]]]] = {
    "best": _best, "expect": _expect, "general": _general, "found": _found, "spaces": _spaces, "recipes": _recipes,
    "families": _families,
    "test": _test, "front": _front, "transfer": _transfer, "held_out": _held_out,
    "extrapolation_small": partial(_extrapolation, "small-rope"),
    "extrapolation_large": partial(_extrapolation, "smollm2-135m"),
    "cream": _cream, "cream_large": _cream_large, "bench": _bench, "gradient": _gradient, "record": _record,
    "exports": _exports, "exports_real": _exports_real, "two_models": _two_models, "verdicts": _verdicts,
    "map": partial(_notebooks, "notebooks/", True), "notebooks": partial(_notebooks, "", False),
}  # fmt: skip


def filled(text: str) -> str:
    """A README with every table written again.

    Raises
    ------
    ValueError
        A table of a name that isn't known.
    """

    def written(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"a README asks for the table {match[1]!r}; there are {', '.join(TABLES)}")
        rows = TABLES[match[1]]()
        if not rows:
            return f"<!-- table {match[1]} -->\nNot measured yet.\n<!-- end -->"
        cells = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        return f"<!-- table {match[1]} -->\n{lines}\n<!-- end -->"

    return _TABLE.sub(written, text)


def colab_cell(repository: str | None, version: str) -> str:
    """Source of the cell that makes a bare Colab work: the project at its version's tag, beside Colab's own torch."""
    if repository:
        fetch = f"""        !git clone --quiet --depth 1 --branch v{version} {repository} project
        %cd -q project/notebooks"""
    else:
        fetch = '        raise FileNotFoundError("open this notebook in a clone of its repository")'
    return f"""import importlib.util
import os
import sys

if importlib.util.find_spec("lrs_utils") is None:  # a bare Colab; elsewhere there is nothing to do
    if not os.path.exists("../pyproject.toml"):
{fetch}
    %pip install --quiet --editable ..[cluster,rivals,tune]
    sys.path.insert(0, "..")"""


def stamp(notebook: Any, name: str, repository: str | None, version: str) -> None:
    """Write a notebook's badge and first code cell, whose output stays as it is."""
    first, cells = notebook.cells[0], notebook.cells
    first.source = re.sub(r"\n\n\[!\[Open in Colab\].*", "", first.source)
    if repository and repository.startswith("https://github.com/"):
        place = repository.removeprefix("https://github.com/") + f"/blob/v{version}/notebooks/{name}"
        badge = "https://colab.research.google.com/assets/colab-badge.svg"
        link = f"\n\n[![Open in Colab]({badge})](https://colab.research.google.com/github/{place})"
        first.source = first.source.replace("\n", f"{link}\n", 1)
    if not any("colab" in cell.metadata.get("tags", []) for cell in cells[1:2]):
        cell = nbformat.v4.new_code_cell(metadata={"tags": ["colab"]}, id="colab")  # type: ignore[no-untyped-call]
        cells.insert(1, cell)
    cells[1].source = colab_cell(repository, version)
    cells[1].metadata["jupyter"] = {"source_hidden": True}  # plumbing: nothing to read


def address() -> tuple[str | None, str]:
    """The repository, None while it is unset, and the version, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository"), project["version"]


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        stamp(notebook, path.name, *address())
        fill_first_screen(notebook)
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
    for path in READMES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
