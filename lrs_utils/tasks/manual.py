"""References in a manual: the title of section 9.5.4, said again a thousand words later ("see Section 9.5.4, ...").

The text is Debian Reference by Osamu Aoki (GPL-2+), from Debian's own package; it is fetched, never committed. Its
sentences and references are real. What is made is the distance: the section that is referred to is put before the
words that lead to the reference, so that the same references can be asked for at every distance.
"""

import gzip
import re
from functools import cache

import numpy as np

from lrs_utils.arguments import whole
from lrs_utils.tasks.files import debian_file
from lrs_utils.tasks.suite import Probe, Question, Suite

_PACKAGE = (
    "d/debian-reference/debian-reference-en_2.100_all.deb",
    "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
    "usr/share/debian-reference/debian-reference.en.txt.gz",
)
_REFERENCE = re.compile(r'\bSection ([\d.]+), ["“]([^"”]{3,60})["”]')
_TARGET_WORDS = 80  # of the section that is referred to, its heading included


def references(distance: int = 600, n_contexts: int = 60, seed: int = 0) -> Suite:
    """Generate a suite of references: a context each, asked for the title of the section that is referred to.

    Parameters
    ----------
    distance : int
        Words of the manual between the section and the reference (about 1.5 tokens each).
    n_contexts : int
        References, each to another section, drawn without replacement.

    Raises
    ------
    ValueError
        There are fewer references than `n_contexts`.
    """
    whole("distance", distance, least=20)
    words, found = _manual()
    usable = []
    for title, number, target, at in found:
        before = " ".join(words[max(0, at - distance) : at])
        if at - distance > target + _TARGET_WORDS and title.lower() not in before.lower() and number not in before:
            usable.append((title, number, target, before))
    if not 1 <= n_contexts <= len(usable):
        raise ValueError(f"n_contexts is {n_contexts}; at {distance} words there are 1 to {len(usable)} references")
    probes = []
    for i in np.random.default_rng([seed, 7]).permutation(len(usable))[:n_contexts]:
        title, number, target, before = usable[i]
        section = " ".join(words[target : target + _TARGET_WORDS])
        probes.append(Probe(f"{section}\n\n{before}", (Question(f" Section {number},", " “", title, 0),), 2))
    return Suite(
        f"references-{distance}", tuple(probes), {"distance": distance, "n_contexts": n_contexts, "seed": seed}
    )


@cache
def _manual() -> tuple[list[str], list[tuple[str, str, int, int]]]:
    """The manual's words, and of the first reference to each section: title, number, where it begins, and who refers.

    Both places are numbers of words.
    """
    text = " ".join(gzip.decompress(debian_file(*_PACKAGE)).decode().replace("\xa0", " ").split())
    body = text.rindex("1.1. Console basics")  # behind the list of contents
    found: dict[str, tuple[str, str, int, int]] = {}
    for match in _REFERENCE.finditer(text):
        number, title = match[1], match[2]
        target = text.find(f"{number}. {title}", body)
        if target >= 0 and number not in found:
            found[number] = (title, number, len(text[:target].split()), len(text[: match.start()].split()))
    return text.split(), list(found.values())
