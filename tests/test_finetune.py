import copy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lrs_utils import ExtendedScaling, LayerScaling, load_lm
from lrs_utils.models.load import fingerprint
from lrs_utils.training.finetune import Training, stretches, tokens_on_disk, train
from lrs_utils.training.positions import cream, plain, pose, rand_pos

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
ABOUT = {"documents": "a fox"}
SHORT = Training(steps=12, batch=4, rate=3e-3, warmup=2)


@pytest.fixture
def documents(tiny, tmp_path):
    return stretches(tokens_on_disk(tiny, [TEXT], tmp_path), 96)


def test_texts_are_tokenised_once_into_a_mapped_file(tiny, tmp_path):
    tokens = tokens_on_disk(tiny, ["abc", "de"], tmp_path)
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [97, 98, 99, 256, 100, 101, 256]
    written = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    tokens_on_disk(tiny, ["abc", "de"], tmp_path)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == written
    assert len(tokens_on_disk(tiny, ["other"], tmp_path)) == 6
    with pytest.raises(ValueError, match="the text has 7 tokens; documents of 8 don't fit"):
        stretches(tokens, 8)


@pytest.mark.parametrize("change", [{}, {"lora": 2}, {"lora": 2, "checkpointing": True}, {"accumulate": 2, "batch": 2}])
def test_training_lowers_the_loss_and_leaves_the_model_given(tiny, documents, tmp_path, change):
    before = fingerprint(tiny.model, tiny.tokenizer)
    trained, losses = train(tiny, documents, plain(48), replace(SHORT, **change), tmp_path / "run", about=ABOUT)
    assert len(losses) == 12
    assert losses[-3:].mean() < losses[:3].mean() - 0.05
    assert fingerprint(tiny.model, tiny.tokenizer) == before != trained.fingerprint
    assert trained.fingerprint == fingerprint(trained.model, trained.tokenizer)
    again, same = train(tiny, documents, plain(48), replace(SHORT, **change), tmp_path / "run", about=ABOUT)
    assert (again.fingerprint, same.tolist()) == (trained.fingerprint, losses.tolist())


def test_accumulated_and_recomputed_steps_are_the_plain_ones(tiny, documents, tmp_path):
    runs = {}
    changes = {"plain": {}, "checkpointing": {"checkpointing": True}, "accumulated": {"accumulate": 2, "batch": 2}}
    for name, change in changes.items():
        training = replace(SHORT, **change)
        runs[name] = train(tiny, documents, plain(48), training, tmp_path / name, about=ABOUT)[1]
    np.testing.assert_allclose(runs["plain"], runs["checkpointing"], rtol=1e-5)
    np.testing.assert_allclose(runs["plain"], runs["accumulated"], rtol=1e-4)


@pytest.mark.parametrize("make", [partial(cream, k=4), pose, rand_pos])
def test_tokens_on_both_sides_of_a_gap_see_each_other(make, tiny, documents, tmp_path):
    """transformers takes a gap for the beginning of another text, unless told otherwise."""
    masks = []
    hook = type(tiny.model.model.layers[0]).forward

    def watched(self, hidden_states, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return hook(self, hidden_states, attention_mask=attention_mask, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny.model.model.layers[0]), "forward", watched)
        train(tiny, documents, make(48, 4), replace(SHORT, steps=1), tmp_path, about=ABOUT)
    assert masks == [None, None], "plain causal attention"


def test_tokens_given_as_complement_are_read_and_not_judged(tiny, documents, tmp_path):
    def hidden(n, rng):
        return [np.concatenate([~document[:60], document[60:]]) for document in documents(n, rng)]

    losses = {}
    for name, drawn in {"judged": documents, "hidden": hidden}.items():
        _, losses[name] = train(tiny, drawn, plain(96), replace(SHORT, steps=1), tmp_path / name, about={"of": name})
    drawn = np.array(documents(4, np.random.default_rng([0, 0]).spawn(2)[0]))
    with torch.no_grad():
        logits = tiny.model(torch.from_numpy(drawn)).logits[:, 59:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(drawn[:, 60:]).flatten())
    assert losses["hidden"][0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses["hidden"][0] != losses["judged"][0]


def test_positions_reach_the_rotary_embedding(tiny, documents, tmp_path):
    seen = []
    sampler = cream(48, 4, k=4)
    original = type(tiny.model.model.rotary_emb).forward

    def watched(self, x, position_ids):
        seen.append(position_ids.clone())
        return original(self, x, position_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny.model.model.rotary_emb), "forward", watched)
        train(tiny, documents, sampler, replace(SHORT, steps=1), tmp_path / "run", about=ABOUT)
    of_documents, of_positions = np.random.default_rng([0, 0]).spawn(2)
    drawn = documents(4, of_documents)
    expected = sampler([len(document) for document in drawn], of_positions).positions
    assert torch.equal(seen[0], torch.from_numpy(expected))
    assert seen[0].max() == 48 * 4 - 1


@pytest.mark.parametrize("scheme", ["pi", "ntk", "yarn"])
def test_a_scaled_model_is_trained_as_scaled(scheme, tiny, documents, tmp_path):
    scaling = ExtendedScaling((1.0, 1.0), scheme, extension=4.0)
    _, losses = train(
        tiny, documents, cream(48, 4, k=4), replace(SHORT, steps=1), tmp_path, about=ABOUT, scaling=scaling
    )
    of_documents, of_positions = np.random.default_rng([0, 0]).spawn(2)
    drawn = documents(4, of_documents)
    positions, tokens = cream(48, 4, k=4)([96] * 4, of_positions)
    ids = torch.tensor(np.array([document[t] for document, t in zip(drawn, tokens, strict=True)]))
    found = {}
    for name, applied in {"scaled": scaling, "bare": LayerScaling.identity(2)}.items():
        with torch.no_grad(), applied.applied_to(tiny.model):
            at = {"position_ids": torch.from_numpy(positions), "attention_mask": torch.ones_like(ids)}
            found[name] = tiny.model(ids, labels=ids, **at).loss.item()
    assert losses[0] == pytest.approx(found["scaled"], rel=1e-5)
    assert abs(found["bare"] - found["scaled"]) > 1e-4


