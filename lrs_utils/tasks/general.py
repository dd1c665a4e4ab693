"""The tasks of a scaling that should help everywhere: of different form, and each of several lengths."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lrs_utils.tasks.copying import copying
from lrs_utils.tasks.kv import kv_retrieval
from lrs_utils.tasks.lines import lines_retrieval
from lrs_utils.tasks.mdqa import mdqa
from lrs_utils.tasks.suite import Suite

Maker = Callable[..., Suite]

MAKERS: dict[str, Maker] = {
    "uuid": kv_retrieval,
    "short": partial(kv_retrieval, keys="short"),
    "lines": lines_retrieval,
    "documents": mdqa,
    "copying": copying,
}
# From about 200 tokens to what two cores can afford.
SIZES: dict[str, Sequence[int]] = {
    "uuid": (3, 6, 12, 20),
    "short": (12, 25, 50, 80),
    "lines": (8, 16, 32, 50),
    "documents": (2, 4, 6, 8),
    "copying": (80, 160, 320, 480),
}


def general_tasks(sizes: Mapping[str, Sequence[int]] = SIZES) -> dict[str, Maker]:
    """UUID pairs, short pairs, lines, documents and copying, each a function of `n_contexts` and `seed`.

    Parameters
    ----------
    sizes : mapping of a task's name to sequence of int
        Pairs, lines, documents or words of its contexts, in turn. By default 200 to 1,500 tokens.
    """
    return {name: vary_size(MAKERS[name], of) for name, of in sizes.items()}


def vary_size(make: Maker, sizes: Sequence[int]) -> Maker:
    """A function of `n_contexts` and `seed` like `make`, whose contexts have each of some sizes in turn.

    Parameters
    ----------
    make : function
        Of a size, `n_contexts` and `seed`, as `kv_retrieval`.
    """

    def mixed(n_contexts: int, seed: int) -> Suite:
        suites = [make(size, n_contexts=n_contexts, seed=seed) for size in sizes]
        probes = tuple(suites[context % len(sizes)].probes[context] for context in range(n_contexts))
        name = suites[0].name.removesuffix(f"-{sizes[0]}")
        recipe = {"sizes": list(sizes), "n_contexts": n_contexts, "seed": seed}
        return Suite(f"{name}-{'/'.join(map(str, sizes))}", probes, recipe)

    return mixed
