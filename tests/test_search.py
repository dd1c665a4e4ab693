import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from lrs_utils import GeneticSearch, LayerScaling, Ledger, search, tasks
from lrs_utils.models.load import LM
from lrs_utils.scoring import outcomes as scoring
from lrs_utils.scoring.outcomes import Outcomes
from lrs_utils.searchers import engine
from lrs_utils.searchers.objectives import (
    mixture,
    utilisation_over_depths_then_nll,
    utilisation_then_nll,
)

ROOT = Path(__file__).parent.parent


def worth(candidate):
    """A made-up fitness with its best at factors that fall from 1.8 to 1.2 over depth."""
    target = np.linspace(1.8, 1.2, len(candidate.factors))
    return (-float(np.abs(np.array(candidate.factors) - target).mean()),)


def run(genetic, generations):
    asked = []
    for _ in range(generations):
        candidates = genetic.ask()
        genetic.tell(candidates, [worth(c) for c in candidates])
        asked += candidates
    return asked


def test_the_first_candidate_is_flat_at_the_middle_of_the_bounds():
    genetic = GeneticSearch(32, first_layer=2, population=5, parents=2)
    assert genetic.ask()[0] == LayerScaling((1.0, 1.0) + (1.5,) * 30)
    assert GeneticSearch(4, start=1.0, population=5, parents=2).ask()[0] == LayerScaling.identity(4)


def test_no_factors_are_proposed_twice():
    asked = run(GeneticSearch(12, population=20, parents=10, mutations=5, crossovers=5), 30)
    assert len(asked) > 200
    assert len({c.factors for c in asked}) == len(asked)


def test_candidates_stay_on_the_grid_and_in_the_bounds():
    for candidate in run(GeneticSearch(30, first_layer=2, bounds=(0.7, 1.2), step=0.05, seed=3), 4):
        factors = np.array(candidate.factors)
        assert (factors[:2] == 1).all()
        assert factors[2:].min() >= 0.7
        assert factors[2:].max() <= 1.2
        np.testing.assert_allclose(factors / 0.05, np.round(factors / 0.05), atol=1e-6)


def test_generations_have_the_sizes_asked_for():
    genetic = GeneticSearch(30)
    sizes = []
    for _ in range(3):
        candidates = genetic.ask()
        genetic.tell(candidates, [worth(c) for c in candidates])
        sizes.append(len(candidates))
    assert sizes == [64, 32, 32]


def test_the_search_climbs_and_beats_random_curves():
    budget, wins = 200, 0
    for seed in range(5):
        asked = run(GeneticSearch(24, population=20, parents=10, mutations=5, crossovers=5, seed=seed), 19)[:budget]
        best = np.maximum.accumulate([worth(c)[0] for c in asked])
        assert best[-1] > best[19]
        random = GeneticSearch(24, population=budget, parents=2, seed=100 + seed).ask()  # mutations of flat only
        wins += best[-1] > max(worth(c)[0] for c in random)
    assert wins >= 4


def test_parents_are_elitist():
    genetic = GeneticSearch(8, population=6, parents=2, mutations=2, crossovers=2)
    first = genetic.ask()
    genetic.tell(first, [(float(i == 3),) for i in range(len(first))])
    for _ in range(5):
        genetic.tell(candidates := genetic.ask(), [(-1.0,)] * len(candidates))
    assert genetic._genomes[first[3]] in [genome for genome, _ in genetic._elite]


def test_a_search_is_deterministic_from_its_seed():
    a, b, c = (run(GeneticSearch(16, seed=seed), 4) for seed in (5, 5, 6))
    assert a == b
    assert a != c


def test_a_space_that_is_used_up_ends_the_search(tiny):
    suite = tasks.kv_retrieval(3, 1, keys="short")
    genetic = GeneticSearch(2, bounds=(1.0, 1.1), population=4, parents=2, mutations=2, crossovers=2)
    result = search(tiny, suite, genetic, budget=1000)
    assert {c.factors for c in result.candidates} == {(1.0, 1.0), (1.0, 1.1), (1.1, 1.0), (1.1, 1.1)}


