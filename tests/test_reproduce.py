import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial

import nbformat
import pandas as pd
import pytest
from reproduce import printed_summary

from lrs_utils import Ledger
from lrs_utils.notebook import ROOT, begin, parameters_of, revision, versions

NAME = "06_ga_search"
ALL = {
    "profile": str, "model": str, "keys": str, "n_pairs": int, "n_contexts": int, "budget": int, "bounds": list,
    "seed": int, "settings": dict, "fresh": bool,
}  # fmt: skip


def namespace(values_of="smoke", /, **changes):
    """What the globals() of notebook 06 hold after its parameters cell and the one that papermill adds."""
    values = parameters_of(NAME, values_of) | {"settings": {}, "fresh": False} | changes
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    return {"__annotations__": ALL, "In": ["", "the parameters", injected], "middle": 3, **values}


def test_a_run_has_the_parameters_and_the_settings_of_its_profile():
    names = namespace()
    before = dict(names)
    run = begin(NAME, names)
    assert names == before, "a notebook's names are its own"
    assert (run["n_pairs"], run["population"]) == (5, 4)
    assert not run.overridden
    assert run.folder == ROOT / "build" / "smoke"
    assert run.place == "build/smoke"
    assert run.command == f"papermill notebooks/{NAME}.ipynb out.ipynb -f notebooks/profiles/smoke/06.yaml"
    assert begin(NAME, namespace("cpu"))["n_pairs"] == 20


def test_given_values_win_and_are_named_in_the_command_and_the_folder():
    run = begin(NAME, namespace("cpu", n_pairs=12, bounds=[1.0, 1.5], settings={"step": 0.1}))
    assert (run["n_pairs"], run["step"], run["population"]) == (12, 0.1, 20)
    assert run.command == (
        f"papermill notebooks/{NAME}.ipynb out.ipynb -p n_pairs 12 -y 'bounds: [1.0, 1.5]' -y 'settings: "
        '{"step": 0.1}\''
    )
    assert run.folder == ROOT / "build" / "cpu,bounds=[1.0,1.5],n_pairs=12,step=0.1"
    assert versions() in run.provenance


def test_the_command_of_a_run_gives_the_same_run(tmp_path):
    """Through papermill's own reading of files, -p and -y."""
    cells = [
        nbformat.v4.new_code_cell("profile: str = 'cpu'\nn: int = 1\nsettings: dict = {}"),
        nbformat.v4.new_code_cell(
            "from pathlib import Path\nimport lrs_utils.notebook as module\nmodule.ROOT = Path.cwd()\n"
            "print(module.begin('01_x', globals()).command)"
        ),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "01_x.ipynb")
    for profile, n in (("cpu", 1), ("smoke", 2)):
        folder = tmp_path / "notebooks" / "profiles" / profile
        folder.mkdir(parents=True)
        (folder / "01.yaml").write_text(f"profile: {profile}\nn: {n}\nsettings: {{a: 1, b: 2}}\n")
    tail = "-f notebooks/profiles/smoke/01.yaml -p n 7 -y 'settings: {\"b\": 3}'"
    command = f"papermill notebooks/01_x.ipynb out.ipynb {tail}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "unknown parameter" not in done.stderr
    [printed] = [cell.outputs for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.outputs]
    assert printed[0].text.strip() == command


def test_only_the_plain_cpu_profile_writes_into_the_repository():
    assert begin(NAME, namespace("cpu")).folder == ROOT
    assert begin(NAME, namespace("cpu", n_pairs=20)).folder == ROOT  # the profile's own value
    assert begin(NAME, namespace("cpu", settings={"step": 0.05})).folder == ROOT
    assert begin(NAME, namespace("gpu")).folder == ROOT / "build" / "gpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_pars": 5}, "06_ga_search has no parameter 'n_pars'; it has profile, model, keys, n_pairs"),
        ({"population": 7}, "06_ga_search has no parameter 'population'"),
        ({"settings": {"popolation": 7}}, "settings has 'popolation'; 06_ga_search has dtype, n_test_contexts, step"),
        ({"profile": "cluster"}, "profile is 'cluster'; choose one of colab, cpu, demo, gpu, smoke"),
        ({"n_pairs": "ten"}, r"parameter n_pairs is 'ten' \(str\); it must be int"),
        ({"n_pairs": 2.5}, "parameter n_pairs is 2.5"),
        ({"n_pairs": True}, "parameter n_pairs is True"),
        ({"settings": None}, "parameter settings is None"),
        ({"fresh": "yes"}, "parameter fresh is 'yes'"),
        ({"fresh": 1}, "parameter fresh is 1"),
    ],
)
def test_unknown_and_mistyped_parameters_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        begin(NAME, namespace(**change))


def test_another_profile_over_the_values_of_cpu_is_told_where_its_own_are():
    with pytest.raises(ValueError, match="profile is 'smoke', but the other parameters are those of 'cpu'") as refused:
        begin(NAME, namespace("cpu", profile="smoke"))
    assert "-f notebooks/profiles/smoke/06.yaml" in str(refused.value)
    lines = str(refused.value).partition(":\n")[2]
    names = namespace("cpu", profile="smoke")
    exec(lines, names)  # as pasted into the cell
    assert begin(NAME, names).overridden == {}


