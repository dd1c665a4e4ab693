"""Other methods beside ours: as published, tuned on validation, and with ours below; what each costs to run."""

import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from two_models import Trial, compare_outcomes, cut_unseen_text

from lrs_utils import LM, LayerScaling, Ledger, load_lm, score, tasks
from lrs_utils.analysis.statistics import holm, mean_over_questions
from lrs_utils.peers import AttentionBuckets, LaMPE, MsPoE, ReRoPE, SelfExtend, String
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import read_key
from lrs_utils.scaling.products import n_heads
from lrs_utils.scoring.packing import pack
from lrs_utils.tasks import Probe, Suite

Applied = Scaling | AttentionBuckets
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One of their methods.

    Attributes
    ----------
    make : function of (lm, probe, on, values)
        What is applied while a context is read; the same for all contexts unless `by_context`.
    published : mapping
        Values of its paper or script.
    grid : mapping of a value's name to a sequence
        What is tried on validation contexts.
    by_context : bool
        What is applied depends on the context.
    """

    make: Callable[[LM, Probe, Scaling | None, Values], Applied]
    published: Values
    grid: Mapping[str, Sequence[Any]]
    by_context: bool = False

    def list_values(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


def _uniform(scheme: str, lm: LM, _: Probe, on: Scaling | None, values: Values) -> Scaling:
    if on is not None:
        raise ValueError("one factor for all layers is not put on another scaling")
    temperatures = None if "temperature" not in values else [values["temperature"]] * lm.num_layers
    return LayerScaling.uniform(values.get("factor", 1.0), lm.num_layers, scheme, temperatures=temperatures)


def _count_tokens(lm: LM, probe: Probe) -> int:
    return pack(lm, probe, "a context").longest


METHODS = {
    "one factor (yarn)": Method(partial(_uniform, "yarn"), {"factor": 2.0}, {"factor": (0.8, 1.1, 1.2, 1.5, 2.0)}),
    "one factor (ntk)": Method(partial(_uniform, "ntk"), {"factor": 2.0}, {"factor": (0.8, 0.9, 1.1, 1.2, 1.5, 2.0)}),
    "one temperature": Method(
        partial(_uniform, "pi"), {"temperature": 1.2}, {"temperature": (0.8, 0.9, 1.1, 1.2, 1.3, 1.5)}
    ),
    "Ms-PoE, fixed order": Method(
        lambda lm, _, on, v: MsPoE(lm.num_layers, n_heads(lm.model), on=on, **v),
        {"low": 1.2, "high": 1.8},
        {"low": (0.8, 0.9, 1.0, 1.1), "high": (1.1, 1.2, 1.4)},
    ),
    "Ms-PoE, order by prompt": Method(
        lambda lm, probe, _, v: MsPoE.for_prompt(lm, _first_prompt(probe), **v),
        {"low": 1.2, "high": 1.8},
        {"low": (0.9, 1.0, 1.1), "high": (1.1, 1.2, 1.4)},
        by_context=True,
    ),
    "Self-Extend": Method(
        lambda lm, _, on, v: SelfExtend(lm.num_layers, on=on, **v),
        {"group": 8, "window": 1024},
        {"group": (2, 4, 8), "window": (64, 128, 256, 512)},
    ),
    "ReRoPE": Method(
        lambda lm, _, on, v: ReRoPE(lm.num_layers, on=on, **v),
        {"window": 512},
        {"window": (32, 64, 128, 256, 384, 512, 768, 1024)},
    ),
    "STRING": Method(
        lambda lm, _, on, v: String(lm.num_layers, on=on, **v),
        {"shift": 2730, "local": 128},
        {"shift": (128, 256, 384, 512, 768), "local": (32, 128)},
    ),
    "LaMPE": Method(
        lambda lm, probe, on, v: LaMPE(
            lm.num_layers, n := _count_tokens(lm, probe), v["mapped"] * n, int(v["near"] * n), int(v["far"] * n), on=on
        ),
        {"mapped": 0.75, "near": 0.1, "far": 0.1},
        {"mapped": (0.5, 0.75, 0.9), "near": (0.05, 0.2), "far": (0.0, 0.1)},
        by_context=True,
    ),
    "Attention Buckets": Method(
        lambda _, __, ___, v: AttentionBuckets(v["bases"]),
        {"bases": (1.0, 1.75, 1.8, 1.9, 2.0, 2.5)},
        {"bases": ((1.0, 1.5), (1.0, 2.0), (0.7, 1.0, 1.5), (1.0, 1.25, 1.5, 2.0))},
    ),
}


def _first_prompt(probe: Probe) -> str:
    question = probe.questions[0]
    return probe.context + question.prompt + question.answer_prefix


@dataclass(frozen=True)
class Contest:
    """A model and a task on which methods are tuned and judged.

    Attributes
    ----------
    budget : int
        Answers that may be scored to tune a method: as many as the gradient search took.
    n_test_contexts, test_stretches : int
        Held-out contexts, and stretches of each text.
    """

    trial: Trial
    budget: int
    n_test_contexts: int
    test_stretches: int

    @property
    def lm(self) -> LM:
        """The model."""
        return self.trial.lm

    def tune(self, name: str) -> pd.DataFrame:
        """Accuracy and nll of each combination of a method's grid on validation contexts, the best first.

        Every combination is scored on the same contexts, as many as the budget allows.
        """
        method, questions = METHODS[name], self.trial.n_pairs
        combinations = method.list_values()
        n = max(1, min(16, self.budget // (len(combinations) * questions)))
        suite = self.trial.make_suite(n, 80_000)
        rows = []
        for values in combinations:
            exact, nll = self.read(name, values, suite)
            rows.append({"values": repr(values), "contexts": n, "accuracy": exact.mean(), "nll": nll.mean()})
        table = pd.DataFrame(rows).sort_values(["accuracy", "nll"], ascending=[False, True], kind="stable")
        return table.reset_index(drop=True).assign(method=name, answers=len(combinations) * n * questions)

    def judge(self, name: str, values: Values, on: str | None = None) -> dict[str, Any]:
        """Points and perplexity of a method with its values, on held-out contexts and texts."""
        suite, text = self.trial.make_judged(self.n_test_contexts), cut_unseen_text(self.test_stretches)
        none = [LayerScaling.identity(self.lm.num_layers)]
        before, text_before = (score(self.lm, s, none, ledger=self.trial.ledger) for s in (suite, text))
        exact, _ = self.read(name, values, suite, on)
        _, nll = self.read(name, values, text, on)
        found = compare_outcomes(before.exact[0], exact, before.depths, text_before.nll[0, :, 0], nll[:, 0])
        return {"method": name, "values": repr(dict(values)), "with": on or ""} | found

    def read(
        self, name: str, values: Values, suite: Suite, on: str | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Verdicts and nll under a method, each (contexts, questions)."""
        method, below = METHODS[name], None if on is None else read_key(on)
        parts = [replace(suite, probes=(probe,)) for probe in suite.probes] if method.by_context else [suite]
        found = [self._read_part(method.make(self.lm, part.probes[0], below, values), part) for part in parts]
        return np.concatenate([exact for exact, _ in found]), np.concatenate([nll for _, nll in found])

    def _read_part(self, applied: Applied, suite: Suite) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        if isinstance(applied, AttentionBuckets):
            return applied.score(self.lm, suite, ledger=self.trial.ledger)
        outcomes = score(self.lm, suite, [applied], ledger=self.trial.ledger)
        return outcomes.exact[0], outcomes.nll[0]


