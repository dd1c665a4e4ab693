import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from lrs_utils import tasks
from lrs_utils.scoring.attention import _attend_packed, laid_out
from lrs_utils.scoring.packing import _BLOCK_ROWS, Layout, Packed, pack


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
@pytest.mark.parametrize("scale", [0.3, 0.25])  # a power of two multiplies queries, another number logits
def test_attention_equals_dense_attention_under_the_mask(
    tiny, monkeypatch, dtype, tolerance, kv_heads, window, block_rows, scale
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
        found, _ = _attend_packed(torch.nn.Module(), q, k, v, None, scale, window)
    seen = seen_densely(packs, copies, window)
    k, v = (x.double().repeat_interleave(6 // kv_heads, 1) for x in (k, v))
    logits = (scale * q.double() @ k.mT).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(
        found.double(), (logits.softmax(-1) @ v).transpose(1, 2), atol=tolerance, rtol=tolerance
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("block_rows", [1, 90, 10_000])
@pytest.mark.parametrize("scale", [0.3, 0.25])  # a power of two multiplies queries, another number logits
def test_gradients_of_attention_equal_those_of_dense_attention(tiny, monkeypatch, kv_heads, window, block_rows, scale):
    monkeypatch.setitem(_BLOCK_ROWS, "cpu", block_rows)
    probes = tasks.kv_retrieval(3, 1, keys="short").probes + tasks.kv_retrieval(5, 1, keys="short").probes
    packs, copies = [pack(tiny, probe, "") for probe in probes], 2
    layout = Layout(packs, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    n = layout.length * copies
    q, k, v, weight = (
        torch.randn(1, n, heads, 4, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (6, kv_heads, kv_heads, 6)
    )
    with laid_out(layout):
        found, _ = _attend_packed(torch.nn.Module(), q, k, v, None, scale, window)
    seen = seen_densely(packs, copies, window)
    of_heads = (x.repeat_interleave(6 // kv_heads, 1) for x in (k, v))
    keys, values = of_heads
    dense = ((scale * q @ keys.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    given = weight.detach().transpose(1, 2)
    for mine, theirs in zip(*(torch.autograd.grad((x * given).sum(), (q, k, v)) for x in (found, dense)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_of_attention_are_those_of_what_it_computes(window):
    """By finite differences: two contexts, of four tokens with two branches and of three with one, in two copies."""
    packs = [_row([0, 1, 2, 3, 4, 5, 3, 4], [0, 0, 0, 0, 1, 1, 2, 2]), _row([0, 1, 2, 3], [0, 0, 0, 1])]
    layout = Layout(packs, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, 24, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    with laid_out(layout):
        assert torch.autograd.gradcheck(
            lambda *given: _attend_packed(torch.nn.Module(), *given, None, 0.5, window)[0], inputs
        )


def test_attention_is_one_function_to_a_mode():
    """A mode that was asked about every call inside would take 2 % of the time of `score`."""
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    layout = Layout([_row([0, 1, 2, 3], [0, 0, 0, 1])], torch.device("cpu"))
    q = torch.ones(1, 2, 4, 8)
    with laid_out(layout), Mode():
        _attend_packed(torch.nn.Module(), q, q, q, None, None, None)
    assert seen == [_attend_packed]


def _row(positions, branch):
    ids = torch.zeros(len(positions), dtype=torch.long)
    return Packed(ids, torch.tensor(positions), torch.tensor(branch), ids[:1], ids[:1], np.zeros(1, np.int64))


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
