import json
import shutil
import subprocess
from functools import partial
from typing import Optional

import nbformat
import pandas as pd
import pytest
from reproduce import printed_summary

from lrs_utils import Ledger
from lrs_utils.notebook import ROOT, begin, revision, versions


def namespace(**changes):
    """What a notebook's globals() hold after its parameters cell and papermill's injected one."""
    annotations = {"profile": str, "n_pairs": Optional[int], "step": Optional[float], "bounds": Optional[list]}
    defaults = {"profile": "smoke", "n_pairs": None, "step": None, "bounds": None, "fresh": False, "Optional": Optional}
    return {"__annotations__": annotations | {"fresh": bool}, "In": [], "Out": {}, **defaults, **changes}


def test_parameters_left_none_come_from_the_profile():
    names = namespace()
    run = begin("06_ga_search", names)
    assert (names["n_pairs"], names["bounds"]) == (5, [0.7, 1.2])
    assert run["n_pairs"] == 5
    assert not run.overridden
    assert run.folder == ROOT / "build" / "smoke"
    assert run.place == "build/smoke"
    assert begin("06_ga_search", namespace(profile="cpu"))["n_pairs"] == 20


def test_given_parameters_win_and_are_named_in_the_command_and_the_folder():
    names = namespace(profile="cpu", n_pairs=12, step=1)
    run = begin("06_ga_search", names)
    assert names["n_pairs"] == run["n_pairs"] == 12
    assert run.command.endswith("-p profile cpu -p n_pairs 12 -p step 1")
    assert begin("x", namespace(bounds=[1.0, 1.5])).command.endswith("-y 'bounds: [1.0, 1.5]'")
    assert run.folder == ROOT / "build" / "cpu,n_pairs=12,step=1"
    assert versions() in run.provenance


def test_only_the_plain_cpu_profile_writes_into_the_repository():
    assert begin("x", namespace(profile="cpu")).folder == ROOT
    assert begin("x", namespace(profile="cpu", n_pairs=20)).folder == ROOT  # the profile's own value
    assert begin("x", namespace(profile="gpu")).folder == ROOT / "build" / "gpu"


def test_a_whole_profile_file_may_be_injected():
    import yaml

    settings = yaml.safe_load((ROOT / "notebooks" / "profiles" / "gpu.yaml").read_text())
    assert begin("x", namespace(**settings)).profile == "gpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_pars": 5}, "x has no parameter 'n_pars'; it has profile, n_pairs"),
        ({"budget": 7}, "x has no parameter 'budget'"),
        ({"profile": "cluster"}, "profile is 'cluster'; choose one of colab, cpu, demo, gpu, smoke"),
        ({"n_pairs": "ten"}, r"parameter n_pairs is 'ten' \(str\); it must be int or None"),
        ({"n_pairs": 2.5}, "parameter n_pairs is 2.5"),
        ({"n_pairs": True}, "parameter n_pairs is True"),
        ({"fresh": "yes"}, "parameter fresh is 'yes'"),
        ({"fresh": 1}, "parameter fresh is 1"),
    ],
)
def test_unknown_and_mistyped_parameters_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        begin("x", namespace(**change))