def read_documents(lm: LM, applied: Applied | None, suite: Suite, n_tokens: int, ledger: Ledger) -> NDArray[np.float64]:
    """Whether free answers hold the right one, as Lost in the Middle judges documents, (contexts, questions)."""
    from lrs_utils.scoring.answers import generate_answers
    from lrs_utils.tasks.judging import best_subspan_em, judged

    scaling = LayerScaling.identity(lm.num_layers) if applied is None else applied
    texts = generate_answers(lm, suite, scaling, max_new_tokens=n_tokens, ledger=ledger)  # type: ignore[arg-type]
    return judged(suite, texts, best_subspan_em).astype(float)


_COST = """
import resource, sys, torch
from time import perf_counter
import rivals
from lrs_utils import load_lm
name, method, values, dtype, n_tokens = sys.argv[1:]
rivals.print_cost(name, method, values, dtype, int(n_tokens))
"""


def measure_cost(model: str, name: str, values: Values, dtype: str, n_tokens: int) -> dict[str, float]:
    """What a method costs to read `n_tokens`, in a process of its own: seconds of a forward pass, and its memory.

    Returns
    -------
    dict
        "seconds" (the fastest of three), "MB" (how far the process grew above the loaded model).
    """
    command = [sys.executable, "-c", _COST, model, name, repr(dict(values)), dtype, str(n_tokens)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, found.stdout.split()[-2:])
    return {"seconds": seconds, "MB": megabytes}


def print_cost(model: str, name: str, values: str, dtype: str, n_tokens: int) -> None:
    """The other side of `measure_cost`: the two numbers on a line."""
    import ast

    lm = load_lm(model, dtype=dtype)
    ids = torch.arange(n_tokens)[None] % 200 + 20
    probe = tasks.kv_retrieval(4, 1).probes[0]
    applied = None if name == "no scaling" else METHODS[name].make(lm, probe, None, ast.literal_eval(values))
    context = (applied or LayerScaling.identity(lm.num_layers)).applied_to(lm.model)
    with torch.no_grad(), context:
        lm.model(ids[:, :32], use_cache=False)
        before, seconds = _peak(), []
        for _ in range(3):
            started = perf_counter()
            lm.model(ids, use_cache=False, logits_to_keep=1)
            seconds.append(perf_counter() - started)
    print(min(seconds), _peak() - before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def correct(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """All judged rows as one table, with p corrected over all of them (Holm)."""
    table = pd.concat(tables, ignore_index=True)
    return table.assign(p=holm(table["p"]))


def draw_map(method: Method, lm: LM, probe: Probe, values: Values, n_tokens: int, ax: Axes) -> None:
    """What distances are read as, for the last of `n_tokens` tokens: one line, or one for each head."""
    applied = method.make(lm, probe, None, values)
    if not isinstance(applied, Scaling):
        raise ValueError("bases have no map of distances")
    setting = applied.settings[-1]
    far = torch.arange(n_tokens)
    for region, nearer in zip(setting.regions, [*setting.regions[1:], None], strict=True):
        upto = n_tokens if nearer is None else min(nearer.since, n_tokens)
        read = region.queries.read(torch.tensor([n_tokens - 1])) - region.keys.read(n_tokens - 1 - far)
        for row in read[:, region.since : upto]:
            ax.plot(far[region.since : upto], row, color="#0173b2", linewidth=0.8)
    ax.plot([0, n_tokens], [0, n_tokens], color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="distance", ylabel="read as")


def mean_accuracy(exact: NDArray[np.bool_], depths: NDArray[np.float64]) -> float:
    """Over contexts, each counting once."""
    return float(mean_over_questions(exact, depths).mean())
