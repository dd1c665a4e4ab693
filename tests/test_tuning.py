from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tuning
from tuning import LargeReading, LargeTuning, Method, Reading, SmallTuning, lengths_up_to, list_methods, search_factors

from lrs_utils import load_lm, tasks
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.training.finetune import Training

WINDOW = 256
CREAM = Method("CREAM", "YaRN", 2)


def documents(n, rng):
    """Nonsense of one window; every token is predicted."""
    return [rng.integers(5, 500, WINDOW) for _ in range(n)]


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture
def small_tuning(tmp_path):
    lm, start = (load_lm("small-rope", dtype=dtype) for dtype in ("float32", "bfloat16"))
    return SmallTuning(lm, start, documents, Training(steps=3, batch=2, rate=1e-3), tmp_path / "trainings", seed=5)


@pytest.fixture
def reading(ledger):
    text = "The sun is yellow and the sea is blue. " * 200
    return Reading(contexts=2, windows=2, first_end=512, seed=0, ledger=ledger, texts=lambda: [text, text.upper()])


def test_methods_are_listed_in_the_order_of_the_shipped_table():
    names = [method.name for method in list_methods([4, 8], 4, [2.0, 2.5])]
    assert names[:4] == [f"untuned, {of}, training 0" for of in ("no scaling x 1", "PI x 4", "YaRN x 4", "YaRN x 8")]
    assert names[4:7] == [f"{of}, YaRN x 4, training {n}" for of, n in (("CREAM", 0), ("CREAM", 1), ("PoSE", 0))]
    assert names[-1] == "CREAM, sigma 2.5, YaRN x 8, training 1"
    assert sum(name.startswith("CREAM, YaRN x 8") for name in names) == 4, "the main comparison has all"
    assert sum(name.startswith("RandPos, YaRN x 8") for name in names) == 2, "others have half"
    assert len(set(names)) == len(names)


def test_lengths_double_up_to_the_target():
    assert lengths_up_to(256, 8) == [256, 512, 1024, 2048]
    assert lengths_up_to(256, 1) == [256]


def test_a_training_is_described_by_the_settings_that_shipped_results_were_trained_with(small_tuning, monkeypatch):
    """Another name, order or value of a setting would train everything again."""
    called = {}

    def note(lm, documents, sampler, training, folder, **options):
        called.update(options, training=training, positions=sampler([WINDOW], np.random.default_rng(0)).positions)
        return replace(lm), np.zeros(3)

    monkeypatch.setattr(tuning, "train", note)
    small_tuning.tune(Method("CREAM", "YaRN", 4, 2.5, nth=1))
    assert list(called["about"].items()) == [
        ("documents", "small.mixed"), ("window", 256), ("sampler", "CREAM"), ("factor", 4), ("sigma", 2.5),
    ]  # fmt: skip
    assert called["scaling"].key == "yarn|4.0,4.0,4.0,4.0"
    assert called["training"].seed == 6
    assert called["positions"].max() == 4 * WINDOW - 1
    large = LargeTuning(
        small_tuning.start, documents, Training(steps=40), small_tuning.folder, {"source": "x"}, 128, 512
    )
    large.tune("PoSE", "PI")
    assert list(called["about"].items()) == [
        ("texts", {"source": "x"}), ("window", 128), ("sampler", "PoSE"), ("target", 512),
    ]  # fmt: skip
    assert called["scaling"].key == "pi|2.0,2.0,2.0,2.0"
    assert called["save_every"] == 5


def test_tuning_changes_the_weights_and_leaves_the_model_itself(small_tuning):
    before = small_tuning.lm.fingerprint
    tuned = small_tuning.tuned(CREAM)
    assert tuned.fingerprint != before
    assert str(next(tuned.model.parameters()).dtype) == "torch.float32"
    assert small_tuning.tuned(Method("untuned", "YaRN", 2)) is small_tuning.lm
    losses = small_tuning.losses_of(CREAM, every=2)
    assert losses["step"].tolist() == [2, 4]
    assert losses.columns.tolist() == ["step", "loss", "sampler", "scheme", "factor", "sigma", "nth"]
    assert np.isfinite(losses["loss"]).all()


