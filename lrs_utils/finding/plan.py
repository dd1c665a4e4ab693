"""How much of everything a search takes: steps, contexts, tokens to read, and the time that these take here.

A call keeps notes of its plan and of its seconds in the ledger, so that it plans and reports the same when resumed.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lrs_utils.finding.parts import LEAST_CONTEXTS, Part
from lrs_utils.models.load import LM
from lrs_utils.progress import SilentProgress
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import score
from lrs_utils.scoring.packing import pack
from lrs_utils.tasks import Suite

NOTES = "find_scaling"  # stands in for a scaling where the ledger keeps notes
STOPS = 2  # stopping points that validation chooses from
DOSES = np.arange(1, 11) / 10
GRADIENT = 2.5  # tokens scored in the time that the gradient of one takes, on two cores
_LEAST = {"steps": 8, "validation": LEAST_CONTEXTS, "test": 8}  # what a shorter search is never cut below


@dataclass(frozen=True)
class Plan:
    """How many contexts, stretches and steps a search takes."""

    steps: int
    search: int  # contexts, as below
    validation: int
    test: int
    stretches: int  # of each text, the same in validation and test

    @property
    def n_contexts(self) -> dict[str, int]:
        """Contexts of each part."""
        return {"search": self.search, "validation": self.validation, "test": self.test}


def measure_seconds_per_token(lm: LM, suite: Suite) -> float:
    """What a token takes here, from one context that is scored without the ledger."""
    one = replace(suite, probes=suite.probes[:1])
    started = time.perf_counter()
    score(lm, one, [LayerScaling.identity(lm.num_layers)], progress=SilentProgress())
    return (time.perf_counter() - started) / count_context_tokens(lm, one)


def count_context_tokens(lm: LM, suite: Suite, questions: int | None = None) -> float:
    """Tokens that a context takes with its questions, or with some of them; from the first few contexts."""
    some = [replace(probe, questions=probe.questions[:questions]) for probe in suite.probes[:3]]
    counts = [len(pack(lm, probe, f"context {number} of {suite.name}").ids) for number, probe in enumerate(some)]
    return sum(counts) / len(counts)


def count_tokens(lm: LM, parts: Mapping[str, Part], plan: Plan, questions: int) -> int:
    """Tokens to read in search, validation and test; the gradient of a token counts as `GRADIENT` of them."""
    suites = parts["test"].tasks
    contexts, text = sum(count_context_tokens(lm, s) for s in suites), count_context_tokens(lm, parts["test"].text)
    step = sum(count_context_tokens(lm, s, questions) for s in suites) + text
    stretches = len(parts["test"].text.probes)
    texts_scored = 1 + 0.7 * STOPS * math.ceil(math.log2(len(DOSES)))  # half of the stretches are often enough
    return (
        round(GRADIENT * plan.steps * step)
        + round((1 + STOPS) * plan.validation * contexts + texts_scored * stretches * text)
        + round(2 * plan.test * contexts + 4 * stretches * text)
    )


def cut_to_minutes(
    lm: LM, parts: Mapping[str, Part], plan: Plan, questions: int, minutes: float, seconds_per_token: float
) -> Plan:
    """The plan, cut until it fits into `minutes`.

    Raises
    ------
    ValueError
        Even the smallest search takes longer.
    """
    affordable = 60 * minutes / seconds_per_token
    for share in np.linspace(1, 0, 51):
        smaller = _shrink(plan, share)
        needed = count_tokens(lm, parts, smaller, questions)
        if needed <= affordable:
            return smaller
    times = math.ceil(10 * needed / affordable) / 10
    raise ValueError(
        f"minutes are too few: the smallest search ({_LEAST['steps']} steps) takes about {times:.1f} times as long "
        "here; give more, or a task of fewer items"
    )


def _shrink(plan: Plan, share: float) -> Plan:
    """A share of a plan's steps and contexts, but not less than the least that a search needs."""
    counts = {name: getattr(plan, name) for name in _LEAST}
    return replace(
        plan, **{name: max(min(_LEAST[name], count), round(share * count)) for name, count in counts.items()}
    )


def name_note(subject: str, parts: Mapping[str, Part], *about: Any) -> str:
    """The key of a note on a call, by its tasks and by what else it depends on (plain JSON values)."""
    fingerprints = [suite.fingerprint for part in parts.values() for suite in part.tasks]
    return f"{subject} {hashlib.sha256(json.dumps([*about, fingerprints]).encode()).hexdigest()[:16]}"


def keep_note(ledger: Ledger, lm: LM, note: str, make: Callable[[], Any]) -> Any:
    """What a note says: what was kept first, else what `make` gives (plain JSON values), which is kept."""
    kept = ledger.find_texts(lm.fingerprint, NOTES, 0).get(note)
    if kept is None:
        [kept] = ledger.record_texts(lm.fingerprint, NOTES, 0, [note], [json.dumps(make())])
    return json.loads(kept)
