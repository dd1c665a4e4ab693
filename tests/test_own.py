import gzip
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from lrs_utils import tasks
from lrs_utils.tasks import SHOP, Question, from_jsonl, own

ROOT = Path(__file__).parent.parent
ASKED = {"question": "How much was paid for rye bread?\nAnswer:", "answer": "8.40", "position": 1}
MANY = {"context": "salt 1.29\nrye bread 8.40\nplum jam 3.65", "questions": [ASKED], "n_items": 3}
SINGLE = {"prompt_before": "salt 1.29\nrye bread 8.40\n\nWhat is rye bread?", "answer": "8.40", "depth": 0.4}


@pytest.fixture
def written(tmp_path):
    """Writes records, or lines as they are, and gives the file."""

    def write(*records, name="mine.jsonl"):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return tmp_path / name

    return write


def refusal(path):
    with pytest.raises(ValueError, match="mine") as error:
        from_jsonl(path)
    return str(error.value).replace(f"{path.parent}/", "")


def test_a_line_becomes_a_context_with_its_questions(written):
    second = {"question": "And the jam, in euros?", "answer": ["3.65", " 3,65 "], "position": 2}
    path = written(MANY | {"questions": [ASKED, second], "id": 7})
    suite = from_jsonl(path)
    [probe] = suite.probes
    assert (suite.name, suite.recipe) == ("mine", {"path": str(path)})
    assert (probe.context, probe.n_items) == (MANY["context"] + "\n\n", 3)
    assert probe.questions == (
        Question("How much was paid for rye bread?\nAnswer:", "", " 8.40", 1),
        Question("And the jam, in euros?", "", " 3.65", 2, ("3,65",)),
    )
    assert probe.questions[1].accepted == ("3.65", "3,65")
    assert suite.depths.tolist() == [0.5, 1]
    assert from_jsonl(**suite.recipe) == suite


def test_a_single_question_stands_at_its_depth(written):
    [probe] = from_jsonl(written(SINGLE)).probes
    assert probe.context == SINGLE["prompt_before"]
    assert probe.questions == (Question("", "", " 8.40", 400),)
    assert probe.n_items == 1001
    ends = from_jsonl(written(SINGLE | {"depth": 0}, SINGLE | {"depth": 1}, SINGLE | {"depth": 0.66666}))
    np.testing.assert_allclose(ends.depths[:, 0], [0, 1, 0.667])


def test_both_forms_and_differing_numbers_of_questions_stand_in_one_file(written):
    suite = from_jsonl(written(MANY | {"questions": [ASKED, ASKED | {"position": 2}]}, SINGLE))
    np.testing.assert_array_equal(suite.depths, [[0.5, 1], [0.4, np.nan]])


@pytest.mark.parametrize(
    ("context", "read"),
    [("end", "end\n\n"), ("end ", "end \n\n"), ("end\n", "end\n"), ("end\n\n\n", "end\n\n\n"), ("end\r\n", "end\r\n")],
)
def test_a_blank_line_follows_the_context_unless_it_ends_with_a_line_break(written, context, read):
    assert from_jsonl(written(MANY | {"context": context})).probes[0].context == read


@pytest.mark.parametrize(
    ("question", "answer", "prompt", "asked"),
    [
        ("Answer:", "8.40", "Answer:", " 8.40"),
        ("Answer: ", "8.40", "Answer:", " 8.40"),
        ("Answer:  ", " 8.40\n", "Answer:", "  8.40"),
        ("Answer:", "\n8.40", "Answer:", "\n8.40"),
        ("Answer:\n\n", "8.40", "Answer:", "\n\n8.40"),
        ("Answer: \n", "8.40", "Answer:", " \n8.40"),
        ("Answer:\n", "8.40", "Answer:\n", "8.40"),
        ('Answer: "', "8.40", 'Answer: "', "8.40"),
        ('{"price":"', "8.40", '{"price":"', "8.40"),
        ("Answer: (", "8.40", "Answer: (", "8.40"),
        ("Answer: “", "8.40", "Answer: “", "8.40"),
        ('Answer: " ', "8.40", 'Answer: "', " 8.40"),
        ("Answer: (", " 8.40", "Answer: (", " 8.40"),
        ('The price of "rye bread"', "8.40", 'The price of "rye bread"', " 8.40"),
        ("The customers'", "8.40", "The customers'", " 8.40"),
        ("The price (of bread)", "8.40", "The price (of bread)", " 8.40"),
        ("'", "8.40", "'", "8.40"),
    ],
)
def test_an_answer_begins_at_a_token_boundary(written, question, answer, prompt, asked):
    many = written(MANY | {"questions": [ASKED | {"question": question, "answer": answer}]})
    assert from_jsonl(many).probes[0].questions[0] == Question(prompt, "", asked, 1)
    [probe] = from_jsonl(written(SINGLE | {"prompt_before": question, "answer": answer})).probes
    assert (probe.context, probe.questions[0].answer) == (prompt, asked)


