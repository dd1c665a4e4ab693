"""What notebook 03 measures beside `score`: texts written out, verdicts of plain decoding, readings of suites, prices.

It knows neither profiles nor paths: models, suites and ledgers are passed in.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lrs_utils import LayerScaling, Ledger, score
from lrs_utils.analysis.statistics import Interval, bootstrap_mean
from lrs_utils.models.load import LM
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.tasks import Question, Suite
from lrs_utils.tasks.judging import best_subspan_em, best_subspan_em_of_first_line, judged


def shorten(text: str, first: int, last: int) -> str:
    """The first and the last lines of a text, with [...] for what is left out between them."""
    lines = text.split("\n")
    if len(lines) <= first + last:
        return text
    return "\n".join([*lines[:first], "[...]", *lines[len(lines) - last :]])


def spread(n: int, at_most: int) -> list[int]:
    """Positions of `n` items, from the first to the last, evenly spread."""
    positions: list[int] = np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(int)).tolist()
    return positions


def pick_questions(exact: NDArray[np.bool_]) -> tuple[int, list[int]]:
    """A context and two of its questions: one answered, nearest to an end, and one missed, nearest to the middle.

    Parameters
    ----------
    exact : bool array, shape (contexts, questions)
        Questions in the order of their depths.

    Returns
    -------
    context, questions
        The first context with both. Where no context has both, the first one's first and middle question.
    """
    n = exact.shape[1]
    from_middle = np.abs(np.arange(n) - (n - 1) / 2)
    for context, verdicts in enumerate(exact):
        if verdicts.any() and not verdicts.all():
            right = max(np.flatnonzero(verdicts), key=lambda q: from_middle[q])
            wrong = min(np.flatnonzero(~verdicts), key=lambda q: from_middle[q])
            return context, [int(right), int(wrong)]
    return 0, [0, (n - 1) // 2]


def write_answers(lm: LM, suite: Suite, context: int, questions: Sequence[int], *, ledger: Ledger | None = None) -> str:
    """What the model writes, greedily and with no scaling, to questions about a context, beside the right answers.

    A wrong answer that is the value of another pair is named as such.

    Parameters
    ----------
    suite : Suite
        Key-value pairs, each asked for.
    """
    probe = suite.probes[context]
    asked = [probe.questions[q] for q in questions]
    opened = tuple(replace(q, prompt=q.prompt + q.answer_prefix, answer_prefix="") for q in asked)
    alone = Suite(suite.name, (replace(probe, questions=opened),))
    longest = max(len(lm.tokenizer(q.answer)["input_ids"]) for q in asked)
    no_scaling = LayerScaling.identity(lm.num_layers)
    [texts] = generate_answers(lm, alone, no_scaling, max_new_tokens=longest, ledger=ledger)
    depth_of = {q.answer: q.position / max(probe.n_items - 1, 1) for q in probe.questions}
    report = []
    for question, text in zip(asked, texts, strict=True):
        said = text.partition('"')[0].partition("\n")[0].rstrip()
        verdict = "exact" if text.startswith(question.answer) else "wrong"
        if verdict == "wrong" and said in depth_of:
            verdict = f"wrong: the value of the pair at depth {depth_of[said]:.2f}"
        report.append(
            f"depth {depth_of[question.answer]:.2f}        {question.prompt.strip().splitlines()[0]}\n"
            f"right answer      {question.answer}\n"
            f"the model writes  {said}   {verdict}"
        )
    return "\n\n".join(report)


def decode_one_by_one(lm: LM, suite: Suite) -> list[list[str]]:
    """What `model.generate` writes, with as many tokens as the answer has, one prompt after the other.

    Returns
    -------
    list of list of str, shape (contexts, questions)
    """
    return [[_decode(lm, probe.context, question) for question in probe.questions] for probe in suite.probes]


def _decode(lm: LM, context: str, question: Question) -> str:
    prompt = lm.tokenizer(context + question.prompt + question.answer_prefix, return_tensors="pt").to(lm.model.device)
    n_answer = len(lm.tokenizer(question.answer)["input_ids"])
    with torch.inference_mode():
        written = lm.model.generate(  # type: ignore[operator]
            **prompt, max_new_tokens=n_answer, do_sample=False, repetition_penalty=1.0, pad_token_id=0
        )
    return str(lm.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]))


def begins_with_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text begins with an accepted answer: exactness, for `judged`."""
    return text.startswith(tuple(answers))


