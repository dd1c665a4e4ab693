import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import papermill
import pytest
from first_screen import fill_first_screen
from readme import address, colab_cell
from reproduce import printed_summary

from lrs_utils.models.download import cache_folder
from lrs_utils.notebook import parameters_of, profiles

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture
def clean_cache(tmp_path, monkeypatch, smollm2):
    """A cache with the model, fetched texts and no outcomes, so that a notebook measures."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache_folder() / "packages").mkdir(exist_ok=True)
    for name in ("smollm2-135m", "packages"):
        os.symlink(cache_folder() / name, cache / name)
    monkeypatch.setenv("LRS_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_smoke(path, clean_cache, tmp_path):
    parameters = parameters_of(path.stem, "smoke")
    papermill.execute_notebook(path, tmp_path / "out.ipynb", parameters, progress_bar=False)
    assert (clean_cache / "ledger.sqlite").exists() or (clean_cache / "tables").exists(), "it measured"
    assert printed_summary(tmp_path / "out.ipynb")
    assert_outputs_are_pictures_and_short_text(nbformat.read(tmp_path / "out.ipynb", as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_the_cpu_profile_left_it(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert_outputs_are_pictures_and_short_text(notebook)
    assert "profile cpu, seed 0" in path.read_text()
    assert not re.search(r"[A-Z]_TEXT\b|COST_|LEARNED|# ASSERTIONS", path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_what_it_found(path):
    notebook = nbformat.read(path, as_version=4)
    before = notebook.cells[0].source
    assert re.search(r"<!-- found -->\n.*\d.*\n\n!\[.{40,}\]\(attachment:figure.png\)\n<!-- end -->", before, re.DOTALL)
    fill_first_screen(notebook)
    assert notebook.cells[0].source == before, "python tools/first_screen.py notebooks/*.ipynb writes it again"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_shows_what_its_cells_do(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert 5 * sum(not cell.outputs for cell in code) <= len(code), "one cell in five may show nothing"
    shown = [cell for cell in code if not cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert [cell.source for cell in shown if len(cell.source.splitlines()) > 15] == []
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    described = [output.metadata.get("image/png", {}).get("alt", "") for output in pictures]
    assert all(len(alt) > 40 for alt in described), described
    tables = [any("<table" in str(o.get("data", {}).get("text/html", "")) for o in c.get("outputs", [])) for c in cells]
    assert not any(all(tables[i : i + 3]) for i in range(len(tables) - 2)), "at most two tables in a row"


def test_every_committed_figure_says_in_words_what_it_shows():
    silent = [path.name for path in sorted((ROOT / "figures").glob("0*.svg")) if "<desc>" not in path.read_text()]
    assert silent == []


def assert_outputs_are_pictures_and_short_text(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            is_progress = "FloatProgress" in str(output.get("data", {}).get("text/plain", ""))
            assert not is_progress
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            assert len(text.splitlines()) < 40
            assert "it/s]" not in text
            assert "s/it]" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_sees_every_parameter(path):
    found = papermill.inspect_notebook(path)
    [cell] = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    declared = re.findall(r"^(\w+): ", cell.source, re.MULTILINE)
    assert list(found) == declared
    assert declared[0] == "profile"
    assert len(declared) <= 10
    assert all(parameter["help"] and parameter["inferred_type_name"] for parameter in found.values())
    values = {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}
    assert parameters_of(path.stem, "cpu") | {"settings": {}, "fresh": False} == values
    for profile in profiles(path.stem):
        assert {*parameters_of(path.stem, profile), "fresh", "settings"} == set(declared)
        assert parameters_of(path.stem, profile)["profile"] == profile
    settings = [tuple(parameters_of(path.stem, profile).get("settings", ())) for profile in profiles(path.stem)]
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    assert {*re.findall(r'run\["(\w+)"\]', code)} == {*settings[0]}, "none that no cell reads"
    assert len(set(settings)) == 1, "all in one order"


@pytest.mark.parametrize("where", ["in a clone", "bare"])
def test_the_first_cell_installs_the_project_on_colab(where, clean_cache, tmp_path):
    """In a fresh virtual environment that has the requirements but not the project, with a stand-in for Colab."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "lrs_utils", clone / "lrs_utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", clone / "notebooks")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    version = address()[1]
    for command in (
        ["init", "--quiet"], ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "a"], ["tag", f"v{version}"],
    ):  # fmt: skip
        subprocess.run(["git", "-C", clone, *command], check=True)
    colab = tmp_path / "stand-in" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "output.py").write_text("def enable_custom_widget_manager():\n    print('widgets are let in')\n")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n{tmp_path / 'stand-in'}\n")
    notebook = nbformat.read(clone / "notebooks" / "05_bezier_playground.ipynb", 4)
    smoke = "\n".join(
        f"{name}: {type(value).__name__} = {value!r}"
        for name, value in parameters_of(NOTEBOOKS[5].stem, "smoke").items()
    )
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    code[1] += f"\n{smoke}\nsettings: dict = {{}}"
    folder = clone / "notebooks"
    if where == "bare":
        code[0], folder = colab_cell(f"file://{clone}", version), tmp_path / "content"
        folder.mkdir()
    (folder / "set_up.ipy").write_text(
        "\n".join(
            ["import google.colab", *code[:3], "import lrs_utils, torch", "print(Path(lrs_utils.__file__).resolve())"]
        )
    )
    command = [tmp_path / "venv" / "bin" / "python", "-m", "IPython", "--no-banner", "set_up.ipy"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "widgets are let in" in done.stdout
    project = clone if where == "in a clone" else folder / "project"
    assert str(project / "lrs_utils" / "__init__.py") in done.stdout
    assert "profile smoke" in done.stdout
    assert not list((tmp_path / "venv").glob("lib/python*/site-packages/torch")), "Colab's own torch is kept"


def test_a_wrong_papermill_parameter_fails_the_run(tmp_path):
    given = parameters_of(NOTEBOOKS[0].stem, "smoke") | {"n_pars": 5}
    with pytest.raises(papermill.PapermillExecutionError, match="n_pars"):
        papermill.execute_notebook(NOTEBOOKS[0], tmp_path / "out.ipynb", given, progress_bar=False)
