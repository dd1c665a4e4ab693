"""What a notebook's session needs: its profile and parameters, the ledger, tables, and where results go.

A notebook declares its parameters (cell tagged `parameters`) and calls `begin`. Those left None come from
`notebooks/profiles/<profile>.yaml`; a misspelt name or a wrong type stops the run. `tools/reproduce.py` runs all
notebooks.
"""

import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import typing
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any

import pandas as pd
import yaml

from lrs_utils.models.download import cache_folder, write_whole
from lrs_utils.progress import Progress
from lrs_utils.scoring.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent  # the clone; notebooks and tools run from one, never from a wheel
VERIFY = "LRS_VERIFY"  # the variable that says which sample to measure again: a seed
AGAIN = "again"  # the folder, below a run's, for pieces of tables measured again
RESULTS_FOLDER = "LRS_RESULTS"  # the variable that says where results go
_SAMPLE = 20  # outcomes to forget behind each notebook
_SHIPPED = ".outcomes.csv.gz"
_IPYTHON_NAMES = {"In", "Out"}


@dataclass(frozen=True)
class Run:
    """One execution of a notebook with all its settings fixed.

    Attributes
    ----------
    settings : mapping
        The profile's values, overridden by the notebook's parameters.
    overridden : mapping
        Parameters that differ from the profile's.
    """

    notebook: str
    profile: str
    settings: Mapping[str, Any]
    overridden: Mapping[str, Any]
    fresh: bool

    def __getitem__(self, name: str) -> Any:
        if name not in self.settings:
            raise KeyError(f"profile {self.profile} sets no {name!r}; add it to notebooks/profiles/{self.profile}.yaml")
        return self.settings[name]

    @property
    def folder(self) -> Path:
        """Where results go: $LRS_RESULTS, else the repository for the plain `cpu` profile, else build/.

        So only the plain `cpu` profile changes committed files.

        Below it are `figures/`, `data/results/` and `lrs_utils/data/factors/`, as in the repository.
        """
        if folder := os.environ.get(RESULTS_FOLDER):
            return Path(folder)
        if self.profile == "cpu" and not self.overridden:
            return ROOT
        changed = "".join(f",{name}={value}" for name, value in sorted(self.overridden.items()))
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

    def find(self, relative: str) -> Path | None:
        """A result that another notebook writes: this run's own, else the repository's, else None."""
        return next((path for path in (self.folder / relative, ROOT / relative) if path.exists()), None)

    @property
    def command(self) -> str:
        """The command that runs this notebook with these settings."""
        changes = "".join(
            f" -y '{name}: {value}'" if isinstance(value, list) else f" -p {name} {value}"
            for name, value in self.overridden.items()
        )
        return f"papermill notebooks/{self.notebook}.ipynb out.ipynb -p profile {self.profile}{changes}"

    @property
    def provenance(self) -> str:
        """One line: command, versions, code revision."""
        return f"{self.command} | {versions()} | code {revision()}"


def sampled(outcomes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rows of exported outcomes to forget and measure again."""
    return outcomes.sample(min(_SAMPLE, len(outcomes)), random_state=seed)


def profiles(root: Path | None = None) -> dict[str, Path]:
    """The files of notebooks/profiles by name.

    Raises
    ------
    FileNotFoundError
        There are none: this is not a clone.
    """
    root = root or ROOT
    found = {path.stem: path for path in sorted((root / "notebooks" / "profiles").glob("*.yaml"))}
    if not found:
        raise FileNotFoundError(f"{root} has no notebooks/profiles: notebooks and tools run from a clone, not a wheel")
    return found


def begin(notebook: str, namespace: MutableMapping[str, Any]) -> Run:
    """Check a notebook's parameters and fill those left None from its profile.

    Parameters
    ----------
    notebook : str
        Its file name without the extension.
    namespace : mapping
        The notebook's `globals()`. Declared parameters are the annotated names in it.

    Raises
    ------
    ValueError
        An unknown parameter or profile, or a value of the wrong type; the message names it and what is allowed.
    """
    declared = dict(namespace["__annotations__"])
    profile, files = namespace["profile"], profiles()
    if profile not in files:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(files)}")
    settings = yaml.safe_load(files[profile].read_text(encoding="utf-8"))
    for name, value in namespace.items():
        plain = isinstance(value, bool | int | float | str | list | tuple | dict | NoneType)
        if "_begun" in namespace or name in declared or not plain or name.startswith("_") or name in _IPYTHON_NAMES:
            continue
        if name not in settings or settings[name] != value:  # `papermill -f profiles/x.yaml` brings all of a profile
            raise ValueError(f"{notebook} has no parameter {name!r}; it has {', '.join(declared)}")
    settings |= settings.pop(f"notebook_{notebook[:2]}", {})  # what differs in this one
    settings = {name: value for name, value in settings.items() if not name.startswith("notebook_")}
    namespace["_begun"] = True  # if cells run again in this kernel, the notebook's own names are not parameters
    overridden = {}
    for name, kind in declared.items():
        value = namespace[name]
        allowed = typing.get_args(kind) or (kind,)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            names = " or ".join("None" if a is NoneType else a.__name__ for a in allowed)
            raise ValueError(
                f"parameter {name} is {value!r} ({type(value).__name__}); it must be {names} (lists: papermill -y)"
            )
        if NoneType not in allowed:
            continue
        if value is not None and value != settings.get(name):
            overridden[name] = value
        namespace[name] = settings[name] = settings.get(name) if value is None else value
    fresh = bool(namespace.get("fresh", False))
    return Run(notebook, profile, settings, overridden, fresh)


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
