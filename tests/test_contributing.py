import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrs_utils import LayerScaling, search
from lrs_utils.searchers.curves import Fitness
from lrs_utils.searchers.objectives import mixture
from lrs_utils.tasks import Probe, Question, Suite
from lrs_utils.tasks.kv import syllables

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def test_the_examples_of_a_task_and_a_searcher_work(tiny):
    names = {"Probe": Probe, "Question": Question, "Suite": Suite, "syllables": syllables, "np": np}
    names |= {"LayerScaling": LayerScaling, "Sequence": Sequence, "Fitness": Fitness}
    task, _, searcher = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(task + searcher, names)
    suite = names["counting"](6, 2)
    result = search(tiny, suite, names["Shaken"](2), budget=15, objective=mixture(1))
    assert len(result.candidates) == 15
    assert max(result.fitness) > result.fitness[0]


def test_what_it_names_is_there():
    root = Path(__file__).parent.parent
    named = re.findall(r"`((?:lrs_utils|tests|tools)/[\w/]+\.py)`", PAGE)
    assert [path for path in named if not (root / path).exists()] == []
    assert {"scaling/layers", "scoring/outcomes", "searchers/engine"} <= {path[10:-3] for path in named}
