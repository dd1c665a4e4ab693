"""Writes data/lm_eval/kv_short_40.jsonl: key-value retrieval as lm-eval's task kv_short_40 reads it.

python tools/lm_eval_task.py
"""

import json
from pathlib import Path

from lrs_utils import tasks

FOLDER = Path(__file__).parent.parent / "data" / "lm_eval"


def make_suite() -> tasks.Suite:
    """Forty short pairs, asked at four depths: contexts of a seed that nothing else uses."""
    return tasks.kv_retrieval(40, 10, 50_000, keys="short", positions=tasks.positions_at(40, (0, 1 / 3, 2 / 3, 1)))


def lay_out(suite: tasks.Suite) -> str:
    """A line for each question."""
    rows = [
        {
            "context": probe.context,
            "question": question.prompt + question.answer_prefix,
            "answer": question.answer,
            "depth": float(depth),
        }
        for probe in suite.probes
        for question, depth in zip(probe.questions, suite.depths, strict=True)
    ]
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


if __name__ == "__main__":
    (FOLDER / "kv_short_40.jsonl").write_text(lay_out(make_suite()), encoding="utf-8")
