"""Data files: where they come from, and reading them line by line with errors that say where."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrs_utils.models.download import web_file

# nelson-liu/lost-in-the-middle, MIT; SHA-256 of the files at this revision
_REVISION = "29b8a6d"
_BASE = f"https://raw.githubusercontent.com/nelson-liu/lost-in-the-middle/{_REVISION}/"
_OFFICIAL = {
    "kv-retrieval-75_keys.jsonl.gz": (
        "kv_retrieval_data",
        "eb6d61fc3473349f2b86df76757c6ab659cc929d907d24caf1c69928e03f6203",
    ),
    "kv-retrieval-140_keys.jsonl.gz": (
        "kv_retrieval_data",
        "66d54aae7e38779da482895ccd538faaf5309f144e54f30dc530a95091581fa1",
    ),
    "nq-open-oracle.jsonl.gz": (
        "qa_data",
        "6a7f72b846f663a133ef952244e5a4e43f06bcf190afe34e8fbe687ce0d1653e",
    ),
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
    place, sha256 = _OFFICIAL[name]
    return web_file(f"{_BASE}{place}/{name}", sha256, "lost-in-the-middle")


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
        lines = enumerate(file, 1)
        number = 0
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} breaks off after line {number}: {error}; fetch it again") from error
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8: {error}; save the file as UTF-8") from error
            except RecursionError as error:
                raise ValueError(
                    f"{where} is nested too deeply to be read; each line must be one flat object"
                ) from error
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at character {error.pos + 1}"
                raise ValueError(f"{where} is not JSON: {reason}; each line must be one whole JSON object") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is no JSON object; each line must be one, {{...}}")
            for field, kind in fields.items():
                if field not in record:
                    raise ValueError(f"{where} has no field {field!r}")
                if not isinstance(record[field], kind):
                    raise ValueError(f"{where}: field {field!r} is {record[field]!r:.60}, not {kind.__name__}")
                if kind in (str, list) and not record[field]:
                    raise ValueError(f"{where}: field {field!r} is empty")
            yield where, record
