"""Pass key retrieval (Mohtashami and Jaggi 2023, the prompt released): a number hidden in filler, length x depth."""

from collections.abc import Sequence

import numpy as np

from lrs_utils.arguments import whole
from lrs_utils.tasks.suite import Probe, Question, Suite

_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def passkey(
    n_fillers: int = 50, n_contexts: int = 20, seed: int = 0, *, depths: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)
) -> list[Suite]:
    """Generate pass key suites, one for each depth: a context has one key, so depths don't share contexts.

    Parameters
    ----------
    n_fillers : int
        Repetitions of the filler, about 25 tokens each.
    n_contexts : int
        Keys for each depth, the same at every depth.
    depths : sequence of float in [0, 1]
        Share of the filler that stands before the key, to the nearest repetition.

    Returns
    -------
    list of Suite, in the order of `depths`
    """
    for name, value in (("n_fillers", n_fillers), ("n_contexts", n_contexts)):
        whole(name, value, least=1)
    outside = [d for d in depths if not 0 <= d <= 1]
    if outside:
        raise ValueError(f"depth {outside[0]} is outside 0 to 1")
    numbers = np.random.default_rng([seed, 2]).integers(1, 50_001, n_contexts)
    suites = []
    for depth in depths:
        before = round(depth * n_fillers)
        probes = []
        for number in map(str, numbers):
            info = f"The pass key is {number}. Remember it. {number} is the pass key."
            parts = [" ".join([_FILLER] * n) for n in (before, n_fillers - before)]
            context = f"{_HEAD}{parts[0]}\n{info}\n{parts[1]}\n"
            question = Question("What is the pass key? The pass key is", " ", number, before)
            probes.append(Probe(context, (question,), n_fillers + 1))
        recipe = {"n_fillers": n_fillers, "n_contexts": n_contexts, "seed": seed, "depths": [depth]}
        suites.append(Suite(f"passkey-{n_fillers}-at-{depth:g}", tuple(probes), recipe))
    return suites
