"""Questions that a model gets wrong, what it writes, and the answer of a whole run in two sentences."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from numpy.typing import NDArray

from lrs_utils import LM, Found, Ledger, tasks
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.tasks import Probe, Question, Suite


def choose_missed(suite: Suite, exact: NDArray[np.bool_], most: int = 3) -> tuple[Probe, list[Question]]:
    """The first context with so many wrong answers, and the questions nearest to its middle; any question if none is.

    Parameters
    ----------
    exact : array, shape (contexts, questions)
    """
    missed = [
        [q for q in range(len(probe.questions)) if not right[q]]
        for probe, right in zip(suite.probes, exact, strict=True)
    ]
    probe, wrong = max(zip(suite.probes, missed, strict=True), key=lambda pair: min(len(pair[1]), most))
    middle = sorted(wrong, key=lambda q: abs(probe.questions[q].position / probe.n_items - 0.5))[:most] or [0]
    return probe, [probe.questions[q] for q in middle]


def ask_freely(probe: Probe, questions: Sequence[Question]) -> Suite:
    """These questions of a context, with the beginning of the answer as part of the prompt."""
    given = tuple(replace(q, prompt=q.prompt + q.answer_prefix, answer_prefix="") for q in questions)
    return tasks.Suite("three questions", (replace(probe, questions=given),))


def tabulate_answers(lm: LM, asked: Suite, scaling: Scaling, *, tokens: int, ledger: Ledger | None) -> pd.DataFrame:
    """What the model writes under a scaling, greedily, up to the first line break, beside the right answers."""
    [texts] = generate_answers(lm, asked, scaling, max_new_tokens=tokens, ledger=ledger)
    rows = []
    for q, text in zip(asked.probes[0].questions, texts, strict=True):
        written = text.strip().partition("\n")[0]
        verdict = "right" if written.startswith(q.accepted) else "wrong"
        rows.append((q.prompt.strip(), q.answer.strip(), written, verdict))
    return pd.DataFrame(rows, columns=["question", "right answer", "the model writes", "verdict"])


_ELSEWHERE = """
import json, sys
sys.modules["lrs_utils"] = None  # importing it is an error
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, trust = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
written = []
for prompt in json.load(sys.stdin):
    ids = tokenizer(prompt, return_tensors="pt")
    tokens_out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    written.append(tokenizer.decode(tokens_out[0, ids["input_ids"].shape[1] :]))
print(json.dumps(written))
"""


def read_elsewhere(folder: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """What the model in a folder writes after each prompt, to the first line break, in a process without lrs_utils."""
    about = json.dumps([str(folder), tokens, (folder / "modeling_lrs.py").exists()])
    command = [sys.executable, "-c", _ELSEWHERE, about]
    found = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{folder} can't be read there: {found.stderr.strip().splitlines()[-1]}")
    return [text.strip().partition("\n")[0] for text in json.loads(found.stdout)]


def read_accuracy(found: Found, measure: str) -> str | None:
    """How accuracy changes in a fifth of the depths, for the first task; None where it has no questions there."""
    task = found.judged.tasks[0].name
    rows = found.table[(found.table["task"] == task) & (found.table["measure"] == measure)]
    if rows.empty:
        return None
    before, after = (100 * float(rows.iloc[0][column]) for column in ("no scaling", "found"))
    return f"from {before:.0f} to {after:.0f} % in the {measure}"


def say_by_depth(found: Found) -> str:
    """A sentence on where in the context answers were gained or lost."""
    parts = [part for name in ("first fifth", "middle fifth", "last fifth") if (part := read_accuracy(found, name))]
    if found.scaling.is_identity or not parts:
        row = found.row(found.judged.tasks[0].name, "accuracy")
        return f"With no scaling the model answers {100 * row['no scaling']:.0f} % of the held-out questions."
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"By depth of the answer in the context, accuracy goes {listed}."


def stack_panels(figure: Figure) -> None:
    """Put the numbers of `Found.plot` below the accuracy by depth, so that a page is wide enough for both."""
    top, *maps = [ax for ax in figure.axes if ax.get_subplotspec()]  # not the colour bars
    grid = GridSpec(2, len(maps), figure=figure, height_ratios=(1.4, 1))
    top.set_subplotspec(grid[0, :])
    for n, ax in enumerate(maps):
        ax.set_subplotspec(grid[1, n])
    top.set(xlim=(0, 1.32), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])  # with room for the names at the lines' ends
    top.spines["bottom"].set_bounds(0, 1)
    figure.set_size_inches(7, 5.6)
