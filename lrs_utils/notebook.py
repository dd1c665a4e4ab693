"""What a notebook's session needs: its profile and parameters, the ledger, tables, and where results go.

A notebook declares its parameters (cell tagged `parameters`; the values are those of the profile "cpu") and calls
`begin`, which stops a misspelt name or a wrong type. Parameters of another profile come from its file, by
`papermill -f notebooks/profiles/smoke/06.yaml`. `tools/reproduce.py` runs all notebooks.
"""

import ast
import hashlib
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any

import pandas as pd
import yaml
from IPython.display import Image
from matplotlib.figure import Figure

from lrs_utils.analysis.pictures import as_image, write_svg
from lrs_utils.models.download import cache_folder, write_whole
from lrs_utils.progress import Progress
from lrs_utils.scoring.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent  # the clone; notebooks and tools run from one, never from a wheel
VERIFY = "LRS_VERIFY"  # the variable that says which sample to measure again: a seed
AGAIN = "again"  # the folder, below a run's, for pieces of tables measured again
RESULTS_FOLDER = "LRS_RESULTS"  # the variable that says where results go
_SAMPLE = 20  # outcomes to forget behind each notebook
_SHIPPED = ".outcomes.csv.gz"

# A notebook imports modules from its own folder, and papermill may run it in any other.
sys.path.insert(0, str(ROOT / "notebooks"))


