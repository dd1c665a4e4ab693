import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from lrs_utils import LayerScaling, load_lm, score, tasks
from lrs_utils.models.tiny import SMALL, SMALL_FOLDER
from lrs_utils.scoring.perplexity import window_nll
from lrs_utils.training import small


@pytest.fixture(scope="module")
def lm():
    return load_lm(SMALL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_FOLDER)


def test_it_ships_small_with_its_window_and_losses():
    assert sum(path.stat().st_size for path in SMALL_FOLDER.iterdir()) < 20 * 2**20
    config = json.loads((SMALL_FOLDER / "config.json").read_text())
    assert config["max_position_embeddings"] == small.WINDOW
    losses = pd.read_csv(SMALL_FOLDER / "losses.csv")
    assert dict(losses.groupby("length")["step"].max()) == {n: stage.steps for n, stage in small.STAGES.items()}
    assert losses["loss"].iloc[-1] < 0.6 * losses["loss"].iloc[0]


def test_it_reads_answers_and_prose_within_its_window(lm):
    unscaled = [LayerScaling.identity(lm.num_layers)]
    outcomes = score(lm, tasks.kv_retrieval(6, 10, seed=9, keys="short"), unscaled)
    assert outcomes.exact.mean() > 0.5
    nll = window_nll(lm, small.measuring_texts()[0], [small.WINDOW], stride=128, n_windows=10)
    assert nll.mean() < 5 < np.log(len(lm.tokenizer))


def test_texts_that_measure_were_not_trained_on():
    trained = small.training_texts()
    assert len(small.measuring_texts()) == 10
    assert not {text[:200] for text in trained} & {text[:200] for text in small.measuring_texts()}


def test_only_answers_of_retrieval_are_to_be_predicted(tokenizer):
    for document in small.retrieval(tokenizer, 256)(20, np.random.default_rng(0)):
        assert len(document) == 256
        judged = document >= 0
        text = tokenizer.decode(np.where(judged, document, ~document))
        assert judged.any()
        for run in np.split(np.arange(256), np.flatnonzero(np.diff(judged)) + 1):
            answer = tokenizer.decode(document[run]) if judged[run[0]] else ""
            assert not answer or (text.count(answer[:-1]) > 1 and answer[-1] in '">.'), "it stands in the context too"


def test_documents_are_the_same_for_the_same_step(tokenizer):
    prose = np.arange(2_000, dtype=np.uint32)
    first, again, other = (small.mixed(tokenizer, prose, 256)(8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert [bool((document >= 0).all()) for document in first] == [True] + 7 * [False]
    assert {len(document) for document in small.mixed(tokenizer, prose, 64)(8, np.random.default_rng(0))} == {64}


def test_keys_are_asked_again_with_their_own_values(tokenizer):
    for document in small.recalled(tokenizer, 128)(10, np.random.default_rng(0)):
        text = tokenizer.decode(np.where(document < 0, ~document, document))
        pairs = re.findall(r'"(\w+)": "(\d{5})"', text)
        assert len(pairs) > len(dict(pairs)) == len(set(pairs)), "each key has one value, and some stand twice"


@pytest.mark.parametrize("length", [256, 1024, 2048])
@pytest.mark.parametrize("task", ["pairs", "lines", "pass key"])
def test_suites_fill_a_length_and_no_more(task, length, tokenizer):
    found = small.suites(task, length, 2, seed=1, n_asked=5)
    texts = [
        probe.context + q.prompt + q.answer_prefix + q.answer
        for suite in found
        for probe in suite.probes
        for q in probe.questions
    ]
    assert len(texts) == 10
    assert 0.8 * length < max(map(len, tokenizer(texts)["input_ids"])) <= length
    assert [d for suite in found for d in suite.depths] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.1)


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="task is 'keys'; choose pairs, lines or pass key"):
        small.suites("keys", 256, 1, 0)


def test_another_base_and_fewer_steps_make_another_model(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(small, "STAGES", {64: replace(small.STAGES[64], steps=20, batch=4)})
    monkeypatch.setattr(small, "training_texts", lambda: ["To be, or not to be, that is the question. " * 200])
    monkeypatch.setattr(small, "_train_tokenizer", lambda texts: tokenizer)
    for base in (1_000.0, 10_000.0):
        made = small.make(tmp_path / f"base-{base:.0f}", share=0.1, rope_theta=base)
        assert made.model.config.rope_parameters["rope_theta"] == base
    losses = [pd.read_csv(tmp_path / f"base-{base}" / "losses.csv") for base in (1000, 10000)]
    assert all(len(rows) == 1 for rows in losses)  # two steps
    assert losses[0]["loss"][0] == pytest.approx(
        losses[1]["loss"][0], rel=0.1
    )  # from the same weights, on the same text