def test_a_notebook_may_be_run_again_in_the_same_kernel():
    names = namespace()
    begin(NAME, names)
    names |= {"high": 4, "n_pairs": 12}  # the notebook's own name, and a parameter edited by hand
    assert begin(NAME, names)["n_pairs"] == 12


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
    run = begin(NAME, namespace("cpu"))
    first = run.table("t", pieces_of(measured, "a", "b"), fingerprint="f")
    assert measured == ["a", "b"]
    again = begin(NAME, namespace("cpu")).table("t", pieces_of(measured, "a", "b"), fingerprint="f")
    pd.testing.assert_frame_equal(first, again)
    assert measured == ["a", "b"]
    assert (in_tmp / "data/results/t.csv").read_text().startswith('# {"pieces": ["a", "b"], "fingerprint": "f"} | ')
    run.table("t", pieces_of(measured, "a", "b"), fingerprint="another model")
    assert measured == ["a", "b"] * 2
    begin(NAME, namespace("cpu", fresh=True)).table("t", pieces_of(measured, "a", "b"), fingerprint="f")
    assert measured == ["a", "b"] * 3


def test_a_killed_table_goes_on_where_it_was(in_tmp):
    measured = []
    pieces = pieces_of(measured, "a", "b", "c")

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(NAME, namespace("cpu")).table("t", pieces | {"b": killed}, n=2)
    assert not (in_tmp / "data/results/t.csv").exists()
    table = begin(NAME, namespace("cpu")).table("t", pieces, n=2)
    assert measured == ["a", "b", "c"]
    assert table["of"].tolist() == ["a", "a", "b", "b", "c", "c"]


def test_a_committed_table_serves_another_folder(in_tmp):
    measured = []
    begin(NAME, namespace("cpu")).table("t", pieces_of(measured, "a"), n=1)
    shutil.rmtree(in_tmp / "cache")
    smoke = begin(NAME, namespace())
    smoke.table("t", pieces_of(measured, "a"), n=1)
    assert measured == ["a"]
    assert (in_tmp / "build/smoke/data/results/t.csv").exists()
    assert smoke.find("data/results/t.csv") == in_tmp / "build/smoke/data/results/t.csv"
    assert begin(NAME, namespace("gpu")).find("data/results/t.csv") == in_tmp / "data/results/t.csv"
    assert smoke.find("data/results/none.csv") is None


def test_a_setting_that_the_profile_lacks_is_named():
    with pytest.raises(KeyError, match=r"no setting 'temperature'; add it to notebooks/profiles/smoke/06\.yaml"):
        begin(NAME, namespace())["temperature"]


def test_fresh_runs_start_with_an_empty_ledger_and_no_trainings(tmp_path, monkeypatch):
    monkeypatch.setenv("LRS_CACHE", str(tmp_path))
    shared = begin(NAME, namespace()).ledger
    assert shared.path == tmp_path / "ledger.sqlite"
    fresh = begin(NAME, namespace(fresh=True)).ledger
    assert fresh.path != shared.path
    assert len(fresh) == 0
    assert begin(NAME, namespace()).trainings == tmp_path / "trainings"
    assert begin(NAME, namespace(fresh=True)).trainings.parent == tmp_path
    assert not begin(NAME, namespace(fresh=True)).trainings.exists()


def test_shipped_outcomes_are_found_like_measured_ones(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lrs_utils.notebook.ROOT", tmp_path)
    profile = tmp_path / "notebooks" / "profiles" / "cpu"
    profile.mkdir(parents=True)
    for number in ("06", "07"):
        (profile / f"{number}.yaml").write_text("profile: cpu\n")
    names = {"profile": "cpu", "__annotations__": {"profile": str}}
    run = begin(NAME, names)
    run.ledger.record("m", "s", ["q"], np.array([True]), np.array([0.5]))
    shipped = run.ship([("m", "s")], ["q"])
    assert shipped == tmp_path / "data" / "results" / f"{NAME}.outcomes.csv.gz"
    monkeypatch.setenv("LRS_CACHE", str(tmp_path / "clean"))
    ledger = begin("07_y", names).ledger
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
    names = namespace()
    monkeypatch.setattr("lrs_utils.notebook.ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no notebooks/profiles: notebooks and tools run from a clone"):
        begin(NAME, names)


def test_the_printed_summary_is_that_of_the_tagged_cells(tmp_path):
    def cell(text, tags):
        output = nbformat.v4.new_output("stream", text=text)
        return nbformat.v4.new_code_cell("x", outputs=[output], metadata={"tags": tags})

    table = nbformat.v4.new_output("display_data", {"text/plain": "a table", "text/html": "<b>"})
    cells = [cell("noise\n", []), cell("found\n", ["summary"]), cell("", ["summary"])]
    cells[2].outputs = [table]
    (tmp_path / "x.ipynb").write_text(json.dumps(nbformat.v4.new_notebook(cells=cells)))
    assert printed_summary(tmp_path / "x.ipynb") == "found\na table"
