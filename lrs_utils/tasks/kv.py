"""Key-value retrieval, as in Lost in the Middle (2307.03172, Section 3; prompt and layout of the authors' release).

A JSON object of random pairs and the question for one key. The authors ask one question of each context, moving the
gold pair to the position; here one context is asked for the pair at every position, which costs a fraction.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrs_utils.arguments import whole
from lrs_utils.tasks.files import official_file, read_lines
from lrs_utils.tasks.suite import Probe, Question, Suite

Pairs = Sequence[tuple[str, str]]
Record = tuple[Pairs, int]  # pairs of a context, and which of them is asked for in the authors' protocol

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
        five-digit values ("bakori": "48213"), about 14 tokens a pair: the same task for a fifth of the cost.
    positions : sequence of int, optional
        Which pairs are asked for; every pair by default.
    """
    records = _generated(n_pairs, n_contexts, seed, keys)
    positions = checked_positions(positions, n_pairs)
    recipe = {"n_pairs": n_pairs, "n_contexts": n_contexts, "seed": seed, "keys": keys, "positions": positions}
    return Suite(f"kv-{keys}-{n_pairs}", tuple(kv_probe(pairs, positions) for pairs, _ in records), recipe)


def kv_official(
    n_pairs: int = 75,
    n_contexts: int = 500,
    *,
    first: int = 0,
    positions: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> Suite:
    """The authors' own contexts, each asked for the pairs at `positions` where they stand.

    Parameters
    ----------
    n_pairs : int
        75, 140 or 300. The file is fetched into the cache (not 300, whose hash we don't know), or read from `folder`.
    n_contexts, first : int
        How many of the 500 records, and from which one on.
    positions : sequence of int, optional
        Which pairs are asked for; every pair by default.
    folder : path, optional
        That holds `kv-retrieval-75_keys.jsonl.gz` and so on.
    """
    positions = checked_positions(positions, n_pairs)
    records = _official(n_pairs, n_contexts, first, folder)
    recipe = {"n_pairs": n_pairs, "n_contexts": n_contexts, "first": first, "positions": positions}
    return Suite(f"kv-official-{n_pairs}", tuple(kv_probe(pairs, positions) for pairs, _ in records), recipe)


def kv_gold_moved(
    n_pairs: int = 75,
    n_contexts: int = 500,
    seed: int = 0,
    *,
    keys: str = "uuid",
    positions: Sequence[int],
    folder: str | Path | None = None,
) -> list[Suite]:
    """The authors' protocol: each context has one gold pair, which is taken out and put back at each position.

    Parameters
    ----------
    keys : "uuid", "short" or "official"
        "official" takes the first `n_contexts` records of the authors' file, and their gold pairs.
    positions : sequence of int

    Returns
    -------
    list of Suite
        One for each position, the same contexts with the same question but for where the gold pair stands.
    """
    positions = checked_positions(positions, n_pairs)
    official = keys == "official"
    records = _official(n_pairs, n_contexts, 0, folder) if official else _generated(n_pairs, n_contexts, seed, keys)
    suites = []
    for position in positions:
        probes = []
        for pairs, gold in records:
            others = [*pairs[:gold], *pairs[gold + 1 :]]
            probes.append(kv_probe([*others[:position], pairs[gold], *others[position:]], [position]))
        recipe = {"n_pairs": n_pairs, "n_contexts": n_contexts, "seed": seed, "keys": keys, "positions": [position]}
        suites.append(Suite(f"kv-{keys}-{n_pairs}-gold-at-{position}", tuple(probes), recipe))
    return suites


def kv_probe(pairs: Pairs, positions: Sequence[int]) -> Probe:
    """One context over `pairs` in the authors' layout, asked for the pairs at `positions`."""
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    questions = tuple(
        Question(f'Key: "{pairs[p][0]}"\nCorresponding value:', _OPENING_QUOTE, pairs[p][1], p) for p in positions
    )
    return Probe(_HEAD + "{" + lines + "}\n\n", questions, len(pairs))


def checked_positions(positions: Sequence[int] | None, n_items: int, items: str = "pairs") -> list[int]:
    """All positions of a context's items by default; one outside is refused."""
    chosen = [whole("a position", p) for p in (range(n_items) if positions is None else positions)]
    outside = [p for p in chosen if not 0 <= p < n_items]
    if outside:
        raise ValueError(f"position {outside[0]} is outside the {n_items} {items} (0 to {n_items - 1})")
    return chosen


def syllables(rng: np.random.Generator, n: int) -> str:
    """A pronounceable word."""
    pairs = zip(rng.choice(list("bdfgklmnprstvz"), n), rng.choice(list("aeiou"), n), strict=True)
    return "".join(consonant + vowel for consonant, vowel in pairs)


def _official(n_pairs: int, n_contexts: int, first: int, folder: str | Path | None) -> list[Record]:
    path = official_file(f"kv-retrieval-{n_pairs}_keys.jsonl.gz", folder)
    records: list[Record] = []
    for where, record in read_lines(path, {"ordered_kv_records": list, "key": str, "value": str}):
        pairs = record["ordered_kv_records"]
        if not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) and x for x in pair) for pair in pairs
        ):
            raise ValueError(f"{where}: field 'ordered_kv_records' holds something other than [key, value]")
        keys = [key for key, _ in pairs]
        if len(pairs) != n_pairs:
            raise ValueError(f"{where}: field 'ordered_kv_records' has {len(pairs)} pairs, not {n_pairs}")
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f"{where}: field 'ordered_kv_records' has the key {twice!r} twice")
        if record["key"] not in keys or dict(pairs)[record["key"]] != record["value"]:
            raise ValueError(f"{where}: fields 'key' and 'value' are no pair of 'ordered_kv_records'")
        records.append(([(key, value) for key, value in pairs], keys.index(record["key"])))
    if not 0 <= first < first + n_contexts <= len(records):
        raise ValueError(f"{path} has {len(records)} records; first {first} and n_contexts {n_contexts} ask for more")
    return records[first : first + n_contexts]


def _generated(n_pairs: int, n_contexts: int, seed: int, keys: str) -> list[Record]:
    if keys not in _PAIRS:
        raise ValueError(f"keys is {keys!r}; choose one of {', '.join(_PAIRS)}")
    for name, value in (("n_pairs", n_pairs), ("n_contexts", n_contexts)):
        whole(name, value, least=1)
    records = []
    for context in range(n_contexts):
        rng = np.random.default_rng([seed, context])
        pairs = _PAIRS[keys](rng, n_pairs)
        records.append((pairs, int(rng.integers(n_pairs))))  # drawn last, so that contexts are the same as without it
    return records


def _uuid_pairs(rng: np.random.Generator, n: int) -> Pairs:
    def random_uuid() -> str:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))

    return [(random_uuid(), random_uuid()) for _ in range(n)]


def _short_pairs(rng: np.random.Generator, n: int) -> Pairs:
    # without replacement: a key or value that came twice would have two right answers
    values = rng.choice(90_000, n, replace=False) + 10_000
    chosen: dict[str, str] = {}
    while len(chosen) < n:
        chosen.setdefault(syllables(rng, 3), str(values[len(chosen)]))
    return list(chosen.items())


_PAIRS = {"uuid": _uuid_pairs, "short": _short_pairs}
