"""Question answering over documents, as in Lost in the Middle (2307.03172, Section 2; prompt of the authors' release).

N documents, one of which holds the answer. The authors' files of 10, 20 and 30 documents can't be fetched, so contexts
are built: from the release's own questions with their gold passages ("oracle", NaturalQuestions), or from facts of the
CIA World Factbook ("factbook"), which the package index holds. Distractors are the passages most similar, by BM25, to a
question together with its own passage, that hold none of its answers. They are easier than the authors' retriever's:
such accuracies are not comparable with the paper's.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from lrs_utils.tasks.factbook import factbook_items
from lrs_utils.tasks.files import official_file, read_lines
from lrs_utils.tasks.judging import normalise
from lrs_utils.tasks.kv import checked_positions
from lrs_utils.tasks.passages import Document, Item, Pool
from lrs_utils.tasks.suite import Probe, Question, Suite

_HEAD = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n\n"
)
_SOURCES = ("factbook", "oracle")  # of which contexts are built
_OFFICIAL_POSITIONS = {10: (0, 4, 9), 20: (0, 4, 9, 14, 19), 30: (0, 4, 9, 14, 19, 24, 29)}


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
    for item, rng in pool.draw(n_contexts, seed):
        chosen = [item]
        for other in pool.rank(item):
            if len(chosen) == n_documents:
                break
            candidates = [
                one
                for one in pool.by_document[other]
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
        By default the authors' for 10, 20 or 30 documents, else every one.

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
        for item, _ in pool.draw(n_contexts, seed):
            distractors = (document for document in pool.rank(item) if not item.answered_by(document))
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


def mdqa_probe(documents: Sequence[Document], asked: Mapping[int, Item]) -> Probe:
    """One context in the authors' layout, asked the question of each position in `asked`."""
    results = "\n".join(f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, 1))
    questions = tuple(
        Question(f"Question: {item.question}\nAnswer:", "", f" {item.answers[0]}", position, item.answers[1:])
        for position, item in asked.items()
    )
    return Probe(f"{_HEAD}{results}\n\n", questions, len(documents))


def _pool(source: str, folder: str | Path | None) -> Pool:
    if source not in _SOURCES:
        raise ValueError(f"source is {source!r}; choose one of {', '.join(_SOURCES)}")
    return Pool(factbook_items() if source == "factbook" else _oracle(folder))


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
    for where, question, answers, documents, gold in _records(path):
        if len(gold) != 1:
            raise ValueError(f"{where}: field 'isgold' marks {len(gold)} documents, not one")
        document = documents[gold[0]]
        # nll is taken of the first answer: one that can be read in the passage, not only known
        read = [a for a in answers if document.holds(a)]
        if not read:
            raise ValueError(f"{where}: none of the field 'answers' stands in the gold document")
        if question in items:
            raise ValueError(f"{where}: field 'question' has {question!r} a second time")
        items[question] = Item(question, (*read, *(a for a in answers if a not in read)), document)
    if not items:
        raise ValueError(f"{path} has no records")
    return list(items.values())


def _official(n_documents: int, n_contexts: int, position: int, folder: str | Path | None) -> list[Probe]:
    path = official_file(f"nq-open-{n_documents}_total_documents_gold_at_{position}.jsonl.gz", folder)
    probes: list[Probe] = []
    for where, question, answers, documents, gold in _records(path):
        if len(documents) != n_documents:
            raise ValueError(f"{where}: field 'ctxs' has {len(documents)} documents, not {n_documents}")
        if gold != [position]:
            raise ValueError(f"{where}: field 'isgold' marks {gold or 'no document'}, not [{position}]")
        probes.append(mdqa_probe(documents, {position: Item(question, answers, documents[position])}))
    if not 1 <= n_contexts <= len(probes):
        raise ValueError(f"{path} has {len(probes)} records, n_contexts is {n_contexts}")
    return probes[:n_contexts]


def _records(path: Path) -> Iterator[tuple[str, str, tuple[str, ...], list[Document], list[int]]]:
    """Of each record: where it stands, question, answers, documents, and which of the documents are gold."""
    for where, record in read_lines(path, {"question": str, "answers": list, "ctxs": list}):
        documents = []
        for one in record["ctxs"]:
            if not (isinstance(one, dict) and all(isinstance(one.get(field), str) for field in ("title", "text"))):
                raise ValueError(f"{where}: field 'ctxs' holds something other than a document with 'title' and 'text'")
            documents.append(Document(one["title"], one["text"]))
        if not all(isinstance(answer, str) and answer.strip() for answer in record["answers"]):
            raise ValueError(f"{where}: field 'answers' holds an empty answer or something other than text")
        # the release has answers like "*", of which nothing is left to be looked for: every text would hold them
        answers = tuple(answer.strip() for answer in record["answers"] if normalise(answer))
        if not answers:
            raise ValueError(f"{where}: field 'answers' holds only punctuation and articles")
        gold = [i for i, one in enumerate(record["ctxs"]) if one.get("isgold")]
        yield where, record["question"], answers, documents, gold
