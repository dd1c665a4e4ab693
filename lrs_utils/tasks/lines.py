"""LongChat-Lines: the number registered under a line's name (LongEval, LMSYS 2023; prompt of its release).

Every line of a record can be asked for, so one context gives the whole curve. The release names lines by adjective and
noun; ours are pronounceable syllables from the seed, which need no word list (CHOICES.md).
"""

from collections.abc import Sequence

import numpy as np

from lrs_utils.tasks.kv import checked_positions, syllables
from lrs_utils.tasks.suite import Probe, Question, Suite

_HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)


def lines_retrieval(
    n_lines: int = 60, n_contexts: int = 40, seed: int = 0, *, positions: Sequence[int] | None = None
) -> Suite:
    """Generate a suite of line records.

    Parameters
    ----------
    n_lines, n_contexts : int
        Lines in a context (about 20 tokens each), contexts. Context i is the same whatever n_contexts is.
    seed : int
        Suites of different seeds share no context.
    positions : sequence of int, optional
        Which lines are asked for; every line by default.
    """
    positions = checked_positions(positions, n_lines, "lines")
    probes = []
    for context in range(n_contexts):
        rng = np.random.default_rng([seed, context, 1])
        names: dict[str, int] = {}
        while len(names) < n_lines:
            names.setdefault(f"{syllables(rng, 3)}-{syllables(rng, 2)}", int(rng.integers(1, 50_001)))
        lines = list(names.items())
        record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in lines)
        questions = tuple(_question(*lines[position], position) for position in positions)
        probes.append(Probe(f"{_HEAD}{record}\n", questions, n_lines))
    recipe = {"n_lines": n_lines, "n_contexts": n_contexts, "seed": seed, "positions": positions}
    return Suite(f"lines-{n_lines}", tuple(probes), recipe)


def _question(name: str, number: int, position: int) -> Question:
    return Question(
        f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number.",
        f"\nThe <REGISTER_CONTENT> in line {name} is <",
        str(number),
        position,
    )
