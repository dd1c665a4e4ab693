"""Verdicts on free text, by the metrics of the releases: each takes the text and the accepted answers."""

import re
import string
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_utils.tasks.suite import Suite


def judged(
    suite: Suite, texts: Sequence[Sequence[str]], judge: Callable[[str, Sequence[str]], bool]
) -> NDArray[np.bool_]:
    """Verdicts of a text metric (below) on free answers, shape (contexts, questions); False where none is asked."""
    verdicts = np.zeros(suite.asked.shape, bool)
    verdicts[suite.asked] = [
        judge(text, question.accepted)
        for probe, given in zip(suite.probes, texts, strict=True)
        for question, text in zip(probe.questions, given, strict=True)
    ]
    return verdicts


def holds_value(text: str, answers: Sequence[str]) -> bool:
    """Key-value retrieval (2307.03172, its release): an answer is somewhere in the text, in upper or lower case."""
    return any(answer.lower() in text.lower() for answer in answers)


def best_subspan_em(text: str, answers: Sequence[str]) -> bool:
    """MDQA (2307.03172, its release): a normalised answer stands in the normalised text, here the whole of it."""
    said = normalise(text)
    return any(normalise(answer) in said for answer in answers)


def best_subspan_em_of_first_line(text: str, answers: Sequence[str]) -> bool:
    """`best_subspan_em` as published: what follows the first line break doesn't count, even if nothing precedes it."""
    return best_subspan_em(text.partition("\n")[0], answers)


def normalise(text: str) -> str:
    """SQuAD's normalisation, in its order: lower case, ASCII punctuation, articles, white space."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
