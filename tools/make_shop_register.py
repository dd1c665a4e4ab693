"""Writes the example of a user's own task: made-up days in the register of a small shop, with questions.

    python tools/make_shop_register.py lrs_utils/tasks/data/shop.jsonl

The same seed gives the same file; `tests/test_own.py` compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

N_DAYS = 40
SEED = 7
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
STREETS = ("Mill Lane", "Station Road", "Church Street", "Harbour Row", "Elm Square", "Bridge Street")
MONTHS = ("March", "April", "May", "June", "September", "October")
# unit prices in cents
GOODS = {
    "oat flour, 1 kg": 395, "rye bread": 420, "salted butter": 289, "plum jam": 365, "brown eggs, box of six": 310,
    "green tea": 480, "ground coffee, 250 g": 595, "sunflower oil": 349, "apple juice, 1 l": 275, "sea salt": 129,
    "tomato paste": 145, "red lentils, 500 g": 239, "basmati rice, 1 kg": 415, "cheddar, 200 g": 379,
    "dark chocolate": 219, "honey, 500 g": 690, "plain yoghurt": 115, "washing powder": 849, "matches": 65,
    "candles, pack of ten": 560, "writing paper": 340, "envelopes, pack of 25": 275, "pencils, pack of four": 320,
    "sewing thread": 185, "blue ink": 455, "light bulb, 40 W": 299, "batteries, pack of four": 525, "string, 50 m": 245,
    "dog biscuits": 475, "cat litter, 5 l": 635, "potatoes, 2 kg": 345, "onions, 1 kg": 165, "lemons, bag of five": 225,
    "hand soap": 195, "toothpaste": 249, "paper towels": 310, "dried apricots": 399, "walnuts, 200 g": 445,
    "mineral water": 89, "ginger biscuits": 255,
}  # fmt: skip
# a day's style: how its sales are written down
HANDS = (
    "{time}  {count} x {article}   ticket {ticket}   till {till}   {total}",
    "At {time} {count} x {article}, ticket {ticket}, were sold at till {till} for {total}.",
    "At {time} till {till} sold {count} x {article} for {total}, ticket {ticket}.",
    "{time}: {count} x {article}, ticket {ticket}, went over till {till} for {total}.",
)
# field that answers, question; a time and an article stand once in a day, so each question has one answer.
# All open the answer in the register's words: a small model would begin with different ones.
ASKED = (
    ("ticket", "Which ticket number did the sale at {time} get?\nAnswer: at {time}, ticket"),
    ("ticket", "Which ticket number did the sale of {article} get?\nAnswer: {article}, ticket"),
    ("article", "What was sold at {time}?\nAnswer: At {time} {count} x"),
    ("total", "How much was paid for {article}?\nAnswer: {count} x {article} for"),
)


def day(rng: np.random.Generator) -> dict[str, Any]:
    """A context of 25 to 40 sales, and 4 to 8 questions about different ones, in the order of the day."""
    n_sales = int(rng.integers(25, 41))
    hand = HANDS[rng.integers(len(HANDS))]
    sales = _sales(rng, n_sales)
    head = (
        f"Register of the corner shop in {_one_of(rng, STREETS)}, {_one_of(rng, DAYS)} {rng.integers(1, 29)} "
        f"{_one_of(rng, MONTHS)}, {n_sales} sales:\n\n"
    )
    asked = np.sort(rng.choice(n_sales, int(rng.integers(4, 9)), replace=False)).tolist()
    return {
        "context": head + "\n".join(hand.format(**sale) for sale in sales),
        "questions": [_question(rng, sales[position], position) for position in asked],
        "n_items": n_sales,
    }


def _sales(rng: np.random.Generator, n: int) -> list[dict[str, str]]:
    # drawn without replacement: a time, ticket or article that came twice would have two answers
    minutes = np.sort(rng.choice(np.arange(8 * 60, 18 * 60), n, replace=False)).tolist()
    tickets = (10_000 + rng.choice(90_000, n, replace=False)).tolist()
    articles = [list(GOODS)[i] for i in rng.permutation(len(GOODS))[:n]]
    sales = []
    for minute, ticket, article in zip(minutes, tickets, articles, strict=True):
        count = int(rng.integers(1, 5))
        cents = count * GOODS[article]
        sales.append(
            {
                "time": f"{minute // 60:02}:{minute % 60:02}",
                "count": str(count),
                "article": article,
                "till": str(rng.integers(1, 4)),
                "ticket": str(ticket),
                "total": f"{cents // 100}.{cents % 100:02}",
            }
        )
    return sales


def _question(rng: np.random.Generator, sale: dict[str, str], position: int) -> dict[str, Any]:
    field, question = ASKED[rng.integers(len(ASKED))]
    name, _, size = sale[field].partition(", ")  # without its size an article is right too
    answer = [sale[field], name] if size else sale[field]
    return {"question": f"Question: {question.format(**sale)}", "answer": answer, "position": position}


def _one_of(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[rng.integers(len(values))]


def written(path: Path, n_days: int = N_DAYS, seed: int = SEED) -> None:
    """A day a line. Day i is the same whatever n_days is."""
    days = [day(np.random.default_rng([seed, number])) for number in range(n_days)]
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in days), encoding="utf-8")


if __name__ == "__main__":
    written(Path(sys.argv[1]))