def test_control_points_stand_behind_every_candidate():
    genetic = GeneticSearch(30, population=8, parents=4)
    for candidate in genetic.ask():
        assert genetic.curve(candidate).factors(30, step=0.1, bounds=(1, 2)) == candidate.factors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": (2.0, 1.0)}, "bounds is"),
        ({"bounds": (0.0, 1.0)}, r"bounds\[0\] is 0.0; it must be above 0"),
        ({"start": 2.5}, "start is 2.5, outside the bounds"),
        ({"parents": 70}, "parents is 70"),
        ({"first_layer": 31}, "first_layer 31 leaves fewer than 2 of 32"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneticSearch(32, **settings)


def test_ties_in_u_are_decided_by_nll(tiny):
    from lrs_utils import score

    outcomes = score(tiny, tasks.kv_retrieval(3, 2, keys="short"), [LayerScaling.identity(2), LayerScaling((1.5, 1.1))])
    assert not outcomes.exact.any()  # a random model
    (u0, n0), (u1, n1) = utilisation_then_nll(outcomes)
    assert u0 == u1 == 0
    np.testing.assert_allclose([n0, n1], -outcomes.nll.mean(axis=(1, 2)))


def outcomes_of(exact, nll, depths):
    return Outcomes(np.array(exact, bool), np.array(nll, float), np.array(depths, float), 0)


def test_objectives_of_contexts_that_ask_at_the_same_depths_are_means_to_the_last_bit():
    rng = np.random.default_rng(0)
    exact, nll = rng.random((50, 16, 7)) < 0.4, rng.random((50, 16, 7)) * 3
    outcomes = outcomes_of(exact, nll, np.arange(7) / 6)
    of_nll = (-nll.mean(axis=(1, 2))).tolist()
    assert [second for _, second in utilisation_then_nll(outcomes)] == of_nll
    assert mixture(1)(outcomes) == [(value,) for value in of_nll]
    two = -(1 * nll.mean(axis=(1, 2)) + 0.3 * nll.mean(axis=(1, 2)))
    assert mixture(1, 0.3)(outcomes, outcomes) == [(value,) for value in two.tolist()]


def test_objectives_of_contexts_that_ask_differently_are_means_of_contexts_means():
    nan = np.nan
    outcomes = outcomes_of(
        [[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [1, 0, 0]]],
        [[[1, 2, 6], [5, nan, nan]], [[0, 1, 2], [3, nan, nan]]],
        [[0, 0.5, 1], [0.1, nan, nan]],
    )
    # by hand: mean nll (3 + 5) / 2 and (1 + 3) / 2
    assert mixture(0.5)(outcomes) == [(-2,), (-1,)]
    for objective in (utilisation_then_nll, utilisation_over_depths_then_nll):
        with pytest.raises(ValueError, match="U needs contexts that all ask at the same depths"):
            objective(outcomes)


def test_the_budget_cuts_the_last_generation_and_the_ledger_makes_a_second_run_free(tiny, tmp_path):
    suite = tasks.kv_retrieval(3, 2, keys="short")
    ledger = Ledger(tmp_path / "ledger.sqlite")

    def searched():
        genetic = GeneticSearch(2, population=6, parents=4, mutations=2, crossovers=2, seed=1)
        return search(tiny, suite, genetic, budget=9, ledger=ledger)

    first, again = searched(), searched()
    assert first.generation == [0] * 6 + [1] * 3
    assert first.recomputed == len(ledger) == 9 * 2 * 3
    assert again.recomputed == 0
    assert (again.candidates, again.fitness, again.best) == (first.candidates, first.fitness, first.best)
    assert first.best_so_far[-1] == max(first.fitness)[0]
    with pytest.raises(ValueError, match="budget is 0"):
        search(tiny, suite, GeneticSearch(2, population=6, parents=4), budget=0)


def test_first_layers_without_scaling_are_computed_once_for_a_whole_search(tiny, monkeypatch):
    generations = [[LayerScaling((1.0, 1.1)), LayerScaling((1.0, 1.2))], [LayerScaling((1.0, 1.3))], []]

    class Given:
        def ask(self):
            return generations.pop(0)

        def tell(self, candidates, fitness):
            pass

    layers, score = [], engine.score

    def counted(*args, **options):
        outcomes = score(*args, **options)
        layers.append((outcomes.layers_run, outcomes.layers_alone))
        return outcomes

    monkeypatch.setattr(engine, "score", counted)
    search(tiny, tasks.kv_retrieval(3, 2, keys="short"), Given(), budget=9)
    # of two contexts: the first layer once, the second for each candidate
    assert layers == [((1 + 2) * 2, 4 * 2), (1 * 2, 2 * 2)]


KILLED = """
import sys
from lrs_utils import GeneticSearch, Ledger, load_lm, search, tasks
lm = load_lm("tiny-llama", dtype="float32", device="cpu")
suite = tasks.kv_retrieval(6, 5, keys="short")
genetic = GeneticSearch(2, population=8, parents=4, mutations=4, crossovers=4, seed=2)
print("ready", flush=True)
ledger = Ledger(sys.argv[1])
known = len(ledger)
result = search(lm, suite, genetic, budget=40, ledger=ledger)
print(result.best.factors, max(result.fitness), known, result.recomputed, flush=True)
"""


def test_a_killed_search_ends_as_an_undisturbed_one_and_measures_nothing_twice(tmp_path):
    def start(name):
        return subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / name], stdout=subprocess.PIPE, text=True)

    def ending(process):
        *factors_and_fitness, known, recomputed = (
            process.communicate(timeout=300)[0].strip().split("\n")[-1].rsplit(" ", 2)
        )
        return factors_and_fitness, int(known), int(recomputed)

    undisturbed, _, total = ending(start("undisturbed"))
    rng = np.random.default_rng(0)
    survived = []
    for kill in range(int(os.environ.get("LRS_KILLS", "2"))):
        victim = start(f"killed-{kill}")
        victim.stdout.readline()  # "ready"
        ledger, moment = Ledger(tmp_path / f"killed-{kill}"), rng.integers(1, total // 2)
        while len(ledger) < moment and victim.poll() is None:
            time.sleep(0.001)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        resumed, known, recomputed = ending(start(f"killed-{kill}"))
        assert resumed == undisturbed
        assert 0 < known < total
        assert known + recomputed == total  # nothing lost, nothing measured twice
        survived.append(known)
    print(f"{len(survived)} kills, {total} outcomes each; known after the kill: {survived}; measured twice: 0")


@pytest.mark.parametrize("over_depths", [False, True], ids=["U", "over depths"])
def test_shipped_outcomes_hold_all_that_the_searches_of_notebook_06_ask_for(
    over_depths, smollm2, tmp_path, monkeypatch
):
    """On any machine: a fitness that differs in its last bit would take a search past a tie to other candidates."""
    settings = yaml.safe_load((ROOT / "notebooks" / "profiles" / "cpu" / "06.yaml").read_text())
    settings |= settings.pop("settings")
    ledger, half = Ledger(tmp_path / "l.sqlite"), settings["population"] // 2
    ledger.load(ROOT / "data" / "results" / "06_ga_search.outcomes.csv.gz")
    factors = json.loads((ROOT / "lrs_utils" / "data" / "factors" / "smollm2-135m" / "ga.json").read_text())
    monkeypatch.setattr(LM, "fingerprint", factors["fingerprint"])  # searched in bfloat16
    n = settings["n_pairs"]
    positions = None if over_depths else tasks.positions_at(n, (0, 0.5, 1))
    genetic = GeneticSearch(
        30, first_layer=settings["first_layer"], bounds=settings["bounds"], step=settings["step"],
        start=settings["start"], population=2 * half, parents=half, mutations=half // 2, crossovers=half - half // 2,
    )  # fmt: skip
    monkeypatch.setattr(scoring, "TrieWalk", None)  # no model is run
    suite = tasks.kv_retrieval(n, settings["n_contexts"], seed=settings["seed"], positions=positions)
    objective = utilisation_over_depths_then_nll if over_depths else utilisation_then_nll
    result = search(smollm2, suite, genetic, budget=settings["budget"], ledger=ledger, objective=objective)
    assert len(result.candidates) == settings["budget"]
    if not over_depths:
        assert list(result.best.factors) == factors["factors"]
