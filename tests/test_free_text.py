import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrs_utils import HeadScaling, LayerScaling, Ledger, load_lm
from lrs_utils.finding import free_text
from lrs_utils.finding.free_text import OPENINGS, continue_freely, distinct_trigrams, near_repeats

SCALING = HeadScaling(gains=[[1.3, 0.7, 1.0, 2.0], [0.9, 1.6, 0.4, 1.1]], layers=LayerScaling((1.2, 0.9), "ntk"))


@pytest.mark.parametrize(
    ("tokens", "repeats", "trigrams"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 0, 1),
        ([5, 5, 5, 5, 5, 5, 5], 1, 1 / 5),
        ([1, 2, 1, 2, 1, 2, 1], 1, 2 / 5),  # 121 and 212
        ([1, 2, 3, 1, 2, 3, 1], 1, 3 / 5),  # the farthest of the three before
        ([1, 2, 3, 4, 1, 2, 3], 0, 4 / 5),  # 123 comes again, but four tokens later
        ([9, 9, 9, 1, 2, 3, 2], 1 / 4, 1),  # the first three have no three before them
        ([1, 2, 3, 4, 4, 5, 4], 2 / 4, 1),
    ],
)
def test_repeats_and_trigrams_of_a_row(tokens, repeats, trigrams):
    rows = np.array([[tokens, range(7)]])
    np.testing.assert_allclose(near_repeats(rows), [[repeats, 0]])
    np.testing.assert_allclose(distinct_trigrams(rows), [[trigrams, 1]])


@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=3))
def test_repeats_and_trigrams_are_what_their_words_say(rows):
    tokens = np.array(rows)
    for row, repeats, trigrams in zip(rows, near_repeats(tokens), distinct_trigrams(tokens), strict=True):
        assert repeats == pytest.approx(np.mean([row[i] in row[i - 3 : i] for i in range(3, 9)]))
        assert trigrams == pytest.approx(len({tuple(row[i : i + 3]) for i in range(7)}) / 7)


def greedy(lm, opening, n_tokens):
    """The model's own continuation of one opening alone, by arg-max of plain forward passes."""
    ids = torch.tensor([lm.tokenizer(opening)["input_ids"]])
    n = ids.shape[1]
    with torch.no_grad():
        for _ in range(n_tokens):
            scores = lm.model(ids).logits[0, -1]
            scores[lm.tokenizer.eos_token_id] = -torch.inf  # all continuations are of the same length
            ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    return ids[0, n:].tolist()


@pytest.mark.parametrize("scaling", [LayerScaling.identity(2), SCALING], ids=["no scaling", "scaled"])
def test_the_first_row_is_what_the_model_says_to_each_opening_alone(lm, scaling):
    found = continue_freely(lm, scaling, n_tokens=10)
    assert found.shape == (len(OPENINGS), 2, 10)
    with scaling.applied_to(lm.model):
        assert found[:, 0].tolist() == [greedy(lm, opening, 10) for opening in OPENINGS]
        for opening, row in zip(OPENINGS[:2], found[:2, 0], strict=True):
            prompt = lm.tokenizer(opening, return_tensors="pt")
            settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
            alone = lm.model.generate(**prompt, **settings)[0, prompt["input_ids"].shape[1] :]
            assert alone.tolist() == row.tolist()
    assert not (found == lm.tokenizer.eos_token_id).any()


def test_a_seed_draws_the_same_tokens_and_another_others(tiny):
    state = torch.random.get_rng_state()
    first, again, other = (continue_freely(tiny, SCALING, n_tokens=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers are used up"
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:, 0], other[:, 0])
    assert (first[:, 1] != other[:, 1]).mean() > 0.5


def test_what_is_drawn_is_drawn_from_the_whole_distribution(tiny):
    scaling = LayerScaling.identity(2)
    drawn = np.stack([continue_freely(tiny, scaling, n_tokens=1, seed=seed)[:, 1, 0] for seed in range(25)], axis=1)
    excess, variance = 0.0, 0.0
    for opening, tokens in zip(OPENINGS, drawn, strict=True):
        with torch.no_grad():
            logits = tiny.model(torch.tensor([tiny.tokenizer(opening)["input_ids"]])).logits[0, -1].double()
        logits[tiny.tokenizer.eos_token_id] = -1e3
        surprise = -torch.log_softmax(logits, -1)
        share = (-surprise).exp()
        entropy = (share * surprise).sum()
        excess += (surprise[tokens] - entropy).sum().item()
        variance += len(tokens) * (share * (surprise - entropy) ** 2).sum().item()
    assert abs(excess) < 4 * variance**0.5
    assert variance > 100, "where all tokens are as likely the test would say nothing"


def test_the_models_own_generation_settings_change_nothing(tiny, monkeypatch, their_settings):
    expected = continue_freely(tiny, SCALING, n_tokens=16)
    monkeypatch.setattr(tiny.model, "generation_config", their_settings)
    np.testing.assert_array_equal(continue_freely(tiny, SCALING, n_tokens=16), expected)
    assert tiny.model.generation_config is their_settings


def test_the_model_is_left_without_scaling_and_its_cache_is_used(tiny, monkeypatch):
    lengths = []
    handle = tiny.model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    continue_freely(tiny, SCALING, n_tokens=16)
    handle.remove()
    assert sorted(set(lengths)) == [1, max(map(len, OPENINGS))]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.model.modules())


def test_the_ledger_answers_the_second_time(tiny, tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    first = continue_freely(tiny, SCALING, n_tokens=16, ledger=ledger)
    np.testing.assert_array_equal(first, continue_freely(tiny, SCALING, n_tokens=16))
    computed, calls = free_text._generate, []
    monkeypatch.setattr(free_text, "_generate", lambda *args: calls.append(args) or computed(*args))
    np.testing.assert_array_equal(continue_freely(tiny, SCALING, n_tokens=16, ledger=ledger), first)
    assert calls == []
    other = load_lm("tiny-qwen3", dtype="float32", device="cpu")
    for changed in (
        {"n_tokens": 15},
        {"seed": 1},
        {"scaling": LayerScaling.identity(2)},
        {"lm": other},
    ):
        continue_freely(**{"lm": tiny, "scaling": SCALING, "n_tokens": 16, "ledger": ledger} | changed)
    assert len(calls) == 4


def test_a_model_without_padding_token_pads_with_its_end(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    found = continue_freely(replace(tiny, tokenizer=tokenizer), SCALING, n_tokens=8)
    np.testing.assert_array_equal(found, continue_freely(tiny, SCALING, n_tokens=8))


def test_a_batch_reaches_the_head_in_a_form_that_copies_nothing(tiny, monkeypatch):
    head, seen = tiny.model.get_output_embeddings(), []
    multiply = head.forward
    monkeypatch.setattr(head, "forward", lambda states: seen.append(states.is_contiguous()) or multiply(states))
    hooks = len(head._forward_pre_hooks)
    continue_freely(tiny, SCALING, n_tokens=3)
    assert seen == [True] * 3  # the first is the prompt's, of which `generate` takes a slice
    assert len(head._forward_pre_hooks) == hooks
