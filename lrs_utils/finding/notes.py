"""Notes that a call of `find_scaling` keeps in the ledger, so that it plans and reports the same when resumed."""

import hashlib
import json
from typing import Any

from lrs_utils.models.load import LM
from lrs_utils.scoring.ledger import Ledger

NOTES = "find_scaling"  # stands in for a scaling where the ledger keeps notes: a plan, the seconds of the first run


def name_note(subject: str, about: Any) -> str:
    """The key of a note on a call that `about` describes (plain JSON values)."""
    return f"{subject} {hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"


def find_note(ledger: Ledger, lm: LM, note: str) -> str | None:
    """What a note says, if it was kept."""
    return ledger.find_texts(lm.fingerprint, NOTES, 0).get(note)


def keep_note(ledger: Ledger, lm: LM, note: str, text: str) -> str:
    """Keep a note; returns what it says, which is what was kept first."""
    return ledger.record_texts(lm.fingerprint, NOTES, 0, [note], [text])[0]
