"""One model, many threads: a second use waits for the first, so that none is wrong."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrs_utils import HeadScaling, LayerScaling, load_lm, score, tasks
from lrs_utils.analysis.attention import logits_by_distance
from lrs_utils.finding.free_text import continue_freely
from lrs_utils.scaling.trial import tried
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.scoring.perplexity import window_nll
from lrs_utils.searchers.gradient import nll_gradient

SUITE = tasks.kv_retrieval(4, 2, keys="short")
SCALINGS = [
    LayerScaling.identity(2),
    LayerScaling((1.3, 0.8)),
    LayerScaling((1.0, 1.2), "ntk", temperatures=(1.1, 0.8)),
    HeadScaling(gains=[[1.0, 0.6, 1.7, 1.0], [1.2] * 4]),
]


@pytest.fixture
def lm():
    return load_lm("tiny-llama", dtype="float32", device="cpu")


def plain_logits(lm):
    return lm.model(torch.arange(60)[None]).logits


def generated(lm):
    return lm.model.generate(torch.arange(9)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)


def scaled_logits(lm, scaling):
    with scaling.applied_to(lm.model):
        return plain_logits(lm)


USES = {
    "forward": plain_logits,
    "generate": generated,
    **{f"scaled {n}": lambda lm, s=s: scaled_logits(lm, s) for n, s in enumerate(SCALINGS)},
    **{f"score {n}": lambda lm, s=s: score(lm, SUITE, [s]).nll for n, s in enumerate(SCALINGS)},
    "gradient": lambda lm: nll_gradient(lm, SUITE.probes[0], SCALINGS[1])[1],
    "answers": lambda lm: generate_answers(lm, SUITE, SCALINGS[2], max_new_tokens=5),
    "free text": lambda lm: continue_freely(lm, SCALINGS[3], n_tokens=5),
    "perplexity": lambda lm: window_nll(lm, "Some words. " * 60, [128], stride=64, scaling=SCALINGS[1]),
    "attention": lambda lm: logits_by_distance(lm, list(range(40))),
}


def test_any_two_uses_from_different_threads_give_what_they_give_alone(lm):
    expected = {name: use(lm) for name, use in USES.items()}
    names = [*USES] * 6
    np.random.default_rng(0).shuffle(names)
    with ThreadPoolExecutor(6) as pool:
        for name, found in zip(names, pool.map(lambda name: USES[name](lm), names), strict=True):
            np.testing.assert_array_equal(found, expected[name], err_msg=name)


def test_a_forward_pass_waits_while_the_model_is_scaled_elsewhere(lm):
    bare, entered, leave = plain_logits(lm), threading.Event(), threading.Event()

    def hold():
        with SCALINGS[1].applied_to(lm.model):
            entered.set()
            leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(30)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(plain_logits, lm)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        leave.set()
        assert torch.equal(waiting.result(timeout=30), bare)
    holder.join()


def test_a_forward_pass_that_fails_ends_its_turn(lm):
    with pytest.raises(IndexError):
        lm.model(torch.tensor([[10**6]]))
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(plain_logits, lm).result(timeout=30), plain_logits(lm))


@pytest.mark.parametrize("use", ["score 1", "gradient", "answers", "free text", "perplexity", "attention"])
def test_a_model_in_training_mode_is_refused(lm, use):
    lm.model.train()
    with pytest.raises(ValueError, match=r"tiny-llama is in training mode.*model\.eval\(\)"):
        USES[use](lm)


def test_a_family_that_ignores_factors_is_refused_to_every_thread():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("phimoe", vocab_size=257, num_key_value_heads=2, num_local_experts=4, **sizes)
    for _ in range(5):
        model = AutoModelForCausalLM.from_config(config).eval()
        together = threading.Barrier(4)

        def refused(_, model=model, together=together):
            together.wait()
            with pytest.raises(ValueError, match="PhimoeForCausalLM can't be scaled by layer: tried on 8 tokens"):
                LayerScaling((1.3, 0.8)).refuse_misfit(model)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(refused, range(4)))


def test_a_trial_that_was_interrupted_has_found_nothing_out(lm):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tried(lm.model, "a trial", interrupted, True)
    assert tried(lm.model, "a trial", lambda: False, True) is False
