"""What notebook 03 measures beside `score`, on a tiny model and made-up answers."""

from dataclasses import replace

import numpy as np
import pytest
from lost_in_the_middle import (
    Reading,
    begins_with_answer,
    decode_one_by_one,
    describe_curve,
    name_copied,
    pick_questions,
    price_suites,
    read_documents,
    read_suite,
    shorten,
    spread,
    write_answers,
)

from lrs_utils import LayerScaling, Ledger, score, tasks
from lrs_utils.analysis.statistics import Interval, bootstrap_mean
from lrs_utils.tasks.judging import judged


@pytest.fixture(scope="module")
def suite():
    return tasks.kv_retrieval(4, 3, seed=0, keys="short")


def with_answers(lm, suite):
    """The same questions, whose right answer is what the model writes."""
    probes = []
    for probe in suite.probes:
        alone = tasks.Suite(suite.name, (probe,))
        written = decode_one_by_one(lm, alone)[0]
        probes.append(
            replace(probe, questions=tuple(replace(q, answer=w) for q, w in zip(probe.questions, written, strict=True)))
        )
    return tasks.Suite(suite.name, tuple(probes))


def test_a_long_text_keeps_its_first_and_last_lines():
    assert shorten("a\nb\nc\nd\ne", 2, 1) == "a\nb\n[...]\ne"
    assert shorten("a\nb\nc", 2, 1) == "a\nb\nc"


def test_positions_are_spread_from_the_first_to_the_last():
    assert spread(60, 11) == [0, 6, 12, 18, 24, 30, 35, 41, 47, 53, 59]
    assert spread(3, 5) == [0, 1, 2]


def test_examples_are_an_answer_near_an_end_and_a_miss_near_the_middle():
    none, all_right = [False] * 5, [True] * 5
    assert pick_questions(np.array([none, all_right, [False, True, False, False, True]])) == (2, [4, 2])
    assert pick_questions(np.array([none, all_right])) == (0, [0, 2])


def test_verdicts_of_plain_decoding_are_those_of_score(tiny, suite):
    texts = decode_one_by_one(tiny, suite)
    exact = score(tiny, suite, [LayerScaling.identity(tiny.num_layers)]).exact[0]
    assert np.array_equal(judged(suite, texts, begins_with_answer), exact)
    assert not exact.any(), "a random model knows no value"
    said = with_answers(tiny, suite)
    assert judged(said, texts, begins_with_answer).all()


def test_a_value_copied_from_another_pair_is_told_from_the_right_one_and_from_others(suite):
    values = [[q.answer for q in probe.questions] for probe in suite.probes]
    texts = [[v[1] + '",', v[1], "", v[3]] for v in values]
    assert name_copied(suite, texts).tolist() == [[True, False, False, False]] * 3
    cut = [[v[1][:3], v[1][:3], v[0][:1], v[0] + "0"] for v in values]
    assert name_copied(suite, cut).tolist() == [[True, False, False, False]] * 3


def test_a_written_answer_names_the_pair_whose_value_it_is(tiny, suite, monkeypatch):
    values = [q.answer for q in suite.probes[1].questions]
    written = [values[0] + '",\n', values[3] + '"', "wh"]
    asked = []

    def answer(_, opened, *__, **___):
        asked.extend(opened.probes[0].questions)
        return [written]

    monkeypatch.setattr("lost_in_the_middle.generate_answers", answer)
    report = write_answers(tiny, suite, 1, [0, 1, 2]).split("\n\n")
    assert [part.splitlines()[-1].partition(values[0])[2].strip() for part in report[:1]] == ["exact"]
    assert report[1].endswith(f"{values[3]}   wrong: the value of the pair at depth 1.00")
    assert report[2].endswith("wh   wrong")
    assert all(values[n] in part for n, part in enumerate(report))
    assert all(question.prompt.endswith(': "') and not question.answer_prefix for question in asked)


def test_the_edge_is_both_ends_against_what_is_between(suite):
    exact = np.array([[True, False, False, False], [True, False, True, True], [True, False, False, True]])
    reading = Reading(suite, bootstrap_mean(exact), bootstrap_mean(exact), exact)
    assert reading.edge.mean == pytest.approx(np.mean([0.5, 0.5, 1.0]))
    assert reading.edge.low <= reading.edge.mean <= reading.edge.high


def test_a_curve_is_told_by_its_ends_and_middle():
    values = np.array([0.65, 0.2, 0.06, 0.51])
    two = describe_curve(Interval(values, values, values), np.array([0, 9 / 19, 10 / 19, 1]))
    assert "0.20 at depth 0.47" in two, "of two equally near to the middle the earlier"
    assert describe_curve(Interval(values, values, values), np.array([0, 0.25, 0.5, 1])) == (
        "0.65 at depth 0, 0.06 at depth 0.5, 0.51 at depth 1"
    )


def test_a_reading_has_the_rows_of_the_table(tiny, suite):
    ledger = Ledger(":memory:")
    reading = read_suite(tiny, suite, ledger=ledger)
    rows = reading.rows("4 pairs")
    assert list(rows) == ["suite", "depth", "mean", "low", "high", "nll", "contexts"]
    assert rows["nll"].tolist() == score(tiny, suite, [LayerScaling.identity(2)]).nll[0].mean(axis=0).tolist()
    assert len(ledger) == 12


def test_documents_are_judged_by_text_and_by_first_line(tiny, monkeypatch):
    questions = (tasks.Question("capital of France?", "", " Paris", 0), tasks.Question("of Spain?", "", " Madrid", 1))
    documents = tasks.Suite("documents", tuple(tasks.Probe(f"{n} Paris, Madrid", questions, 2) for n in range(2)))
    texts = [["It is Paris.", "\nMadrid"]] * 2
    monkeypatch.setattr("lost_in_the_middle.generate_answers", lambda *_, **__: texts)
    rows = read_documents(tiny, documents, 4).rows("documents")
    assert rows["subspan"].tolist() == [1, 1]
    assert rows["subspan_first_line"].tolist() == [1, 0]


def test_prices_are_of_each_name_once(tiny, suite):
    shorter = tasks.kv_retrieval(2, 2, seed=0, keys="short")
    table = price_suites(tiny, [suite, shorter, suite], repeats=2)
    assert table["suite"].tolist() == ["kv-short-4", "kv-short-2"]
    assert table["questions"].tolist() == [4, 2]
    assert (table["seconds"] > 0).all()
    assert table["tokens"][0] > table["tokens"][1]
