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
        doesn't hang on how a model chooses to begin. Left out by the free protocol.
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
    """Probes that all ask at the same depths.

    Attributes
    ----------
    recipe : mapping
        The call that makes this suite again: `kv_retrieval(**recipe)`, say. `in_chat` adds "prompt_style".
    """

    name: str
    probes: tuple[Probe, ...]
    recipe: Mapping[str, Any] = field(compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.probes or not self.probes[0].questions:
            raise ValueError(f"suite {self.name} has no contexts or no questions")
        for index, probe in enumerate(self.probes):
            if _depths(probe) != _depths(self.probes[0]):
                raise ValueError(
                    f"suite {self.name}: context {index} asks at depths {_depths(probe)}, "
                    f"context 0 at {_depths(self.probes[0])}; all contexts must ask at the same depths"
                )

    @property
    def depths(self) -> NDArray[np.float64]:
        """Depth of each question, position / (n_items - 1), shape (questions,): 0 is the begin, 1 the end."""
        return np.array(_depths(self.probes[0]))

    @property
    def fingerprint(self) -> str:
        """Hash of all contexts and questions."""
        return hashlib.sha256("".join(key for probe in self.probes for key in probe.keys).encode()).hexdigest()[:16]


def positions_at(n_items: int, depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> list[int]:
    """Positions nearest to some depths, each once; of two equally near the earlier."""
    return sorted({round(depth * (n_items - 1) - 1e-9) for depth in depths})


def _depths(probe: Probe) -> tuple[float, ...]:
    return tuple(question.position / max(probe.n_items - 1, 1) for question in probe.questions)
