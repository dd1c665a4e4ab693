import re
import tomllib
from itertools import chain
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(r) for r in chain(PROJECT["dependencies"], *EXTRAS.values())]
BROUGHT_BY_PIP = {"bm25s", "datasets", "lm-eval", "playwright", "pypi-simple"}  # by the last line of environment.yml
CONDA_NAMES = {"torch": "pytorch"}


def test_environment_yml_asks_for_what_pyproject_asks_for():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {Requirement(entry).name: Requirement(entry).specifier for entry in listed if isinstance(entry, str)}
    wanted = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in REQUIREMENTS if r.name not in BROUGHT_BY_PIP}
    assert conda.pop("python") == PROJECT["requires-python"]
    assert conda.pop("pip") is not None
    assert conda == wanted
    [by_pip] = [entry["pip"] for entry in listed if not isinstance(entry, str)]
    assert by_pip == [f"--editable .[{','.join(sorted(EXTRAS))}]"]


def test_constraints_pin_every_requirement_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in REQUIREMENTS:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert pins["torch"] == "2.13.0"


def test_the_oldest_that_are_tested_are_the_oldest_that_are_admitted():
    [oldest] = re.findall(r"^OLDEST := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, version in (pin.split("==") for pin in oldest.split()):
        [bounds] = [r.specifier for r in REQUIREMENTS if r.name == name]
        assert f">={version.removesuffix('.0')}" in map(str, bounds)


def test_metadata_names_the_tested_pythons():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    named = re.findall(r"3\.\d+", " ".join(PROJECT["classifiers"]))
    assert named == ["3.11", "3.12", "3.13"]


def test_the_readme_gives_the_commands_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "results" / "README.md")
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", "".join(page.read_text() for page in pages), re.MULTILINE))
    assert {"demo", "test"} <= used <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()
