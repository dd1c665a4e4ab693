from types import SimpleNamespace

import asking
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lrs_utils import LayerScaling, tasks
from lrs_utils.tasks import Probe, Question, Suite


def suite() -> Suite:
    questions = tuple(Question(f"\nNumber {i} is", ' "', f"word{i}", i) for i in range(6))
    return Suite("numbers", tuple(Probe(f"context {c}", questions, 6) for c in range(3)))


def test_the_first_context_with_enough_wrong_answers_is_chosen_and_those_nearest_to_its_middle():
    exact = np.ones((3, 6), bool)
    exact[0, 0] = exact[1, [0, 2, 4, 5]] = exact[2, [1, 2, 3]] = False
    probe, questions = asking.choose_missed(suite(), exact)
    assert probe.context == "context 1"
    assert sorted(q.position for q in questions) == [2, 4, 5]


def test_where_all_is_right_the_first_question_is_shown():
    probe, questions = asking.choose_missed(suite(), np.ones((3, 6), bool))
    assert (probe.context, [q.position for q in questions]) == ("context 0", [0])


def test_answers_stand_beside_the_right_ones(tiny):
    made = tasks.kv_retrieval(3, 1, seed=0, keys="short")
    probe, questions = asking.choose_missed(made, np.zeros((1, 3), bool), most=2)
    asked = asking.ask_freely(probe, questions)
    assert all(q.answer_prefix == "" and q.prompt.endswith('"') for q in asked.probes[0].questions)
    table = asking.tabulate_answers(tiny, asked, LayerScaling.identity(tiny.num_layers), tokens=3, ledger=None)
    assert [*table.columns] == ["question", "right answer", "the model writes", "verdict"]
    assert [*table["right answer"]] == [q.answer.strip() for q in questions]
    right = [text.startswith(q.accepted) for q, text in zip(questions, table["the model writes"], strict=True)]
    assert [*table["verdict"]] == ["right" if is_right else "wrong" for is_right in right]


def found_with(scaling, *fifths):
    rows = [("accuracy", 0.15, 0.94), ("first fifth", 0.3, 0.9), ("middle fifth", 0.1, 0.93), ("last fifth", 0.1, 0.95)]
    kept = [row for row in rows if row[0] in ("accuracy", *fifths)]
    table = pd.DataFrame(kept, columns=["measure", "no scaling", "found"]).assign(task="mine")
    judged = SimpleNamespace(tasks=[SimpleNamespace(name="mine")])
    row = {"no scaling": 0.15}
    return SimpleNamespace(table=table, judged=judged, scaling=scaling, row=lambda task, measure: row)


def test_the_sentence_by_depth_holds_for_any_data_and_for_no_scaling():
    some, none = LayerScaling.uniform(1.1, 2), LayerScaling.identity(2)
    whole = asking.say_by_depth(found_with(some, "first fifth", "middle fifth", "last fifth"))
    assert whole == (
        "By depth of the answer in the context, accuracy goes from 30 to 90 % in the first fifth, "
        "from 10 to 93 % in the middle fifth and from 10 to 95 % in the last fifth."
    )
    assert "goes from 10 to 93 % in the middle fifth." in asking.say_by_depth(found_with(some, "middle fifth"))
    assert asking.say_by_depth(found_with(some)) == asking.say_by_depth(found_with(none, "middle fifth"))
    assert asking.say_by_depth(found_with(none)) == "With no scaling the model answers 15 % of the held-out questions."


def test_accuracy_stands_above_the_numbers():
    figure, axes = plt.subplots(1, 3, layout="constrained")
    figure.colorbar(axes[1].imshow([[0, 1]]), ax=axes[1])
    asking.stack_panels(figure)
    figure.canvas.draw()
    top, *maps = (ax.get_position() for ax in axes)
    assert all(top.y0 > below.y1 for below in maps)
    assert maps[0].x1 < maps[1].x0
    plt.close(figure)
