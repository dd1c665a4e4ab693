import pytest
import torch
from benchmark import (
    ALL,
    ALONE,
    GENERATE,
    GENERATION,
    GENERATION_ALONE,
    PRICED,
    THREE,
    Recorded,
    generate_work,
    measured,
    operations,
    price_table,
    price_works,
    profile,
    recorded_search,
    score_work,
    summary,
    with_searches,
)
from test_packed import seen_densely
from torch.utils.flop_counter import FlopCounterMode

from lrs_utils import GeneticSearch, LayerScaling, Ledger, search, tasks
from lrs_utils.analysis.plots import benchmark
from lrs_utils.progress import Progress
from lrs_utils.scoring.packing import PRODUCT_ROWS, pack
from lrs_utils.searchers.engine import SearchResult


def test_operations_are_those_that_torch_counts(tiny):
    ids = torch.arange(100)[None]
    tiny.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        tiny.model(ids)
    tiny.model.set_attn_implementation("sdpa")
    assert operations(tiny, 100, 100 * 100, 100) == counter.get_total_flops()  # eager attends to what it then hides


def test_operations_of_a_packed_context_are_those_of_its_tokens_and_what_they_see(tiny):
    suite = tasks.kv_retrieval(4, 1, keys="short")
    packs = [pack(tiny, suite.probes[0], "")]
    seen = int(seen_densely(packs, 1, None).sum())
    work = score_work(tiny, ALL, suite, [LayerScaling.identity(2)])
    assert work.operations == operations(tiny, len(packs[0].ids), seen, len(packs[0].predicted_at))
    work.run(Progress(1, "the family is tried once"))
    with FlopCounterMode(display=False) as counter:
        work.run(Progress(1, "counting"))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    # products are filled up to PRODUCT_ROWS; attention is counted apart
    filled = [
        PRODUCT_ROWS["cpu"] * -(-n // PRODUCT_ROWS["cpu"]) for n in (len(packs[0].ids), len(packs[0].predicted_at))
    ]
    assert counts["aten.mm"] == operations(tiny, filled[0], 0, filled[1])
    assert sum(counts.values()) > work.operations


def test_every_line_is_measured_and_compared(tiny):
    generation = [LayerScaling((1.0, s)) for s in (0.8, 0.9, 1.1)]
    repetitions = []
    for seed in range(2):
        suite = tasks.kv_retrieval(4, 1, seed, keys="short")
        few = {ALONE: [2], THREE: [0, 1, 3]}
        repetitions.append(
            [
                generate_work(tiny, suite.probes[0], generation[0], [0, 3]),
                score_work(tiny, ALL, suite, generation[:1]),
                *(
                    score_work(tiny, line, tasks.kv_retrieval(4, 1, seed, keys="short", positions=at), generation[:1])
                    for line, at in few.items()
                ),
                score_work(tiny, GENERATION, suite, generation),
                score_work(tiny, GENERATION_ALONE, suite, generation, together=False),
            ]
        )
    raw = measured(tiny, repetitions)
    assert (raw["seconds"] > 0).all()
    trie, alone = (raw.loc[raw["line"] == line, "limit"].iloc[0] for line in (GENERATION, GENERATION_ALONE))
    assert 0.6 < trie / alone < 0.9  # of six layers, four are run; answers are judged for each
    plain = SearchResult([*generation, LayerScaling((1.3, 1.3))], [(0.0,)] * 4, [0, 0, 0, 1])
    recorded = [Recorded("of U", 3, 6, plain), Recorded("of all", 4, 6, plain)]
    # a context: four of six layers in the first generation, both in the second
    assert recorded[0].scored == 24
    assert recorded[0].saved == pytest.approx(1 - (4 + 2) / (4 * 2))
    assert str(recorded[0]) == "of U: 4 candidates; layers saved by the trie 25.0%"
    table = summary(with_searches(raw, recorded)).set_index("line")
    assert len(table) == 6 + 2 * 3
    assert (table.loc[GENERATE, ["times_faster", "slowest", "fastest"]] == 1).all()
    assert table.loc["of U: generate", "times_faster"] == 1
    assert table.loc["of U: score", "answers"] == 24 * 3
    one = raw[(raw["line"] == THREE)]["seconds"]
    assert table.loc["of U: score", "least"] == pytest.approx(24 * one.min() / (24 * 3))
    assert (table["most"] >= table["least"]).all()
    assert {ALL, "of all: trie"} <= {t.get_text() for t in benchmark(table.reset_index(), 4).axes[1].get_yticklabels()}


def test_a_profile_names_the_operations_that_take_the_time(tiny):
    work = score_work(tiny, ALL, tasks.kv_retrieval(4, 1, keys="short"), [LayerScaling.identity(2)])
    head, parts = profile(tiny, work).split(": ")
    shares = [int(part.split()[1].rstrip("%")) for part in parts.split(", ")]
    assert head == f"profile of {ALL}, 4 pairs"
    assert "aten::mm " in parts
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= 2
    assert sum(shares) <= 105


def test_a_search_is_replayed_from_its_outcomes(tiny, tmp_path):
    settings = {
        "n_pairs": 3, "n_contexts": 9, "seed": 3, "keys": "short", "population": 8, "first_layer": 0, "bounds": (1, 2),
        "step": 0.1, "start": 1.5, "budget": 20,
    }  # fmt: skip

    def minus_nll(outcomes):
        return [(-float(nll),) for nll in outcomes.nll.mean(axis=(1, 2))]

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(RuntimeError, match="the shipped outcomes know nothing of the search of nll"):
            recorded_search(tiny, settings, ledger, "search of nll", minus_nll, None)
        genetic = GeneticSearch(
            2, bounds=(1, 2), start=1.5, population=8, parents=4, mutations=2, crossovers=2, seed=3
        )  # fmt: skip
        suite = tasks.kv_retrieval(3, 9, 3, keys="short")
        plain = search(tiny, suite, genetic, budget=20, objective=minus_nll, ledger=ledger)
        recorded = recorded_search(tiny, settings, ledger, "search of nll", minus_nll, None)
    assert (recorded.answers, recorded.contexts) == (3, 9)
    assert recorded.result.candidates == plain.candidates
    assert recorded.result.recomputed == 0


def test_a_gradient_is_priced_in_contexts_scored(tiny, monkeypatch):
    monkeypatch.setattr("benchmark.PRICED", ((4, "short"), (2, "uuid")))
    plan = [
        [work for pair in ((4, "short"), (2, "uuid")) for work in price_works(tiny, *pair, seed)] for seed in (0, 1)
    ]
    raw = measured(tiny, plan)
    table = price_table(raw).set_index(["keys", "numbers of"])
    seconds = {line: rows["seconds"].to_numpy() for line, rows in raw.groupby("line")}
    ratios = seconds["price of short: heads"] / seconds["price of short: score"]
    assert table.loc[("short", "heads"), ["least", "most"]].tolist() == [ratios.min(), ratios.max()]
    assert len(table) == 4
    assert {keys for _, keys in PRICED} == {"short", "uuid"}
