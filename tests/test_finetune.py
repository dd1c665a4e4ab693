import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lrs_utils import LayerScaling, load_lm
from lrs_utils.cream import cream, plain
from lrs_utils.finetune import Training, stretches, tokens_on_disk, train
from lrs_utils.models import fingerprint

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SHORT = Training(steps=12, batch=4, rate=3e-3, warmup=2)


@pytest.fixture
def documents(tiny, tmp_path):
    return stretches(tokens_on_disk(tiny, [TEXT], tmp_path / "tokens.npy"), 96)


def test_texts_are_tokenised_once_into_a_mapped_file(tiny, tmp_path):
    path = tmp_path / "tokens.npy"
    tokens = tokens_on_disk(tiny, ["abc", "de"], path)
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [97, 98, 99, 256, 100, 101, 256]
    assert tokens_on_disk(tiny, ["not read again"], path).tolist() == tokens.tolist()
    with pytest.raises(ValueError, match="the text has 7 tokens; documents of 8 don't fit"):
        stretches(tokens, 8)


@pytest.mark.parametrize("change", [{}, {"lora": 2}, {"checkpointing": True}, {"accumulate": 2, "batch": 2}])
def test_training_lowers_the_loss_and_leaves_the_model_given(tiny, documents, tmp_path, change):
    before = fingerprint(tiny.model, tiny.tokenizer)
    trained, losses = train(tiny, documents, plain(48), replace(SHORT, **change), tmp_path / "run")
    assert len(losses) == 12
    assert losses[-3:].mean() < losses[:3].mean() - 0.05
    assert fingerprint(tiny.model, tiny.tokenizer) == before != trained.fingerprint
    assert trained.fingerprint == fingerprint(trained.model, trained.tokenizer)
    again, same = train(tiny, documents, plain(48), replace(SHORT, **change), tmp_path / "run")
    assert (again.fingerprint, same.tolist()) == (trained.fingerprint, losses.tolist())


def test_accumulated_and_recomputed_steps_are_the_plain_ones(tiny, documents, tmp_path):
    runs = {}
    for name, change in {"plain": {}, "checkpointing": {"checkpointing": True}}.items():
        runs[name] = train(tiny, documents, plain(48), replace(SHORT, **change), tmp_path / name)[1]
    np.testing.assert_allclose(runs["plain"], runs["checkpointing"], rtol=1e-5)


def test_positions_reach_the_rotary_embedding(tiny, documents, tmp_path):
    seen = []
    sampler = cream(48, 4, k=4)
    original = type(tiny.model.model.rotary_emb).forward

    def watched(self, x, position_ids):
        seen.append(position_ids.clone())
        return original(self, x, position_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny.model.model.rotary_emb), "forward", watched)
        train(tiny, documents, sampler, replace(SHORT, steps=1), tmp_path / "run")
    rng = np.random.default_rng([0, 0])
    drawn = documents(4, rng)
    expected = sampler([len(document) for document in drawn], rng).positions
    assert torch.equal(seen[0], torch.from_numpy(expected))
    assert seen[0].max() == 48 * 4 - 1


def test_a_scaled_model_is_trained_as_scaled(tiny, documents, tmp_path):
    scaling = LayerScaling.uniform(4.0, 2)
    _, bare = train(tiny, documents, plain(48), SHORT, tmp_path / "bare")
    _, scaled = train(tiny, documents, plain(48), SHORT, tmp_path / "scaled", scaling=scaling)
    assert abs(bare[0] - scaled[0]) > 1e-3


def test_another_training_in_the_folder_and_a_model_without_positions_are_refused(tiny, documents, tmp_path):
    train(tiny, documents, plain(48), SHORT, tmp_path / "run")
    with pytest.raises(ValueError, match="holds another training"):
        train(tiny, documents, plain(48), replace(SHORT, rate=1e-3), tmp_path / "run")
    with pytest.raises(ValueError, match="holds another training"):
        train(tiny, documents, plain(48), SHORT, tmp_path / "run", about={"documents": "others"})

    class Blind(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ValueError, match="Blind takes no position_ids"):
        train(replace(tiny, model=Blind()), documents, plain(48), SHORT, tmp_path / "other")


KILLED = """
import sys
from pathlib import Path
from lrs_utils import load_lm
from lrs_utils.cream import cream
from lrs_utils.finetune import Training, stretches, tokens_on_disk, train
lm = load_lm("tiny-llama", dtype="float32", device="cpu")
folder = Path(sys.argv[1])
documents = stretches(tokens_on_disk(lm, ["the quick brown fox jumps over the lazy dog. " * 40], folder / "t.npy"), 96)
print("ready", flush=True)
training = Training(steps=120, batch=4, rate=3e-3, lora=int(sys.argv[2]) or None)
trained, losses = train(lm, documents, cream(48, 4, k=4), training, folder, save_every=10)
print(trained.fingerprint, losses.tolist(), flush=True)
"""


@pytest.mark.parametrize("lora", ["0", "2"])
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, lora):
    def start(name):
        command = [sys.executable, "-c", KILLED, tmp_path / name, lora]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    victim = start("killed")
    victim.stdout.readline()
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists() and victim.poll() is None:
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 10 <= len(torch.load(checkpoint)["losses"]) < 120
    endings = [start(name).communicate(timeout=300)[0].splitlines()[-1] for name in ("undisturbed", "killed")]
    assert endings[0] == endings[1]


def test_training_in_bfloat16_of_the_embedded_model_takes_a_step(smollm2, tmp_path):
    lm = load_lm("smollm2-135m", dtype="bfloat16", device="cpu")
    documents = stretches(tokens_on_disk(lm, [TEXT], tmp_path / "tokens.npy"), 200)
    trained, losses = train(lm, documents, cream(64, 2, k=4), Training(steps=2, batch=1, lora=2), tmp_path / "run")
    assert np.isfinite(losses).all()
    assert trained.model.dtype == torch.bfloat16
