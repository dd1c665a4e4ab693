import numpy as np
import torch

from lrs_utils import LayerScaling, tasks
from lrs_utils.benchmark import (
    ALL,
    ALONE,
    GENERATE,
    GENERATION,
    GENERATION_ALONE,
    THREE,
    Recorded,
    generate_work,
    measured,
    operations,
    score_work,
    summary,
    with_searches,
)
from lrs_utils.plots import benchmark


def test_operations_are_those_that_torch_counts(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(100)[None]
    tiny.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        tiny.model(ids)
    tiny.model.set_attn_implementation("sdpa")
    assert operations(tiny, 100, 100 * 100, 100) == counter.get_total_flops()  # eager attends to what it then hides


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
    recorded = [
        Recorded("of U", 3, 12, [generation], known=5, spared=3, same_best=True),
        Recorded("of all", 4, 12, [generation], known=0, spared=0, same_best=True),
    ]
    np.testing.assert_allclose(recorded[0].layers_saved, 2 / 6)
    table = summary(with_searches(raw, recorded)).set_index("line")
    assert len(table) == 6 + 2 * 4
    assert (table.loc[GENERATE, ["times_faster", "slowest", "fastest"]] == 1).all()
    assert table.loc["of U: generate", "times_faster"] == 1
    np.testing.assert_allclose(
        table.loc["of U: trie", "seconds_an_answer"] * 0.75, table.loc["of U: trie and racing", "seconds_an_answer"]
    )
    assert (table["share_of_limit"] > 0).all()
    assert {ALL, "of all: trie and racing"} <= {
        t.get_text() for t in benchmark(table.reset_index(), 4).axes[1].get_yticklabels()
    }
