"""The tasks of a scaling that should help everywhere: of different form, and each of several lengths."""

from collections.abc import Callable, Sequence
from functools import partial

from lrs_utils.tasks.copying import copying
from lrs_utils.tasks.kv import kv_retrieval
from lrs_utils.tasks.lines import lines_retrieval
from lrs_utils.tasks.mdqa import mdqa
from lrs_utils.tasks.suite import Suite

Maker = Callable[..., Suite]


def vary_size(make: Maker, sizes: Sequence[int]) -> Maker:
    """A function of `n_contexts` and `seed` like `make`, whose contexts have each of some sizes in turn.

    Parameters
    ----------
    make : function
        Of a size, `n_contexts` and `seed`, as `kv_retrieval`.
    sizes : sequence of int
        Pairs, lines, documents or words.
    """

    def mixed(n_contexts: int, seed: int) -> Suite:
        suites = [make(size, n_contexts=n_contexts, seed=seed) for size in sizes]
        probes = tuple(suites[context % len(sizes)].probes[context] for context in range(n_contexts))
        name = suites[0].name.removesuffix(f"-{sizes[0]}")
        recipe = {"sizes": list(sizes), "n_contexts": n_contexts, "seed": seed}
        return Suite(f"{name}-{'/'.join(map(str, sizes))}", probes, recipe)

    return mixed


# From about 200 tokens to what two cores can afford. Prompts of all but the last are other people's.
GENERAL: dict[str, Maker] = {
    "uuid": vary_size(kv_retrieval, (3, 6, 12, 20)),
    "short": vary_size(partial(kv_retrieval, keys="short"), (12, 25, 50, 80)),
    "lines": vary_size(lines_retrieval, (8, 16, 32, 50)),
    "documents": vary_size(mdqa, (2, 4, 6, 8)),
    "copying": vary_size(copying, (80, 160, 320, 480)),
}
