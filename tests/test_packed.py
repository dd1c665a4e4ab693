import pytest
import torch

from lrs_utils import tasks
from lrs_utils.scoring.packing import _BLOCK_ROWS, Layout, _attend_packed, laid_out, pack


def seen_densely(packs, copies, window):
    """Who sees whom, (tokens, tokens), written down without any thought of speed."""
    segment = torch.cat([torch.full_like(p.ids, i) for i, p in enumerate(packs * copies)])
    branch, position = (torch.cat([getattr(p, name) for p in packs * copies]) for name in ("branch", "positions"))
    left_at = torch.cat([branched_from(p) for p in packs * copies])
    distance = position[:, None] - position
    of_context = (branch == 0) & ((position < left_at[:, None]) | (branch == 0)[:, None])
    same_line = of_context | (branch == branch[:, None])
    return (segment[:, None] == segment) & same_line & (distance >= 0) & (distance < (window or 10**9))


def branched_from(packed):
    """Of each token, how much of the context its branch sees: it begins where the context's tokens end for it."""
    return torch.stack([packed.positions[packed.branch == b].min() for b in packed.branch])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("block_rows", [1, 90, 10_000])
def test_attention_equals_dense_attention_under_the_mask(
    tiny, monkeypatch, dtype, tolerance, kv_heads, window, block_rows
):
    monkeypatch.setitem(_BLOCK_ROWS, "cpu", block_rows)
    probes = tasks.kv_retrieval(3, 1, keys="short").probes + tasks.kv_retrieval(5, 1, keys="short").probes
    packs, copies = [pack(tiny, probe, "") for probe in probes], 2
    layout = Layout(packs, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    # as layers give them: heads and tokens swapped
    q, k, v = (
        torch.randn(1, layout.length * copies, heads, 16, generator=generator).to(dtype).transpose(1, 2)
        for heads in (6, kv_heads, kv_heads)
    )
    with laid_out(layout):
        found, _ = _attend_packed(torch.nn.Module(), q, k, v, None, 0.3, window)
    seen = seen_densely(packs, copies, window)
    k, v = (x.double().repeat_interleave(6 // kv_heads, 1) for x in (k, v))
    logits = (0.3 * q.double() @ k.mT).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(
        found.double(), (logits.softmax(-1) @ v).transpose(1, 2), atol=tolerance, rtol=tolerance
    )  # fmt: skip


def test_a_packed_probe_holds_every_question_as_it_would_be_alone(smollm2):
    probe = tasks.kv_retrieval(6, 1).probes[0]
    packed = pack(smollm2, probe, "")
    n = int((packed.branch == 0).sum())
    for q, question in enumerate(probe.questions):
        mine = packed.branch == q + 1
        start = int(packed.positions[mine].min())
        text = probe.context + question.prompt + question.answer_prefix + question.answer
        alone = smollm2.tokenizer(text)["input_ids"]
        assert packed.ids[:start].tolist() + packed.ids[mine].tolist() == alone[:-1]
        assert packed.positions[mine].tolist() == list(range(start, len(alone) - 1))
        assert n - start == 1  # all but the last token, which may merge with a question's first
        judged = packed.predicted_at[packed.owner == q]
        assert packed.targets[packed.owner == q].tolist() == alone[-len(judged) :]
        assert torch.equal(packed.positions[judged], torch.arange(len(alone) - 1 - len(judged), len(alone) - 1))
        assert smollm2.tokenizer.decode(alone[-len(judged) :]) == question.answer
    assert n > 400  # nearly all is context
