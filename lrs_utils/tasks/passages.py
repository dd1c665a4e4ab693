"""Questions with the passage that answers each, and which other passages are most similar to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import bm25s
import numpy as np

from lrs_utils.tasks.judging import normalise

_normalise = cache(normalise)  # passages are looked through again and again


@dataclass(frozen=True)
class Document:
    """A passage as it stands in a context."""

    title: str
    text: str

    def holds(self, answer: str) -> bool:
        """Whether an answer stands in it (`best_subspan_em`)."""
        return _normalise(answer) in _normalise(f"{self.title} {self.text}")


@dataclass(frozen=True)
class Item:
    """A question, its accepted answers (the first is the one that nll is taken of), and the passage that holds them."""

    question: str
    answers: tuple[str, ...]
    gold: Document

    def answered_by(self, document: Document) -> bool:
        """Whether an accepted answer stands in a document."""
        return any(map(document.holds, self.answers))


class Pool:
    """Items with the passages that may stand beside theirs, ranked by BM25."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.by_document: dict[Document, list[Item]] = {}  # the questions that each passage answers
        for item in items:
            self.by_document.setdefault(item.gold, []).append(item)
        self._documents = list(self.by_document)
        self._index = bm25s.BM25(backend="numpy")
        texts = [f"{document.title} {document.text}" for document in self._documents]
        self._index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def draw(self, n_contexts: int, seed: int) -> Iterator[tuple[Item, np.random.Generator]]:
        """The first items of a random order of all, each with its own source of randomness."""
        if not 1 <= n_contexts <= len(self.items):
            raise ValueError(f"n_contexts is {n_contexts}; there are questions for 1 to {len(self.items)}")
        order = np.random.default_rng([seed, 3]).permutation(len(self.items))
        for context, i in enumerate(order[:n_contexts]):
            yield self.items[i], np.random.default_rng([seed, context, 3])

    def rank(self, item: Item) -> Iterator[Document]:
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
