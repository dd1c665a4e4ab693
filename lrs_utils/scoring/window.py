"""How long a prompt is, and whether a model under a scaling reads so much."""

from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.tasks import Probe


def context_tokens(lm: LM, probe: Probe) -> int:
    """Tokens that "dynamic_ntk" stretches for: those of the context, whatever is asked about it.

    So a question's outcome doesn't depend on which others are asked with it. A text that only goes on, without a
    question, counts with its continuation.
    """
    [first, *others] = probe.questions
    continued = "" if first.prompt or others else first.answer
    return len(lm.tokenizer(probe.context + continued)["input_ids"])


def refuse_beyond_window(lm: LM, length: int, scaling: Scaling, where: str) -> None:
    """Raise the ValueError of a prompt that is longer than the window after scaling."""
    # layer l sees positions up to length / s_l, so the smallest factor decides
    limit = lm.window * scaling.reach
    if length > limit:
        raise ValueError(
            f"{where} has {length:,} tokens with question and answer, but {lm.name} reads {int(limit):,} (window "
            f"{lm.window:,} x {scaling.reach:g}); use fewer items, or extrapolate=True "
            "to go beyond the window"
        )
