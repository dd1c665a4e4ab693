"""What every suite is made of."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Question:
    """One question about a context. The model reads context + prompt + answer_prefix and should go on with answer.

    Attributes
    ----------
    answer_prefix : str
        What the answer opens with, given to the model (the opening quote of a value, say), so that a verdict
        doesn't depend on how a model chooses to begin. Left out by the free protocol.
    answer : str
        What greedy decoding should emit and nll is taken of, a leading space included where there is one.
    position : int
        Index of the gold item among the context's items, 0-based.
    also : tuple of str
        Other answers that a text may hold to be right.
    """

    prompt: str
    answer_prefix: str
    answer: str
    position: int
    also: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that a text may hold to be right."""
        return (self.answer.strip(), *self.also)


@dataclass(frozen=True)
class Probe:
    """One long context of `n_items` items and the questions asked about it."""

    context: str
    questions: tuple[Question, ...]
    n_items: int

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Content of each question together with its context, hashed: what an outcome is filed under."""
        context = hashlib.sha256(self.context.encode())
        keys = []
        for question in self.questions:
            digest = context.copy()
            digest.update("\0".join(("", question.prompt, question.answer_prefix, question.answer)).encode())
            keys.append(digest.hexdigest()[:16])
        return tuple(keys)


@dataclass(frozen=True)
class Suite:
    """Contexts with their questions, whose number and depths may differ from context to context.

    Arrays over a suite have a column for each question of the context that has most. Where a context has fewer, `asked`
    is False, a depth is nan, and so is the nll of an outcome.

    Attributes
    ----------
    recipe : mapping
        The call that makes this suite again: `kv_retrieval(**recipe)`, say. `in_chat` adds "prompt_style", `parts`
        which "contexts" were taken.

    Raises
    ------
    ValueError
        There is no context, or one without a question.
    """

    name: str
    probes: tuple[Probe, ...]
    recipe: Mapping[str, Any] = field(compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not any(probe.questions for probe in self.probes):
            raise ValueError(f"suite {self.name} has no contexts or no questions; give at least one of each")
        for index, probe in enumerate(self.probes):
            if not probe.questions:
                raise ValueError(f"suite {self.name}: context {index} has no questions; ask one or leave it out")

    @property
    def n_questions(self) -> int:
        """Questions of the context that has most."""
        return max(len(probe.questions) for probe in self.probes)

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Whether a context has that question, shape (contexts, questions)."""
        counts = [len(probe.questions) for probe in self.probes]
        return np.arange(self.n_questions) < np.array(counts)[:, None]

    @property
    def depths(self) -> NDArray[np.float64]:
        """Depth of each question, position / (n_items - 1): 0 is the beginning, 1 the end.

        Shape (questions,) where all contexts ask at the same depths, in the same order. Otherwise (contexts,
        questions), nan where a context has no such question.
        """
        rows = [tuple(q.position / max(probe.n_items - 1, 1) for q in probe.questions) for probe in self.probes]
        if all(row == rows[0] for row in rows):
            return np.array(rows[0])
        depths = np.full((len(rows), self.n_questions), np.nan)
        depths[self.asked] = np.concatenate(rows)
        return depths

    def parts(self, *counts: int, seed: int) -> list["Suite"]:
        """Suites of so many contexts each that share none, drawn by `seed`: to search, to choose and to judge on.

        Raises
        ------
        ValueError
            Too few contexts, a part of none, or two contexts of the same text, which could stand in two parts.
        """
        if min(counts, default=0) < 1:
            raise ValueError(f"parts of {list(counts)} contexts; give the number of each part, at least 1")
        if sum(counts) > len(self.probes):
            raise ValueError(
                f"suite {self.name} has {len(self.probes)} contexts, parts of {list(counts)} need {sum(counts)}; add "
                "contexts or ask for fewer"
            )
        first: dict[str, int] = {}
        for index, probe in enumerate(self.probes):
            if (earlier := first.setdefault(probe.context, index)) != index:
                raise ValueError(
                    f"suite {self.name}: contexts {earlier} and {index} have the same text and could stand in two "
                    "parts; make them one context with the questions of both"
                )
        order = np.random.default_rng(seed).permutation(len(self.probes)).tolist()
        whole = self.recipe.get("contexts", range(len(self.probes)))  # of a part's own parts: as in the whole suite
        parts = []
        for number, count in enumerate(counts):
            taken, order = order[:count], order[count:]
            recipe = {**self.recipe, "contexts": [whole[index] for index in taken]}
            parts.append(Suite(f"{self.name}-part-{number}", tuple(self.probes[index] for index in taken), recipe))
        return parts

    @property
    def fingerprint(self) -> str:
        """Hash of all contexts and questions."""
        return hashlib.sha256("".join(key for probe in self.probes for key in probe.keys).encode()).hexdigest()[:16]


def positions_at(n_items: int, depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> list[int]:
    """Positions nearest to some depths, each once; of two equally near the earlier."""
    return sorted({round(depth * (n_items - 1) - 1e-9) for depth in depths})