def test_trainings_that_differ_lie_beside_each_other(tiny, documents, tmp_path):
    changes = [{}, {"training": replace(SHORT, rate=1e-3)}, {"about": {"documents": "others"}}]
    changes.append({"scaling": LayerScaling.uniform(2.0, 2)})
    for n, change in enumerate(changes * 2):
        options = {"training": SHORT, "about": ABOUT} | change
        train(tiny, documents, plain(48), options.pop("training"), tmp_path / "all", **options)
        assert len(list((tmp_path / "all").glob("training-*/checkpoint.pt"))) == min(n + 1, len(changes))


def test_a_model_without_positions_and_numbers_below_one_are_refused(tiny, documents, tmp_path):
    class Blind(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ValueError, match="Blind takes no position_ids"):
        train(replace(tiny, model=Blind()), documents, plain(48), SHORT, tmp_path / "other", about=ABOUT)
    with pytest.raises(ValueError, match="accumulate is 0; it must be positive"):
        Training(steps=1, accumulate=0)


KILLED = """
import sys
from pathlib import Path
from lrs_utils import load_lm
from lrs_utils.training.positions import cream
from lrs_utils.training.finetune import Training, stretches, tokens_on_disk, train
lm = load_lm("tiny-llama", dtype="float32", device="cpu")
folder = Path(sys.argv[1])
documents = stretches(tokens_on_disk(lm, ["the quick brown fox jumps over the lazy dog. " * 40], folder), 96)
print("ready", flush=True)
training = Training(steps=120, batch=4, rate=3e-3, lora=int(sys.argv[2]) or None)
trained, losses = train(lm, documents, cream(48, 4, k=4), training, folder, about={}, save_every=10)
print(trained.fingerprint, losses.tolist(), flush=True)
"""


@pytest.mark.parametrize("lora", ["0", "2"])
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, lora):
    def start(name):
        command = [sys.executable, "-c", KILLED, tmp_path / name, lora]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    victim = start("killed")
    victim.stdout.readline()
    while not (found := list((tmp_path / "killed").glob("*/checkpoint.pt"))) and victim.poll() is None:
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 10 <= len(torch.load(found[0])["losses"]) < 120
    endings = [start(name).communicate(timeout=300)[0].splitlines()[-1] for name in ("undisturbed", "killed")]
    assert endings[0] == endings[1]


def test_training_in_bfloat16_of_the_embedded_model_takes_a_step(smollm2, tmp_path):
    lm = load_lm("smollm2-135m", dtype="bfloat16", device="cpu")
    documents = stretches(tokens_on_disk(lm, [TEXT], tmp_path), 200)
    trained, losses = train(
        lm, documents, cream(64, 2, k=4), Training(steps=2, batch=1, lora=2), tmp_path / "run", about=ABOUT
    )
    assert np.isfinite(losses).all()
    assert trained.model.dtype == torch.bfloat16


def test_training_in_bfloat16_learns_as_in_float32_does(documents, tmp_path):
    lm, losses, trained = load_lm("tiny-llama", dtype="bfloat16", device="cpu"), {}, None
    for name, model in {"bf16": lm.model, "f32": copy.deepcopy(lm.model).float()}.items():
        start = replace(lm, model=model)
        result, losses[name] = train(start, documents, plain(48), SHORT, tmp_path / name, about=ABOUT)
        trained = result if name == "bf16" else trained
    assert losses["f32"][-1] < 0.9 * losses["f32"][0]
    np.testing.assert_allclose(losses["bf16"], losses["f32"], rtol=0.02)
    assert trained.model.dtype == torch.bfloat16
    for name, frequencies in lm.model.model.rotary_emb.named_buffers():
        after = trained.model.model.rotary_emb.get_buffer(name)
        assert after.dtype == torch.float32
        torch.testing.assert_close(after, frequencies, rtol=0, atol=0)


def test_bfloat16_weights_are_trained_in_float32(documents, tmp_path):
    """Steps of a small rate are far below the spacing of bfloat16: without float32 nothing would move."""
    lm = load_lm("tiny-llama", dtype="bfloat16", device="cpu")
    training = replace(SHORT, rate=1e-5, steps=4, warmup=1)
    trained, losses = train(lm, documents, plain(48), training, tmp_path / "bf16", about=ABOUT)
    same, expected = train(
        replace(lm, model=copy.deepcopy(lm.model).float()),
        documents,
        plain(48),
        training,
        tmp_path / "f32",
        about=ABOUT,
    )
    np.testing.assert_allclose(losses, expected, rtol=0.01)
    assert trained.model.dtype == torch.bfloat16
    checkpoints = [path for name in ("bf16", "f32") for path in (tmp_path / name).glob("*/checkpoint.pt")]
    states = [torch.load(path)["weights"] for path in checkpoints]
    moves = [
        torch.cat([(w - b.float()).flatten() for w, b in zip(state, lm.model.parameters(), strict=True)])
        for state in states
    ]
    assert torch.cosine_similarity(*moves, dim=0) > 0.9
    assert same.fingerprint != lm.fingerprint
