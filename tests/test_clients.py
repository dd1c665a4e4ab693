"""Programs of other people on an exported folder: lm-eval, and transformers' server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_task import FOLDER, lay_out, make_suite
from transformers import pipeline

from lrs_utils import HeadScaling, LayerScaling, export, load_factors, load_lm, score

ROOT = Path(__file__).parent.parent


N = 8  # questions, of two contexts


def evaluate(model):
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["kv_short_40"], task_manager=manager, bootstrap_iters=0, limit=N)
    return [row["acc"] for row in found["samples"]["kv_short_40"]]


def test_lm_eval_measures_a_scaled_model_and_its_folder_as_score_does(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite, scaling = make_suite(), load_factors("smollm2-135m/pairs-gains")
    assert (FOLDER / "kv_short_40.jsonl").read_text() == lay_out(suite)
    suite = replace(suite, probes=suite.probes[:2])
    wanted = score(smollm2, suite, [scaling]).exact[0].ravel()
    with scaling.applied_to(smollm2.model):
        live = evaluate(HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer))
    export(smollm2, scaling, tmp_path / "out")
    exported = evaluate(HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32"))
    np.testing.assert_array_equal(live, wanted)
    np.testing.assert_array_equal(exported, wanted)
    assert np.mean(wanted) > 0.5


SCALINGS = {
    "stock": HeadScaling(gains=[[1.5, 0.6, 1.0, 1.0], [1.0, 1.2, 0.7, 1.0]]),
    "granite": LayerScaling((1.3, 0.7), "ntk", temperatures=(1.2, 1.0)),
    "remote": LayerScaling((1.3, 0.7)),
}
PROMPT = "a key, and its value: "


def export_and_continue(form, folder):
    """What the scaled model writes after the prompt; its folder is written."""
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    assert export(lm, SCALINGS[form], folder).form == form
    ids = lm.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with SCALINGS[form].applied_to(lm.model):
        tokens = lm.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    return lm.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_pipeline_of_transformers_runs_a_folder_with_code(tmp_path):
    wanted = export_and_continue("remote", tmp_path / "out")
    writer = pipeline("text-generation", str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    found = writer(PROMPT, max_new_tokens=24, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == wanted


@pytest.mark.parametrize("form", ["stock", "granite"])  # it looks for the class of a model in transformers alone
def test_transformers_serve_answers_over_http_as_the_scaled_model_does(form, tmp_path):
    wanted = export_and_continue(form, tmp_path / "out")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "transformers.cli.transformers"]
    command = [*program, "serve", str(tmp_path / "out"), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        body = {"model": str(tmp_path / "out"), "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        found = _ask(port, body, server)
        assert found["choices"][0]["text"] == wanted
    finally:
        server.kill()
        server.wait()


def _ask(port, body, server):
    """The answer to a completion, once the server is up."""
    for _ in range(240):
        assert server.poll() is None, "the server has ended"
        try:
            socket.create_connection(("localhost", port), timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    given = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), given)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())
