import numpy as np
import pytest

from lrs_utils import (
    CmaEsSearch,
    GeneticSearch,
    LayerScaling,
    LinearSearch,
    RandomSearch,
    RefinementSearch,
    TpeSearch,
    search,
    tasks,
)
from lrs_utils.searchers.curves import Points, Space

BOUNDS = {"bounds": (0.7, 1.3), "start": 1.0, "step": 0.05}
SMALL = {"population": 20, "parents": 10, "mutations": 5, "crossovers": 5}
SEARCHERS = {
    "genetic": lambda seed, **space: GeneticSearch(12, seed=seed, **SMALL, **space),
    "random": lambda seed, **space: RandomSearch(12, seed=seed, **space),
    "cma-es": lambda seed, **space: CmaEsSearch(12, seed=seed, **space),
    "tpe": lambda seed, **space: TpeSearch(12, seed=seed, **space),
}


def worth(scaling):
    """A made-up fitness: best where factors fall from 1.2 to 0.8 over depth, and temperatures are 1.3."""
    off = np.abs(np.array(scaling.factors) - np.linspace(1.2, 0.8, 12)).mean()
    temperatures = np.array(scaling.temperatures or (1.0,) * 12)
    return (-float(off + 0.1 * np.abs(temperatures - 1.3).mean()),)


