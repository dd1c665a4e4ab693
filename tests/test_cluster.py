"""Searches whose model runs in other processes: of this machine, or of a Dask cluster on loopback."""

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
from distributed import Client, LocalCluster

from lrs_utils import GeneticSearch, LayerScaling, Ledger, load_lm, score, search, tasks
from lrs_utils.searchers.objectives import mixture

SUITE = tasks.kv_retrieval(4, 6, keys="short")


@pytest.fixture(scope="module")
def client():
    with (
        mock.patch.dict(os.environ),  # workers are given one thread by the environment, this process with them
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def searched(lm, executor=None, ledger=None):
    genetic = GeneticSearch(2, population=8, parents=4, mutations=4, crossovers=4, seed=3)
    # a context is a task: batches of one
    return search(lm, SUITE, genetic, budget=20, objective=mixture(1), ledger=ledger, executor=executor, batch_tokens=1)


def test_a_cluster_gives_the_same_result_to_the_last_bit(tiny, client, tmp_path):
    ledgers = [Ledger(tmp_path / name) for name in ("here", "there")]
    here = searched(tiny, ledger=ledgers[0])
    there = searched(tiny, client.get_executor(), ledgers[1])
    assert there.candidates == here.candidates
    assert there.fitness == here.fitness
    assert there.recomputed == here.recomputed == len(ledgers[1]) == 20 * 6 * 4
    for scaling in here.candidates:
        assert ledgers[0].find(tiny.fingerprint, scaling.key) == ledgers[1].find(tiny.fingerprint, scaling.key)
    again = searched(tiny, client.get_executor(), ledgers[1])
    assert (again.recomputed, again.fitness) == (0, here.fitness)


def test_a_worker_killed_in_mid_run_costs_nothing_but_time(tiny, client, tmp_path):
    written = Counter()

    class Watched(Ledger):
        def record(self, model, scaling, questions, *values):
            written[scaling, tuple(questions)] += 1
            return super().record(model, scaling, questions, *values)

    here, ledger = searched(tiny), Watched(tmp_path / "ledger.sqlite")
    pids = list(client.run(os.getpid).values())
    counts = []

    def kill():
        watching = Ledger(ledger.path)
        while not counts:
            if len(watching) > 100:
                counts.append(len(watching))
                os.kill(pids[0], signal.SIGKILL)
            time.sleep(0.001)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    there = searched(tiny, client.get_executor(), ledger)
    thread.join()
    assert 100 < counts[0] < 20 * 6 * 4, "killed in mid-run"
    assert there.candidates == here.candidates
    assert there.fitness == here.fitness
    assert len(ledger) == 20 * 6 * 4, "nothing lost"
    assert set(written.values()) == {1}, "nothing twice"
    client.wait_for_workers(2)
    assert pids[0] not in client.run(os.getpid).values()


def test_any_executor_will_do(tiny):
    here = score(tiny, SUITE, [LayerScaling((1.5, 0.9))], batch_tokens=1)
    for executor in (ThreadPoolExecutor(2), ProcessPoolExecutor(1, mp_context=get_context("spawn"))):
        with executor:
            there = score(tiny, SUITE, [LayerScaling((1.5, 0.9))], batch_tokens=1, executor=executor)
        assert (there.nll == here.nll).all()
        assert there.recomputed == here.recomputed


def test_a_worker_with_another_model_is_refused(tiny):
    other = load_lm("tiny-llama", dtype="float32", device="cpu")
    other.model.lm_head.weight.data[0, 0] += 1.0
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(ValueError, match=f"fingerprint {tiny.fingerprint}, the search's {other.fingerprint}"),
    ):
        score(other, SUITE, [LayerScaling((1.5, 0.9))], executor=executor)