@dataclass(frozen=True)
class Run:
    """One execution of a notebook with all its settings fixed.

    Attributes
    ----------
    values : mapping
        Its parameters, and the profile's settings.
    overridden, changed : mapping
        Parameters and settings that differ from the profile's.
    """

    notebook: str
    profile: str
    values: Mapping[str, Any]
    overridden: Mapping[str, Any]
    changed: Mapping[str, Any]
    fresh: bool

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise KeyError(f"there is no setting {name!r}; add it to {profile_file(self.notebook, self.profile)}")
        return self.values[name]

    @property
    def folder(self) -> Path:
        """Where results go: $LRS_RESULTS, else the repository for the plain `cpu` profile, else build/.

        So only the plain `cpu` profile changes committed files.

        Below it are `figures/`, `data/results/` and `lrs_utils/data/factors/`, as in the repository.
        """
        if folder := os.environ.get(RESULTS_FOLDER):
            return Path(folder)
        different = {**self.overridden, **self.changed}
        if self.profile == "cpu" and not different:
            return ROOT
        changed = "".join(f",{name}={value}" for name, value in sorted(different.items()))
        return ROOT / "build" / f"{self.profile}{changed}".replace("/", "-").replace(" ", "")

    @property
    def place(self) -> str:
        """`folder`, as shown to a reader."""
        if self.folder == ROOT:
            return "the repository"
        return str(self.folder.relative_to(ROOT) if self.folder.is_relative_to(ROOT) else self.folder)

    def path(self, relative: str) -> Path:
        """A file to write below `folder`; its parent folders are made."""
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def scratch(self, name: str) -> Path:
        """A place for files that are never committed: below `folder`, or build/ where that is the repository."""
        path = (ROOT / "build" / self.profile if self.folder == ROOT else self.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @cached_property
    def ledger(self) -> Ledger:
        """Outcomes measured on this machine and those that ship with the repository.

        With `fresh`, a new, empty file instead, so that everything is measured. To verify shipped outcomes
        (`tools/verify.py`), only the shipped ones, without a sample of them.
        """
        if self.fresh:
            return Ledger(cache_folder() / f"ledger-{_now()}.sqlite")
        seed = os.environ.get(VERIFY)
        own = f"{self.notebook}{_SHIPPED}"
        ledger = Ledger(self.path(f"{AGAIN}/{self.notebook}.sqlite") if seed else cache_folder() / "ledger.sqlite")
        for shipped in sorted((ROOT / "data" / "results").glob(f"*{_SHIPPED}")):
            ledger.load(shipped)
        if seed and (ROOT / "data" / "results" / own).exists():
            rows = sampled(pd.read_csv(ROOT / "data" / "results" / own, skiprows=1), int(seed))
            for model, scaling, question in rows[["model", "scaling", "question"]].to_numpy(str).tolist():
                ledger.forget(model, scaling, question)
        return ledger

    @cached_property
    def trainings(self) -> Path:
        """The folder of trainings, unfinished and finished (`finetune.train`); with `fresh` a new, empty folder."""
        return cache_folder() / (f"trainings-{_now()}" if self.fresh else "trainings")

    def ship(self, candidates: list[tuple[str, str]], questions: list[str]) -> Path:
        """Export the outcomes behind this run's results, so that a fresh clone plots them without the model."""
        path = self.path(f"data/results/{self.notebook}{_SHIPPED}")
        self.ledger.export(path, candidates, questions, self.provenance)
        return path

    def table(
        self,
        name: str,
        pieces: Mapping[str, Callable[[], pd.DataFrame]],
        *,
        again: Sequence[str] | None = None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Measure a table that the ledger can't hold, or find it where it was measured with the same settings.

        It is looked up in the committed data/results/<name>.csv, whose first line gives the settings, then in the
        cache. Each piece is written there as soon as it is known, so a killed run resumes. The table is written below
        `folder`.

        Parameters
        ----------
        pieces : mapping of str to function
            For each piece's name, a function that gives its rows; measured one after the other.
        again : sequence of str, optional
            Pieces that `--verify` may measure again, if others take too long; by default all.
        settings
            Everything that the numbers of every piece depend on besides its name (model fingerprint, sizes, seed):
            plain JSON values.
        """
        about = json.dumps({"pieces": list(pieces), **settings})
        path, committed = self.path(f"data/results/{name}.csv"), ROOT / "data" / "results" / f"{name}.csv"
        if not self.fresh and committed.exists():
            text = committed.read_text(encoding="utf-8")
            if text.startswith(f"# {about} | "):
                if committed != path:
                    shutil.copyfile(committed, path)
                chosen = [(nth, piece) for nth, piece in enumerate(pieces) if again is None or piece in again]
                if chosen and (seed := os.environ.get(VERIFY)):
                    nth, piece = random.Random(f"{seed} {name}").choice(chosen)
                    again = pieces[piece]().to_csv(index=False, float_format="%.6g")
                    write_whole(self.path(f"{AGAIN}/{name}.csv"), f"# {nth} of {len(pieces)}: {piece}\n{again}")
                return pd.read_csv(path, skiprows=1)
        parts, bar = [], Progress(len(pieces), name)
        with bar.shown():
            for piece, measure in pieces.items():
                digest = hashlib.sha256(json.dumps({"piece": piece, **settings}).encode()).hexdigest()[:16]
                part = cache_folder() / "tables" / f"{name}-{digest}.csv"
                if self.fresh or not part.exists():
                    write_whole(part, measure().to_csv(index=False, float_format="%.6g"))
                parts.append(pd.read_csv(part))
                bar.advance(1, piece)
        rows = pd.concat(parts).to_csv(index=False, float_format="%.6g")
        write_whole(path, f"# {about} | {self.provenance}\n{rows}")
        return pd.read_csv(path, skiprows=1)

    def show(self, figure: Figure, alt: str, name: str | None = None) -> Image:
        """A figure as a notebook shows it, with a text for readers who don't see it.

        Parameters
        ----------
        alt : str
            What the figure says, made from the numbers that it draws.
        name : str, optional
            It is also written as figures/<name>.svg, with that text in it.
        """
        if name is not None:
            write_svg(figure, self.path(f"figures/{name}.svg"), alt)
        return as_image(figure, alt)

    def find(self, relative: str) -> Path | None:
        """A result that another notebook writes: this run's own, else the repository's, else None."""
        return next((path for path in (self.folder / relative, ROOT / relative) if path.exists()), None)

    @property
    def command(self) -> str:
        """The command that runs this notebook with these settings."""
        words = ["papermill", f"notebooks/{self.notebook}.ipynb", "out.ipynb"]
        if self.profile != "cpu":  # the values in the notebook
            words += ["-f", profile_file(self.notebook, self.profile)]
        different = {**self.overridden, **({"settings": self.changed} if self.changed else {})}
        for name, value in different.items():
            plain = isinstance(value, bool | int | float | str)
            words += ["-p", name, str(value)] if plain else ["-y", f"{name}: {json.dumps(value)}"]
        return shlex.join(words)

    @property
    def provenance(self) -> str:
        """One line: command, versions, code revision."""
        return f"{self.command} | {versions()} | code {revision()}"


def sampled(outcomes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rows of exported outcomes to forget and measure again."""
    return outcomes.sample(min(_SAMPLE, len(outcomes)), random_state=seed)


def profiles(notebook: str | None = None, root: Path | None = None) -> list[str]:
    """Names of the profiles that there are, or that a notebook has.

    Raises
    ------
    FileNotFoundError
        There are none: this is not a clone.
    """
    root = root or ROOT
    file = f"{notebook[:2]}.yaml" if notebook else "*.yaml"
    found = sorted({path.parent.name for path in (root / "notebooks" / "profiles").glob(f"*/{file}")})
    if not found:
        raise FileNotFoundError(f"{root} has no notebooks/profiles: notebooks and tools run from a clone, not a wheel")
    return found


def parameters_of(notebook: str, profile: str, root: Path | None = None) -> dict[str, Any]:
    """What a profile sets for a notebook: its parameters, and under "settings" what few readers change.

    Raises
    ------
    ValueError
        The notebook has no such profile; names those that it has.
    """
    known = profiles(notebook, root)
    if profile not in known:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(known)}")
    text = ((root or ROOT) / profile_file(notebook, profile)).read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def profile_file(notebook: str, profile: str) -> str:
    """The file for `papermill -f`, below the clone."""
    return f"notebooks/profiles/{profile}/{notebook[:2]}.yaml"


def begin(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Check a notebook's parameters and add the settings of its profile.

    Parameters
    ----------
    notebook : str
        Its file name without the extension.
    namespace : mapping
        The notebook's `globals()`. Declared parameters are the annotated names in it. It is not changed.

    Raises
    ------
    ValueError
        An unknown parameter, setting or profile, a value of the wrong type, or another profile's name over the values
        of `cpu`; the message names it and what is allowed.
    """
    declared = namespace["__annotations__"]
    unknown = [name for name in _injected(namespace) if name not in declared]
    if unknown:
        raise ValueError(f"{notebook} has no parameter {unknown[0]!r}; it has {', '.join(declared)}")
    values = {name: namespace[name] for name in declared}
    for name, kind in declared.items():
        _refuse_another_type(name, values[name], kind)
    profile, fresh, given = values.pop("profile"), values.pop("fresh", False), values.pop("settings", {})
    own = parameters_of(notebook, profile)
    settings = own.pop("settings", {})
    unknown = [name for name in given if name not in settings]
    if unknown:
        raise ValueError(f"settings has {unknown[0]!r}; {notebook} has {', '.join(settings) or 'none'}")
    _refuse_values_of_cpu(notebook, profile, own, values)
    overridden = {name: value for name, value in values.items() if name not in own or own[name] != value}
    changed = {name: value for name, value in given.items() if settings[name] != value}
    return Run(notebook, profile, values | settings | given, overridden, changed, fresh)


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """The names that papermill's own cell sets, which it puts below the one with the parameters."""
    cells = [cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters\n")]
    nodes = ast.walk(ast.parse(cells[-1] if cells else ""))
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _refuse_another_type(name: str, value: Any, kind: Any) -> None:
    allowed = typing.get_args(kind) or (kind,)
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        names = " or ".join("None" if a is NoneType else a.__name__ for a in allowed)
        raise ValueError(
            f"parameter {name} is {value!r} ({type(value).__name__}); it must be {names} (lists: papermill -y)"
        )


def _refuse_values_of_cpu(notebook: str, profile: str, own: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    cpu = parameters_of(notebook, "cpu")
    differ = [name for name, value in own.items() if name in values and value != cpu[name]]
    if differ and all(values[name] == cpu[name] for name in differ):
        lines = "\n".join(f"{name} = {own[name]!r}" for name in differ)
        raise ValueError(
            f"profile is {profile!r}, but the other parameters are those of 'cpu'. Give papermill "
            f"-f {profile_file(notebook, profile)}, or write into the cell with the parameters:\n{lines}"
        )


def _now() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"


def versions() -> str:
    """Versions that results depend on."""
    packages = " ".join(f"{name} {version(name)}" for name in ("lrs-utils", "torch", "transformers", "numpy"))
    return f"Python {platform.python_version()} {packages}"


def revision() -> str:
    """The commit of the code, with "+changes" where the code differs from it."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return "unknown"
    code = ["lrs_utils", "notebooks", ":(exclude)lrs_utils/data"]  # found factors are results
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True, check=False)
    return found.stdout.strip() + ("" if clean.returncode == 0 else "+changes")