def test_a_notebook_may_be_run_again_in_the_same_kernel():
    names = namespace()
    begin("x", names)
    names |= {"middle": 3, "n_pairs": 12}  # the notebook's own name, and a parameter edited by hand
    assert begin("x", names)["n_pairs"] == 12


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs whose repository and cache are elsewhere."""
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setattr("lrs_utils.notebook.ROOT", tmp_path)
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def pieces_of(measured, *names):
    """Pieces that note when they are measured."""

    def measure(name):
        measured.append(name)
        return pd.DataFrame({"of": [name, name], "value": [1 / 3, len(measured)]})

    return {name: partial(measure, name) for name in names}


def test_a_table_is_measured_once(in_tmp):
    measured = []
    run = begin("x", namespace(profile="cpu"))
    first = run.table("t", pieces_of(measured, "a", "b"), fingerprint="f")
    assert measured == ["a", "b"]
    again = begin("x", namespace(profile="cpu")).table("t", pieces_of(measured, "a", "b"), fingerprint="f")
    pd.testing.assert_frame_equal(first, again)
    assert measured == ["a", "b"]
    assert (in_tmp / "data/results/t.csv").read_text().startswith('# {"pieces": ["a", "b"], "fingerprint": "f"} | ')
    run.table("t", pieces_of(measured, "a", "b"), fingerprint="another model")
    assert measured == ["a", "b"] * 2
    begin("x", namespace(profile="cpu", fresh=True)).table("t", pieces_of(measured, "a", "b"), fingerprint="f")
    assert measured == ["a", "b"] * 3


def test_a_killed_table_goes_on_where_it_was(in_tmp):
    measured = []
    pieces = pieces_of(measured, "a", "b", "c")

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin("x", namespace(profile="cpu")).table("t", pieces | {"b": killed}, n=2)
    assert not (in_tmp / "data/results/t.csv").exists()
    table = begin("x", namespace(profile="cpu")).table("t", pieces, n=2)
    assert measured == ["a", "b", "c"]
    assert table["of"].tolist() == ["a", "a", "b", "b", "c", "c"]


def test_a_committed_table_serves_another_folder(in_tmp):
    measured = []
    begin("x", namespace(profile="cpu")).table("t", pieces_of(measured, "a"), n=1)
    shutil.rmtree(in_tmp / "cache")
    smoke = begin("x", namespace())
    smoke.table("t", pieces_of(measured, "a"), n=1)
    assert measured == ["a"]
    assert (in_tmp / "build/smoke/data/results/t.csv").exists()
    assert smoke.find("data/results/t.csv") == in_tmp / "build/smoke/data/results/t.csv"
    assert begin("x", namespace(profile="gpu")).find("data/results/t.csv") == in_tmp / "data/results/t.csv"
    assert smoke.find("data/results/none.csv") is None


def test_a_setting_that_no_profile_knows_is_named():
    with pytest.raises(KeyError, match="profile smoke sets no 'temperature'"):
        begin("x", namespace())["temperature"]


def test_fresh_runs_start_with_an_empty_ledger_and_no_trainings(tmp_path, monkeypatch):
    monkeypatch.setenv("LRS_CACHE", str(tmp_path))
    shared = begin("x", namespace()).ledger
    assert shared.path == tmp_path / "ledger.sqlite"
    fresh = begin("x", namespace(fresh=True)).ledger
    assert fresh.path != shared.path
    assert len(fresh) == 0
    assert begin("x", namespace()).trainings == tmp_path / "trainings"
    assert begin("x", namespace(fresh=True)).trainings.parent == tmp_path
    assert not begin("x", namespace(fresh=True)).trainings.exists()


def test_shipped_outcomes_are_found_like_measured_ones(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lrs_utils.notebook.ROOT", tmp_path)
    profiles = tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "cpu.yaml").write_text("profile: cpu\n")
    names = {"profile": "cpu", "__annotations__": {"profile": str}}
    run = begin("x", names)
    run.ledger.record("m", "s", ["q"], np.array([True]), np.array([0.5]))
    shipped = run.ship([("m", "s")], ["q"])
    assert shipped == tmp_path / "data" / "results" / "x.outcomes.csv.gz"
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "clean"))
    ledger = begin("y", names).ledger
    assert isinstance(ledger, Ledger)
    assert ledger.find("m", "s") == {"q": (True, 0.5)}


def test_code_differs_from_its_commit_by_code_and_not_by_the_factors_found(tmp_path, monkeypatch):
    monkeypatch.setattr("lrs_utils.notebook.ROOT", tmp_path)
    assert revision() == "unknown"
    code, found = tmp_path / "lrs_utils" / "a.py", tmp_path / "lrs_utils" / "data" / "factors" / "m" / "ga.json"
    found.parent.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    code.write_text("# one")
    found.write_text("{}")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "-m", "a"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    found.write_text('{"factors": [1]}')
    committed = revision()
    assert "+" not in committed
    code.write_text("# two")
    assert revision() == f"{committed}+changes"


def test_what_is_no_clone_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("lrs_utils.notebook.ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no notebooks/profiles: notebooks and tools run from a clone"):
        begin("x", namespace())


def test_the_printed_summary_is_that_of_the_tagged_cells(tmp_path):
    def cell(text, tags):
        output = nbformat.v4.new_output("stream", text=text)
        return nbformat.v4.new_code_cell("x", outputs=[output], metadata={"tags": tags})

    table = nbformat.v4.new_output("display_data", {"text/plain": "a table", "text/html": "<b>"})
    cells = [cell("noise\n", []), cell("found\n", ["summary"]), cell("", ["summary"])]
    cells[2].outputs = [table]
    (tmp_path / "x.ipynb").write_text(json.dumps(nbformat.v4.new_notebook(cells=cells)))
    assert printed_summary(tmp_path / "x.ipynb") == "found\na table"
