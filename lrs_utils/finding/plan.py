"""How much of everything a search takes: steps, contexts, tokens to read, and the time that these take here."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lrs_utils.finding.notes import find_note, keep_note, name_note
from lrs_utils.finding.parts import LEAST_CONTEXTS, Part
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import score
from lrs_utils.scoring.packing import pack
from lrs_utils.tasks import Suite

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
    began = time.perf_counter()
    score(lm, one, [LayerScaling.identity(lm.num_layers)], progress=Progress(0, ""))
    return (time.perf_counter() - began) / count_context_tokens(lm, one)


def count_context_tokens(lm: LM, suite: Suite, questions: int | None = None) -> float:
    """Tokens that a context takes with its questions, or with some of them; from the first few contexts."""
    some = suite.probes[:3]
    if questions is not None:
        some = tuple(replace(probe, questions=probe.questions[:questions]) for probe in some)
    packs = [pack(lm, probe, f"context {number} of {suite.name}") for number, probe in enumerate(some)]
    return sum(len(packed.ids) for packed in packs) / len(packs)


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
    lm: LM,
    parts: Mapping[str, Part],
    plan: Plan,
    questions: int,
    *,
    minutes: float,
    seconds_per_token: float,
    ledger: Ledger,
) -> Plan:
    """The plan, cut until it fits into `minutes`; a resumed run keeps the plan that it began with.

    Raises
    ------
    ValueError
        Even the smallest search takes longer.
    """
    fingerprints = [suite.fingerprint for part in parts.values() for suite in part.tasks]
    note = name_note("plan", [minutes, plan.__dict__, questions, fingerprints])
    if kept := find_note(ledger, lm, note):
        return Plan(**json.loads(kept))
    affordable = 60 * minutes / seconds_per_token
    for share in np.linspace(1, 0, 51):
        smaller = _shrink(plan, share)
        needed = count_tokens(lm, parts, smaller, questions)
        if needed <= affordable:
            return Plan(**json.loads(keep_note(ledger, lm, note, json.dumps(smaller.__dict__))))
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
