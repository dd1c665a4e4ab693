from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrs_utils import LayerScaling, Ledger, load_lm, score, tasks
from lrs_utils.models.decode import decode
from lrs_utils.peers import AttentionBuckets, LaMPE, MsPoE, ReRoPE, SelfExtend, String
from lrs_utils.peers.lampe import map_length

SUITE = tasks.kv_retrieval(3, 2, keys="short")
POSITIONS = torch.arange(90)


def read(scaling, layer=0, head=0):
    """The distance that each query at i, key at j is read as, (90, 90)."""
    i, j = POSITIONS[:, None], POSITIONS[None]
    found = (i - j).double()
    for region in scaling.regions[layer] or ():
        q, k = (p.read(POSITIONS).double() for p in (region.queries, region.keys))
        q, k = (x[head if len(x) > 1 else 0] for x in (q, k))
        found = torch.where(i - j >= region.since, q[:, None] - k[None], found)
    return found.numpy()


AT, SEEN = np.meshgrid(np.arange(90), np.arange(90), indexing="ij")
R = AT - SEEN


def holds(found, wanted):
    np.testing.assert_allclose(found[R >= 0], np.broadcast_to(wanted, R.shape)[R >= 0], atol=2e-4)


@given(window=st.integers(1, 100), group=st.integers(1, 20))
def test_self_extend_reads_every_distance_by_its_formula(window, group):
    far = AT // group - SEEN // group + window - window // group
    holds(read(SelfExtend(2, window, group)), np.where(window > R, R, far))


@given(window=st.integers(1, 100))
def test_rerope_reads_no_distance_as_more_than_its_window(window):
    holds(read(ReRoPE(2, window)), np.minimum(R, window))


@given(shift=st.integers(1, 100), local=st.integers(0, 50))
def test_string_reads_every_distance_by_its_formula(shift, local):
    holds(read(String(2, shift, local)), np.where(shift > R, R, R - shift + local))


@given(length=st.integers(20, 90), mapped=st.floats(12, 100), near=st.integers(1, 5), far=st.integers(0, 5))
def test_lampe_reads_every_distance_by_its_formula(length, mapped, near, far):
    found = read(LaMPE(2, length, mapped, near, far))
    if mapped >= length:
        holds(found, R)
        return
    middle = (mapped - near - far) / (length - near - far) * (R - near) + near
    wanted = np.where(near > R, R, np.where((length - far > R) | (far == 0), middle, mapped - length + R))
    holds(found, wanted)


def test_ms_poe_divides_positions_by_a_ratio_for_each_head():
    for orders, first in ((None, 3), ([[2, 0, 1, 3]] * 3, 2)):
        scaling = MsPoE(3, 4, orders)
        holds(read(scaling, 1), R)  # the first two layers are left
        ratios = 1.2 + 0.6 * np.array([3, 2, 1, 0] if orders is None else orders[2]) / 4
        for head, ratio in enumerate(ratios):
            holds(read(scaling, 2, head), R / ratio)
        assert ratios[0] == pytest.approx(1.2 + 0.6 * first / 4)
    with pytest.raises(ValueError, match="orders must be 3 permutations of 0 to 3"):
        MsPoE(3, 4, [[0, 0, 1, 2]] * 3)


