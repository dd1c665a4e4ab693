"""Your own contexts, questions and answers, from a JSON-lines file (format: lrs_utils/tasks/data/README.md)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrs_utils.tasks.files import read_lines
from lrs_utils.tasks.suite import Probe, Question, Suite

# an example file, 40 made-up days of a small shop's register; `tools/make_shop_register.py` writes it
SHOP = Path(__file__).parent / "data" / "shop.jsonl"

_MANY, _SINGLE = ("context", "questions", "n_items"), ("prompt_before", "depth")
_FIELDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "context": (str, "the text that is asked about, a string"),
    "questions": (list, 'a list of {"question": ..., "answer": ..., "position": ...}'),
    "n_items": (int, "how many items the context has, a whole number from 1"),
    "question": (str, "the text that stands between context and answer, a string"),
    "answer": ((str, list), "what the model should write, a string, or a list of strings that are all right"),
    "position": (int, "which item holds the answer, a whole number counted from 0"),
    "prompt_before": (str, "all that stands before the answer, a string"),
    "depth": ((int, float), "where in the prompt the answer stands, a number from 0 (beginning) to 1 (end)"),
}
_STEPS = 1000  # a depth is kept to this part, as a position
# a straight quote opens what follows where nothing, white space or such a sign stands before it
_OPENING = re.compile(r"""(?:[(\[{<“‘«„‹]|(?:^|[\s(\[{<=:,])["'`])\Z""")


def from_jsonl(path: str | Path) -> Suite:
    """A suite of your own, a context a line. Lines may ask at different depths, and different numbers of questions.

    A line is one of

        {"context": "...", "questions": [{"question": "...", "answer": "...", "position": 3}, ...], "n_items": 20}
        {"prompt_before": "...", "answer": ["first", "also right"], "depth": 0.4}

    The model reads context, a blank line (none where the context ends with a line break), question. It should go on
    with the answer, the first of several. Answers begin where tokens do (`_divided`). Other fields are ignored.

    Parameters
    ----------
    path : str or path
        UTF-8, .jsonl or .jsonl.gz. The suite is named after it.

    Raises
    ------
    ValueError
        Names file, line, field and the fix: a field that is missing, empty or of another type, a position or depth
        that is outside, both forms in one line, a line that comes twice, a file that is empty, no JSON or not UTF-8.
    """
    path = Path(path)
    found: dict[Probe, str] = {}
    for where, record in read_lines(path, {}):
        probe = _probe(where, record)
        try:
            _ = probe.keys
        except UnicodeEncodeError as error:  # JSON can escape half of a pair of code units, which is no text
            raise ValueError(f"{where} holds half a character, {error.object[error.start]!r}; delete it") from error
        if probe in found:
            raise ValueError(f"{where} has the same content as {found[probe]}; delete one of the two")
        found[probe] = where
    if not found:
        raise ValueError(f"{path} is empty; write one JSON object a line, such as those in {SHOP.parent / 'README.md'}")
    return Suite(Path(path.name.removesuffix(".gz")).stem, tuple(found), {"path": str(path)})


def _probe(where: str, record: Mapping[str, Any]) -> Probe:
    """The context of a line, in either form."""
    many, single = ([name for name in names if name in record] for names in (_MANY, _SINGLE))
    if many and (single or "answer" in record):
        other = single[0] if single else "answer"
        raise ValueError(
            f"{where} has field {many[0]!r} beside {other!r}; a line has either {', '.join(_MANY)} (answers "
            "stand in its questions) or prompt_before, answer, depth"
        )
    if many:
        return _of_many(where, record)
    if not single and "answer" not in record:
        raise ValueError(f"{where} has no field 'context' and no field 'prompt_before'; give one of the two")
    return _of_single(where, record)


def _of_many(where: str, record: Mapping[str, Any]) -> Probe:
    context, n_items = _given(where, record, "context"), _given(where, record, "n_items")
    if n_items < 1:
        raise _refused(where, "n_items", n_items, "n_items")
    questions = []
    for index, asked in enumerate(_given(where, record, "questions")):
        place = f"questions[{index}]."
        if not isinstance(asked, dict):
            raise _refused(where, f"questions[{index}]", asked, "questions")
        position = _given(where, asked, "position", place)
        if not 0 <= position < n_items:
            raise ValueError(
                f"{where}: field '{place}position' is {position}, outside 0 to {n_items - 1}; count the {n_items} "
                "items from 0, or mend n_items"
            )
        answer, *also = _answers(where, asked, place)
        prompt, answer = _divided(_given(where, asked, "question", place), answer)
        questions.append(Question(prompt, "", answer, position, tuple(also)))
    return Probe(context if context.endswith("\n") else f"{context}\n\n", tuple(questions), n_items)


def _of_single(where: str, record: Mapping[str, Any]) -> Probe:
    before, depth = _given(where, record, "prompt_before"), _given(where, record, "depth")
    if not 0 <= depth <= 1:
        raise _refused(where, "depth", depth, "depth")
    answer, *also = _answers(where, record)
    context, answer = _divided(before, answer)
    return Probe(context, (Question("", "", answer, round(depth * _STEPS), tuple(also)),), _STEPS + 1)


def _divided(question: str, answer: str) -> tuple[str, str]:
    """Where the model's part begins: at a token boundary.

    Words carry the white space before them, so what ends the question opens the answer; where there is none, one space
    does, unless the question ends with an opening quote or bracket. A single line break stays with the question: it
    ends a token everywhere, and some tokenizers join it to what stands before.
    """
    bare, text = question.rstrip(), answer.lstrip()
    space = question[len(bare) :] or answer[: len(answer) - len(text)]
    if space == "\n" and question.endswith(space):
        return question, text
    if not space and not _OPENING.search(bare):
        space = " "
    return bare, space + text


def _answers(where: str, record: Mapping[str, Any], place: str = "") -> list[str]:
    """The answer and the others that are right too; white space at their ends can't be seen, so it doesn't count."""
    given = _given(where, record, "answer", place)
    if isinstance(given, str):
        return [given.rstrip()]
    for index, answer in enumerate(given):
        if not isinstance(answer, str) or not answer.strip():
            raise _refused(where, f"{place}answer[{index}]", answer, "answer")
    return [given[0].rstrip(), *(answer.strip() for answer in given[1:])]


def _given(where: str, record: Mapping[str, Any], field: str, place: str = "") -> Any:
    """A field that is there, of its type and not empty; `place` is what its name begins with: "questions[1].", say."""
    kind, wanted = _FIELDS[field]
    name = place + field
    if field not in record:
        raise ValueError(f"{where} has no field '{name}'; give {wanted}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, kind):  # to Python True is a number
        raise _refused(where, name, value, field)
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: field '{name}' is empty; give {wanted}")
    return value


def _refused(where: str, name: str, value: object, field: str) -> ValueError:
    return ValueError(f"{where}: field '{name}' is {value!r:.60}; give {_FIELDS[field][1]}")