def run(searcher, budget=100):
    asked, told = [], []
    while len(asked) < budget and (candidates := searcher.ask()):
        candidates = candidates[: budget - len(asked)]
        fitness = [worth(c) for c in candidates]
        searcher.tell(candidates, fitness)
        asked += candidates
        told += fitness
    return asked, told


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("vary", ["factors", "temperatures", "both"])
def test_every_searcher_starts_flat_keeps_its_bounds_and_asks_nothing_twice(name, vary):
    asked, _ = run(SEARCHERS[name](0, vary=vary, temperature_bounds=(0.8, 1.5), **BOUNDS))
    assert asked[0] == LayerScaling.identity(12)
    assert len(asked) == len(set(asked)) == 100
    factors = np.array([c.factors for c in asked])
    temperatures = np.array([c.temperatures or (1.0,) * 12 for c in asked])
    for values, (low, high), varied in (
        (factors, (0.7, 1.3), vary != "temperatures"),
        (temperatures, (0.8, 1.5), vary != "factors"),
    ):
        assert varied == bool((values != 1).any())
        assert low <= values.min() <= values.max() <= high
        np.testing.assert_allclose(values / 0.05, np.round(values / 0.05), atol=1e-6)


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_searcher_is_deterministic_from_its_seed(name):
    first, again, other = (run(SEARCHERS[name](seed, **BOUNDS), 60)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", sorted(set(SEARCHERS) - {"random"}))
def test_whatever_learns_beats_what_does_not(name):
    learned = [max(run(SEARCHERS[name](seed, **BOUNDS))[1])[0] for seed in range(5)]
    drawn = [max(run(SEARCHERS["random"](seed, **BOUNDS))[1])[0] for seed in range(5)]
    assert np.mean(learned) > np.mean(drawn)


def test_the_shapes():
    def sampled(shape, *points, **options):
        space = Space(8, shape=shape, **{"bounds": (0.5, 2.0), "start": 1.0, "step": 0.1} | options)
        assert len(space.flat[0].values) == len(points)
        return space.scaling((Points(*zip(*points, strict=True)),)).factors

    assert sampled("uniform", (0, 1.3)) == (1.3,) * 8
    assert sampled("linear", (0, 0.6), (7, 1.3)) == (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    assert sampled("step", (0, 0.8), (5, 1.2)) == (0.8,) * 5 + (1.2,) * 3
    free = (1.0, 1.1, 1.2, 0.6, 0.6, 1.5, 0.9, 2.0)
    assert sampled("free", *enumerate(free)) == free
    assert sampled("linear", (2, 0.5), (7, 1.0), first_layer=2) == (1.0, 1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert sampled("bezier", (0, 1.0), (2, 1.0), (5, 1.0), (7, 2.0))[-1] == 2.0


@pytest.mark.parametrize("shape", ["bezier", "linear", "step", "uniform", "free"])
@pytest.mark.parametrize("num_layers", [2, 3, 5, 30])
def test_any_coordinates_are_a_genome(shape, num_layers):
    space = Space(num_layers, shape=shape, vary="both", bounds=(0.5, 1.5))
    n = len(space.start_coordinates)
    for coordinates in [np.zeros(n), np.ones(n), *np.random.default_rng(0).random((50, n))]:
        for points in space.genome(coordinates):
            if not (shape == "bezier" and num_layers < 4):  # no room for four whole layers
                assert list(points.layers) == sorted(set(points.layers))
        scaling = space.scaling(space.genome(coordinates))
        assert len(scaling.factors) == num_layers


def test_a_genetic_search_in_any_shape_finds_new_scalings_only():
    for shape in ("linear", "step", "uniform", "free"):
        asked, told = run(GeneticSearch(12, shape=shape, **SMALL, **BOUNDS), 60)
        assert len(set(asked)) == len(asked)
        assert max(told) > told[0] or shape == "uniform"  # of which the first is the best
    assert len(asked) == 60


def test_a_line_is_found_by_the_linear_search():
    asked, told = run(LinearSearch(12, seed=0, **BOUNDS), 150)
    best = asked[told.index(max(told))].factors
    assert best[0] > 1.1
    assert best[-1] < 0.9
    assert np.abs(np.diff(best, n=2)).max() < 0.11  # straight, up to the grid


def test_a_space_that_is_used_up_ends_every_search():
    tiny_space = {"shape": "linear", "bounds": (1.0, 1.2), "start": 1.0, "step": 0.2}
    for search_in in (RandomSearch(12, **tiny_space), TpeSearch(12, **tiny_space), CmaEsSearch(12, **tiny_space)):
        asked, _ = run(search_in, 200)
        assert 10 < len(asked) == len(set(asked)) <= 24  # two values, and where one turns into the other


def test_the_scheme_is_kept():
    assert {c.scheme for c in GeneticSearch(12, scheme="ntk", **SMALL, **BOUNDS).ask()} == {"ntk"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, "shape is 'square'; choose one of bezier"),
        ({"vary": "all"}, "vary is 'all'"),
        ({"temperature_bounds": (1.1, 2.0), "vary": "both"}, r"start is 1.0, outside the bounds \(1.1, 2.0\)"),
        ({"temperature_bounds": (0.0, 2.0)}, r"temperature_bounds\[0\] is 0.0; it must be above 0"),
    ],
)
def test_bad_spaces_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomSearch(12, **options)


def test_cma_es_over_one_number_is_refused():
    with pytest.raises(ValueError, match="two coordinates or more"):
        CmaEsSearch(12, shape="uniform")


def test_refinement_leaves_the_curve_where_that_is_better():
    target = np.ones(12)
    target[7] = 1.25  # one layer that no smooth curve can spare

    def spiked(scaling):
        return (-float(np.abs(np.array(scaling.factors) - target).sum()),)

    refined = RefinementSearch(LayerScaling.uniform(1.05, 12), step=0.05, moves=8)
    asked, told = [], []
    while len(asked) < 150 and (candidates := refined.ask()):
        refined.tell(candidates, [spiked(c) for c in candidates])
        asked += candidates
        told += [spiked(c) for c in candidates]
    assert asked[0] == LayerScaling.uniform(1.05, 12)
    assert len(asked) == len(set(asked))
    assert max(told)[0] > told[0][0] / 2
    best = asked[told.index(max(told))].factors
    assert np.argmax(best) == 7


def test_refinement_makes_good_moves_together_and_moves_temperatures_where_asked():
    refined = RefinementSearch(LayerScaling.identity(4), step=0.1, vary="temperatures", moves=8)
    [start] = refined.ask()
    refined.tell([start], [(0.0,)])
    singles = refined.ask()
    assert len(singles) == 8
    assert all(c.factors == (1.0,) * 4 for c in singles)
    raised = [c for c in singles if max(c.temperatures) > 1]
    refined.tell(singles, [(float(c in raised),) for c in singles])
    assert refined.ask()[0].temperatures == (1.1,) * 4


def test_all_searchers_go_through_the_search(tiny):
    suite = tasks.kv_retrieval(3, 2, keys="short")
    for searcher in (RandomSearch(2), CmaEsSearch(2), TpeSearch(2), RefinementSearch(LayerScaling.identity(2))):
        result = search(tiny, suite, searcher, budget=7)
        assert len(result.candidates) == 7
        assert result.answers == [6 * (i + 1) for i in range(7)]
