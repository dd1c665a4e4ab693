import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lrs_utils.tasks import capitals, mdqa, mdqa_gold_moved
from lrs_utils.tasks.judging import best_subspan_em
from lrs_utils.tasks.mdqa import mdqa_probe
from lrs_utils.tasks.passages import Document, Item

OFFICIAL = Path(__file__).parent.parent.parent / "shared" / "data" / "lost-in-the-middle"
ITEMS = {"factbook": 900, "oracle": 2600}
PROMPT = """Write a high-quality answer for the given question using only the provided search results \
(some of which might be irrelevant).

Document [1](Title: A) first text
Document [2](Title: B) second text

Question: who is it
Answer:"""


def documents_of(probe):
    _, *documents = re.split(r"\nDocument \[\d+\]\(Title: ", probe.context)
    return [document.rstrip("\n").partition(") ") for document in documents]


def test_the_prompt_is_the_authors_byte_for_byte():
    documents = [Document("A", "first text"), Document("B", "second text")]
    probe = mdqa_probe(documents, {1: Item("who is it", ("Second", "the 2nd"), documents[1])})
    [question] = probe.questions
    assert probe.context + question.prompt == PROMPT
    assert (question.answer_prefix, question.answer, question.also) == ("", " Second", ("the 2nd",))
    assert question.accepted == ("Second", "the 2nd")
    assert (question.position, probe.n_items) == (1, 2)


@pytest.fixture(params=["factbook", "oracle"])
def source(request):
    """Keyword arguments of either source of questions."""
    if request.param == "factbook":
        return {"source": "factbook"}
    if not OFFICIAL.exists():
        pytest.skip("the official file is not at hand")
    return {"source": "oracle", "folder": OFFICIAL}


def test_every_document_answers_its_own_question_and_no_other(source):
    suite = mdqa(10, 40, seed=1, **source)
    np.testing.assert_allclose(suite.depths, np.arange(10) / 9)
    for probe in suite.probes:
        documents = documents_of(probe)
        assert len({title for title, _, _ in documents}) == 10
        for question in probe.questions:
            holding = [best_subspan_em(f"{title} {text}", question.accepted) for title, _, text in documents]
            assert np.flatnonzero(holding).tolist() == [question.position]


def test_the_gold_document_moves_and_nothing_else_does(source):
    first, middle, last = mdqa_gold_moved(10, 20, seed=1, **source)
    assert [s.depths.tolist() for s in (first, middle, last)] == [[0.0], [4 / 9], [1.0]]
    for suite, position in ((first, 0), (middle, 4), (last, 9)):
        for probe, at_first in zip(suite.probes, first.probes, strict=True):
            documents, others = documents_of(probe), documents_of(at_first)
            assert documents.pop(position) == others.pop(0)
            assert documents == others
            [question] = probe.questions
            assert question.prompt == at_first.questions[0].prompt
            assert not any(best_subspan_em(f"{title} {text}", question.accepted) for title, _, text in documents)


def test_five_hundred_contexts_do_not_repeat(source):
    suite = mdqa(10, 500, **source)
    assert len({probe.context for probe in suite.probes}) == 500
    assert len({key for probe in suite.probes for key in probe.keys}) == 5000
    # nor do their documents: a context has few in common with another
    titles = Counter(title for probe in suite.probes for title, _, _ in documents_of(probe))
    assert max(titles.values()) < 0.25 * 500
    questions = {question.prompt for probe in suite.probes for question in probe.questions}
    assert len(questions) > 0.75 * ITEMS[source["source"]]
    moved = mdqa_gold_moved(10, 500, positions=[3], **source)[0]
    assert len({probe.questions[0].prompt for probe in moved.probes}) == 500
    assert len({frozenset(documents_of(probe)) for probe in moved.probes}) > 200  # a country's questions share theirs


def test_suites_are_deterministic_and_longer_ones_extend_them(source):
    suite = mdqa(10, 5, seed=3, positions=[9, 0], **source)
    assert suite.depths.tolist() == [1.0, 0.0]
    assert mdqa(**suite.recipe, folder=source.get("folder")) == suite
    assert mdqa(10, 8, seed=3, positions=[9, 0], **source).probes[:5] == suite.probes
    assert mdqa(10, 5, seed=4, positions=[9, 0], **source).probes != suite.probes


def test_distractors_are_those_most_alike_to_the_question_in_decreasing_order(source):
    [suite] = mdqa_gold_moved(20, 200, positions=[0], **source)
    [fewer] = mdqa_gold_moved(10, 200, positions=[0], **source)
    shared = np.zeros((200, 19))
    for row, (probe, short) in enumerate(zip(suite.probes, fewer.probes, strict=True)):
        documents = documents_of(probe)
        assert documents_of(short) == documents[:10]
        own, _, text = documents[0]
        words = {word for word in f"{own} {text}".lower().split() if len(word) > 4}
        shared[row] = [len(words & set(f"{title} {text}".lower().split())) for title, _, text in documents[1:]]
    assert shared[:, :3].mean() > shared[:, -3:].mean()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"source is 'wikipedia'; choose one of factbook, oracle$"):
        mdqa(source="wikipedia")
    with pytest.raises(ValueError, match="source is 'offical'; choose one of factbook, oracle, official"):
        mdqa_gold_moved(source="offical")
    with pytest.raises(ValueError, match="has no contexts or no questions"):
        mdqa(positions=[])
    with pytest.raises(ValueError, match=r"position 10 is outside the 10 documents \(0 to 9\)"):
        mdqa(positions=[10])
    with pytest.raises(ValueError, match="n_contexts is 5000; there are questions for 1 to"):
        mdqa(n_contexts=5000)
    with pytest.raises(ValueError, match=r"n_documents is 400, but only .* ask for fewer"):
        mdqa(400, 1)


