import numpy as np
import pytest
import torch

from lrs_utils import LayerScaling
from lrs_utils.analysis import attention as entropy


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 256, 90).tolist()


def naive_weights(lm, ids):
    """Attention of transformers' own eager code, (layers, heads, queries, keys)."""
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = lm.model(torch.tensor([ids]), output_attentions=True).attentions
    lm.model.set_attn_implementation("sdpa")
    return torch.cat(maps).double().numpy()


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_entropy_and_mass_equal_the_naive_computation(lm, ids, monkeypatch, chunk_rows):
    monkeypatch.setattr(entropy, "_CHUNK_BYTES", chunk_rows * 4 * 4 * len(ids))
    with LayerScaling((1.3, 0.8)).applied_to(lm.model):
        found = entropy.attention(lm, ids, edges=[0, 1, 20, 60])
        weights = naive_weights(lm, ids)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    np.testing.assert_allclose(found.entropy, -(weights * logs).sum(-1), atol=2e-5)
    np.testing.assert_allclose(found.mass, np.add.reduceat(weights, [0, 1, 20, 60], axis=-1), atol=2e-5)


def test_last_queries_are_the_end_of_all(tiny, ids):
    all_queries, last = entropy.attention(tiny, ids), entropy.attention(tiny, ids, queries=3)
    np.testing.assert_allclose(last.entropy, all_queries.entropy[:, :, -3:], atol=1e-6)
    np.testing.assert_allclose(last.mass, all_queries.mass[:, :, -3:], atol=1e-6)
    assert all_queries.mass.shape == (2, 4, 90, 11)
    np.testing.assert_allclose(all_queries.mass.sum(-1), 1, atol=1e-5)
    assert (all_queries.entropy <= np.log(np.arange(1, 91)) + 1e-5).all()


def test_measuring_leaves_the_model_as_it_was(tiny, ids):
    before = tiny.model.config._attn_implementation
    bare = tiny.model(torch.tensor([ids])).logits
    entropy.attention(tiny, ids)
    assert tiny.model.config._attn_implementation == before
    assert torch.equal(tiny.model(torch.tensor([ids])).logits, bare)


def test_logits_by_distance_equal_the_mean_over_pairs(lm, ids):
    maps = []

    def watch(query, key, window):
        maps.append(query @ key.repeat_interleave(len(query) // len(key), 0).mT)

    found = entropy.logits_by_distance(lm, ids)
    assert found.shape[-1] == 45
    entropy._watch_attention(lm, ids, watch)
    for layer, logits in enumerate(maps):
        for r in (0, 1, 10, 44):
            naive = np.mean([logits[:, m, m - r].numpy() for m in range(45, 90)], axis=0)
            np.testing.assert_allclose(found[layer, :, r], naive, atol=1e-4)


def test_no_chunk_is_larger_than_its_limit(tiny, monkeypatch):
    sizes = []
    whole = torch.Tensor.log_softmax

    def noted(logits, *args):
        sizes.append(logits.nbytes)
        return whole(logits, *args)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noted)
    monkeypatch.setattr(entropy, "_CHUNK_BYTES", 200_000)
    entropy.attention(tiny, [5] * 1500)
    assert len(sizes) > 2 * 1500 * 1500 * 4 * 4 / 2 / 200_000
    assert max(sizes) <= 200_000


def test_induction_scores_find_heads_that_do_what_they_say(tiny, monkeypatch):
    def watch_only(lm, ids, watch):
        """Heads that see only the token before, only the one after the last same one, and all evenly."""
        n = len(ids)
        after = torch.tensor([max([k for k in range(1, q) if ids[k - 1] == ids[q]], default=0) for q in range(n)])
        query, key = torch.zeros(3, n, n), torch.eye(n)[None]
        query[0, torch.arange(n), torch.arange(n) - 1] = 50.0
        query[1, torch.arange(n), after] = 50.0
        watch(query, key, None)

    monkeypatch.setattr(entropy, "_watch_attention", watch_only)
    scores = entropy.induction_scores(tiny, n_tokens=40, n_texts=2)
    assert scores.index.tolist() == [(0, 0), (0, 1), (0, 2)]
    np.testing.assert_allclose(scores["previous token"], [1, 0, 0.025], atol=0.02)
    np.testing.assert_allclose(scores["prefix matching"], [0, 1, 0.025], atol=0.02)


def test_bad_requests_are_named(tiny, ids):
    with pytest.raises(ValueError, match="edges is \\[0, 5, 5\\]"):
        entropy.attention(tiny, ids, edges=[0, 5, 5])
    with pytest.raises(ValueError, match="queries is 91; the text has 1 to 90"):
        entropy.attention(tiny, ids, queries=91)
    with pytest.raises(ValueError, match="3,000 tokens, but tiny-llama reads 2,048"):
        entropy.attention(tiny, [1] * 3000)