def name_copied(suite: Suite, texts: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Which texts are the value of another pair of their context, as far as they go, shape (contexts, questions).

    A text may end before the value does: values have different numbers of tokens. Half a value is enough.

    Parameters
    ----------
    suite : Suite
        Key-value pairs.
    texts : sequence of sequence of str
        What the model wrote after the opening quote.
    """
    copied = np.zeros((len(suite.probes), suite.n_questions), bool)
    for c, (probe, written) in enumerate(zip(suite.probes, texts, strict=True)):
        values = re.findall(r'": "([^"]+)"', probe.context)
        for q, (question, text) in enumerate(zip(probe.questions, written, strict=True)):
            said = text.partition('"')[0].rstrip()
            others = [value for value in values if value != question.answer]
            copied[c, q] = any(value.startswith(said) and 2 * len(said) >= len(value) for value in others)
    return copied


@dataclass(frozen=True)
class Reading:
    """How a model reads a suite with no scaling, by depth.

    Attributes
    ----------
    suite : Suite
    accuracy, nll : Interval
        Of exact answers, and of the nll of their tokens, with intervals over contexts.
    exact : bool array, shape (contexts, questions)
    in_text, in_first_line : Interval, optional
        Share of free answers whose text, or first line, has an accepted answer; only of `read_documents`.
    """

    suite: Suite
    accuracy: Interval
    nll: Interval
    exact: NDArray[np.bool_]
    in_text: Interval | None = None
    in_first_line: Interval | None = None

    def rows(self, name: str) -> pd.DataFrame:
        """A row for each depth, as in data/results/retrieval.csv."""
        columns = {"depth": self.suite.depths, **self.accuracy._asdict(), "nll": self.nll.mean}
        table = pd.DataFrame({"suite": name, **columns, "contexts": len(self.suite.probes)})
        if self.in_text is not None and self.in_first_line is not None:
            table["subspan"], table["subspan_first_line"] = self.in_text.mean, self.in_first_line.mean
        return table

    @property
    def edge(self) -> Interval:
        """Accuracy of the first and the last question minus that of all between them, with its interval."""
        return bootstrap_mean(self.exact[:, [0, -1]].mean(axis=1) - self.exact[:, 1:-1].mean(axis=1))


def describe_curve(curve: Interval, depths: NDArray[np.float64]) -> str:
    """A curve in words: its values at the beginning, the depth nearest to the middle, and the end."""
    places = [0, int(np.argmin(np.abs(depths - 0.5 + 1e-9))), len(depths) - 1]  # of two equally near the earlier
    return ", ".join(f"{curve.mean[place]:.2f} at depth {depths[place]:.2g}" for place in places)


def read_suite(lm: LM, suite: Suite, *, ledger: Ledger | None = None) -> Reading:
    """Score a suite with no scaling."""
    outcomes = score(lm, suite, [LayerScaling.identity(lm.num_layers)], ledger=ledger)
    exact, nll = outcomes.exact[0], outcomes.nll[0]
    return Reading(suite, bootstrap_mean(exact), bootstrap_mean(nll), exact)


def read_documents(lm: LM, suite: Suite, max_new_tokens: int, *, ledger: Ledger | None = None) -> Reading:
    """Score a suite of documents, and let the model answer freely as well (`best_subspan_em`, the metric of MDQA)."""
    no_scaling = LayerScaling.identity(lm.num_layers)
    texts = generate_answers(lm, suite, no_scaling, max_new_tokens=max_new_tokens, ledger=ledger)
    in_text, in_first_line = (
        bootstrap_mean(judged(suite, texts, judge)) for judge in (best_subspan_em, best_subspan_em_of_first_line)
    )
    return replace(read_suite(lm, suite, ledger=ledger), in_text=in_text, in_first_line=in_first_line)


def price_suites(lm: LM, suites: Sequence[Suite], *, repeats: int = 3) -> pd.DataFrame:
    """Seconds to read one context of each suite and judge its questions: the median of some contexts, nothing stored.

    Returns
    -------
    DataFrame
        Columns "suite", "tokens", "questions", "seconds"; of suites with one name the first.
    """
    no_scaling, rows = LayerScaling.identity(lm.num_layers), []
    for name in dict.fromkeys(suite.name for suite in suites):
        suite = next(suite for suite in suites if suite.name == name)
        times = []
        for probe in suite.probes[:repeats]:
            began = time.perf_counter()
            score(lm, replace(suite, probes=(probe,)), [no_scaling])
            times.append(time.perf_counter() - began)
        tokens = len(lm.tokenizer(suite.probes[0].context)["input_ids"])
        rows.append((name, tokens, suite.n_questions, sorted(times)[len(times) // 2]))
    return pd.DataFrame(rows, columns=["suite", "tokens", "questions", "seconds"])
