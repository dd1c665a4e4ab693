"""Copying: random words, a few of which come again and should go on as they did. A task without any content.

The idea is PEAR's (random tokens repeated once; TTArch/PEAR-RAG). Here one context of words that all differ is asked at
many places, each in a branch of its own.
"""

import numpy as np

from lrs_utils.arguments import whole
from lrs_utils.tasks.kv import syllables
from lrs_utils.tasks.suite import Probe, Question, Suite

_CUE, _ANSWER = 3, 3  # words that come again, and words that should follow


def copying(n_words: int = 200, n_contexts: int = 40, seed: int = 0, *, n_questions: int = 10) -> Suite:
    """Generate a suite of random words to copy from.

    Parameters
    ----------
    n_words, n_contexts : int
        Words in a context (about 2.5 tokens each), contexts. Context i is the same whatever n_contexts is.
    seed : int
        Suites of different seeds share no context.
    n_questions : int
        Places that are asked for: a random one in each of so many equal stretches of the context.
    """
    whole("n_contexts", n_contexts, least=1)
    whole("n_questions", n_questions, least=1)
    whole("n_words", n_words, least=n_questions + _CUE + _ANSWER)
    n_places = n_words - _CUE - _ANSWER + 1
    probes = []
    for context in range(n_contexts):
        rng = np.random.default_rng([seed, context, 5])
        distinct: dict[str, None] = {}
        while len(distinct) < n_words:
            distinct.setdefault(syllables(rng, int(rng.integers(2, 4))))
        words = list(distinct)
        places = [int(rng.choice(stretch)) for stretch in np.array_split(np.arange(n_places), n_questions)]
        probes.append(Probe(f"{' '.join(words)}\n", tuple(_question(words, place) for place in places), n_places))
    recipe = {"n_words": n_words, "n_contexts": n_contexts, "seed": seed, "n_questions": n_questions}
    return Suite(f"copying-{n_words}", tuple(probes), recipe)


def _question(words: list[str], place: int) -> Question:
    answer_at = place + _CUE
    return Question(" ".join(words[place:answer_at]), "", "".join(f" {w}" for w in words[answer_at:][:_ANSWER]), place)
