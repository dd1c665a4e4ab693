"""What is searched, chosen and tested on: suites and stretches of text that share nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrs_utils.tasks import Suite, continuations, from_jsonl

Task = Callable[..., Suite] | Suite | str | Path

LEAST_CONTEXTS = 4  # in each part of a file, and for validation
_STRETCH = {"words": 200, "judged": 150}  # of a text, about 270 tokens
_SEEDS = {"search": 1000, "validation": 5000, "test": 10_000}


@dataclass(frozen=True)
class Part:
    """Search, validation or test: a suite for each task, and stretches of the texts."""

    tasks: list[Suite]
    text: Suite
    kinds: NDArray[np.str_]  # of each stretch


def divide(
    given: Sequence[Task], texts: Mapping[str, str], n_contexts: Mapping[str, int], n_stretches: int, seed: int
) -> dict[str, Part]:
    """Search, validation and test, which share no context, and no stretch of a text.

    Parameters
    ----------
    n_contexts : mapping of part to int
        Contexts of each task; of a file that holds fewer, as many as there are in the same proportion.
    n_stretches : int
        Of each text, in each part.
    """
    suites: dict[str, list[Suite]] = {part: [] for part in n_contexts}
    for task in given:
        of_task = _divide_task(task, n_contexts, seed)
        name = of_task[0].name
        if n_same := sum(suite.name.partition(" (")[0] == name for suite in suites["test"]):
            of_task = [replace(suite, name=f"{suite.name} ({n_same + 1})") for suite in of_task]
        for part, suite in zip(n_contexts, of_task, strict=True):
            suites[part].append(suite)
    return {
        part: Part(suites[part], *_cut_stretches(texts, third, n_stretches, seed))
        for third, part in enumerate(n_contexts)
    }


def _divide_task(task: Task, n_contexts: Mapping[str, int], seed: int) -> list[Suite]:
    """A suite for each part: made from seeds of its own, or a part of the file."""
    if callable(task):
        suites = [task(n_contexts=n, seed=_SEEDS[part] + seed) for part, n in n_contexts.items()]
        _refuse_shared(suites)
        return suites
    whole = task if isinstance(task, Suite) else from_jsonl(task)
    parts = whole.parts(*_share_out(whole, [*n_contexts.values()]), seed=seed)
    return [replace(suite, name=whole.name) for suite in parts]


def _share_out(suite: Suite, wanted: Sequence[int]) -> list[int]:
    """How many contexts of a file each part gets: as many as wanted, or those there are in the same proportion."""
    there = len(suite.probes)
    if there < 3 * LEAST_CONTEXTS:
        raise ValueError(
            f"{suite.name} has {there} contexts; to search, choose and test on different ones it needs "
            f"{3 * LEAST_CONTEXTS}"
        )
    if there >= sum(wanted):
        return [*wanted]
    shares = [max(LEAST_CONTEXTS, there * n // sum(wanted)) for n in wanted]
    while sum(shares) > there:
        shares[shares.index(max(shares))] -= 1
    shares[2] += there - sum(shares)
    return shares


def _refuse_shared(suites: Sequence[Suite]) -> None:
    seen: set[str] = set()
    for suite in suites:
        contexts = {probe.context for probe in suite.probes}
        if seen & contexts:
            raise ValueError(
                f"{suite.name} gives the same context for different seeds; let `seed` change every context, so that a "
                "scaling is not judged on what it was searched on"
            )
        seen |= contexts


def _cut_stretches(texts: Mapping[str, str], third: int, n: int, seed: int) -> tuple[Suite, NDArray[np.str_]]:
    """Stretches of one third of each text, kinds in turn."""
    suites = []
    for name, text in texts.items():
        size = len(text) // 3
        try:
            suites.append(continuations(text[third * size : (third + 1) * size], n, seed, **_STRETCH))
        except ValueError as error:
            raise ValueError(f"text {name!r}, divided into thirds to search, choose and test on: {error}") from error
    probes = [probe for probes in zip(*(suite.probes for suite in suites), strict=True) for probe in probes]
    return Suite("text", tuple(probes)), np.array([*texts] * n)
