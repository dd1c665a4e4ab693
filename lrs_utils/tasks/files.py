"""Data files: where they come from, and reading them line by line with errors that say where."""

import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrs_utils.models.download import cache_folder, fetch_once

_BASE = "https://raw.githubusercontent.com/nelson-liu/lost-in-the-middle/29b8a6d/"  # MIT
# SHA-256 of its files at this revision
_OFFICIAL = {
    "kv-retrieval-75_keys.jsonl.gz": "eb6d61fc3473349f2b86df76757c6ab659cc929d907d24caf1c69928e03f6203",
    "kv-retrieval-140_keys.jsonl.gz": "66d54aae7e38779da482895ccd538faaf5309f144e54f30dc530a95091581fa1",
    "nq-open-oracle.jsonl.gz": "6a7f72b846f663a133ef952244e5a4e43f06bcf190afe34e8fbe687ce0d1653e",
}


def official_file(name: str, folder: str | Path | None = None) -> Path:
    """A file of the authors' release: from the user's folder, or fetched once into the cache and checked.

    Raises
    ------
    ValueError
        A file whose hash we don't know is not fetched; it can be read from a folder.
    OSError
        The folder lacks the file, or the download broke or brought something else; no half file is left behind.
    """
    if folder is not None:
        path = Path(folder) / name
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {name}; it is in github.com/nelson-liu/lost-in-the-middle")
        return path
    if name not in _OFFICIAL:
        raise ValueError(f"{name} is not fetched: its hash is not known here. Give the folder that has it")
    url = f"{_BASE}{'kv_retrieval_data' if name.startswith('kv') else 'qa_data'}/{name}"
    path = cache_folder() / "lost-in-the-middle" / name
    return fetch_once(path, url, _OFFICIAL[name], f"fetch {url} yourself and give its folder")


def debian_file(package: str, sha256: str, member: str) -> bytes:
    """A file out of a Debian package as a carrier of data: fetched once and checked, never installed.

    Parameters
    ----------
    package : str
        Its place below https://deb.debian.org/debian/pool/main/.
    member : str
        Path in the package.
    """
    url = f"https://deb.debian.org/debian/pool/main/{package}"
    path = cache_folder() / "packages" / url.rpartition("/")[2]
    fetch_once(path, url, sha256, f"fetch {url} yourself and put it into {path.parent}")
    content, at = path.read_bytes(), 8  # an `ar` archive: a signature, then headers of 60 bytes with a file each
    while not content[at:].startswith(b"data.tar.xz"):
        size = int(content[at + 48 : at + 58])
        at += 60 + size + size % 2
    size = int(content[at + 48 : at + 58])
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(content[at + 60 : at + 60 + size]))) as archive:
        file = archive.extractfile(f"./{member}")
        assert file is not None
        return file.read()


def read_lines(path: str | Path, fields: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a JSON-lines file (.jsonl or .jsonl.gz), each with where it stands, for messages.

    Blank lines are passed over, and a byte order mark as some editors write it.

    Parameters
    ----------
    fields : mapping of field to type
        What every record must have; strings and lists may not be empty.

    Raises
    ------
    ValueError
        Names file, line and field.
    """
    path = Path(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    record = _parse(line, where)
                    _check_fields(record, fields, where)
                    yield where, record
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} breaks off after line {number}: {error}; fetch it again") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error}; save the file as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read; each line must be one flat object") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"{where} is not JSON: {reason}; each line must be one whole JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object; each line must be one, {{...}}")
    return record


def _check_fields(record: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    for field, kind in fields.items():
        if field not in record:
            raise ValueError(f"{where} has no field {field!r}")
        if not isinstance(record[field], kind):
            raise ValueError(f"{where}: field {field!r} is {record[field]!r:.60}, not {kind.__name__}")
        if kind in (str, list) and not record[field]:
            raise ValueError(f"{where}: field {field!r} is empty")