def test_ms_poe_orders_heads_by_the_attention_of_the_prompts_last_token():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    prompt = SUITE.probes[0].context
    found = MsPoE.for_prompt(lm, prompt, first_layer=0)
    kept = []

    def note(_, args, given):
        kept.append(args[0] if args else given["hidden_states"])

    hook = lm.model.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        lm.model(ids)
    hook.remove()
    attention = lm.model.model.layers[0].self_attn
    q = attention.q_proj(kept[0])[0].view(-1, 4, 8).transpose(0, 1)
    k = attention.k_proj(kept[0])[0].view(ids.shape[1], -1, 8).transpose(0, 1)
    weights = (q[:, -1:] @ k.repeat_interleave(4 // len(k), 0).mT * 8**-0.5).softmax(-1)[:, 0]
    order = (-(weights > 3 * weights.mean(-1, keepdim=True)).float().mean(-1)).argsort(stable=True).tolist()
    divisors = found.regions[0][0].queries.divisors
    assert divisors == pytest.approx([1.2 + 0.6 * nth / 4 for nth in order])
    assert found.key == MsPoE.for_prompt(lm, prompt, first_layer=0).key
    assert MsPoE.for_prompt(lm, prompt, first_layer=1).regions[0] == ()
    assert lm.model.config._attn_implementation == "sdpa"


def test_methods_are_scored_with_ours_on_top(tiny):
    ours = LayerScaling((1.2, 0.9), "ntk", (1.1, 0.9))
    methods = [SelfExtend(2, 20, 4, on=ours), ReRoPE(2, 20), String(2, 30, 10, on=ours), LaMPE(2, 120, 60, 10, 10)]
    nll = score(tiny, SUITE, [ours, *methods]).nll
    alone = np.concatenate([score(tiny, SUITE, [scaling]).nll for scaling in (ours, *methods)])
    np.testing.assert_array_equal(nll, alone)
    assert len({row.tobytes() for row in nll}) == 5
    assert len({scaling.key for scaling in methods}) == 4
    with pytest.raises(ValueError, match="regions can't be put on regions"):
        String(2, 30, on=ReRoPE(2, 20))
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        SelfExtend(2, 0)
    with pytest.raises(ValueError, match="near 30 and far 40 leave nothing of the mapped length 60"):
        LaMPE(2, 120, 60, 30, 40)


def test_the_mapped_length_grows_to_the_window():
    assert map_length(0, 100, 0.1, 0.0) == 50
    assert map_length(10**4, 100, 0.1, 0.0) == pytest.approx(100)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_buckets_read_with_every_base_and_the_surest_decides_most(family, tmp_path):
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    buckets, ledger = AttentionBuckets((1.0, 1.8, 2.5)), Ledger(tmp_path / "ledger.sqlite")
    exact, nll = buckets.score(lm, SUITE, ledger=ledger)
    d = 8
    probe = SUITE.probes[1]
    for q, question in enumerate(probe.questions):
        prompt = probe.context + question.prompt + question.answer_prefix
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = lm.tokenizer(prompt + question.answer, return_tensors="pt")["input_ids"][:, ids.shape[1] :]
        whole, each = torch.cat([ids, answer], 1), []
        with torch.no_grad():
            for base in buckets.bases:
                scaling = LayerScaling((base ** ((d - 2) / d),) * 2, "ntk")
                with scaling.applied_to(lm.model):
                    each.append(lm.model(whole).logits[0, ids.shape[1] - 1 : -1])
            logits = torch.stack(each)
            weights = logits.amax(-1, keepdim=True).softmax(0)
            wanted = torch.nn.functional.cross_entropy((weights * logits).sum(0), answer[0])
            with buckets.applied_to(lm.model):
                together = lm.model(whole).logits[0, ids.shape[1] - 1 : -1]
                tokens = decode(lm, ids, torch.ones_like(ids), answer.shape[1], to_the_end=True)
                again = lm.model(torch.cat([ids, tokens], 1)).logits[0, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(together, (weights * logits).sum(0), atol=1e-4, rtol=1e-4)
        assert float(wanted) == pytest.approx(nll[1, q], abs=2e-5)
        again[:, lm.tokenizer.eos_token_id] = -torch.inf  # never chosen, `to_the_end`
        assert again.argmax(-1).tolist() == tokens[0].tolist()
    again, same = buckets.score(lm, SUITE, ledger=ledger)
    np.testing.assert_array_equal(again, exact)
    np.testing.assert_array_equal(same, nll)
    with pytest.raises(ValueError, match="one text at a time"), buckets.applied_to(lm.model):
        lm.model(ids.repeat(2, 1))


def test_buckets_refuse_what_they_would_get_wrong(tiny):
    buckets = AttentionBuckets((1.0, 2.0))
    with buckets.applied_to(tiny.model), pytest.raises(ValueError, match="already scaled"):
        LayerScaling((2.0, 2.0)).refuse_misfit(tiny.model)
    with LayerScaling((2.0, 2.0)).applied_to(tiny.model), pytest.raises(ValueError, match="already scaled"):
        buckets.refuse_misfit(tiny.model)
    ragged = replace(SUITE, probes=(SUITE.probes[0], replace(SUITE.probes[1], questions=SUITE.probes[1].questions[:1])))
    with pytest.raises(ValueError, match="different numbers of questions"):
        buckets.score(tiny, ragged)
    with pytest.raises(ValueError, match="give positive multiples"):
        AttentionBuckets((1.0, -2.0))