def test_reading_gives_every_task_and_text_at_every_length(small_tuning, reading):
    rows = reading.measure(small_tuning, Method("untuned", "no scaling", 1), [256, 512])
    assert {*rows["task"]} == {"pairs", "lines", "pass key", "text"}
    assert rows.groupby("task")["length"].nunique().eq(2).all()
    by_context, by_fifth = rows[rows["fifth"].isna()], rows[rows["fifth"].notna()]
    pairs = {at: of.set_index("length") for at, of in by_fifth[by_fifth["task"] == "pairs"].groupby("fifth")}
    assert pairs.keys() == {1, 2, 3, 4, 5}
    mean = by_context[(by_context["task"] == "pairs") & (by_context["length"] == 256)]["right"].mean()
    assert mean > 50, "the small model was taught pairs in its window"
    assert np.mean([of["right"][256] for of in pairs.values()]) == pytest.approx(mean, abs=5)
    assert rows[rows["task"] == "text"]["nll"].between(0, 12).all()


def test_factors_change_what_is_read_and_a_factor_of_1_does_not(small_tuning, reading):
    plain, ones, halves = (
        reading.measure_factors(small_tuning, Method("untuned", "YaRN", 2), "GA", [factor] * 4, [256])
        for factor in (1.0, 1.0, 0.5)
    )
    pd.testing.assert_frame_equal(plain, ones)
    assert not np.allclose(plain["nll"].dropna(), halves["nll"].dropna())
    assert {*halves["how"]} == {"GA"}


@pytest.mark.parametrize("how", ["one factor", "GA"])
def test_a_search_finds_factors_no_worse_than_the_worst_and_says_what_it_started_from(how, small_tuning, ledger):
    suite = tasks.kv_retrieval(10, 1, seed=3, keys="short", positions=[0, 5, 9])
    rows = search_factors(small_tuning.lm, "untuned", how, 2, suite, 4, seed=0, ledger=ledger)
    assert rows.columns.tolist() == ["layer", "factor", "sampler", "how", "candidates", "nll", "best"]
    assert len(rows) == 4
    assert rows["factor"].between(0.5, 2).all()
    assert (rows["factor"].nunique() == 1) or how == "GA"
    assert rows["best"].iloc[0] <= rows["nll"].iloc[0] + 1e-6, "both try no factors too"


def test_another_search_is_refused(small_tuning, ledger):
    with pytest.raises(ValueError, match="how is 'both'; choose one factor or GA"):
        search_factors(
            small_tuning.lm, "untuned", "both", 2, tasks.kv_retrieval(5, 1, seed=3), 4, seed=0, ledger=ledger
        )


def test_a_larger_model_is_read_at_its_window_and_at_the_target(small_tuning, ledger, tmp_path, monkeypatch):
    text = "The sun is yellow and the sea is blue. " * 200
    monkeypatch.setattr(tuning.small, "measuring_texts", lambda: ["too short", text])
    training = Training(steps=1, batch=1, rate=1e-3)
    large = LargeTuning(small_tuning.start, documents, training, tmp_path / "large", {"source": "x"}, 128, 512)
    pairs = tasks.kv_retrieval(4, 1, seed=3, keys="short")
    read = LargeReading(texts=1, windows=1, stride=128, depths=[0, 1], pairs=pairs, seed=0, ledger=ledger)
    rows = read.measure(large, "CREAM", "PI")
    assert {*rows["method"]} == {"CREAM, PI"}
    assert rows[rows["task"] == "text"]["length"].tolist() == [256, 512]
    assert rows[rows["task"] == "pass key"]["depth"].tolist() == [0, 1]
    assert len(rows[rows["task"] == "pairs"]) == 4
    assert large.losses_of("CREAM", "PI")["step"].tolist() == [1]
    assert large.stretch("no scaling").is_identity