# how GPT-2 and SmolLM2, and how Llama-3 and Qwen cut a text into words; tokens are parts of words
CUT_BY_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CUT_BY_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("cut", [CUT_BY_GPT2, CUT_BY_QWEN], ids=["gpt2", "qwen"])
@pytest.mark.parametrize(
    "question", ["Answer:", "Answer: ", "Answer:  ", "Answer:\n", "Answer", 'Answer: "', "Answer is"]
)
@pytest.mark.parametrize("answer", ["8.40", "bread", "(bread)"])
def test_no_word_of_any_tokenizer_reaches_from_question_into_answer(written, cut, question, answer):
    [probe] = from_jsonl(written(SINGLE | {"prompt_before": question, "answer": answer})).probes
    cut = Split(Regex(cut), "isolated")
    before, whole = (
        [word for word, _ in cut.pre_tokenize_str(text)]
        for text in (probe.context, probe.context + probe.questions[0].answer)
    )
    if (question[-1], answer) != ('"', "(bread)"):  # two signs side by side are one word to all
        assert whole[: len(before)] == before


QUESTION = {"question": "q", "answer": "a", "position": 0}


def many(**changed):
    return MANY | {"questions": [ASKED, QUESTION | changed]}


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        # missing
        (without(MANY, "context"), " has no field 'context'; give the text that is asked about, a string"),
        (without(MANY, "questions"), ' has no field \'questions\'; give a list of {"question": ..., "answer": ..., '),
        (without(MANY, "n_items"), " has no field 'n_items'; give how many items the context has, a whole number from"),
        (
            MANY | {"questions": [{}]},
            " has no field 'questions[0].position'; give which item holds the answer, a whole",
        ),
        (
            MANY | {"questions": [without(QUESTION, "question")]},
            " has no field 'questions[0].question'; give the text that stands between context and answer, a string",
        ),
        (
            MANY | {"questions": [without(QUESTION, "answer")]},
            " has no field 'questions[0].answer'; give what the model should write, a string, or a list of strings",
        ),
        (without(SINGLE, "prompt_before"), " has no field 'prompt_before'; give all that stands before the answer"),
        (without(SINGLE, "answer"), " has no field 'answer'; give what the model should write"),
        (
            without(SINGLE, "depth"),
            " has no field 'depth'; give where in the prompt the answer stands, a number from 0",
        ),
        ({"text": "c"}, " has no field 'context' and no field 'prompt_before'; give one of the two"),
        # of another type
        (MANY | {"context": 5}, ": field 'context' is 5; give the text that is asked about, a string"),
        (MANY | {"questions": {"question": "q"}}, ": field 'questions' is {'question': 'q'}; give a list of"),
        (MANY | {"questions": [ASKED, "q"]}, ": field 'questions[1]' is 'q'; give a list of"),
        (MANY | {"n_items": "3"}, ": field 'n_items' is '3'; give how many items"),
        (MANY | {"n_items": True}, ": field 'n_items' is True; give how many items"),
        (MANY | {"n_items": 0}, ": field 'n_items' is 0; give how many items the context has, a whole number from 1"),
        (many(question=None), ": field 'questions[1].question' is None; give the text that stands between"),
        (many(answer=8.4), ": field 'questions[1].answer' is 8.4; give what the model should write"),
        (many(answer=["8.40", 8.4]), ": field 'questions[1].answer[1]' is 8.4; give what the model should write"),
        (many(position="1"), ": field 'questions[1].position' is '1'; give which item holds the answer"),
        (many(position=1.0), ": field 'questions[1].position' is 1.0; give which item holds the answer"),
        (many(position=True), ": field 'questions[1].position' is True; give which item holds the answer"),
        (SINGLE | {"prompt_before": ["c"]}, ": field 'prompt_before' is ['c']; give all that stands before"),
        (SINGLE | {"depth": "0.4"}, ": field 'depth' is '0.4'; give where in the prompt"),
        (SINGLE | {"depth": False}, ": field 'depth' is False; give where in the prompt"),
        # empty
        (MANY | {"context": " \n"}, ": field 'context' is empty; give the text that is asked about"),
        (MANY | {"questions": []}, ": field 'questions' is empty; give a list of"),
        (many(question=" "), ": field 'questions[1].question' is empty; give the text that stands between"),
        (many(answer=""), ": field 'questions[1].answer' is empty; give what the model should write"),
        (many(answer=[]), ": field 'questions[1].answer' is empty; give what the model should write"),
        (many(answer=["8.40", " "]), ": field 'questions[1].answer[1]' is ' '; give what the model should write"),
        (SINGLE | {"prompt_before": ""}, ": field 'prompt_before' is empty; give all that stands before"),
        (SINGLE | {"answer": " "}, ": field 'answer' is empty; give what the model should write"),
        # outside
        (many(position=3), ": field 'questions[1].position' is 3, outside 0 to 2; count the 3 items from 0, or mend n"),
        (many(position=-1), ": field 'questions[1].position' is -1, outside 0 to 2; count the 3 items from 0"),
        (
            SINGLE | {"depth": 1.01},
            ": field 'depth' is 1.01; give where in the prompt the answer stands, a number from",
        ),
        (SINGLE | {"depth": -0.1}, ": field 'depth' is -0.1; give where in the prompt the answer stands"),
        (SINGLE | {"depth": float("nan")}, ": field 'depth' is nan; give where in the prompt the answer stands"),
        # two forms
        (MANY | {"depth": 0.4}, " has field 'context' beside 'depth'; a line has either context, questions, n_items"),
        (MANY | SINGLE, " has field 'context' beside 'prompt_before'; a line has either context, questions, n_items"),
        (MANY | {"answer": "a"}, " has field 'context' beside 'answer'; a line has either context, questions, n_items"),
        # no record
        ([1], " is no JSON object; each line must be one, {...}"),
        ('{"context": ', " is not JSON: Expecting value at character 12; each line must be one whole JSON"),
        (SINGLE | {"answer": "\ud83d"}, " holds half a character, '\\ud83d'; delete it"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_field_and_mend(written, record, message):
    good = SINGLE | {"depth": 0.1}
    assert refusal(written(good, record)).startswith(f"mine.jsonl, line 2{message}")


def test_a_line_that_comes_twice_is_refused_with_both_places(written):
    other = SINGLE | {"id": "the same but for what is not looked at"}
    message = refusal(written(MANY, SINGLE, other))
    assert message == "mine.jsonl, line 3 has the same content as mine.jsonl, line 2; delete one of the two"


def test_a_file_without_a_line_or_not_in_utf_8_is_refused(written, tmp_path):
    for lines in ((), ("", " ")):
        assert refusal(written(*lines)).startswith("mine.jsonl is empty; write one JSON object a line")
    (tmp_path / "mine.jsonl").write_bytes(json.dumps(SINGLE).encode() + b'\n{"context": "caf\xe9"}\n')
    message = refusal(tmp_path / "mine.jsonl")
    assert message.startswith("mine.jsonl, line 2 is not UTF-8")
    assert message.endswith("save the file as UTF-8")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        from_jsonl(tmp_path / "none.jsonl")


def test_blank_lines_and_a_byte_order_mark_are_passed_over(written, tmp_path):
    plain = from_jsonl(written(MANY, SINGLE))
    path = written(MANY, "", SINGLE, "")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert from_jsonl(path) == plain
    assert refusal(written(MANY, "", "{")).startswith("mine.jsonl, line 3 is not JSON")


def test_a_compressed_file_is_the_same_suite(written):
    path = written(MANY, SINGLE)
    compressed = path.with_name("mine.jsonl.gz")
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert from_jsonl(compressed) == from_jsonl(path)
    compressed.write_bytes(compressed.read_bytes()[:-20])
    assert "mine.jsonl.gz breaks off after line" in refusal(compressed)


@pytest.fixture(scope="module")
def shop():
    return from_jsonl(SHOP)


def test_the_example_asks_differing_numbers_of_questions_at_depths_of_all_kinds(shop):
    assert (shop.name, len(shop.probes), shop.n_questions) == ("shop", 40, 8)
    assert set(shop.asked.sum(axis=1).tolist()) == {4, 5, 6, 7, 8}
    assert {probe.n_items for probe in shop.probes} <= set(range(25, 41))
    assert min(np.histogram(shop.depths[shop.asked], 5, (0, 1))[0]) >= 30
    assert [len(part.probes) for part in shop.parts(20, 10, 10, seed=0)] == [20, 10, 10]
    assert SHOP.stat().st_size < 300_000


def test_every_answer_of_the_example_stands_in_its_line_and_no_other_line_is_meant(shop):
    for probe in shop.probes:
        lines = probe.context.strip().split("\n")[2:]
        assert len(lines) == probe.n_items
        for question in probe.questions:
            asked, _ = question.prompt.removeprefix("Question: ").split("\nAnswer:")
            [key] = re.findall(r"(?:sale at|sold at|sale of|paid for) (.*?)(?: get)?\?", asked)
            meant = [line for line in lines if re.search(rf"(?<![\w:]){re.escape(key)}(?!\w)", line)]
            assert meant == [lines[question.position]]
            for answer in question.accepted:
                assert answer in lines[question.position]


def test_the_example_is_what_its_script_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_shop_register", ROOT / "tools" / "make_shop_register.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.written(tmp_path / "shop.jsonl")
    assert (tmp_path / "shop.jsonl").read_bytes() == SHOP.read_bytes()
    script.written(tmp_path / "less.jsonl", n_days=3)
    assert SHOP.read_bytes().startswith((tmp_path / "less.jsonl").read_bytes())


def test_the_format_is_documented_field_by_field():
    text = (SHOP.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{field}`" in text for field in own._FIELDS)
    assert tasks.SHOP == SHOP


def test_a_line_nested_too_deeply_is_refused_with_its_number(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep.jsonl, line 1 is nested too deeply"):
        tasks.from_jsonl(path)
