import numpy as np
import pytest

from lrs_utils.tasks import Probe, Question, Suite
from lrs_utils.tasks.judging import (
    best_subspan_em,
    best_subspan_em_of_first_line,
    holds_value,
    judged,
    normalise,
)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("A man, an apple & the U.S.A.", "man apple usa"),
        ("Theatre of a-the", "theatre of athe"),  # punctuation goes first, then whole words only
        ("well-known", "wellknown"),
        ("“Röntgen’s”", "“röntgen’s”"),  # no ASCII punctuation; letters stay as they are
        ("The", ""),
    ],
)
def test_texts_are_normalised_as_for_squad(text, bare):
    assert normalise(text) == bare


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("It was Wilhelm Conrad Röntgen, in 1901.", ["Wilhelm Conrad Röntgen"], True),
        ("It was Wilhelm Conrad Rontgen.", ["Wilhelm Conrad Röntgen"], False),  # accents count
        ("the lord of the rings", ["Lord of Rings"], True),
        ("in the u.s.a", ["USA"], True),
        ("May 18 2018", ["May 18, 2018"], True),
        ("a catalogue", ["cat"], True),  # a sub-span, also inside a word
        ("Robert Hooke", ["Matthias Schleiden", "Robert Hooke"], True),
        ("nobody", ["Matthias Schleiden", "Robert Hooke"], False),
        ("", ["x"], False),
    ],
)
def test_best_subspan_em_of_worked_cases(text, answers, right):
    assert best_subspan_em(text, answers) is right


def test_only_the_first_line_counts_as_published():
    assert best_subspan_em_of_first_line(" Paris, of course\nLondon", ["paris"])
    assert not best_subspan_em_of_first_line(" Paris, of course\nLondon", ["London"])
    assert not best_subspan_em_of_first_line("\nParis", ["Paris"])
    assert best_subspan_em("\nParis", ["Paris"])


def test_a_value_is_found_in_upper_or_lower_case():
    assert holds_value("it is aB-c1.", ["Ab-C1"])
    assert not holds_value("ab c1", ["ab-c1"])


def test_verdicts_have_the_suite_s_shape_and_know_every_accepted_answer():
    questions = (Question("q", "", " AbC", 0), Question("q", "", "abc", 1, also=("xyz",)))
    suite = Suite("s", (Probe("c", questions, 2), Probe("d", questions, 2)))
    texts = [["it is abc.", "ab c"], ["", "say XYZ"]]
    np.testing.assert_array_equal(judged(suite, texts, holds_value), [[True, False], [False, True]])