def official_folder(tmp_path, *records):
    with gzip.open(tmp_path / "nq-open-2_total_documents_gold_at_1.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, records)) + "\n")
    return tmp_path


def good(**changes):
    documents = [
        {"title": "A", "text": "first text", "isgold": False},
        {"title": "B", "text": "second text", "isgold": True},
    ]
    return {"question": "who is it", "answers": ["Second"], "ctxs": documents} | changes


def test_official_files_are_read_as_they_are(tmp_path):
    folder = official_folder(tmp_path, good(), good(question="what is it"))
    [suite] = mdqa_gold_moved(2, 2, source="official", positions=[1], folder=folder)
    assert suite.probes[0].context + suite.probes[0].questions[0].prompt == PROMPT
    assert suite.probes[1].questions[0].prompt == "Question: what is it\nAnswer:"
    with pytest.raises(ValueError, match=r"gold_at_1\.jsonl\.gz has 2 records, n_contexts is 3"):
        mdqa_gold_moved(2, 3, source="official", positions=[1], folder=folder)
    with pytest.raises(FileNotFoundError, match=r"has no nq-open-10_total_documents_gold_at_0\.jsonl\.gz"):
        mdqa_gold_moved(10, 1, source="official", folder=folder)
    with pytest.raises(ValueError, match="is not fetched: its hash is not known here"):
        mdqa_gold_moved(10, 1, source="official")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": []}, "field 'answers' is empty"),
        ({"answers": ["x", " "]}, "field 'answers' holds an empty answer"),
        ({"answers": [3]}, "field 'answers' holds an empty answer or something other than text"),
        ({"ctxs": [{"title": "A"}]}, "field 'ctxs' holds something other than a document"),
        ({"ctxs": good()["ctxs"][:1]}, "field 'ctxs' has 1 documents, not 2"),
        ({"ctxs": good()["ctxs"][::-1]}, r"field 'isgold' marks \[0\], not \[1\]"),
        ({"ctxs": [{"title": "A", "text": "t"}] * 2}, "field 'isgold' marks no document, not"),
        ({"question": ""}, "field 'question' is empty"),
        ({"answers": ["The", "*"]}, "field 'answers' holds only punctuation and articles"),
    ],
)
def test_a_bad_record_is_named_with_file_line_and_field(tmp_path, changes, message):
    folder = official_folder(tmp_path, good(), good(**changes))
    with pytest.raises(ValueError, match=rf"gold_at_1\.jsonl\.gz, line 2.*{message}"):
        mdqa_gold_moved(2, 2, source="official", positions=[1], folder=folder)


def oracle_folder(tmp_path, *records):
    with gzip.open(tmp_path / "nq-open-oracle.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def asked(number, *answers, text="it is blue or red", gold=True):
    document = {"title": f"T{number}", "text": f"{text} {number}", "isgold": gold}
    return {"question": f"question {number}", "answers": list(answers), "ctxs": [document]}


def test_nll_is_of_an_answer_that_stands_in_the_passage_and_nothing_empty_is_looked_for(tmp_path):
    folder = oracle_folder(tmp_path, asked(1, "green", "*", "red"), asked(2, "2 2", text="2"))
    [suite] = mdqa_gold_moved(1, 2, source="oracle", positions=[0], folder=folder)
    questions = {probe.questions[0].prompt[:20]: probe.questions[0].accepted for probe in suite.probes}
    assert questions == {"Question: question 1": ("red", "green"), "Question: question 2": ("2 2",)}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no records"),
        ([asked(1, "red"), asked(2, "green")], "line 2: none of the field 'answers' stands in the gold document"),
        ([asked(1, "red"), asked(1, "blue")], "line 2: field 'question' has 'question 1' a second time"),
        ([asked(1, "red", gold=False)], "line 1: field 'isgold' marks 0 documents, not one"),
    ],
)
def test_a_bad_oracle_file_is_named(tmp_path, records, message):
    with pytest.raises(ValueError, match=rf"nq-open-oracle\.jsonl\.gz.*{message}"):
        mdqa(1, 1, source="oracle", folder=oracle_folder(tmp_path, *records))


def test_capitals_are_told_from_other_capitals():
    suite = capitals(30, seed=1)
    assert suite.probes == capitals(40, seed=1).probes[:30]
    assert suite != capitals(30, seed=2)
    for probe in suite.probes:
        options = [question.answer for question in probe.questions]
        assert len(set(options)) == 4
        assert probe.context.startswith("The capital of ")
    right = {probe.context: probe.questions[0].answer for probe in capitals(198).probes}
    assert right["The capital of Estonia is"] == " Tallinn"
    with pytest.raises(ValueError, match="there are 198 capitals for n_contexts 199"):
        capitals(199)
