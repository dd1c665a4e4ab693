"""Key-value retrieval, as in Lost in the Middle (2307.03172, Section 3; prompt and layout of the authors' release).

A JSON object of random pairs and the question for one key. The authors ask one question of each context, moving the
gold pair to the position; here one context is asked for the pair at every position, which costs a fraction.
"""

import uuid
from collections.abc import Sequence

import numpy as np

from lrs_utils.tasks.suite import Probe, Question, Suite

Pairs = Sequence[tuple[str, str]]

_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_OPENING_QUOTE = ' "'  # the answer prefix: left free, SmolLM2 often opens with a line break and a JSON object


def kv_retrieval(
    n_pairs: int = 20,
    n_contexts: int = 40,
    seed: int = 0,
    *,
    keys: str = "uuid",
    positions: Sequence[int] | None = None,
) -> Suite:
    """Generate a key-value retrieval suite.

    Parameters
    ----------
    n_pairs, n_contexts : int
        Pairs in a context, contexts. Context i is the same whatever n_contexts is.
    seed : int
        Suites of different seeds share no context.
    keys : "uuid" or "short"
        "uuid": version-4 UUIDs as in the paper, about 72 tokens a pair. "short": pronounceable six-letter keys and
        five-digit values ("bakori": "48213"), about 14 tokens a pair: the same task for a fifth of the price.
    positions : sequence of int, optional
        Which pairs are asked for; every pair by default.
    """
    if keys not in _PAIRS:
        raise ValueError(f"keys is {keys!r}; choose one of {', '.join(_PAIRS)}")
    for name, value in (("n_pairs", n_pairs), ("n_contexts", n_contexts)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    positions = range(n_pairs) if positions is None else list(positions)
    outside = [p for p in positions if not 0 <= p < n_pairs]
    if outside:
        raise ValueError(f"position {outside[0]} is outside the {n_pairs} pairs (0 to {n_pairs - 1})")
    probes = tuple(
        kv_probe(_PAIRS[keys](np.random.default_rng([seed, context]), n_pairs), positions)
        for context in range(n_contexts)
    )
    recipe = {"n_pairs": n_pairs, "n_contexts": n_contexts, "seed": seed, "keys": keys, "positions": list(positions)}
    return Suite(f"kv-{keys}-{n_pairs}", probes, recipe)


def kv_probe(pairs: Pairs, positions: Sequence[int]) -> Probe:
    """One context over `pairs` in the authors' layout, asked for the pairs at `positions`."""
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    questions = tuple(
        Question(f'Key: "{pairs[p][0]}"\nCorresponding value:', _OPENING_QUOTE, pairs[p][1], p) for p in positions
    )
    return Probe(_HEAD + "{" + lines + "}\n\n", questions, len(pairs))


def _uuid_pairs(rng: np.random.Generator, n: int) -> Pairs:
    def random_uuid() -> str:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))

    return [(random_uuid(), random_uuid()) for _ in range(n)]


def _short_pairs(rng: np.random.Generator, n: int) -> Pairs:
    # without replacement: a key or value that stood twice would have two right answers
    values = rng.choice(90_000, n, replace=False) + 10_000
    chosen: dict[str, str] = {}
    while len(chosen) < n:
        syllables = zip(rng.choice(list("bdfgklmnprstvz"), 3), rng.choice(list("aeiou"), 3), strict=True)
        chosen.setdefault("".join(c + v for c, v in syllables), str(values[len(chosen)]))
    return list(chosen.items())


_PAIRS = {"uuid": _uuid_pairs, "short": _short_pairs}
