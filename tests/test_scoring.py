import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from lrs_utils import ExtendedScaling, HeadScaling, LayerScaling, Ledger, load_lm, score, tasks
from lrs_utils.progress import Progress
from lrs_utils.scoring import answers as free_answers
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.scoring.packing import _BLOCK_ROWS, pack
from lrs_utils.scoring.trie import Shared
from lrs_utils.scoring.window import context_tokens
from lrs_utils.tasks import Probe, Question, Suite
from lrs_utils.tasks.judging import holds_value, judged

SCALINGS = {2: LayerScaling((1.4, 0.8)), 30: LayerScaling([0.9] * 12 + [1.0] * 18)}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "smollm3", "gemma3"]


def decoded(lm, probe, question, n_tokens):
    """Greedy text of one question alone, by model.generate."""
    text = probe.context + question.prompt + question.answer_prefix
    prompt = lm.tokenizer(text, return_tensors="pt").to(lm.model.device)
    n = prompt["input_ids"].shape[1]
    new = lm.model.generate(**prompt, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return lm.tokenizer.decode(new[0, n:])


def with_answers(suite, answers):
    """The suite with other answers: a random model is right about nothing but its own words."""
    probes = []
    for probe, texts in zip(suite.probes, answers, strict=True):
        questions = (replace(q, answer=a) for q, a in zip(probe.questions, texts, strict=True))
        probes.append(Probe(probe.context, tuple(questions), probe.n_items))
    return Suite("answers", tuple(probes))


def reference_nll(lm, probe, question):
    """Mean nll of the answer from one plain forward pass over this question alone."""
    text = probe.context + question.prompt + question.answer_prefix
    n = len(lm.tokenizer(text)["input_ids"])
    ids = torch.tensor([lm.tokenizer(text + question.answer)["input_ids"]])
    with torch.no_grad():
        logits = lm.model(ids).logits[0, n - 1 : -1].float()
    return F.cross_entropy(logits, ids[0, n:]).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_verdict_and_nll_equal_one_question_at_a_time(family):
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    asked = tasks.kv_retrieval(n_pairs=5, n_contexts=4, seed=2, keys="short")  # 20 questions, about 200 tokens
    scaling = SCALINGS[2]
    with scaling.applied_to(lm.model):
        own = [[decoded(lm, p, q, 3 + q.position) for q in p.questions] for p in asked.probes]
        # every second answer is what the model says (of different lengths), the others differ in the last letter
        answers = [[a if i % 2 else a[:-1] + ("x" if a[-1] != "x" else "y") for i, a in enumerate(p)] for p in own]
        suite = with_answers(asked, answers)
        expected = np.array([[a == o for a, o in zip(*row, strict=True)] for row in zip(answers, own, strict=True)])
        nll = np.array([[reference_nll(lm, p, q) for q in p.questions] for p in suite.probes])
    outcomes = score(lm, suite, [LayerScaling.identity(2), scaling])
    assert outcomes.exact.shape == (2, 4, 5)
    np.testing.assert_array_equal(outcomes.exact[1], expected)
    assert 0 < expected.mean() < 1
    np.testing.assert_allclose(outcomes.nll[1], nll, atol=1e-4)
    assert np.abs(outcomes.nll[0] - nll).max() > 1e-3  # the scaling matters to this model


@pytest.mark.parametrize("scaling", [LayerScaling.identity(30), SCALINGS[30]], ids=["unscaled", "scaled"])
def test_smollm2_verdicts_equal_generate_on_a_hundred_questions(smollm2, scaling):  # fifty under each
    suite = tasks.kv_retrieval(n_pairs=5, n_contexts=10, seed=4, keys="short")
    with scaling.applied_to(smollm2.model):
        expected = [[decoded(smollm2, p, q, 5) == q.answer for q in p.questions] for p in suite.probes]
    np.testing.assert_array_equal(score(smollm2, suite, [scaling]).exact[0], expected)
    assert 0 < np.mean(expected) < 1


def test_gemma3_verdicts_equal_generate_beyond_its_sliding_window(gemma3):
    suite = tasks.kv_retrieval(n_pairs=45, n_contexts=1, seed=4, keys="short", positions=[0, 10, 20, 44])
    [probe] = suite.probes
    assert len(gemma3.tokenizer(probe.context)["input_ids"]) > 512
    gains = np.linspace(0.7, 1.3, 72).reshape(18, 4)
    scalings = [
        LayerScaling.identity(18),
        HeadScaling(gains=gains, layers=LayerScaling((1.1,) * 18, scheme="ntk")),
    ]
    n_tokens = len(gemma3.tokenizer(probe.questions[0].answer, add_special_tokens=False)["input_ids"])
    expected = []
    for scaling in scalings:
        with scaling.applied_to(gemma3.model):
            expected.append([[decoded(gemma3, probe, q, n_tokens) == q.answer for q in probe.questions]])
    np.testing.assert_array_equal(score(gemma3, suite, scalings).exact, expected)
    assert 0 < np.mean(expected) < 1


def test_smollm2_loses_the_middle(smollm2):
    outcomes = score(smollm2, tasks.kv_retrieval(20, 6, keys="short", positions=[0, 9]), [LayerScaling.identity(30)])
    first, middle = outcomes.exact[0].mean(axis=0)
    assert first > middle
    assert outcomes.nll[0, :, 0].mean() < outcomes.nll[0, :, 1].mean()


def test_branches_in_groups_give_the_same(tiny, monkeypatch):
    suite = tasks.kv_retrieval(6, 2, keys="short")
    whole = score(tiny, suite, [SCALINGS[2]])
    monkeypatch.setitem(_BLOCK_ROWS, "cpu", 1)  # one branch a block
    np.testing.assert_allclose(score(tiny, suite, [SCALINGS[2]]).nll, whole.nll, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_share_equal_first_layers_and_nothing_else(family):
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    suite = tasks.kv_retrieval(5, 2, keys="short")
    pairs = [(1.2, 1.0), (1.2, 1.1), (0.9, 1.1), (1.0, 1.0), (1.2, 0.8), (1.0, 1.0), (1.0, 2.0)]
    scalings = [LayerScaling(pair) for pair in pairs] + [LayerScaling((1.2, 0.8), temperatures=(1.3, 1.0))]
    together = score(lm, suite, scalings)
    alone = [score(lm, suite, [scaling]) for scaling in scalings]
    np.testing.assert_array_equal(together.nll, np.concatenate([one.nll for one in alone]))
    # a context: first layers 0.9, 1.0, 1.2 without and with a temperature; then a second layer for each that differs
    assert together.layers_run == 2 * (4 + 7)
    assert together.layers_alone == sum(one.layers_run for one in alone) == 2 * 8 * 2


def with_known(suite, lm, outcomes, scalings, ledger, rng):
    """The ledger with a random half of some outcomes in it."""
    for c, scaling in enumerate(scalings):
        for p, probe in enumerate(suite.probes):
            known = np.flatnonzero(rng.random(len(probe.keys)) < 0.5)
            keys = [probe.keys[q] for q in known]
            ledger.record(lm.fingerprint, scaling.key, keys, outcomes.exact[c, p, known], outcomes.nll[c, p, known])
    return ledger


def assert_nothing_beside_it_changes_an_outcome(lm, suite, scalings, tmp_path, batches=(1, 700, 100_000)):
    """Bit for bit: other batches, other candidates and contexts, fewer questions, a random half known already."""
    whole = score(lm, suite, scalings)
    for tokens in batches:
        np.testing.assert_array_equal(score(lm, suite, scalings, batch_tokens=tokens).nll, whole.nll)
    rng = np.random.default_rng(0)
    for number in range(3):
        ledger = with_known(suite, lm, whole, scalings, Ledger(tmp_path / f"half-{number}.sqlite"), rng)
        resumed = score(lm, suite, scalings, ledger=ledger)
        assert 0 < resumed.recomputed < whole.nll.size
        np.testing.assert_array_equal(resumed.nll, whole.nll)
        np.testing.assert_array_equal(resumed.exact, whole.exact)
    probe = suite.probes[-1]
    alone = Suite("one", (replace(probe, questions=probe.questions[1:2]),))
    assert score(lm, alone, scalings[-1:]).nll.item() == whole.nll[-1, -1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_outcome_does_not_depend_on_what_is_asked_beside_it(family, dtype, tmp_path):
    lm = load_lm(f"tiny-{family}", dtype=dtype, device="cpu")
    probes = tasks.kv_retrieval(5, 3, keys="short").probes
    longer = [replace(probe, context=probe.context + " " * i) for i, probe in enumerate(probes)]  # no two of a length
    suite = Suite("lengths", tuple(longer))
    pairs = [(1.0, 1.0), (1.2, 1.1), (0.9, 1.1), (1.2, 0.8), (1.0, 2.0)]
    scalings = [*map(LayerScaling, pairs), HeadScaling(gains=[[1.0] * 4, [0.7, 1.4, 1.0, 2.0]])]
    assert_nothing_beside_it_changes_an_outcome(lm, suite, scalings, tmp_path)
    runs = [score(lm, suite, scalings, batch_tokens=tokens).layers_run for tokens in (1, 700, 100_000)]
    assert len(set(runs)) == 1


def test_an_outcome_of_the_real_model_does_not_depend_on_what_is_asked_beside_it(tmp_path):
    lm = load_lm("smollm2-135m", device="cpu")  # bfloat16 where the CPU multiplies in it
    suite = tasks.kv_retrieval(6, 2, keys="short", positions=[0, 2, 5])
    scalings = [LayerScaling([0.9] * 12 + [s] * 18) for s in (1.0, 1.1)]
    assert_nothing_beside_it_changes_an_outcome(lm, suite, scalings, tmp_path, batches=(1, 100_000))


def out_of_memory_above(lm, most_tokens):
    """Let the last layer run out of memory as a GPU's would; gives the tokens of each attempt."""
    tokens = []

    def limited(layer, args):
        tokens.append(args[0].shape[1])
        if args[0].shape[1] > most_tokens:
            raise torch.OutOfMemoryError("made up")

    lm.model.model.layers[-1].register_forward_pre_hook(limited)
    return tokens


def test_running_out_of_memory_halves_the_batch_and_goes_on(tmp_path):
    tiny = load_lm("tiny-llama", dtype="float32", device="cpu")
    suite = tasks.kv_retrieval(3, 4, keys="short")
    scalings = [LayerScaling((1.0, second)) for second in (0.8, 0.9, 1.1)]
    expected = score(tiny, suite, scalings, batch_tokens=1)
    one = score(tiny, Suite("one", suite.probes[:1]), scalings[:1])
    tokens = out_of_memory_above(tiny, 700)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    outcomes = score(tiny, suite, scalings, ledger=ledger, batch_tokens=10_000)
    np.testing.assert_array_equal(outcomes.nll, expected.nll)
    np.testing.assert_array_equal(outcomes.exact, expected.exact)
    assert len(ledger) == one.recomputed * 12 == outcomes.recomputed
    assert max(tokens) > 700
    assert sum(t > 700 for t in tokens) <= 3  # halved, not tried again and again


def test_a_context_that_fits_no_memory_says_so():
    tiny = load_lm("tiny-llama", dtype="float32", device="cpu")
    out_of_memory_above(tiny, 30)
    with pytest.raises(torch.OutOfMemoryError) as error:
        score(tiny, tasks.kv_retrieval(3, 2, keys="short"), [SCALINGS[2]], batch_tokens=1000)
    assert "tokens with its 3 questions; ask it at fewer positions" in error.value.__notes__[0]


def test_unscaled_first_layers_are_kept_for_later_calls(tiny):
    suite = tasks.kv_retrieval(3, 2, keys="short")
    first_kept, scaled = LayerScaling((1.0, 1.3)), LayerScaling((1.3, 1.0))
    kept = Shared()
    assert score(tiny, suite, [first_kept], shared=kept).layers_run == 4
    later = score(tiny, suite, [LayerScaling((1.0, 1.2))], shared=kept)
    assert later.layers_run == 2  # the second layer of two contexts
    np.testing.assert_array_equal(later.nll, score(tiny, suite, [LayerScaling((1.0, 1.2))]).nll)
    both = score(tiny, suite, [scaled, first_kept], shared=kept)
    np.testing.assert_array_equal(both.nll, score(tiny, suite, [scaled, first_kept]).nll)


def test_what_is_kept_stays_within_its_limit(tiny):
    suite = tasks.kv_retrieval(3, 3, keys="short")
    one = score(tiny, Suite("one", suite.probes[:1]), [SCALINGS[2]])
    assert one.layers_run == 2
    hidden = len(pack(tiny, suite.probes[0], "").ids) * tiny.model.config.hidden_size * 4
    kept = Shared(max_bytes=hidden + 100)  # of one context
    for layers_run in (6, 5, 5):
        assert score(tiny, suite, [LayerScaling((1.0, 1.2))], shared=kept, batch_tokens=1).layers_run == layers_run


def test_the_model_is_left_as_it_was(tiny):
    suite = tasks.kv_retrieval(2, 1, keys="short")
    ids = torch.arange(50)[None]
    before, attention = tiny.model(ids).logits, tiny.model.config._attn_implementation
    score(tiny, suite, [SCALINGS[2], LayerScaling((1.4, 0.9))])
    assert not any("forward" in vars(module) for module in tiny.model.modules())
    assert tiny.model.config._attn_implementation == attention
    assert torch.equal(tiny.model(ids).logits, before)


def test_a_forward_that_others_put_on_a_layer_is_called_and_kept():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    layer, calls = lm.model.model.layers[0], []
    original = layer.forward

    @functools.wraps(original)
    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = theirs
    score(lm, tasks.kv_retrieval(2, 1, 1, keys="short"), [LayerScaling((1.2, 1.0))])  # a new model is tried first
    calls.clear()
    score(lm, tasks.kv_retrieval(2, 1, keys="short"), [LayerScaling((1.2, 1.0)), LayerScaling((1.2, 1.1))])
    assert layer.forward is theirs
    assert calls == [1]  # and once for the two, who share it


def test_outcomes_in_the_ledger_are_not_measured_again(tiny, tmp_path):
    suite = tasks.kv_retrieval(4, 3, keys="short")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    first = score(tiny, suite, [SCALINGS[2]], ledger=ledger)
    assert first.recomputed == len(ledger) == 12
    bar = Progress(3, "found")
    assert score(tiny, suite, [SCALINGS[2]], ledger=ledger, progress=bar).recomputed == 0
    assert bar.done == 3
    again = score(tiny, suite, [LayerScaling.identity(2), SCALINGS[2]], ledger=ledger)
    assert again.recomputed == 12
    np.testing.assert_array_equal(again.nll[1], first.nll[0])
    np.testing.assert_array_equal(again.exact[1], first.exact[0])
    fewer = score(tiny, tasks.kv_retrieval(4, 2, keys="short", positions=[3, 0]), [SCALINGS[2]], ledger=ledger)
    assert fewer.recomputed == 0
    np.testing.assert_array_equal(fewer.nll[0], first.nll[0, :2, [3, 0]].T)


def test_a_partly_known_context_keeps_what_is_known_and_measures_the_rest(tiny, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    suite = tasks.kv_retrieval(4, 1, keys="short")
    marked = np.array([7.0, 8.0])  # values that no model gives
    known = [suite.probes[0].keys[q] for q in (0, 2)]
    ledger.record(tiny.fingerprint, SCALINGS[2].key, known, np.array([True, True]), marked)
    outcomes = score(tiny, suite, [SCALINGS[2]], ledger=ledger)
    assert outcomes.recomputed == 2
    np.testing.assert_array_equal(outcomes.nll[0, 0, [0, 2]], marked)
    alone = score(tiny, suite, [SCALINGS[2]])
    np.testing.assert_allclose(outcomes.nll[0, 0, [1, 3]], alone.nll[0, 0, [1, 3]], atol=1e-5)
    assert score(tiny, suite, [SCALINGS[2]], ledger=ledger).nll.tolist() == outcomes.nll.tolist()


def test_another_model_or_precision_finds_nothing_in_the_ledger(tiny, tmp_path):
    ledger, suite = Ledger(tmp_path / "ledger.sqlite"), tasks.kv_retrieval(3, 1, keys="short")
    score(tiny, suite, [SCALINGS[2]], ledger=ledger)
    for lm in (load_lm("tiny-llama", dtype="bfloat16", device="cpu"), load_lm("tiny-qwen3", dtype="float32")):
        assert score(lm, suite, [SCALINGS[2]], ledger=ledger).recomputed == 3


def test_a_prompt_longer_than_the_window_is_refused_with_the_numbers(tiny):
    suite = tasks.kv_retrieval(110, 1, keys="short", positions=[0])  # 20 bytes, so 20 tokens, a pair
    with pytest.raises(ValueError, match=r"context 0 of kv-short-110 has 2,\d+ tokens .* tiny-llama reads 2,048"):
        score(tiny, suite, [LayerScaling.identity(2)])
    assert score(tiny, suite, [LayerScaling.identity(2)], extrapolate=True).recomputed == 1
    assert score(tiny, suite, [LayerScaling((1.5, 1.2))]).recomputed == 1  # each layer's positions fit
    with pytest.raises(ValueError, match=r"reads 1,638 \(window 2,048 x 0.8\)"):
        score(tiny, suite, [LayerScaling((1.5, 0.8))])
    with pytest.raises(ValueError, match="reads 2,048"):
        generate_answers(tiny, suite, LayerScaling.identity(2))


def test_a_sliding_window_that_only_the_mask_knows_is_refused():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    lm.model.config.sliding_window = 64
    with pytest.raises(ValueError, match="LlamaAttention hides its sliding window"):
        score(lm, tasks.kv_retrieval(2, 1, keys="short"), [LayerScaling.identity(2)])


def test_an_answer_that_merges_with_its_prompt_is_refused(smollm2):
    suite = Suite("merging", (Probe("Say: ", (Question("hel", "", "lo", 0),), 1),))
    with pytest.raises(ValueError, match=r"the answer 'lo' .* merges with its prompt"):
        score(smollm2, suite, [LayerScaling.identity(30)])


def test_a_likelihood_that_is_no_number_names_context_and_question():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    lm.model.lm_head.weight.data[:] = torch.nan
    suite = tasks.kv_retrieval(3, 2, keys="short", positions=[1, 2])
    with pytest.raises(FloatingPointError, match=r"to the answer at position 1 in context 0 of kv-short-3, under"):
        score(lm, suite, [LayerScaling.identity(2)])


def test_a_wrong_number_of_factors_is_refused(tiny):
    with pytest.raises(ValueError, match="factors has 30 values but tiny-llama has 2 layers"):
        score(tiny, tasks.kv_retrieval(2, 1, keys="short"), [LayerScaling.identity(30)])


def test_free_answers_equal_generate_on_each_question_alone(smollm2):
    suite = tasks.kv_retrieval(8, 2, seed=5, keys="short")
    scaling = SCALINGS[30]
    answers = generate_answers(smollm2, suite, scaling, max_new_tokens=12)
    bare = replace(suite.probes[0].questions[0], answer_prefix="")
    with scaling.applied_to(smollm2.model):
        for probe, texts in zip(suite.probes, answers, strict=True):
            for question, text in zip(probe.questions, texts, strict=True):
                alone = decoded(smollm2, probe, replace(question, answer_prefix=bare.answer_prefix), 12)
                assert alone.startswith(text)  # free answers end at the end-of-text token
    held = judged(suite, answers, holds_value)
    assert held.shape == (2, 8)
    assert 0 < held.mean() < 1


def test_the_models_own_generation_settings_change_no_free_answer(tiny, monkeypatch, their_settings):
    suite = tasks.kv_retrieval(3, 1, seed=2, keys="short")
    expected = generate_answers(tiny, suite, SCALINGS[2], max_new_tokens=12)
    [probe] = suite.probes
    with SCALINGS[2].applied_to(tiny.model):
        assert expected == [[decoded(tiny, probe, replace(q, answer_prefix=""), 12) for q in probe.questions]]
    monkeypatch.setattr(tiny.model, "generation_config", their_settings)
    assert generate_answers(tiny, suite, SCALINGS[2], max_new_tokens=12) == expected


def test_free_answers_end_where_the_models_config_says(tiny, monkeypatch):
    suite = tasks.kv_retrieval(3, 1, seed=2, keys="short", positions=[1])
    [[text]] = generate_answers(tiny, suite, SCALINGS[2], max_new_tokens=12)
    settings = GenerationConfig(eos_token_id=[ord(text[5]), 256])
    monkeypatch.setattr(tiny.model, "generation_config", settings)
    [[ended]] = generate_answers(tiny, suite, SCALINGS[2], max_new_tokens=12)
    assert ended == text[: text.index(text[5]) + 1]


def test_free_answers_are_the_same_in_smaller_batches_and_from_the_ledger(smollm2, tmp_path, monkeypatch):
    suite, scaling = tasks.kv_retrieval(5, 2, seed=5, keys="short"), SCALINGS[30]
    answers = generate_answers(smollm2, suite, scaling, max_new_tokens=8)
    monkeypatch.setattr(free_answers, "_CACHED_BYTES", 400 * 256)  # two questions at once, at 256 bytes a token
    assert generate_answers(smollm2, suite, scaling, max_new_tokens=8) == answers
    ledger = Ledger(tmp_path / "l.sqlite")
    part = replace(suite, probes=(replace(suite.probes[0], questions=suite.probes[0].questions[1:3]),))
    assert generate_answers(smollm2, part, scaling, max_new_tokens=8, ledger=ledger) == [answers[0][1:3]]
    assert generate_answers(smollm2, suite, scaling, max_new_tokens=8, ledger=ledger) == answers
    monkeypatch.setattr(free_answers, "_decode_together", None)
    assert generate_answers(smollm2, suite, scaling, max_new_tokens=8, ledger=ledger) == answers


def test_dynamic_ntk_gives_each_context_the_frequencies_of_its_own_length(tiny):
    window = 2048
    # tokens are characters: one within, one beyond; together in a suite, with other scalings
    within, beyond = (tasks.kv_retrieval(n, 1, keys="short", positions=[0, n - 1]).probes[0] for n in (60, 100))
    suite = Suite("mixed", (within, beyond))
    factors, plain = (1.2, 0.9), LayerScaling.identity(2)
    scalings = [ExtendedScaling(factors, "dynamic_ntk", extension=2.0), plain]
    [text] = tasks.continuations("a b c d " * 50, 1, words=30, judged=10).probes
    assert context_tokens(tiny, text) == len(tiny.tokenizer(text.context + text.questions[0].answer)["input_ids"])
    length = context_tokens(tiny, beyond)
    assert context_tokens(tiny, within) < window < length
    found = score(tiny, suite, scalings, extrapolate=True)
    np.testing.assert_allclose(found.nll[0, 0], found.nll[1, 0], atol=1e-5)
    static = LayerScaling([2 * s * (length / window - 1) + 1 for s in factors], "ntk")
    alone = score(tiny, replace(suite, probes=(beyond,)), [static], extrapolate=True)
    np.testing.assert_allclose(found.nll[0, 1], alone.nll[0, 0], atol=1e-5)
    halves = [replace(suite, probes=tuple(replace(p, questions=p.questions[i:]) for p in suite.probes)) for i in (0, 1)]
    last = score(tiny, halves[1], scalings, extrapolate=True)
    np.testing.assert_allclose(found.nll[..., 1:], last.nll, atol=1e-5)
    # free answers too: questions of unequal length, padded, go on from the frequencies that the context was read with
    longer = replace(beyond.questions[1], prompt="\nAnd now, for something else:" + beyond.questions[1].prompt)
    suite = Suite("unequal", (replace(beyond, questions=(beyond.questions[0], longer)),))
    answers = generate_answers(tiny, suite, scalings[0], max_new_tokens=6, extrapolate=True)
    for i, question in enumerate(suite.probes[0].questions):
        alone = replace(suite, probes=(replace(beyond, questions=(question,)),))
        [[answer]] = generate_answers(tiny, alone, scalings[0], max_new_tokens=6, extrapolate=True)
        assert answer == answers[0][i]
